"""What stands before and after attention in a latent step's layer, with gradients: a node of autograd each for ten.

With one token a sequence, going through autograd's nodes takes longer than what most of them do. The ops are those that
the layer's parts call one by one (diffmas.models.linears, diffmas.models.pointwise), in the same order, backward too: to the
bit the same. Gradients of LoRA's weights wait for the end of the run (diffmas.trace.lora_run).
"""

import itertools
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.attention import attend
from diffmas.models.linear_parts import Waiting, waiting
from diffmas.models.plain_layer import plain_layer
from diffmas.models.pointwise import rows_of_numbers, unflattened
from diffmas.ops.layer import layer_ops
from diffmas.ops.linear import FEW_ROWS, linear
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["AfterAttention", "Learning", "NormedLinears", "learning_layer"]


class Learning(NamedTuple):
    """A linear of a latent step: its parts (diffmas.models.linear_parts), where its adapter's gradients wait, and the kernels
    (diffmas.ops.layer)."""

    parts: tuple
    waiting: Waiting | None
    ops: object

    @property
    def token(self) -> Tensor | None:
        return self.waiting and self.waiting.token

    def forward(self, x: Tensor) -> tuple[Tensor, tuple]:
        """y, and what backward needs of the adapter's: x and u."""
        y, u = linear(x, *self.parts, ops=self.ops)
        return y, (x, u) if self.waiting is not None else (None, None)

    def backward(self, dy: Tensor, x: Tensor | None, u: Tensor | None) -> Tensor:
        """dx; keeps what the adapter's gradients are made of."""
        weight, _, a, b, scale = self.parts
        dx, v = linear(dy, weight, None, a, b, scale, transposed=True, ops=self.ops)
        if self.waiting is not None:
            self.waiting.run.keep(self.waiting.number, x, u, dy, v)
        return dx


def _weights(linears) -> tuple:
    """What backward reads of them, and autograd watches."""
    return tuple(w for one in linears for w in (one.parts[0], *one.parts[2:4]))


class NormedLinears(torch.autograd.Function):
    """x [1, n, hidden] -> linears of its RMSNorm, [1, n, out] each. norm: its weight and eps."""

    @staticmethod
    def forward(ctx, x, norm, linears, *tokens):
        weight, eps = norm
        normed = linears[0].ops.norm(rows_of_numbers(x), weight, eps)
        ys, kept = zip(*(one.forward(normed) for one in linears))
        ctx.save_for_backward(x, weight, *itertools.chain(*kept), *_weights(linears))
        ctx.rest = eps, linears
        return tuple(unflattened(y, x) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        return (_before_once if torch.is_grad_enabled() else _before)(ctx, *dys)


def _before(ctx, *dys):
    eps, linears = ctx.rest
    x, weight, *kept = ctx.saved_tensors
    dnormed = None
    for i, (one, dy) in reversed([*enumerate(zip(linears, dys))]):  # autograd's order, in which their sums round
        dx = one.backward(rows_of_numbers(dy), *kept[2 * i : 2 * i + 2])
        dnormed = dx if dnormed is None else dnormed.add_(dx)
    dx = linears[0].ops.norm_backward(dnormed, rows_of_numbers(x), weight, eps)
    return dx.view(x.shape), None, None, *(None for _ in linears)


class AfterAttention(torch.autograd.Function):
    """Attention's o [1, n, Hq * D] and the layer's x [1, n, hidden] -> what the layer returns. linears: out, gate, up, down."""

    @staticmethod
    def forward(ctx, o, x, norm, linears, *tokens):
        (out, gate, up, down), (weight, eps), ops = linears, norm, linears[0].ops
        y, of_out = out.forward(rows_of_numbers(o))
        middle = rows_of_numbers(x) + y
        normed = ops.norm(middle, weight, eps)
        (gate_y, of_gate), (up_y, of_up) = gate.forward(normed), up.forward(normed)
        y, of_down = down.forward(ops.gate(gate_y, up_y))
        ctx.save_for_backward(middle, weight, gate_y, up_y, *of_out, *of_gate, *of_up, *of_down, *_weights(linears))
        ctx.rest = eps, linears
        return unflattened(middle + y, x)

    @staticmethod
    def backward(ctx, dy):
        return (_after_once if torch.is_grad_enabled() else _after)(ctx, dy)


def _after(ctx, dy):
    eps, (out, gate, up, down) = ctx.rest
    middle, weight, gate_y, up_y, *kept = ctx.saved_tensors
    of_out, of_gate, of_up, of_down = (kept[i : i + 2] for i in range(0, 8, 2))
    dy, ops = rows_of_numbers(dy), out.ops
    dgate, dup = ops.gate_backward(down.backward(dy, *of_down), gate_y, up_y)
    dnormed = up.backward(dup, *of_up)
    dnormed.add_(gate.backward(dgate, *of_gate))
    dmiddle = dy + ops.norm_backward(dnormed, middle, weight, eps)
    do = out.backward(dmiddle, *of_out)
    return do[None], dmiddle[None], None, None, *(None for _ in range(4))


_before_once, _after_once = once_differentiable(_before), once_differentiable(_after)


def _learning(linears: list[tuple], forward_pass: ForwardPass, ops) -> list[Learning] | None:
    """None where the gradients of an adapter do not wait."""
    found = []
    for parts in linears:
        weights = parts[2:4]
        waits = waiting(*weights, parts[4], forward_pass, ops)
        if waits is None and any(w is not None and w.requires_grad for w in weights):
            return None
        found.append(Learning(parts, waits, ops))
    return found


def learning_layer(layer: nn.Module, forward_pass: ForwardPass, args: tuple, kwargs: dict) -> Tensor | None:
    """The output of a decoder layer whose forward was called with these arguments, x [1, n, hidden] first; None where the layer
    has to do it."""
    x = args[0] if args else kwargs["hidden_states"]
    kernels = layer_ops(x, forward_pass.work.spec.fused)
    if kernels is None or x.shape[1] > FEW_ROWS or not x.requires_grad or _has_any_global_hook():
        return None
    if "position_embeddings" not in kwargs or (plain := plain_layer(layer, kernels)) is None:
        return None
    attention, (before, after), linears = plain
    if (learning := _learning(linears, forward_pass, kernels.ops)) is None:
        return None
    q, k, v = NormedLinears.apply(x, before, learning[:3], *(one.token for one in learning[:3]))
    o = attend(attention, forward_pass, q, k, v, *kwargs["position_embeddings"], kwargs.get("position_ids"))
    return AfterAttention.apply(o, x, after, learning[3:], *(one.token for one in learning[3:]))
