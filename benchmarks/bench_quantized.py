"""A token over quantised rows, and several readers of them: rows of 8 bits and a scale, or the numbers that they stand for.

The answer is attention over these numbers. Without a trace's own rows, whose attention is a call of its own and a merge.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op
from diffmas.ops import dequantize, quantize, reference

__all__ = ["CASES", "PROVIDERS", "problem"]


class Inputs(NamedTuple):
    """q, do [n, Hq, D]; rows: payloads and scales as the op takes them; k, v: their numbers, head-major; view: of all n queries
    as one sequence."""

    q: Tensor
    do: Tensor
    rows: tuple[Tensor, ...]
    k: Tensor
    v: Tensor
    view: tuple
    scale: float


def _case(bits: str, N: int, n: int, phase: str = "forward", quick: bool = False, dtype: str = "float32") -> Case:
    D, size = 128, 4 if dtype == "float32" else 2
    note = f"{D + 4} bytes for {size * D}: {size * D / (D + 4):.2f} x fewer"
    return Case(
        "cross_attention", f"quantised rows, {bits}", phase, N=N, n=n, heads="16/8", D=D, dtype=dtype, quick=quick, note=note
    )


CPU_CASES = [
    _case(bits, N, n, phase, quick=(bits, N, n, phase, dtype) == ("int8", 4096, 1, "forward", "float32"), dtype=dtype)
    for bits in ("int8", "fp8")
    for N, n in ((1024, 1), (4096, 1), (4096, 8), (16384, 1))
    for phase in ("forward", "backward")
    for dtype in ("float32", "bfloat16")
]
GPU_CASES = [
    _case(bits, N, n, phase, quick=(N, n, phase) == (65536, 1, "forward"), dtype="bfloat16")
    for bits in ("int8", "fp8")
    for N, n in ((16384, 1), (65536, 1), (65536, 64))
    for phase in ("forward", "backward")
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    """read: payloads and scales, once for all queries."""
    Hq, Hkv = map(int, case.heads.split("/"))
    dtype, device, D = getattr(torch, case.dtype), "cuda" if torch.cuda.is_available() else "cpu", case.D
    random = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    q, do = 3 * random(case.n, Hq, D), random(case.n, Hq, D)
    payloads, scales = zip(*(quantize(random(Hkv, case.N, D), case.regime.split(", ")[1]) for _ in "kv"))
    rows = tuple(x.transpose(0, 1) for x in (*payloads, *scales))
    k, v = (dequantize(x, scale, dtype).transpose(0, 1) for x, scale in zip(payloads, scales))
    index = lambda *xs: torch.tensor(xs, device=device)
    view = index(0, case.n), index(0, 1), index(0), index(case.N), None, None
    x = Inputs(q, do, rows, k, v, view, D**-0.5)

    def answer(dtype: torch.dtype) -> dict[str, Tensor]:
        args = *rows, *view, x.scale, False
        o, lse = reference.cross_attention_quantized(q.to(dtype), *args)
        if case.phase == "forward":
            return {"o": o, "lse": lse}
        return {"dq": reference.cross_attention_quantized_backward(do.to(dtype), q.to(dtype), o, lse, *args)}

    backward = case.phase == "backward"
    own = 2 * q.numel() * q.element_size() * (1 + backward)
    read = 2 * Hkv * case.N * (D + 4) + own
    return Problem(case, x, answer, flops=(6 if backward else 4) * Hq * D * case.N * case.n, read=read, peers_lack=("lse",))


def diffmas(p: Problem) -> Trial:
    x: Inputs = p.inputs
    args = *x.rows, *x.view, x.scale, False
    forward = lambda: run_op("cross_attention_quantized", x.q, x.q, *args)
    if p.case.phase == "forward":
        return Trial(forward, lambda r: {"o": r[0], "lse": r[1]})
    o, lse = forward()
    return Trial(lambda: run_op("cross_attention_quantized_backward", x.q, x.do, x.q, o, lse, *args), lambda dq: {"dq": dq})


def full(p: Problem) -> Trial:
    """The same numbers in the dtype of q. Backward: dq alone."""
    x: Inputs = p.inputs
    args = *x.view, x.scale, False, False
    forward = lambda: run_op("cross_attention", x.q, x.q, x.k, x.v, *args)
    if p.case.phase == "forward":
        return Trial(forward, lambda r: {"o": r[0], "lse": r[1]})
    o, lse = forward()
    grads = tuple(torch.zeros_like(t, dtype=reference.accumulator(t.dtype)) for t in (x.k, x.v))
    none = torch.zeros_like(x.view[0][1:])
    given = x.do, None, x.q, o, lse, x.k, x.v, *args, *grads, none
    return Trial(lambda: run_op("cross_attention_backward", x.q, *given), lambda dq: {"dq": dq})


PROVIDERS = {OURS: diffmas, f"{OURS}, full rows": full}


def test_quantized(bench, case):
    bench(case, problem, PROVIDERS)
