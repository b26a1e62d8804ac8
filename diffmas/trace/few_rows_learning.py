"""Decoder layers of few rows with gradients: one node of autograd for all of them, an op forward and an op backward.

With one token a sequence, going through a layer's parts, and through autograd's nodes for them, takes longer than what most of
them do. The ops are those that the parts call one by one, in the order in which autograd runs them and adds up: to the bit the
same. Gradients of LoRA's weights wait for the end of the run (diffmas.trace.lora_run); dK and dV of the rows before it, too.
"""

import contextlib
import functools

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.trace.autograd import node
from diffmas.trace.few_rows import Weights, arguments, ends_of, few_rows_layers, ready
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.lora_run import LoraRun
from diffmas.trace.spec import LayerSpec

__all__ = ["learning_layers"]

KEPT = 6  # tensors that the op leaves beside y: rotated q, o, lse; rows that backward reads; rows and floats for adapters


class Layers(torch.autograd.Function):
    """x [1, n, hidden] -> y. order, token: inputs that say what this stands behind. rest: one argument, since autograd looks at
    each in Python."""

    @staticmethod
    def forward(ctx, x, order, token, rest):
        work, layers, weights, cos, sin, scale, waiting = rest
        y, *kept = few_rows_layers(work, layers, x, weights, cos, sin, scale, learning=True)
        ctx.save_for_backward(x, *kept, *weights.norms, *weights.linears, *weights.head_norms)
        ctx.rest = work.ref, layers, weights, cos, sin, scale, waiting
        return y

    @staticmethod
    def backward(ctx, dy):
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx, dy):
    with torch.autocast("cpu", enabled=False):  # which the forward was not under either
        return _backward_as_it_is(ctx, dy)


def _backward_as_it_is(ctx, dy):
    x, *kept = ctx.saved_tensors[: 1 + KEPT]
    work, layers, weights, cos, sin, scale, waiting = ctx.rest
    work = work()
    choices = [work.choices[layer.index] for layer in layers]
    grads = [work.store.pools[layer.index].grads() for layer in layers]
    tables, views = work.read_by(layers[0], x.device)
    with contextlib.ExitStack() as held:
        lent = [
            held.enter_context(of_layer.lend(work.lineage, work.views, work.grad_tail if own_rows_only else None))
            for of_layer, (own_rows_only, _) in zip(grads, choices)
        ]
        dx, do, rows, floats = torch.ops.diffmas_native.few_rows_layers_backward(
            dy.contiguous(), x, kept, *arguments(work, layers, weights, cos, sin, scale, lent), [dk for *_, dk, _ in lent],
            [dv for *_, dv in lent], [own_rows_only for own_rows_only, _ in choices], tables.grad_tail,
            views["shared"][2] if views["shared"] is not None else None,
        )  # fmt: skip
    for of_layer, (_, deferred), step in zip(grads, choices, zip(*(t.unbind() for t in (do, *kept[:3])))):
        if deferred is not None:
            of_layer.steps(work.lineage, deferred).append(step)
    if waiting is not None:
        run, number = waiting
        run.keep(number, kept[1], *kept[4:], rows, floats)
    return dx, None, None, None


_backward_once = once_differentiable(_backward)
_layers = node(Layers)


def _lora_grads(weights: Weights, ends: list[int], steps: list[tuple[Tensor, ...]]) -> list[Tensor]:
    return torch.ops.diffmas_native.few_rows_lora_grads(*weights.of_layers, ends, *map(list, zip(*steps)))


def learning_layers(
    forward_pass: ForwardPass, layers: list[LayerSpec], x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, scale: float
) -> Tensor | None:
    """What `few_rows_layers` makes of x, which needs a gradient; None where it cannot be one node."""
    work, order, token, waiting = forward_pass.work, forward_pass.order, None, None
    if order is None or not order.requires_grad or work.watch is not None or not ready(work, layers, x.device, learning=True):
        return None
    if weights.learning:
        if work.deferred is None:
            return None
        run = work.deferred.lora = work.deferred.lora or LoraRun()
        grads = functools.partial(_lora_grads, weights, ends_of(work, weights))  # the same in all steps of a run
        token, number = run.begin(id(weights), weights.learning, grads)
        waiting = run, number
    return _layers(x, order, token, (work, layers, weights, cos, sin, scale, waiting))
