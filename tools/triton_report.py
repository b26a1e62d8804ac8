"""Compiles the kernels for a GPU that need not be there, and says what they cost: registers, shared memory, stack, spills.

    python -m tools.triton_report                         # all of them, into triton_report.csv (make kernel-report)
    python -m tools.triton_report --missing               # those whose kernel or tile has changed, or that are not there yet
    python -m tools.triton_report --kernel dq dkv         # these kernels alone; --arch, --dtype and --head-dim choose too
    python -m tools.triton_report "attention" --arch 80 90 100 120 --dtype float32 --head-dim 64        # printed

What is compiled is what the launchers ask for: they run on small CPU tensors with the kernels replaced by recorders. Not under
TRITON_INTERPRET=1, where kernels cannot be compiled. A row's column `code` is a hash of all that its binary follows from,
beside Triton itself; a row that was compiled from other code is stale, and stays until it is compiled again.
"""

import argparse
import csv
import functools
import itertools
import multiprocessing
import os
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffmas.kernels import cross_attention, inject, linear, merge_states, pointwise, reposition
from diffmas.kernels.blocks import ARCHITECTURES, launch_options, line_of, table
from diffmas.kernels.launch import interpreting
from tools.kernel_code import fingerprint

__all__ = [
    "HIDDEN",
    "LAYER",
    "OPS",
    "QUANTIZED",
    "Launch",
    "binary",
    "compiled",
    "fits",
    "inner_loops",
    "launches",
    "opcodes",
    "tiles_for",
]

TABLE = Path(__file__).with_name("triton_report.csv")
SHARED = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}  # bytes that a program can have

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int8: "i8", torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip


def inject_call(n, D, dtype, backward=False, interleaved=False):
    q, k, v = torch.zeros(n, 16, D, dtype=dtype).split((8, 4, 4), 1)
    tables = torch.zeros(2, n, D, dtype=dtype).unbind()
    weight, slots = torch.zeros(D, dtype=dtype), torch.arange(n)
    pools = torch.zeros(2, 4, n, D, dtype=torch.float32 if backward else dtype).transpose(1, 2).unbind()
    rest = *tables, slots, weight, weight, 1e-6, interleaved, *pools
    return inject.inject_backward(q, q, k, *rest) if backward else inject.inject(q, k, v, *rest)


def merge_call(n, D, dtype, backward=False):
    o, lse = torch.zeros(n, 8, D, dtype=dtype), torch.zeros(n, 8)
    if backward:
        return merge_states.merge_states_backward(o, lse, o, lse, o, lse, o, lse)
    return merge_states.merge_states(o, lse, o, lse)


def reposition_call(n, D, dtype, backward=False, interleaved=False):
    pools = torch.zeros(2, 4, 2 * n, D, dtype=torch.float32 if backward else dtype).transpose(1, 2).unbind()
    src = torch.arange(n)
    op = reposition.reposition_backward if backward else reposition.reposition
    return op(src, src + n, src, torch.zeros(D // 2), interleaved, *pools)


def attention_call(
    n, D, dtype, tiles, tokens=2, groups=4, backward=False, offset=False, causal=True, grad_tail=False, segments=2
):
    """`tokens` new tokens of one sequence over a view of n + 4096 rows; groups: query heads of a K/V head."""
    rows, many = n + 4096, torch.arange(segments)
    q, lse = torch.zeros(tokens, 2 * groups, D, dtype=dtype), torch.zeros(tokens, 2 * groups)
    pools, grads = (torch.zeros(2, 2, rows, D, dtype=t).transpose(1, 2).unbind() for t in (dtype, torch.float32))
    one = lambda *x: torch.tensor(x)
    offsets = (many, torch.zeros(D // 2)) if offset else (None, None)
    view = one(0, tokens), one(0, segments), many, torch.ones_like(many), *offsets, 0.1, causal, False
    if not backward:
        return cross_attention.cross_attention(q, *pools, *view, tiles=tiles)
    tail = one(1) if grad_tail else None
    return cross_attention.cross_attention_backward(q, lse, q, q, lse, *pools, *view, *grads, tail, tiles=tiles)


def quantized_call(n, D, dtype, tiles, tokens=2, payload=torch.int8, backward=False, offset=False):
    """As `attention_call`, over quantised rows."""
    rows, q, lse = n + 4096, torch.zeros(tokens, 8, D, dtype=dtype), torch.zeros(tokens, 8)
    pools = torch.zeros(2, 2, rows, D, dtype=torch.int8).view(payload).transpose(1, 2).unbind()
    scales, one = torch.zeros(2, 2, rows).transpose(1, 2).unbind(), lambda *x: torch.tensor(x)
    offsets = (one(0, 1), torch.zeros(D // 2)) if offset else (None, None)
    view = one(0, tokens), one(0, 2), one(0, 1), one(1, 1), *offsets, 0.1, False
    if not backward:
        return cross_attention.cross_attention_quantized(q, *pools, *scales, *view, tiles=tiles)
    return cross_attention.cross_attention_quantized_backward(q, q, q, lse, *pools, *scales, *view, tiles=tiles)


def pointwise_call(n, D, dtype, op):
    x, weight = torch.zeros(3, n, D, dtype=dtype).unbind(), torch.zeros(D, dtype=dtype)
    if "norm" in op:
        return pointwise.norm_backward(*x[:2], weight, 1e-6) if "backward" in op else pointwise.norm(x[0], weight, 1e-6)
    return pointwise.gate_backward(*x) if "backward" in op else pointwise.gate(*x[:2])


def linear_call(n, D, dtype, more=0, rank=8, transposed=False):
    """A square weight, with a bias; 1 to 16 rows and `more`."""
    x, weight = torch.zeros(more + n % 16 + 1, D, dtype=dtype), torch.zeros(D, D, dtype=dtype)
    bias, a, b = torch.zeros(D, dtype=dtype), torch.zeros(rank, D), torch.zeros(D, rank)
    return linear.linear(x, weight, None if transposed else bias, *((a, b) if rank else (None, None)), 1.5, transposed)


def linears_call(n, D, dtype, more=0, rank=8, back=False, gate=False):
    """q, k and v of a hidden size D, or, gate, what comes before and after silu(gate) up."""
    n = more + n % 16 + 1
    outs, of = (4 * D, 4 * D) if gate else (D, D // 4, D // 4), functools.partial(torch.zeros, dtype=dtype)
    x = of(n, D)
    ab = lambda length, out: (torch.zeros(rank, length), torch.zeros(out, rank), 1.5) if rank else (None, None, 0.0)
    parts = [(of(out, D), None, *ab(D, out)) for out in outs]
    if gate and back:
        return linear.linear_gate_backward(x, of(D, 4 * D), *ab(4 * D, D), of(n, 4 * D), of(n, 4 * D))
    if gate:
        return linear.gated_linears(x, parts, True)
    return linear.linears_backward([of(n, out) for out in outs], parts) if back else linear.linears(x, parts)


def add_lora_call(n, D, dtype, rank=8, transposed=False):
    x, y = torch.zeros(2, n + 32, D, dtype=dtype).unbind()
    return linear.add_lora(y, x, torch.zeros(rank, D), torch.zeros(D, rank), 1.5, transposed)


def lora_grad_call(n, D, dtype, rank=8):
    return linear.lora_grad(torch.zeros(n, rank), torch.zeros(n, D, dtype=dtype), 1.5)


# call(n, D, dtype, **flags) of n tokens or rows; attention is called with tiles too
OPS = {
    "inject": (inject, inject_call, {}),
    "inject, interleaved": (inject, inject_call, dict(interleaved=True)),
    "inject_backward": (inject, inject_call, dict(backward=True)),
    "inject_backward, interleaved": (inject, inject_call, dict(backward=True, interleaved=True)),
    "merge_states": (merge_states, merge_call, {}),
    "merge_states_backward": (merge_states, merge_call, dict(backward=True)),
    "reposition": (reposition, reposition_call, {}),
    "reposition, interleaved": (reposition, reposition_call, dict(interleaved=True)),
    "reposition_backward": (reposition, reposition_call, dict(backward=True)),
    "attention": (cross_attention, attention_call, dict(tokens=128)),
    "attention, group of 2": (cross_attention, attention_call, dict(tokens=128, groups=2)),
    "attention, no group": (cross_attention, attention_call, dict(tokens=128, groups=1)),
    "attention, offset": (cross_attention, attention_call, dict(tokens=128, offset=True)),
    "attention, not causal": (cross_attention, attention_call, dict(tokens=128, causal=False)),
    "attention, small-q": (cross_attention, attention_call, dict(tokens=12)),
    "attention, small-q, offset": (cross_attention, attention_call, dict(tokens=12, offset=True)),
    "attention, many segments": (cross_attention, attention_call, dict(tokens=128, segments=63)),
    "attention, many segments, offset": (cross_attention, attention_call, dict(tokens=128, segments=63, offset=True)),
    "attention, latent step, many segments": (cross_attention, attention_call, dict(segments=63)),
    "attention, latent step": (cross_attention, attention_call, {}),
    "attention, latent step, group of 2": (cross_attention, attention_call, dict(groups=2)),
    "attention, latent step, offset": (cross_attention, attention_call, dict(offset=True)),
    "attention_backward": (cross_attention, attention_call, dict(tokens=128, backward=True)),
    "attention_backward, group of 2": (cross_attention, attention_call, dict(tokens=128, groups=2, backward=True)),
    "attention_backward, no group": (cross_attention, attention_call, dict(tokens=128, groups=1, backward=True)),
    "attention_backward, offset": (cross_attention, attention_call, dict(tokens=128, backward=True, offset=True)),
    "attention_backward, many segments": (cross_attention, attention_call, dict(tokens=128, segments=63, backward=True)),
    "attention_backward, latent step": (cross_attention, attention_call, dict(backward=True, grad_tail=True)),
    "attention_backward, step, group of 2": (cross_attention, attention_call, dict(groups=2, backward=True, grad_tail=True)),
    "attention_backward, step, offset": (cross_attention, attention_call, dict(backward=True, grad_tail=True, offset=True)),
    "attention_backward, flush": (cross_attention, attention_call, dict(tokens=16, backward=True, causal=False)),
}
# What a decoder layer does beside attention; D is its hidden size.
LAYER = {
    **{op: (pointwise, pointwise_call, dict(op=op)) for op in ("norm", "norm_backward", "gate", "gate_backward")},
    "linear": (linear, linear_call, {}),
    "linear, 17 to 32 rows": (linear, linear_call, dict(more=16)),
    "linear, no adapter": (linear, linear_call, dict(rank=0)),
    "linear, r = 64": (linear, linear_call, dict(rank=64)),
    "linear, transposed": (linear, linear_call, dict(transposed=True)),
    "linear, transposed, 17 to 32 rows": (linear, linear_call, dict(transposed=True, more=16)),
    "linears": (linear, linears_call, {}),
    "linears, 17 to 32 rows": (linear, linears_call, dict(more=16)),
    "linears, no adapters": (linear, linears_call, dict(rank=0)),
    "linears, backward": (linear, linears_call, dict(back=True)),
    "linears, backward, 17 to 32 rows": (linear, linears_call, dict(back=True, more=16)),
    "gated linears": (linear, linears_call, dict(gate=True)),
    "gated linears, 17 to 32 rows": (linear, linears_call, dict(gate=True, more=16)),
    "gated linears, backward": (linear, linears_call, dict(gate=True, back=True)),
    "gated linears, backward, 17 to 32 rows": (linear, linears_call, dict(gate=True, back=True, more=16)),
    "add_lora": (linear, add_lora_call, {}),
    "add_lora, transposed": (linear, add_lora_call, dict(transposed=True)),
    "lora_grad": (linear, lora_grad_call, {}),
}
HIDDEN = 2048
QUANTIZED_HEADS, QUANTIZED_ARCHITECTURES = (64, 128), (80, 90)  # the others of blocks.csv have not been compiled
QUANTIZED = {
    "quantised rows": (cross_attention, quantized_call, dict(tokens=128)),
    "quantised rows, offset": (cross_attention, quantized_call, dict(tokens=128, offset=True)),
    "quantised rows, latent step": (cross_attention, quantized_call, {}),
    "quantised rows, backward": (cross_attention, quantized_call, dict(tokens=128, backward=True)),
    "quantised rows, backward, offset": (cross_attention, quantized_call, dict(tokens=128, backward=True, offset=True)),
    "quantised rows, backward of a step": (cross_attention, quantized_call, dict(backward=True)),
}
QUANTIZED |= {f"{op}, fp8": (*x, flags | dict(payload=torch.float8_e4m3fn)) for op, (*x, flags) in QUANTIZED.items()}


@dataclass
class Launch:
    """A kernel with everything that decides its code: equal ones run the same binary."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict[tuple[int], list]
    options: dict[str, int]
    line: tuple | None = None  # of blocks.csv


class Recorder:
    """Stands in for a kernel: a launch is remembered instead of run."""

    def __init__(self, kernel, seen: list):
        self.kernel, self.seen = kernel, seen

    def __getitem__(self, grid):
        return self.record

    def record(self, *args, **kwargs):
        names = self.kernel.arg_names
        values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
        launch = Launch(self.kernel, {}, {}, {}, {name: value for name, value in kwargs.items() if name not in names})
        for i, parameter in enumerate(self.kernel.params):
            self.specialize(launch, (i,), parameter, values[parameter.name])
        self.seen.append(launch)

    @staticmethod
    def specialize(launch, at, parameter, value):
        """As Triton does at a call: constants and None are in the code, so is whether an address or stride divides by 16."""
        name, free = parameter.name, parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and not free):
            launch.signature[name], launch.constants[name] = "constexpr", value
            return
        if isinstance(value, torch.Tensor):
            launch.signature[name] = "*" + TYPES[value.dtype]
            aligned = not free  # as torch allocates; also what a slice of a fused projection keeps
        elif isinstance(value, float):
            launch.signature[name], aligned = "fp32", False
        else:
            launch.signature[name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and not free
        if aligned:
            launch.attributes[at] = [["tt.divisibility", 16]]


def tiles_for(arch: int, forced: dict[str, dict] | None = None):
    """The `tiles` of attention launchers for an architecture, whatever device there is, and the list of the lines of blocks.csv
    that were asked for. forced: lines for some kernels, in the place of the table's."""
    lines = []

    def tiles(kernel, rows, head_dim, wide, offset, device):
        lines.append(line_of(kernel, rows, head_dim, wide, offset, arch))
        return launch_options((forced or {}).get(kernel) or table()[lines[-1]], lines[-1][-1], kernel)

    return tiles, lines


def launches(
    op: str, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, n: int = 48, arch: int = 90, forced: dict | None = None,
    **more,
) -> list[Launch]:  # fmt: skip
    """Every kernel launch of one call of `op`, of OPS, LAYER or QUANTIZED, on n tokens, with the tiles of an architecture.
    more: flags of the call in the place of the entry's."""
    module, call, flags = (OPS | LAYER | QUANTIZED)[op]
    kernels = {name: x for name, x in vars(module).items() if isinstance(x, triton.JITFunction) and "_kernel" in name}
    seen = []
    try:
        vars(module).update({name: Recorder(kernel, seen) for name, kernel in kernels.items()})
        tiles, lines = tiles_for(arch, forced)
        if module is cross_attention:
            flags = flags | {"tiles": tiles}
        call(n, head_dim, dtype, **flags | more)
        tiled = [one for one in seen if module is cross_attention and "BLOCK_N" in one.constants]
        for launch, line in zip(tiled, lines, strict=True):
            launch.line = line
    finally:
        vars(module).update(kernels)
    return seen


def binary(launch: Launch, arch: int):
    """The kernel compiled for compute capability arch / 10, as Triton has it."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def _read(kernel, *tool: str) -> str:
    """What one of the tools that come with Triton says of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        return subprocess.run([TOOLS / tool[0], *tool[1:], file.name], capture_output=True, text=True, check=True).stdout


LISTED = re.compile(r"^(\.L\w+):|^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+,?\s+)?([A-Z]\w*)(?:.*`\((\.L\w+)\))?", flags=re.M)


def opcodes(kernel) -> list[str]:
    """Its instructions by name, as they lie in memory."""
    return [code for _, code, _ in LISTED.findall(_read(kernel, "nvdisasm", "-ndf", "-c")) if code]


def inner_loops(kernel) -> list[list[str]]:
    """The instructions of each loop that has no other loop in it."""
    codes, labels, loops = [], {}, []
    for label, code, target in LISTED.findall(_read(kernel, "nvdisasm", "-ndf", "-c")):
        if label:
            labels[label] = len(codes)
            continue
        codes.append(code)
        if code == "BRA" and target in labels:  # backwards
            loops.append((labels[target], len(codes)))
    return [codes[a:b] for a, b in loops if not any(a <= c < d <= b and (a, b) != (c, d) for c, d in loops)]


def compiled(launch: Launch, arch: int = 90, listing: bool = True) -> dict[str, int]:
    """What it costs: registers, shared memory and stack in bytes; and, from its listing, spill and matrix instructions."""
    kernel = binary(launch, arch)
    usage, codes = _read(kernel, "cuobjdump", "-res-usage"), opcodes(kernel) if listing else []
    number = lambda name: int(re.search(rf"\b{name}:(\d+)", usage).group(1))
    count = lambda *names: sum(code in names for code in codes)
    return dict(
        registers=number("REG"), shared=kernel.metadata.shared, stack=number("STACK"), spills=count("LDL", "STL"),
        mma=count("HMMA", "HGMMA", "UTCHMMA"), instructions=len(codes),
    )  # fmt: skip


def fits(cost: dict[str, int], arch: int) -> bool:
    """Nothing spilled, and the shared memory is there; Triton compiles all the same where it is not."""
    return not cost["stack"] and not cost["spills"] and cost["shared"] <= SHARED[arch]


def cases():
    """(op, dtype, head_dim, arch) of the table: together they ask for every line of blocks.csv."""
    for op in OPS:
        for arch in ARCHITECTURES:
            yield from ((op, "bfloat16", D, arch) for D in (64, 80, 96, 128, 256))
            yield from ((op, "float32", D, arch) for D in (64, 128))
        yield op, "float16", 128, 90
    yield from ((op, "bfloat16", D, arch) for op in QUANTIZED for arch in QUANTIZED_ARCHITECTURES for D in QUANTIZED_HEADS)
    for op in LAYER:
        for arch in ARCHITECTURES:
            yield op, "bfloat16", HIDDEN, arch
            yield op, "float32", HIDDEN, arch
        yield op, "float16", HIDDEN, 90


def expected_rows() -> list[tuple[dict, Launch]]:
    """What the table says of every kernel before it is compiled, and the launch; those that several ops share once."""
    found = {}
    for op, dtype, D, arch in cases():
        for one in launches(op, D, getattr(torch, dtype), arch=arch):
            row = dict(kernel=one.kernel.__name__, dtype=dtype, head_dim=D, arch=arch, tile=_tile(one))
            if one.kernel.__name__.startswith("attention_work"):  # the same for all of them
                row |= dict(dtype="int32", head_dim=0)
            row["code"] = code(one)
            found.setdefault((*row.values(), one.line), ({"op": op, **row}, one))
    return list(found.values())


def wrong(one: dict) -> bool:
    """Whether a row of the table is not as it must be: it spills, has no room, or no tensor cores where they are expected."""
    products = re.fullmatch("cross_attention_(fwd_kernel|bwd_kernel_dq|bwd_kernel_dkv)", one["kernel"])
    return not fits(one, one["arch"]) or bool(products and one["dtype"] != "float32" and not one["mma"])


def read_table() -> list[dict]:
    with TABLE.open(newline="") as file:
        return [{name: int(x) if x.isdecimal() else x for name, x in line.items()} for line in csv.DictReader(file)]


def code(launch: Launch) -> str:
    """Equal as long as the binary is, of one version of Triton and for one architecture."""
    sorted_ = lambda values: sorted((str(k), str(v)) for k, v in values.items())
    return fingerprint(launch.kernel, *map(sorted_, (launch.signature, launch.constants, launch.attributes, launch.options)))


def _tile(launch: Launch) -> str:
    names = [name for name in ("BLOCK_R", "BLOCK_M", "BLOCK_N", "BLOCK_W") if name in launch.constants]
    at_most = f", {launch.options['maxnreg']} registers" if launch.options.get("maxnreg") else ""
    return (
        " x ".join(str(launch.constants[name]) for name in names)
        + f", {launch.options['num_warps']} warps, {launch.options.get('num_stages', 3)} stages{at_most}"
    )


_expected = functools.cache(expected_rows)  # a process that compiles makes it once: kernels cannot be sent there


def _row(i: int) -> dict:
    row, launch = _expected()[i]
    return {"triton": triton.__version__, **row, **compiled(launch, row["arch"])}


def _write(rows: list[dict]) -> None:
    places = {_key(row): i for i, (row, _) in enumerate(_expected())}
    newest_first = lambda one: ([-int(x) for x in str(one["triton"]).split(".")], places.get(_key(one), len(places)))
    with TABLE.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=newest_first))


def _place(row: dict) -> tuple:
    return tuple(row[name] for name in ("op", "kernel", "dtype", "head_dim", "arch", "tile"))


def _key(row: dict) -> tuple:
    return *_place(row), row["code"]


def _replaces(row: dict, old: dict) -> bool:
    """Whether a row that was compiled now is the one that was there, or stands where a stale one was."""
    same = row["triton"] == old["triton"] and _place(row) == _place(old)
    return same and (row["code"] == old["code"] or _key(old) not in {_key(one) for one, _ in _expected()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="entries of OPS, to be printed; the whole table is written by default")
    parser.add_argument("--arch", nargs="+", type=int, help="printed: 90")
    parser.add_argument("--dtype", nargs="+", help="printed: bfloat16")
    parser.add_argument("--head-dim", nargs="+", type=int, help="printed: 128")
    parser.add_argument("--kernel", nargs="+", default=[""], help="ends of names; of the table")
    parser.add_argument("--missing", action="store_true", help="only what the table does not have yet, or of another code")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes that compile")
    args = parser.parse_args()
    if interpreting():
        parser.error("kernels cannot be compiled under TRITON_INTERPRET=1")
    if args.op:
        choices = itertools.product(args.arch or [90], args.op, args.head_dim or [128], args.dtype or ["bfloat16"])
        for arch, op, head_dim, dtype in choices:
            for one in launches(op, head_dim, getattr(torch, dtype), arch=arch):
                what = dict(op=op, kernel=one.kernel.__name__, arch=arch, tile=_tile(one)) | compiled(one, arch)
                print("  ".join(f"{name} {value}" for name, value in what.items()), flush=True)
        return
    table, here = read_table() if TABLE.exists() else [], triton.__version__
    chosen = lambda row: (
        row["kernel"].endswith(tuple(args.kernel))
        and all(
            not values or row[name] in values
            for name, values in (("arch", args.arch), ("dtype", args.dtype), ("head_dim", args.head_dim))
        )
    )
    expected = {_place(row) for row, _ in _expected()}
    rows = [one for one in table if one["triton"] != here or _place(one) in expected]
    have = {_key(one) for one in rows if one["triton"] == here and args.missing}
    wanted = [i for i, (row, _) in enumerate(_expected()) if chosen(row) and _key(row) not in have]
    with ProcessPoolExecutor(args.jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        for row in tqdm(workers.map(_row, wanted), total=len(wanted), desc="compile"):
            rows = [one for one in rows if not _replaces(row, one)] + [row]
            _write(rows)  # after each: what was found is not lost
    rows = [one for one in rows if one["triton"] == here]
    print(f"{sum(_key(row) not in set(map(_key, rows)) for row, _ in _expected())} rows are not there yet, or of another code")
    bad = list(filter(wrong, rows))
    print(f"{TABLE}: {len(rows)} kernels, {len(bad)} that spill, do not fit in shared memory or have no tensor cores")
    for one in bad:
        print("  ".join(f"{name} {value}" for name, value in one.items()))
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
