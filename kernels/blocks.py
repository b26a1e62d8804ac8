"""Tile sizes and warps of every kernel: found offline (tools/triton_tune.py), never in a user's first call.

inject, merge_states and reposition move bytes and compute next to nothing: memory binds, or the launch when there is one token.
A tile is BLOCK_R rows of one (token, head) each. 16 rows of 128 16-bit numbers over 4 warps are two 16-byte accesses a thread
and tensor, registers for five or more programs on a multiprocessor, and all 16 heads of a single token in one program.

linear reads weights: a stage of a program's pipeline is 8 KB of W (4 KB in float32, whose products have no tensor cores), three
stages are on their way, and four programs fit on a multiprocessor. Eight warps hold the products of float32: with four, ptxas
spills for one architecture or another, with maxnreg and without. The tiles compile without a spill; none has been timed.

Registers bind the attention kernels. For each head size, dtype and architecture, blocks.csv has the first candidate of
tools/triton_tune.py that holds its tiles without a spill in every case of tools/triton_report.py. Its column maxnreg is the
most registers a thread may have, 0 for as many as ptxas likes: Triton 3.9's would rather spill a few than have one program less
on a multiprocessor, and is talked out of it by 255; other tiles fit without that and spill with it.
"""

import csv
import functools
from pathlib import Path

import torch

__all__ = [
    "ARCHITECTURES", "FUSION", "HEAD_DIMS", "NARROW", "QUANTIZED", "ROWS", "TABLE", "TILE", "attention_blocks", "blocks",
    "launch_options", "line_of", "table",
]  # fmt: skip

BLOCKS = {
    "inject": dict(BLOCK_R=16, num_warps=4),
    "inject_backward": dict(BLOCK_R=16, num_warps=4, maxnreg=255),  # 64, as ptxas likes, spills at D = 64
    "inject_weights": dict(BLOCK_S=128, BLOCK_C=32, num_warps=4),
    "merge_states": dict(BLOCK_R=16, num_warps=4),
    "merge_states_backward": dict(BLOCK_R=16, num_warps=4),
    "reposition": dict(BLOCK_R=16, num_warps=4),
    "reposition_backward": dict(BLOCK_R=16, num_warps=4),
    "cross_attention_delta": dict(BLOCK_R=16, num_warps=4),
    "gate": dict(BLOCK_W=1024, num_warps=4),
    "linear": dict(BLOCK_N=32, BLOCK_K=128, BLOCK_R=16, BLOCK_L=32, num_warps=4, num_stages=4, maxnreg=128),
    "linear_float32": dict(BLOCK_N=32, BLOCK_K=32, BLOCK_R=16, BLOCK_L=32, num_warps=8, num_stages=4),
    "linear_finish": dict(BLOCK_N=32, BLOCK_R=16, num_warps=4, maxnreg=128),
    "lora_grad": dict(BLOCK_R=16, BLOCK_N=64, BLOCK_K=32, num_warps=4),
}
FUSION = dict(enable_fp_fusion=True)  # explicit, because Triton's default is about to change

TABLE = Path(__file__).with_name("blocks.csv")
ARCHITECTURES = (80, 86, 90, 100, 120)  # 86 serves 8.7 and 8.9 too: no more shared memory there
TILE = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages", "maxnreg")
HEAD_DIMS = (64, 128, 256)
NARROW = 96  # heads of 65 to 96 have their own line where the tile of 128 spills with their masks
ROWS = {"fwd": (16, 64, 128), "dq": (16, 64), "dkv": (64,)}  # query rows of a sequence, up to; the last serves more too
QUANTIZED = "8"  # behind fwd or dq: over quantised rows, which have a line of their own where that of full rows spills


@functools.cache
def blocks(op: str) -> dict:
    """The keyword arguments of the op's launch."""
    return BLOCKS[op] | FUSION


def attention_blocks(kernel: str, rows: int, head_dim: int, wide: bool, offset: bool, device: torch.device) -> dict:
    """As `blocks`, for the kernels fwd, dq, dkv, fwd8 and dq8 of cross_attention. rows: query rows of a sequence, on average;
    wide: products in float32; offset: a segment may be read at a position offset. Launchers take another function in its
    place."""
    arch = architecture(device)
    if arch is None:  # the interpreter: small inputs still have several tiles
        return dict(BLOCK_M=16 if rows <= 16 else 32, BLOCK_N=32)
    return launch_options(table()[line_of(kernel, rows, head_dim, wide, offset, arch)], 0 if wide else arch, kernel)


def line_of(kernel: str, rows: int, head_dim: int, wide: bool, offset: bool, arch: int) -> tuple:
    """The key in `table`; arguments as in `attention_blocks`, arch one of ARCHITECTURES."""
    full = kernel.removesuffix(QUANTIZED)
    rows = next((size for size in ROWS[full] if rows <= size), ROWS[full][-1])
    # float32 is the exception: one tile for all architectures
    key = lambda size, kernel=kernel: (kernel, rows, size, wide, offset, 0 if wide else arch)
    size = next(d for d in HEAD_DIMS if head_dim <= d)
    if kernel != full and key(size) not in table():
        return line_of(full, rows, head_dim, wide, offset, arch)
    return key(NARROW) if 64 < head_dim <= NARROW and key(NARROW) in table() else key(size)


def launch_options(line: dict, arch: int, kernel: str = "") -> dict:
    """The keyword arguments that a line of the table asks for, for one of ARCHITECTURES or all, 0, and a kernel. HOIST:
    pointers to a segment's rows stay in registers, which there are where operands of products, or accumulators, are
    elsewhere."""
    options = {name: line[name] or None for name in TILE} | dict(HOIST=arch in (90, 100)) | FUSION
    if kernel == "dq" + QUANTIZED and line.get("kernel") == "dq":
        options["BLOCK_N"] = max(16, options["BLOCK_N"] // 2)  # numbers are made in registers, where those of K stay to the end
    return options


@functools.cache
def table() -> dict[tuple, dict]:
    """The lines of blocks.csv by (kernel, rows, head_dim, wide, offset, arch); arch 0 serves all."""
    with TABLE.open(newline="") as file:
        lines = [{name: int(x) if x.isdecimal() else x for name, x in line.items()} for line in csv.DictReader(file)]
    key = lambda line: (
        *(line[c] for c in ("kernel", "rows", "head_dim")),
        bool(line["wide"]),
        bool(line["offset"]),
        line["arch"],
    )
    return {key(line): line for line in lines}


@functools.cache
def architecture(device: torch.device) -> int | None:
    """The newest of ARCHITECTURES that the GPU is not older than; None without a GPU."""
    if device.type != "cuda":
        return None
    major, minor = torch.cuda.get_device_capability(device)
    return max((a for a in ARCHITECTURES if a <= 10 * major + minor), default=ARCHITECTURES[0])
