"""reposition: stored keys rotated on to new positions, values copied, against eager PyTorch on a segment of a DynamicCache."""

import torch
from torch import Tensor

from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op
from diffmas.ops import reference

__all__ = ["CASES", "PROVIDERS", "problem"]

OFFSET = 777

CASES = [
    Case("reposition", "segment", phase, n=n, heads=f"{Hkv}/{Hkv}", D=128, dtype=dtype, quick=(n, dtype) == (1024, "float32"))
    for phase in ("forward", "backward")
    for n, Hkv, dtype in ((64, 8, "float32"), (1024, 8, "float32"), (4096, 8, "float32"), (4096, 8, "bfloat16"))
    if phase == "forward" or dtype == "float32"
]


def problem(case: Case) -> Problem:
    """Rows 0 .. n of the pools are moved to rows n .. 2n."""
    Hkv, D, n = int(case.heads.split("/")[1]), case.D, case.n
    device = "cuda" if torch.cuda.is_available() else "cpu"
    # Gradient pools are float32 whatever the pools are.
    dtype = getattr(torch, case.dtype)
    k, v = (torch.randn(Hkv, 2 * n, D, device=device).bfloat16().to(dtype).transpose(0, 1) for _ in range(2))
    index = torch.arange(n, device=device)
    move = (
        index,
        index + n,
        torch.full((n,), OFFSET, device=device),
        1e6 ** (-torch.arange(0, D, 2, device=device).float() / D),
    )

    def answer(as_dtype: torch.dtype) -> dict:
        copy = [x.to(as_dtype).clone() for x in (k, v)]
        (reference.reposition if case.phase == "forward" else reference.reposition_backward)(*move, False, *copy)
        part = slice(n, None) if case.phase == "forward" else slice(0, n)
        return {"k": copy[0][part], "v": copy[1][part]}

    return Problem(case, (k, v, move), answer, copied=(4 if case.phase == "forward" else 8) * Hkv * D * n * dtype.itemsize)


def diffmas(p: Problem) -> Trial:
    k, v, move = p.inputs
    mine, n = [x.transpose(0, 1).clone().transpose(0, 1) for x in (k, v)], p.case.n
    if p.case.phase == "forward":
        call = lambda: run_op("reposition", mine[0], *move, False, *mine)
        return Trial(call, lambda _: {"k": mine[0][n:], "v": mine[1][n:]})
    call = lambda: run_op("reposition_backward", mine[0], *move, False, *mine)
    return Trial(call, lambda _: {"k": mine[0][:n], "v": mine[1][:n]})


def _rotated_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def eager(p: Problem) -> Trial:
    """One offset for the whole segment: cos and sin are one row."""
    k, v, (_, _, offset, inv_freq) = p.inputs
    n, train = p.case.n, p.case.phase == "backward"
    angle = offset[:1].double()[:, None] * inv_freq.double()
    cos, sin = (torch.cat((f(angle), f(angle)), -1).float() for f in (torch.cos, torch.sin))
    old = [x[:n].transpose(0, 1)[None].clone().requires_grad_(train) for x in (k, v)]
    grads = [x[n:].transpose(0, 1)[None].clone() for x in (k, v)]
    pooled = lambda x: x[0].transpose(0, 1)

    def move():
        moved = (old[0].float() * cos + _rotated_half(old[0].float()) * sin).to(old[0].dtype)
        return moved, old[1].clone()

    if not train:
        return Trial(torch.no_grad()(move), lambda r: {"k": pooled(r[0]), "v": pooled(r[1])})
    kept, sums = move(), [x.detach().clone() for x in old]

    def backward():
        for total, grad in zip(sums, torch.autograd.grad(kept, old, grads, retain_graph=True)):
            total.add_(grad)

    return Trial(backward, lambda _: {"k": pooled(sums[0]), "v": pooled(sums[1])})


PROVIDERS = {OURS: diffmas, "eager": eager}


def test_reposition(bench, case):
    bench(case, problem, PROVIDERS)
