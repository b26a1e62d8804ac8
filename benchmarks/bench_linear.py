"""A frozen linear of few rows with its LoRA adapter, r = 8: one op, against PEFT's own products. "backward": to its input.

A call goes through as many weights as make 64 MB, so that they come from memory; times are per linear. On the CPU alone.
"""

import torch

from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.ops import extension
from diffmas.ops.linear import linear

__all__ = ["CASES", "PROVIDERS", "problem"]

BYTES, RANK, SCALE = 64 << 20, 8, 2.0
SHAPES = {"576x1536": (576, 1536), "1536x576": (1536, 576), "2048x2048": (2048, 2048)}  # weights [out, in]

CASES = [
    Case("linear", "few rows", phase, n=n, dtype=dtype, model=model, note="LoRA r = 8", quick=n == 12 and model == "576x1536")
    for dtype in ("bfloat16", "float32")
    for model in SHAPES
    for phase in ("forward", "backward")
    for n in (1, 12, 32)
]


def problem(case: Case) -> Problem:
    (out, length), dtype = SHAPES[case.model], getattr(torch, case.dtype)
    count = max(1, BYTES // (out * length * dtype.itemsize))
    weights = [(torch.randn(out, length) / length**0.5).to(dtype) for _ in range(count)]
    a, b = torch.randn(RANK, length) / length**0.5, torch.randn(out, RANK) / RANK**0.5
    x = torch.randn(case.n, length if case.phase == "forward" else out).to(dtype)

    def answer(dtype: torch.dtype) -> dict:
        x_, w, a_, b_ = (t.to(dtype) for t in (x, weights[0], a, b))
        if case.phase == "forward":
            return {"y": x_ @ w.T + SCALE * (x_ @ a_.T) @ b_.T}
        return {"dx": x_ @ w + SCALE * (x_ @ b_) @ a_}

    return Problem(
        case, (x, weights, a, b), answer, flops=2 * case.n * out * length, read=out * length * dtype.itemsize, units=count
    )  # fmt: skip


def _trial(p: Problem, product) -> Trial:
    x, weights, _, _ = p.inputs
    name = "y" if p.case.phase == "forward" else "dx"
    return Trial(torch.no_grad()(lambda: [product(x, w) for w in weights]), lambda found: {name: found[0]})


def diffmas(p: Problem) -> Trial:
    if not extension.loaded:
        raise Senseless
    _, _, a, b = p.inputs
    transposed = p.case.phase == "backward"
    return _trial(p, lambda x, w: linear(x, w, None, a, b, SCALE, transposed)[0])


def peft(p: Problem) -> Trial:
    _, _, a, b = p.inputs

    def forward(x, w):
        return (x @ w.T + (x.float() @ a.T @ b.T) * SCALE).to(x.dtype)

    def backward(dy, w):
        return dy @ w + ((dy.float() * SCALE) @ b @ a).to(dy.dtype)

    return _trial(p, forward if p.case.phase == "forward" else backward)


PROVIDERS = {OURS: diffmas, "PEFT": peft}


def test_linear(bench, case):
    bench(case, problem, PROVIDERS)
