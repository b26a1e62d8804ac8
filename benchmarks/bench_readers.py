"""Samples of one question, a token each: all of them read the rows of the prompt. Once for all, or each for itself.

The answer is that of `cross_attention`. Ours is what the package does for such a batch: one pass over the shared rows with all
queries, one over each reader's own rows, and a merge. N counts a reader's rows, its own included.
"""

from dataclasses import replace

import torch

from diffmas.benchmarks import bench_attention
from diffmas.benchmarks.attention.problem import Inputs
from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op, variants

__all__ = ["CASES", "PROVIDERS", "problem"]

REGIME = "agents side by side"  # of bench_attention: a common prefix, and each sequence's own rows


def _case(R, N, heads="16/8", D=128, quick=False, dtype="float32") -> Case:
    return Case("cross_attention", "readers of a prefix", N=N, n=1, batch=R, heads=heads, D=D, dtype=dtype, quick=quick)


CPU_CASES = [
    *(_case(R, N, quick=(R, N) == (8, 4096)) for R in (2, 8) for N in (2048, 4096, 16384)),
    _case(8, 4096, "4/2", 64),
    _case(8, 4096, "32/8"),
]
GPU_CASES = [
    *(_case(R, N, quick=R == 8 and N > 256, dtype="bfloat16") for R in (2, 8, 64) for N in (257, 1024, 8192, 32768)),
    *(_case(R, 32768, "32/8", dtype="bfloat16") for R in (2, 64)),
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    p = replace(bench_attention.problem(replace(case, regime=REGIME)), case=case)
    return replace(p, peers_lack=("lse",))


def diffmas(p: Problem, run_op=run_op) -> Trial:
    x: Inputs = p.inputs
    R, prefix = p.case.batch, p.case.N - 1
    index = lambda *xs: torch.tensor(xs, device=x.q.device)
    each = torch.arange(R + 1, device=x.q.device)
    shared = index(0, R), index(0, 1), index(0), index(prefix)
    own = each, each, prefix + each[:-1], torch.ones_like(each[:-1])
    read = lambda view, causal: run_op("cross_attention", x.q, x.q, x.k, x.v, *view, None, None, x.scale, causal, False)
    call = lambda: run_op("merge_states", x.q, *read(shared, False), *read(own, True))
    return Trial(call, lambda r: {"o": r[0], "lse": r[1]})


PROVIDERS = {
    OURS: diffmas,
    **variants("cross_attention", diffmas),
    f"{OURS}, each for itself": bench_attention.diffmas,
    **{
        name: bench_attention.PROVIDERS[name]
        for name in ("sdpa", "sdpa, grouped", "sdpa, expanded", "sdpa, one by one", "flashinfer", "xformers")
    },
}


def test_readers(bench, case):
    bench(case, problem, PROVIDERS)
