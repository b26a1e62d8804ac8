"""Inputs of a decoder layer's ops beside attention, and what they are compared with: plain PyTorch, as transformers and PEFT
have it, in any precision. An op is asked for by name, from whoever has it."""

from dataclasses import dataclass

import torch
from op_runs import exact_in_half, within_budget
from torch import Tensor

__all__ = ["EPS", "SCALE", "FeedForward", "Linear", "Together", "agree", "gates", "lora_gradients", "norms"]

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


class Together:
    """Up to three linears that read the same n rows of `length`; outs and ranks: of each."""

    def __init__(self, n: int, outs: tuple, length: int, ranks: tuple, bias: bool = False, far: bool = False):
        self.of_each = [Linear(n, out, length, r, bias, far) for out, r in zip(outs, ranks, strict=True)]
        for other in self.of_each[1:]:
            other.x = self.of_each[0].x
        self.terms = sum(x.terms for x in self.of_each)

    def at(self, dtype: torch.dtype, device="cpu") -> tuple[Tensor, list[Tensor], list[tuple]]:
        """x, dy of each, and what each is made of, with a scale of its own."""
        found = [one.at(dtype, device) for one in self.of_each]
        parts = [(*x[2:], SCALE * (i + 1) if x[4] is not None else 0.0) for i, x in enumerate(found)]
        return found[0][0], [x[1] for x in found], parts

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """All y and u; the sum of all dx, as autograd adds them up, the last first; all v."""
        x, dys, parts = self.at(dtype)
        return _one_by_one(_plain_linear, x, dys, parts)

    def one_by_one(self, kernels, dtype: torch.dtype, device="cpu") -> list[Tensor]:
        """The same of `linear`, a call for each."""
        return _one_by_one(kernels.linear, *self.at(dtype, device))

    def run(self, kernels, dtype: torch.dtype, device="cpu") -> list[Tensor]:
        x, dys, parts = self.at(dtype, device)
        (ys, us), (dx, vs) = kernels.linears(x, parts), kernels.linears_backward(dys, parts)
        return [*ys, *us, dx, *vs]


def _plain_linear(x, weight, bias, a, b, scale, transposed):
    y = x @ weight if transposed else torch.nn.functional.linear(x, weight, bias)
    if a is None:
        return y, x.new_empty(len(x), 0, dtype=torch.promote_types(x.dtype, torch.float32))
    down, up = (b, a.T) if transposed else (a.T, b)
    u = x.to(a.dtype) @ down
    return (y + scale * (u @ up.T)).to(x.dtype), u


def _one_by_one(linear, x, dys, parts) -> list[Tensor]:
    ys, us = zip(*(linear(x, *part, False) for part in parts))
    dxs, vs = zip(*(linear(dy, weight, None, *rest, True) for dy, (weight, _, *rest) in zip(dys, parts)))
    dx = dxs[-1]
    for other in dxs[-2::-1]:
        dx = dx + other
    return [*ys, *us, dx, *vs]


class FeedForward:
    """n rows of `length` through gate and up to `inner` numbers, and what `down` gives back to these."""

    def __init__(self, n: int, inner: int, length: int, ranks: tuple = (0, 0, 0), bias: bool = False):
        self.both = Together(n, (inner, inner), length, ranks[:2], bias)
        self.down = Linear(n, length, inner, ranks[2], False)
        self.terms = self.both.terms + self.down.terms

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """silu(gate) up, gate, up, both u; dgate, dup, v."""
        x, _, parts = self.both.at(dtype)
        (gate, up), us = zip(*(_plain_linear(x, *part, False) for part in parts))
        _, dy, weight, _, a, b = self.down.at(dtype)
        dh, v = _plain_linear(dy, weight, None, a, b, SCALE, True)
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        h = torch.nn.functional.silu(gate) * up
        return [h.detach(), gate.detach(), up.detach(), *us, *torch.autograd.grad(h, (gate, up), dh), v]

    def one_by_one(self, kernels, dtype: torch.dtype, device="cpu") -> list[Tensor]:
        """The same of `linear` and `gate`."""
        x, _, parts = self.both.at(dtype, device)
        (gate, up), us = zip(*(kernels.linear(x, *part, False) for part in parts))
        _, dy, weight, _, a, b = self.down.at(dtype, device)
        dh, v = kernels.linear(dy, weight, None, a, b, SCALE, True)
        return [kernels.gate(gate, up), gate, up, *us, *kernels.gate_backward(dh, gate, up), v]

    def run(self, kernels, dtype: torch.dtype, device="cpu") -> list[Tensor]:
        x, _, parts = self.both.at(dtype, device)
        h, gate, up, us = kernels.gated_linears(x, parts, True)
        _, dy, weight, _, a, b = self.down.at(dtype, device)
        return [h, gate, up, *us, *kernels.linear_gate_backward(dy, weight, a, b, SCALE, gate, up)]


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
