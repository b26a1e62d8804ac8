"""The two parts of an attention backward, each alone: dq, and dK and dV. Both read scores and dO V' anew, so together they take
more than a backward that computes them once."""

from dataclasses import replace

import torch

from diffmas.benchmarks import bench_attention
from diffmas.benchmarks.attention.problem import Inputs
from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op, variants

__all__ = ["CASES", "PROVIDERS", "problem"]

PRODUCTS = {"dq": 3, "dkv": 4}  # of matrices, where a backward that shares them has 5


def _case(n, phase, heads="16/8", dtype="bfloat16", quick=False) -> Case:
    return Case("cross_attention", "part of a backward", phase, N=n, n=n, heads=heads, D=128, dtype=dtype, quick=quick)


CPU_CASES = [_case(1024, phase, dtype="float32", quick=True) for phase in PRODUCTS]
GPU_CASES = [
    _case(n, phase, heads, quick=(n, heads) == (4096, "16/8"))
    for n, heads in ((4096, "16/8"), (16384, "16/8"), (4096, "32/8"))
    for phase in PRODUCTS
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    whole = bench_attention.problem(replace(case, regime="prompt", phase="backward"))
    outputs = {"dq": ("dq",), "dkv": ("dk", "dv")}[case.phase]

    def answer(dtype: torch.dtype) -> dict:
        every = whole.reference(dtype)
        return {name: every[name] for name in outputs}

    more = dict(copied=0) if case.phase == "dq" else {}
    return replace(whole, case=case, reference=answer, flops=whole.flops * PRODUCTS[case.phase] / 5, **more)


def diffmas(p: Problem, run_op=run_op) -> Trial:
    x: Inputs = p.inputs
    o, lse = run_op("cross_attention", x.q, x.q, x.k, x.v, *x.args())
    dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (x.k, x.v))
    none = torch.zeros(len(x.queries), dtype=torch.int64, device=x.q.device)
    part = (none, True) if p.case.phase == "dq" else (None, False)  # grad_tail, want_dq
    given = x.do, None, x.q, o, lse, x.k, x.v, *x.args(), dk, dv
    call = lambda: run_op("cross_attention_backward", x.q, *given, *part)
    return Trial(call, lambda dq: {"dq": dq} if p.case.phase == "dq" else {"dk": dk, "dv": dv})


PROVIDERS = {OURS: diffmas, **variants("cross_attention", diffmas)}


def test_parts(bench, case):
    bench(case, problem, PROVIDERS)
