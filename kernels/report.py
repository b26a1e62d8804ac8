"""Compiles the kernels for a GPU that need not be there, and says what they cost: registers, shared memory, stack, spills.

    python -m diffmas.kernels.report [--arch 80 90 100 120] [--dtype bfloat16] [--head-dim 128] [op ...]

What is compiled is what the launchers ask for: they run on small CPU tensors with the kernels replaced by recorders. Not under
TRITON_INTERPRET=1, where kernels cannot be compiled.
"""

import argparse
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from diffmas.kernels import inject, merge_states, reposition
from diffmas.kernels.launch import interpreting

__all__ = ["OPS", "Launch", "launches", "compiled"]

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64",
    torch.int32: "i32", torch.int64: "i64",
}  # fmt: skip

# ---- one small call of every op --------------------------------------------------------------------------------------


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


# call(n, D, dtype, **flags) of n tokens or rows
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
}

# ---- recording and compiling -----------------------------------------------------------------------------------------


@dataclass
class Launch:
    """A kernel with everything that decides its code: equal ones run the same binary."""

    kernel: triton.JITFunction
    signature: dict[str, str]
    constants: dict[str, object]
    attributes: dict[tuple[int], list]
    options: dict[str, int]


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
            aligned = True  # as torch allocates; also what a slice of a fused projection keeps
        elif isinstance(value, float):
            launch.signature[name], aligned = "fp32", False
        else:
            launch.signature[name], aligned = "i32" if abs(value) < 2**31 else "i64", value % 16 == 0 and not free
        if aligned:
            launch.attributes[at] = [["tt.divisibility", 16]]


def launches(op: str, head_dim: int = 128, dtype: torch.dtype = torch.bfloat16, n: int = 48) -> list[Launch]:
    """Every kernel launch of one call of `op`, an entry of OPS, on n tokens."""
    module, call, flags = OPS[op]
    kernels = {name: x for name, x in vars(module).items() if isinstance(x, triton.JITFunction) and name.endswith("_kernel")}
    seen = []
    try:
        vars(module).update({name: Recorder(kernel, seen) for name, kernel in kernels.items()})
        call(n, head_dim, dtype, **flags)
    finally:
        vars(module).update(kernels)
    return seen


def compiled(launch: Launch, arch: int = 90) -> dict[str, int]:
    """Compiled for compute capability arch / 10: registers, shared and stack in bytes, spill and matrix instructions."""
    source = ASTSource(launch.kernel, launch.signature, launch.constants, launch.attributes)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        read = lambda *tool: subprocess.run([*tool, file.name], capture_output=True, text=True, check=True).stdout
        usage, sass = read(TOOLS / "cuobjdump", "-res-usage"), read(TOOLS / "nvdisasm", "-c")
    number = lambda name: int(re.search(rf"\b{name}:(\d+)", usage).group(1))
    opcodes = re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass, flags=re.M)
    count = lambda *heads: sum(code.split(".")[0] in heads for code in opcodes)
    return dict(
        registers=number("REG"), shared=kernel.metadata.shared, stack=number("STACK"), spills=count("LDL", "STL"),
        mma=count("HMMA", "HGMMA", "UTCHMMA"),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("op", nargs="*", help="entries of OPS; all of them by default")
    parser.add_argument("--arch", nargs="+", type=int, default=[90])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--head-dim", type=int, default=128)
    args = parser.parse_args()
    if interpreting():
        parser.error("kernels cannot be compiled under TRITON_INTERPRET=1")
    print(f"Triton {triton.__version__}, {args.dtype}, D = {args.head_dim}")
    for op in args.op or OPS:
        for one in launches(op, args.head_dim, getattr(torch, args.dtype)):
            for arch in args.arch:
                cost = "  ".join(f"{name} {value}" for name, value in compiled(one, arch).items())
                print(f"{op:30} {one.kernel.__name__:28} sm_{arch:<4} {cost}", flush=True)


if __name__ == "__main__":
    main()
