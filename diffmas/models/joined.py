"""Linears of few rows that kernels take together: those that read the same rows, and a gated feed-forward part. One node of
autograd each, with two launches for what reads the same rows, forward and backward.

What they make are the numbers of the linears one by one; so is the sum of the gradients to what they read, which is rounded
where autograd rounds it. Where one of them is not of the common kind, or somebody sees what goes into it, each goes alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.linear_parts import Learning, learning, lora_grads_of, unseen_parts
from diffmas.models.rows import rows_of_numbers, unflattened
from diffmas.models.running import forward_pass_here
from diffmas.ops.layer import layer_ops
from diffmas.ops.linear import FEW_ROWS, Adapter
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["feed_forward", "same_rows"]

Parts = list[tuple]  # of each linear `alone` (diffmas.ops.linear)


def same_rows(modules: Sequence[nn.Module], x: Tensor) -> tuple[Tensor, ...] | None:
    """What linears make of x [..., in], [..., out] each; None where each has to go alone."""
    found = _served(modules, x)
    if found is None or not _alike(found[1], x.shape[-1]):
        return None
    ops, parts, forward_pass = found
    if not _has_gradients(x, parts):
        return tuple(unflattened(y, x) for y in ops.linears(rows_of_numbers(x), parts)[0])
    inputs, waits = _learning(parts, forward_pass, ops)
    return Linears.apply(x, (parts, waits, ops), *inputs)


def feed_forward(gate: nn.Module, up: nn.Module, down: nn.Module, x: Tensor) -> Tensor | None:
    """down(silu(gate(x)) up(x)) of linears, x [..., hidden]; None where each has to go alone."""
    found = _served((gate, up, down), x)
    if found is None:
        return None
    ops, parts, forward_pass = found
    width = len(parts[0][0])
    if not _alike(parts[:2], x.shape[-1]) or len(parts[1][0]) != width or parts[2][0].shape[1] != width:
        return None
    if not _has_gradients(x, parts):
        y, *_ = ops.gated_linears(rows_of_numbers(x), parts[:2], False)
        return unflattened(ops.linear(y, *parts[2], False)[0], x)
    inputs, waits = _learning(parts, forward_pass, ops)
    return FeedForward.apply(x, (parts, waits, ops), *inputs)


def _served(modules: Sequence[nn.Module], x: Tensor) -> tuple[object, Parts, ForwardPass] | None:
    if torch.compiler.is_compiling() or (here := forward_pass_here()) is None or _has_any_global_hook():
        return None
    kernels = layer_ops(x, here.work.spec.fused)
    if kernels is None or not kernels.joins or not kernels.takes(x) or x.numel() > FEW_ROWS * x.shape[-1]:
        return None
    parts = []
    for module in modules:
        found = unseen_parts(module, kernels)
        if found is None or len(found.adapters) > 1:
            return None
        parts.append(found.alone)
    return kernels.ops, parts, here


def _alike(parts: Parts, length: int) -> bool:
    return len({bias is None for _, bias, *_ in parts}) == 1 and all(weight.shape[1] == length for weight, *_ in parts)


def _has_gradients(x: Tensor, parts: Parts) -> bool:
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any(w is not None and w.requires_grad for part in parts for w in part[2:4])


def _learning(parts: Parts, forward_pass: ForwardPass, ops) -> tuple[list, list[tuple]]:
    """Of all linears one after the other `Learning.inputs`; and run and number of each."""
    own = [None if part[2] is None else Adapter(*part[2:]) for part in parts]
    found = [Learning() if adapter is None else learning(adapter, forward_pass, ops) for adapter in own]
    return [x for one in found for x in one.inputs], [one[1:] for one in found]


def _wanted(ctx) -> list[tuple]:
    """Which gradients to a linear's `Learning.inputs` are, by linear."""
    flags = ctx.needs_input_grad[2:]
    return [flags[i : i + 3] for i in range(0, len(flags), 3)]


def _keep(ctx, parts: Parts, waits, ops, xs: list, us: list, *more: Tensor) -> None:
    """xs, us: rows that a linear has read, and u of them."""
    wanted = [any(x) for x in _wanted(ctx)]  # as in torch, the gradient to the input needs the weights alone
    xs, us = ([x if w else None for x, w in zip(some, wanted)] for some in (xs, us))
    ctx.save_for_backward(*more, *xs, *us, *(part[i] for i in (0, 2, 3) for part in parts))
    ctx.rest = [part[4] for part in parts], waits, ops


def _kept(ctx, more: int) -> tuple:
    """What `_keep` was given: more, xs, us, and parts without biases."""
    scales, waits, ops = ctx.rest
    kept, count = ctx.saved_tensors, len(scales)
    xs, us, weights, a, b = (kept[i : i + count] for i in range(more, more + 5 * count, count))
    return kept[:more], xs, us, list(zip(weights, count * [None], a, b, scales)), waits, ops


class Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rest, *inputs):
        parts, waits, ops = rest
        ys, us = ops.linears(rows_of_numbers(x), parts)
        _keep(ctx, parts, waits, ops, len(parts) * [x], us)
        return tuple(unflattened(y, x) for y in ys)

    @staticmethod
    def backward(ctx, *dys):
        return (_linears_backward_once if torch.is_grad_enabled() else _linears_backward)(ctx, *dys)


def _linears_backward(ctx, *dys):
    _, xs, us, parts, waits, ops = _kept(ctx, 0)
    rows, dx, vs = [rows_of_numbers(dy) for dy in dys], None, len(parts) * [None]
    if ctx.needs_input_grad[0]:
        dx, vs = ops.linears_backward(rows, parts)
        dx = unflattened(dx, dys[0])
    return dx, None, *_lora_grads(_wanted(ctx), waits, xs, us, rows, vs, parts, ops)


def _lora_grads(*of_each) -> list:
    *of_each, parts, ops = of_each
    found = []
    for wanted, (run, number), x, u, dy, v, (_, _, _, b, scale) in zip(*of_each, parts):
        found += lora_grads_of(wanted, run, number, x, u, dy, v, b, scale, ops)
    return found


class FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rest, *inputs):
        parts, waits, ops = rest
        h, gate, up, us = ops.gated_linears(rows_of_numbers(x), parts[:2], True)
        y, u = ops.linear(h, *parts[2], False)
        _keep(ctx, parts, waits, ops, [x, x, h], [*us, u], gate, up)
        return unflattened(y, x)

    @staticmethod
    def backward(ctx, dy):
        return (_feed_forward_backward_once if torch.is_grad_enabled() else _feed_forward_backward)(ctx, dy)


def _feed_forward_backward(ctx, dy):
    (gate, up), xs, us, parts, waits, ops = _kept(ctx, 2)
    rows, (weight, _, a, b, scale) = rows_of_numbers(dy), parts[2]
    dgate, dup, v = ops.linear_gate_backward(rows, weight, a, b, scale, gate, up)
    dx, vs = None, [None, None]
    if ctx.needs_input_grad[0]:
        dx, vs = ops.linears_backward([dgate, dup], parts[:2])
        dx = unflattened(dx, dy)
    return dx, None, *_lora_grads(_wanted(ctx), waits, xs, us, [dgate, dup, rows], [*vs, v], parts, ops)


_linears_backward_once = once_differentiable(_linears_backward)
_feed_forward_backward_once = once_differentiable(_feed_forward_backward)
