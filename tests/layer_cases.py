"""Inputs of a decoder layer's ops beside attention, and what they are compared with: plain PyTorch, as transformers and PEFT
have it, in any precision. An op is asked for by name, from whoever has it."""

from dataclasses import dataclass

import torch
from op_runs import exact_in_half, within_budget
from torch import Tensor

__all__ = ["EPS", "SCALE", "Linear", "agree", "gates", "lora_gradients", "norms"]

SCALE, EPS = 0.7, 1e-5


def _further_apart(x: Tensor) -> Tensor:
    """The same rows with something between them."""
    return torch.cat((x, torch.full_like(x, torch.nan)), 1)[:, : x.shape[1]]


@dataclass
class Linear:
    """n rows through a weight [out, length] with a LoRA adapter of rank r, 0: without. far: rows of x and dy lie further apart
    than they are long."""

    n: int
    out: int = 192
    length: int = 160
    r: int = 8
    bias: bool = True
    far: bool = False

    def __post_init__(self):
        self.x, self.dy = (exact_in_half(self.n, m) for m in (self.length, self.out))
        self.weight = exact_in_half(self.out, self.length) / 16
        self.of_bias = exact_in_half(self.out) if self.bias else None
        lora = exact_in_half(self.r, self.length) / 16, exact_in_half(self.out, self.r) / 4
        self.a, self.b = lora if self.r else (None, None)
        self.terms = (self.length + self.out) ** 0.5 + self.r

    def at(self, dtype: torch.dtype, device="cpu") -> tuple:
        """x, dy, weight and bias of a dtype, a and b of the one that LoRA's weights have."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        to = lambda t, kind: None if t is None else t.to(device, kind)
        x, dy = (_further_apart(to(t, dtype)) if self.far else to(t, dtype) for t in (self.x, self.dy))
        return x, dy, to(self.weight, dtype), to(self.of_bias, dtype), to(self.a, wide), to(self.b, wide)

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """y, u; dx, v: of PEFT's own products."""
        x, dy, weight, bias, a, b = self.at(dtype)
        y, dx = torch.nn.functional.linear(x, weight, bias), dy @ weight
        if a is None:
            return [y, dx]
        u, v = x.to(a.dtype) @ a.T, dy.to(a.dtype) @ b
        return [(y + SCALE * (u @ b.T)).to(dtype), u, (dx + SCALE * (v @ a)).to(dtype), v]

    def run(self, linear, dtype: torch.dtype, device="cpu") -> list[Tensor]:
        """The same of linear(x, weight, bias, a, b, scale, transposed)."""
        x, dy, weight, bias, a, b = self.at(dtype, device)
        y, u = linear(x, weight, bias, a, b, SCALE, False)
        dx, v = linear(dy, weight, None, a, b, SCALE, True)
        return [y, dx] if a is None else [y, u, dx, v]


def norms(n: int, length: int, far: bool = False):
    """-> run(dtype, device, ops): y and dx of an RMSNorm; ops None: of plain PyTorch."""
    x, dy = (3 * exact_in_half(n, length) for _ in range(2))
    weight = exact_in_half(length)

    def run(dtype, device="cpu", ops=None):
        x_, dy_, w = (t.to(device, dtype) for t in (x, dy, weight))
        x_, dy_ = (_further_apart(t) if far else t for t in (x_, dy_))
        if ops is not None:
            return [ops.norm(x_, w, EPS), ops.norm_backward(dy_, x_, w, EPS)]
        wide = torch.promote_types(dtype, torch.float32)
        x_ = x_.requires_grad_()
        h = x_.to(wide)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + EPS)
        y = w * h.to(dtype)
        return [y.detach(), *torch.autograd.grad(y, x_, dy_)]

    return run


def gates(n: int, length: int, far: bool = False):
    """-> run(dtype, device, ops): y, dgate and dup of silu(gate) * up; ops None: of plain PyTorch."""
    rows = [2 * exact_in_half(n, length) for _ in range(3)]

    def run(dtype, device="cpu", ops=None):
        dy, gate, up = (_further_apart(t) if far else t for t in (r.to(device, dtype) for r in rows))
        if ops is not None:
            return [ops.gate(gate, up), *ops.gate_backward(dy, gate, up)]
        gate, up = gate.requires_grad_(), up.requires_grad_()
        y = torch.nn.functional.silu(gate) * up
        return [y.detach(), *torch.autograd.grad(y, (gate, up), dy)]

    return run


def lora_gradients(n: int, r: int, length: int):
    """-> run(dtype, device, ops): scale c' z; ops None: of plain PyTorch."""
    c, z = exact_in_half(n, r), exact_in_half(n, 2 * length)

    def run(dtype, device="cpu", ops=None):
        wide = torch.promote_types(dtype, torch.float32)
        c_, z_ = c.to(device, wide), z.to(device, dtype)[:, :length]
        return [SCALE * c_.T @ z_.to(wide) if ops is None else ops.lora_grad(c_, z_, SCALE)]

    return run


def agree(got: list[Tensor], plain, dtype: torch.dtype, terms: float) -> None:
    """Within the budget of the other ops: twice the error of plain PyTorch in that precision, against float64."""
    for mine, like, want in zip(got, plain(dtype), plain(torch.float64), strict=True):
        assert mine.shape == want.shape and mine.dtype == like.dtype
        if mine.numel():
            within_budget(mine, like, want, terms)
