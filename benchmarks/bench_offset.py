"""Earlier agents' segments read at a position offset, for which q is rotated; or read where they were written.

The offset rotates every pair of dimensions by a right angle. The pool that is read at an offset holds keys rotated back by that
angle, which is exact; so both ways have one answer, that of `cross_attention`. Peers read keys that were rotated beforehand.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from diffmas.benchmarks import bench_attention
from diffmas.benchmarks.attention.problem import Inputs
from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op, variants

__all__ = ["CASES", "PROVIDERS", "problem"]

STEP, PROMPT = "latent step at an offset", "prompt at an offset"
REGIMES = {STEP: "latent step", PROMPT: "prompt on a trace"}  # what they are in bench_attention


def _case(regime, N, n, phase="forward", heads="16/8", quick=False, dtype="float32") -> Case:
    return Case("cross_attention", regime, phase, N=N, n=n, heads=heads, D=128, dtype=dtype, quick=quick)


CPU_CASES = [
    *(_case(STEP, 8192, 1, phase, quick=phase == "forward") for phase in ("forward", "backward")),
    *(_case(PROMPT, 2048, 256, phase, quick=phase == "forward") for phase in ("forward", "backward")),
]
GPU_CASES = [
    _case(regime, N, n, phase, heads, quick=heads == "16/8" and phase == "forward", dtype="bfloat16")
    for regime, N, n in ((STEP, 16384, 1), (STEP, 65536, 1), (PROMPT, 16384, 4096))
    for heads in ("16/8", "32/8")
    for phase in ("forward", "backward")
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    return replace(bench_attention.problem(replace(case, regime=REGIMES[case.regime])), case=case)


def rotated_back(x: Tensor) -> Tensor:
    """By a right angle, the rotation of an offset of 1."""
    first, second = x.chunk(2, -1)
    return torch.cat((second, -first), -1)


def diffmas(p: Problem, run_op=run_op) -> Trial:
    x: Inputs = p.inputs
    lengths = x.view[3]
    seg_offset = torch.ones_like(lengths)
    if p.case.n > 1:
        seg_offset[-1] = 0  # the prompt itself
    moved = torch.cat([torch.arange(s, s + n, device=x.q.device) for s, n, by in zip(x.view[2], lengths, seg_offset) if by])
    k = x.k.transpose(0, 1).clone().transpose(0, 1)
    k[moved] = rotated_back(k[moved])
    inv_freq = torch.full((p.case.D // 2,), math.pi / 2, device=x.q.device)
    trial = bench_attention.diffmas(replace(p, inputs=replace(x, k=k, seg_offset=seg_offset, inv_freq=inv_freq)), run_op)

    def read(result) -> dict[str, Tensor]:
        out = trial.read(result)
        if "dk" in out:
            dk = out["dk"].clone()
            dk[moved] = -rotated_back(dk[moved])  # rotated on again
            out["dk"] = dk
        return out

    return Trial(trial.call, read)


PROVIDERS = {
    OURS: diffmas,
    f"{OURS}, no offset": bench_attention.diffmas,
    **variants("cross_attention", diffmas),
    **{name: bench_attention.PROVIDERS[name] for name in ("sdpa", "sdpa, flash", "sdpa, cudnn", "flashinfer")},
}


def test_offset(bench, case):
    bench(case, problem, PROVIDERS)
