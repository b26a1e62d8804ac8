"""The gradients of LoRA's weights in a run of latent steps: one product for all steps, as with dK and dV of older rows.

A step's backward keeps what the gradients are made of, (x, u, dy, v) of diffmas.ops.linear. Before the run, in autograd's
graph, stands a node for each adapted linear, or for those of several layers (`Begin`): it has the weights' gradients to give,
each step takes its token, and so it runs when all steps have run backward.
"""

import functools
import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.ops.linear import lora_grads
from diffmas.trace.pool import of_this_pass

__all__ = ["LoraRun"]


class Kept:
    """By linear, what the steps that a backward pass has been through have kept, the last step first."""

    def __init__(self):
        self.steps: dict[int, list[tuple[Tensor, ...]]] = {}

    def clear(self) -> None:
        self.steps = {}


class LoraRun:
    """The linears of one run."""

    def __init__(self):
        self._tokens: dict[tuple, tuple[Tensor, int, object]] = {}
        self._kept: weakref.WeakValueDictionary[int, Kept] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def token(self, a: Tensor, b: Tensor, scale: float, ops) -> tuple[Tensor, int]:
        """What a step's linear with these weights depends on, and the number under which it keeps. ops: for `lora_grads`."""
        return self.begin((id(a), id(b), scale), (a, b), functools.partial(_of_one, scale, ops))

    def begin(self, key, weights: Sequence[Tensor], grads: Callable[[list[tuple]], Sequence[Tensor]]) -> tuple[Tensor, int]:
        """The same of linears whose steps are kept together. key: of nobody else, as long as weights or grads live. grads: the
        weights' gradients, of what the steps have kept."""
        found = self._tokens.get(key)
        if found is None:
            number = len(self._tokens)
            token = Begin.apply(weakref.ref(self), number, grads, *weights)
            found = self._tokens[key] = token, number, (weights, grads)
        return found[:2]

    def keep(self, number: int, *step: Tensor) -> None:
        self.kept(number).append(step)

    def kept(self, number: int) -> list[tuple[Tensor, ...]]:
        with self._lock:
            return of_this_pass(self._kept, Kept).steps.setdefault(number, [])


def _of_one(scale: float, ops, steps: list[tuple]) -> tuple[Tensor, Tensor]:
    x, u, dy, v = (torch.cat(parts) for parts in zip(*steps))
    steps.clear()
    return lora_grads(x, u, dy, v, scale, ops)


class Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, run, number, grads, *weights):
        ctx.rest = run, number, grads, len(weights)
        return weights[0].new_zeros(0)  # on the device: autograd runs backward on the stream where the steps' nodes run

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        run, number, grads, count = ctx.rest
        steps = run().kept(number)
        found = grads(steps) if steps else (None,) * count  # nothing came back to any of them
        steps.clear()
        return None, None, None, *found
