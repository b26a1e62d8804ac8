"""Earlier agents' rows read at another position than they were written at, for which q is rotated; or as they are.

The shift turns every pair of dimensions by a right angle, so that the rows of a pool which stores the keys turned back have the
same bits as those of one that does not: both ways have one answer, which is that of `cross_attention`. Peers read keys that
somebody has turned for them.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from diffmas.benchmarks import bench_attention
from diffmas.benchmarks.bench_attention import Inputs
from diffmas.benchmarks.measure import OURS, Case, Problem, Run
from diffmas.benchmarks.ours import run_op, twins

__all__ = ["CASES", "PROVIDERS", "problem"]

REGIMES = {"shifted latent step": "latent step", "shifted prompt": "prompt on a trace"}  # and what they are in bench_attention


def _case(regime, N, n, phase="forward", heads="16/8", quick=False, dtype="float32") -> Case:
    return Case("cross_attention", regime, phase, N=N, n=n, heads=heads, D=128, dtype=dtype, quick=quick)


CPU_CASES = [
    *(_case("shifted latent step", 8192, 1, phase, quick=phase == "forward") for phase in ("forward", "backward")),
    *(_case("shifted prompt", 2048, 256, phase, quick=phase == "forward") for phase in ("forward", "backward")),
]
GPU_CASES = [
    _case(regime, N, n, phase, heads, quick=heads == "16/8" and phase == "forward", dtype="bfloat16")
    for regime, N, n in (("shifted latent step", 16384, 1), ("shifted latent step", 65536, 1), ("shifted prompt", 16384, 4096))
    for heads in ("16/8", "32/8")
    for phase in ("forward", "backward")
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    return replace(bench_attention.problem(replace(case, regime=REGIMES[case.regime])), case=case)


def turned_back(x: Tensor) -> Tensor:
    """By the right angle that a shift of 1 turns on."""
    first, second = x.chunk(2, -1)
    return torch.cat((second, -first), -1)


def diffmas(p: Problem, run_op=run_op) -> Run:
    x: Inputs = p.inputs
    lengths = x.view[3]
    shift = torch.ones_like(lengths)
    if p.case.n > 1:
        shift[-1] = 0  # the prompt itself
    moved = torch.cat([torch.arange(s, s + n, device=x.q.device) for s, n, by in zip(x.view[2], lengths, shift) if by])
    k = x.k.transpose(0, 1).clone().transpose(0, 1)
    k[moved] = turned_back(k[moved])
    inv_freq = torch.full((p.case.D // 2,), math.pi / 2, device=x.q.device)
    run = bench_attention.diffmas(replace(p, inputs=replace(x, k=k, shift=shift, inv_freq=inv_freq)), run_op)

    def read(result) -> dict[str, Tensor]:
        out = run.read(result)
        if "dk" in out:
            dk = out["dk"].clone()
            dk[moved] = -turned_back(dk[moved])  # on again
            out["dk"] = dk
        return out

    return Run(run.call, read)


PROVIDERS = {
    OURS: diffmas,
    f"{OURS}, no shift": bench_attention.diffmas,
    **twins("cross_attention", diffmas),
    **{name: bench_attention.PROVIDERS[name] for name in ("sdpa", "sdpa, flash", "sdpa, cudnn", "flashinfer")},
}


def test_shift(bench, case):
    bench(case, problem, PROVIDERS)
