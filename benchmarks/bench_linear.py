"""A frozen linear with its LoRA adapter, r = 8: one op, against PEFT's own products. "backward": to its input.

A call goes through as many weights as make 64 MB, so that they come from memory; times are per linear. On a GPU also many rows,
whose product with W is torch's, and `bench_layer.py` has what stands between a layer's linears.
"""

import torch

from diffmas.benchmarks import ours
from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.ops.layer import layer_ops, usable
from diffmas.ops.linear import Adapter, Parts, linear

__all__ = ["CASES", "PROVIDERS", "problem"]

BYTES, RANK, SCALE = 64 << 20, 8, 2.0
SHAPES = {"576x1536": (576, 1536), "1536x576": (1536, 576), "2048x2048": (2048, 2048)}  # weights [out, in]
GPU_SHAPES = {"576x1536": (576, 1536), "4096x4096": (4096, 4096), "14336x4096": (14336, 4096), "small": (96, 64)}


def _case(regime, phase, n, dtype, shape, quick=False) -> Case:
    return Case("linear", regime, phase, n=n, dtype=dtype, model=shape, note="LoRA r = 8", quick=quick)


CPU_CASES = [
    _case("few rows", phase, n, dtype, shape, quick=n == 12 and shape == "576x1536")
    for dtype in ("bfloat16", "float32")
    for shape in SHAPES
    for phase in ("forward", "backward")
    for n in (1, 12, 32)
]
GPU_CASES = [
    _case("few rows" if n <= 32 else "many rows", phase, n, "bfloat16", shape, quick=n == 12 and shape == "4096x4096")
    for shape in GPU_SHAPES
    if shape != "small"
    for phase in ("forward", "backward")
    for n in (1, 12, 32, 512, 4096)
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    (out, length), dtype = (SHAPES | GPU_SHAPES)[case.model], getattr(torch, case.dtype)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    random = lambda *shape: torch.randn(*shape, device=device)
    count = max(1, (BYTES if case.model != "small" else 1) // (out * length * dtype.itemsize))
    weights = [(random(out, length) / length**0.5).to(dtype) for _ in range(count)]
    a, b = random(RANK, length) / length**0.5, random(out, RANK) / RANK**0.5
    x = random(case.n, length if case.phase == "forward" else out).to(dtype)

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
    x, _, a, b = p.inputs
    kernels = layer_ops(x, usable("auto", fuse=True))
    if kernels is None:
        raise Senseless
    transposed = p.case.phase == "backward"
    adapter = (Adapter(a, b, SCALE),)
    return _trial(p, lambda x, w: linear(x, Parts(w, None, adapter), None, transposed, kernels.ops)[0])


def peft(p: Problem) -> Trial:
    _, _, a, b = p.inputs

    def forward(x, w):
        return (x @ w.T + (x.float() @ a.T @ b.T) * SCALE).to(x.dtype)

    def backward(dy, w):
        return dy @ w + ((dy.float() * SCALE) @ b @ a).to(dy.dtype)

    return _trial(p, forward if p.case.phase == "forward" else backward)


def in_16_bits(p: Problem) -> Trial:
    """LoRA's weights rounded to the dtype of the model and its products added in place, which is what unsloth's matmul_lora
    does: four launches with the roundings."""
    if not ours.on_gpu():
        raise Senseless
    _, _, a, b = p.inputs

    def forward(x, w):
        return (x @ w.T).addmm_(x @ a.to(x.dtype).T, b.to(x.dtype).T, alpha=SCALE)

    def backward(dy, w):
        return (dy @ w).addmm_(dy @ b.to(dy.dtype), a.to(dy.dtype), alpha=SCALE)

    return _trial(p, forward if p.case.phase == "forward" else backward)


PROVIDERS = {OURS: diffmas, "PEFT": peft, "LoRA in 16 bits": in_16_bits}


def test_linear(bench, case):
    bench(case, problem, PROVIDERS)
