"""Writes blocks.csv, the tiles of the attention kernels: make tune.

    python -m tools.triton_tune [--arch 80 90 100 120 0] [--kernel fwd dq dkv] [--missing]

--arch 0: the lines that all architectures share, those of float32.

For each kernel, number of query rows, head size, dtype and architecture: the candidates in order of preference, compiled with
the installed Triton for every case of triton_report.py that uses the line. Those that spill or do not fit in shared memory are
left out. Without a GPU the search starts at the tile that the line already has and takes the first that is left: run with two
versions of Triton in turns until nothing changes, it ends at the first candidate that holds with both. On a GPU the first few
that are left, the tile that the line has among them, are timed on the GPU's architecture and the fastest is taken. The times
are printed, and the best is written beside the tile.

A line that is removed from blocks.csv is searched anew (--missing: only those). Where heads of 65 to 96 need a smaller tile
than those of 128, because of their masks, they get a line of head size 96, and quantised rows (fwd8, dq8) one of their own
where the tile of full rows spills with them: add them by hand.
"""

import argparse
import csv
import functools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

import torch
import triton
from tqdm import tqdm

from diffmas.kernels import blocks, cross_attention
from diffmas.kernels.blocks import ARCHITECTURES, HEAD_DIMS, NARROW, ROWS, TABLE, TILE
from diffmas.kernels.launch import interpreting
from tools.triton_report import cases, compiled, fits, launches, tiles_for

TIMED = 6  # candidates
COLUMNS = ("kernel", "rows", "head_dim", "wide", "offset", "arch", *TILE, "microseconds")
# (BLOCK_M, BLOCK_N, warps, stages). Of 64 rows first with four warps: on sm_90 eight compute the same scores twice.
LONG = {
    ("fwd", 64): [(128, 128, 8, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 4, 3), (64, 64, 4, 3)],
    ("fwd", 128): [
        *((128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3)),
        *((64, 64, 4, 3), (64, 32, 4, 3), (64, 64, 8, 2)),
    ],
    ("fwd", 256): [(128, 64, 8, 2), (128, 32, 8, 2), (64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2)],
    ("dq", 64): [(128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
    ("dq", 128): [
        (128, 64, 8, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 3),
        (64, 16, 4, 3),
        (64, 64, 8, 3),
        (64, 64, 8, 2),
        (64, 32, 8, 2),
        (64, 32, 8, 1),
    ],
    ("dq", 256): [(64, 64, 8, 2), (64, 32, 8, 2), (32, 32, 8, 2)],
    ("dkv", 64): [
        *((64, 128, 8, 2), (128, 64, 8, 2), (32, 128, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 1)),
        *((32, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 1)),
    ],
    ("dkv", 128): [(64, 64, 8, 2), (32, 64, 8, 2), (64, 32, 8, 2)],
    ("dkv", 256): [(64, 32, 8, 2), (32, 32, 8, 2), (16, 32, 8, 2)],
}
LAST = [
    (32, 32, 8, 2), (32, 32, 4, 2), (32, 32, 8, 1), (32, 32, 4, 1),
    (16, 32, 4, 2), (16, 32, 8, 1), (16, 16, 8, 2), (16, 16, 8, 1), (16, 16, 4, 1),
]  # fmt: skip
ANY = dict(zip(TILE, (*LAST[-1], 0)))


def candidates(kernel: str, rows: int, head_dim: int, wide: bool, offset: bool) -> list[tuple[int, ...]]:
    small_q = kernel != "dkv" and rows == 16
    if wide:
        order = [(16, 32, 8, 2), *LAST[4:]] if small_q else [(32, 32, 8, 2), (16, 32, 8, 2), *LAST[3:]]
    elif small_q:  # bound by memory: many bytes in flight
        order = ((128, 4, 3), (128, 4, 2), (64, 4, 4), (64, 4, 3), (64, 4, 2), (32, 4, 3), (32, 8, 2), (16, 8, 1))
        order = [(16, *rest) for rest in order]
    elif kernel == "fwd" and rows == 64:
        order = [(64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 3), (64, 32, 4, 2), (64, 64, 8, 2), (64, 32, 8, 2), (64, 32, 8, 1)]
        order += LAST
    else:
        order = [*LONG[kernel, 128 if head_dim == NARROW else head_dim], *LAST]
    # A tile that is rotated is in registers for a while.
    order = [c for c in order if not offset or wide or c[0] * head_dim <= 8192]
    return [(*c, most) for c in order for most in ((255, 0) if offset or wide else (0, 255))]


@functools.cache
def users() -> dict[tuple, list[tuple]]:
    """The cases of the report that use each line of the table."""
    found = {}
    for op, dtype, D, arch in cases():
        if op.startswith("attention"):
            for one in launches(op, D, getattr(torch, dtype), arch=arch, forced=dict.fromkeys(ROWS, ANY)):
                found.setdefault(one.line, []).append((op, D, getattr(torch, dtype), arch))
    return found


def shown(key: tuple, block: dict) -> bool:
    """Whether the kernel fits with these tiles wherever the report shows it with this line of the table."""
    if key not in users():
        raise SystemExit(f"{key}: no case of triton_report.py uses this line of {TABLE.name}; give cases() one")
    for op, D, dtype, arch in users()[key]:
        for one in launches(op, D, dtype, arch=arch, forced=dict.fromkeys(ROWS, block)):
            if one.line == key and not fits(compiled(one, arch, listing=False), arch):  # what spills has a stack
                return False
    return True


def seconds(kernel: str, rows: int, head_dim: int, wide: bool, offset: bool, here: int, block: dict) -> float:
    """The time of the op on this GPU, in the shape that the tile is for: a latent step over 32k rows, or 4k queries."""
    dtype, G = torch.float32 if wide else torch.bfloat16, 4
    tokens = {16: 2, 64: 12 if kernel == "fwd" else 4096, 128: 4096}[rows]
    N = 32768 if tokens < 16 else tokens
    q, do = torch.randn(2, tokens, 8 * G, head_dim, device="cuda", dtype=dtype).unbind()
    pools = torch.randn(2, 8, N, head_dim, device="cuda", dtype=dtype).transpose(1, 2).unbind()
    grads = torch.zeros(2, 8, N, head_dim, device="cuda").transpose(1, 2).unbind()
    index = lambda *x: torch.tensor(x, device="cuda")
    offsets = (index(7), torch.rand(head_dim // 2, device="cuda")) if offset else (None, None)
    view = index(0, tokens), index(0, 1), index(0), index(N), *offsets, head_dim**-0.5, True, False
    tiles, _ = tiles_for(here, dict.fromkeys(ROWS, ANY) | {kernel: block})
    forward = functools.partial(cross_attention.cross_attention, q, *pools, *view, tiles=tiles)
    o, lse = forward()
    backward = functools.partial(
        cross_attention.cross_attention_backward, do, None, q, o, lse, *pools, *view, *grads, tiles=tiles
    )
    return triton.testing.do_bench(forward if kernel == "fwd" else backward, return_mode="median") / 1e3


def choose(key: tuple, before: dict | None, here: int | None = None) -> dict:
    """The line of the table for a key; before: the line it had; here: the architecture of this machine's GPU."""
    arch = key[-1]
    timed = here is not None and arch in (0, here)
    order = candidates(*key[:5])
    if before:
        there = tuple(before[name] for name in TILE)
        behind = order[order.index(there) + 1 :] if there in order and not timed else [c for c in order if c != there]
        order = [there, *behind]
    good = (c for c in order if shown(key, dict(zip(TILE, c))))
    if not timed:
        best, took = next(good, None), before["microseconds"] if before and before["microseconds"] else ""
    else:
        times = {c: seconds(*key[:5], here, dict(zip(TILE, c))) for c, _ in zip(good, range(TIMED))}
        best = min(times, key=times.get)
        took = round(times[best] * 1e6, 1)
        print(*key, {c: f"{t * 1e6:.1f} us" for c, t in times.items()}, flush=True)
    if best is None:
        raise SystemExit(f"{key}: no candidate fits; give triton_tune.py a smaller one")
    return dict(zip(COLUMNS, (*key[:3], int(key[3]), int(key[4]), arch, *best, took)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", type=int, default=(*ARCHITECTURES, 0))
    parser.add_argument("--kernel", nargs="+", default=list(ROWS))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile, where nothing is timed")
    parser.add_argument("--missing", action="store_true", help="only what has no line yet")
    args = parser.parse_args()
    if interpreting():
        parser.error("kernels cannot be compiled under TRITON_INTERPRET=1")
    before = blocks.table() if TABLE.exists() else {}
    here = blocks.architecture(torch.device("cuda", 0)) if torch.cuda.is_available() else None
    keys = [
        (kernel, rows, head_dim, not arch, offset, arch)
        for offset in (False, True) for arch in args.arch
        for kernel in args.kernel for rows in ROWS[kernel] for head_dim in HEAD_DIMS if arch or head_dim <= 128
    ]  # fmt: skip
    keys += [key for key in before if key[2] == NARROW and key[0] in args.kernel and key[-1] in args.arch]
    keys = [key for key in keys if not (args.missing and key in before)]
    table, old = dict(before), [before.get(key) for key in keys]
    if here in args.arch:
        lines = (choose(*one, here) for one in zip(keys, old))  # alone on the machine
    else:
        workers = ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn"))
        lines = workers.map(choose, keys, old)
    for key, line in tqdm(zip(keys, lines), total=len(keys), desc="tiles"):
        table[key] = line
        with TABLE.open("w", newline="") as file:  # after each: what was found is not lost
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(table[key] for key in sorted(table))
    print(f"{TABLE}: {len(table)} lines, Triton {triton.__version__}")


if __name__ == "__main__":
    main()
