"""A token, and a prompt, over rows that are read with low-rank codes: a pool's rows and r numbers beside each, or all of the
rows that these make, as each reader would have them without.

The answer is attention over these rows. Full rows are there before the clock starts; codes are multiplied anew in every call.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op
from diffmas.ops import reference
from diffmas.ops.low_rank import (
    FEW_ROWS,
    Codes,
    Tile,
    Whole,
    few_kernels,
    low_rank_attention,
    low_rank_attention_backward,
    of_pairs,
    rows_built,
)  # fmt: skip

__all__ = ["CASES", "PROVIDERS", "problem"]

R = 8  # numbers of a code
TILE = 1 << 18  # numbers of K in a tile: diffmas.trace.low_rank's


class Inputs(NamedTuple):
    """q, do [n, Hq, D]; k, v: the pool's rows, head-major; reads: all of them, by all queries, as a trace does it."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    codes: Codes
    tables: tuple[Tensor, Tensor]
    reads: list[Tile] | Whole
    scale: float


def _case(codes: str, N: int, n: int, phase: str = "forward", quick: bool = False, dtype: str = "float32") -> Case:
    Hkv, D, size = 3, 64, 4 if dtype == "float32" else 2
    row, code = 2 * Hkv * D * size, (2 if " and " in codes else 1) * R * 4
    note = f"{code} bytes for {row}: {row / code:.0f} x fewer for each further reader"
    return Case(
        "cross_attention", f"low-rank rows, {codes}", phase, N=N, n=n, heads="9/3", D=D, dtype=dtype, quick=quick, note=note
    )


CASES = [
    _case(codes, N, n, phase, quick=(codes, N, n, phase) == ("k and v", 1024, 1, "forward"))
    for codes in ("k and v", "v")
    for N in (1024, 8192)
    for n in (1, 64)
    for phase in ("forward", "backward")
]


def problem(case: Case) -> Problem:
    """read: rows, codes and tables, once for all queries."""
    Hq, Hkv = map(int, case.heads.split("/"))
    dtype, device, D, N = getattr(torch, case.dtype), "cuda" if torch.cuda.is_available() else "cpu", case.D, case.N
    random = lambda *shape: torch.randn(*shape, device=device)
    q, do = (3 * random(case.n, Hq, D)).to(dtype), random(case.n, Hq, D).to(dtype)
    k, v = (random(Hkv, N, D).to(dtype).transpose(0, 1) for _ in "kv")
    codes = Codes(z_v=random(N, R), b_v=random(Hkv * D, R) / R)
    if " and " in case.regime:
        codes = codes._replace(z_k=random(N, R), b_k=random(Hkv * D, R) / R)
    inv_freq = 10000.0 ** -(torch.arange(D // 2, device=device) / (D // 2))
    tables = of_pairs(reference.offset_tables(torch.arange(N, device=device), inv_freq, False, torch.float32), False)
    reads, most, index = [], TILE // (Hkv * D), lambda *xs: torch.tensor(xs, device=device)
    if case.n * Hq // Hkv <= FEW_ROWS and few_kernels(q, "auto"):
        reads = Whole(index(0), (index(0, case.n), index(0, 1), index(0), index(N), None))
    else:
        for first in range(0, N, most):
            rows = slice(first, min(first + most, N))
            reads.append(Tile(rows, rows, (index(0, case.n), index(0, 1), index(0), index(rows.stop - first), None)))
    x = Inputs(q, do, k, v, codes, tables, reads, D**-0.5)
    backward = case.phase == "backward"

    def answer(dtype: torch.dtype) -> dict[str, Tensor]:
        exact = Codes(*(None if y is None else y.to(dtype) for y in codes))
        q, rows = x.q.to(dtype), rows_built(x.k.to(dtype), x.v.to(dtype), exact, tables, False)
        args = *rows, *_view(x), x.scale, False, False
        o, lse = reference.cross_attention(q, *args)
        if not backward:
            return {"o": o, "lse": lse}
        grads = tuple(torch.zeros_like(y, dtype=reference.accumulator(dtype)) for y in rows)
        return {"dq": reference.cross_attention_backward(x.do.to(dtype), None, q, o, lse, *args, *grads)}

    own = 2 * q.numel() * q.element_size() * (1 + backward)
    of_codes = sum(y.numel() * y.element_size() for y in codes if y is not None) + N * D * 4 * (codes.z_k is not None)
    read = 2 * Hkv * N * D * k.element_size() + of_codes + own
    return Problem(case, x, answer, flops=(10 if backward else 4) * Hq * D * N * case.n, read=read, peers_lack=("lse",))


def _view(x: Inputs) -> tuple:
    """Of all rows."""
    index = lambda *xs: torch.tensor(xs, device=x.q.device)
    return index(0, len(x.q)), index(0, 1), index(0), index(len(x.k)), None, None


def diffmas(p: Problem) -> Trial:
    """Backward: of q, codes and adapter."""
    x: Inputs = p.inputs
    forward = lambda: low_rank_attention(x.q, x.k, x.v, x.codes, x.tables, x.reads, None, x.scale, False)
    if p.case.phase == "forward":
        return Trial(forward, lambda r: {"o": r[0], "lse": r[1]})
    o, lse = forward()
    grads = Codes(*(None if y is None else torch.zeros_like(y) for y in x.codes))
    given = x.do, x.q, o, lse, x.k, x.v, x.codes, x.tables, x.reads, None, x.scale, False, "auto", grads
    return Trial(lambda: low_rank_attention_backward(*given), lambda dq: {"dq": dq})


def full(p: Problem) -> Trial:
    """Backward: of q and of the rows."""
    x: Inputs = p.inputs
    args = *rows_built(x.k, x.v, x.codes, x.tables, False), *_view(x), x.scale, False, False
    forward = lambda: run_op("cross_attention", x.q, x.q, *args)
    if p.case.phase == "forward":
        return Trial(forward, lambda r: {"o": r[0], "lse": r[1]})
    o, lse = forward()
    grads = tuple(torch.zeros_like(y, dtype=reference.accumulator(y.dtype)) for y in (x.k, x.v))
    given = x.do, None, x.q, o, lse, *args, *grads
    return Trial(lambda: run_op("cross_attention_backward", x.q, *given), lambda dq: {"dq": dq})


PROVIDERS = {OURS: diffmas, f"{OURS}, full rows": full}


def test_low_rank(bench, case):
    bench(case, problem, PROVIDERS)
