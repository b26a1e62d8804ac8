"""Clipping the gradient that goes from a latent step to the hidden state before it.

A latent step can multiply a gradient, and T of them by its T-th power: most sequences' stays below what their answers get, and
single ones' comes to thousands of times as much (docs/log.md). Clipping the norm of the parameters' gradient
(`max_grad_norm`) leaves nothing but those of such a batch. Here each sequence is clipped at each step, before
it is multiplied again (for recurrent networks: Pascanu et al., arXiv 1211.5063), in units of the gradient of its own answer:
what comes out depends on the batch as little as on the loss's scale. A gradient whose norm is not finite is not clipped: it
stays what it is, for whoever looks for one (`Trainer` stops there), where `torch.nn.utils.clip_grad_norm_` makes it NaN and 0.
"""

import contextlib
import functools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.trace.pool import of_this_pass

__all__ = ["GradientClip", "clipping", "current_clip"]

_current: ContextVar["GradientClip | None"] = ContextVar("diffmas_gradient_clip", default=None)


def current_clip() -> "GradientClip | None":
    """Of the `clipping` that this thread is inside of, where gradients are recorded."""
    return _current.get() if torch.is_grad_enabled() else None


@contextlib.contextmanager
def clipping(times: float | None) -> "Iterator[GradientClip | None]":
    """Inside, latent steps clip their gradient, in the norm of the answers that the clip is told; None: they do not."""
    token = _current.set(None if times is None else GradientClip(times))
    try:
        yield _current.get()
    finally:
        _current.reset(token)


class GradientClip:
    """Of the episodes of one batch. times: the largest norm of dL/dh at a sequence's latent step, in norms of dL/dh of its
    answer's last hidden states."""

    def __init__(self, times: float):
        self.times = times
        self._lock = threading.Lock()
        self._answers: weakref.WeakValueDictionary[int, AnswerNorms] = weakref.WeakValueDictionary()

    def answer(self, lengths: list[int], of: list[int]) -> Callable[[Tensor], None]:
        """To be told the last hidden states of the last agent's prompts and answers, [1, n, hidden]. lengths: of each. of: the
        sequence that the others wrote for it; of answers to one sequence the norm is taken together."""

        def told(h: Tensor) -> None:
            if h.requires_grad:
                h.register_hook(functools.partial(self._measure, lengths, of))

        return told

    def _measure(self, lengths: list[int], of: list[int], dh: Tensor) -> None:
        squares = _norms(dh.flatten(0, -2)).square()
        of_answers = torch.stack([x.sum() for x in squares.split(lengths)])
        sums = of_answers.new_zeros(max(of) + 1).index_add_(0, torch.tensor(of, device=dh.device), of_answers)
        self._of_this_pass().norms = sums.sqrt()

    def step(self, h: Tensor, sequences: Tensor | None) -> Tensor:
        """h [n, hidden], before a latent step of these sequences, None: of all; those of several agents, agent by agent. The
        same, whose gradient is clipped."""
        return _Clipped.apply(h, self, sequences) if h.requires_grad else h

    def clip(self, dh: Tensor, sequences: Tensor | None) -> Tensor:
        answers = self._of_this_pass().norms
        if answers is None:  # a loss that has no answer in it
            return dh
        most, norms = self.times * answers.to(dh.device), _norms(dh)
        if sequences is not None or len(norms) > len(most):  # agents that share a forward have a sequence for each question
            sequences = torch.arange(len(norms), device=dh.device) if sequences is None else sequences
            most = most[sequences % len(most)]
        longer = (norms > most) & norms.isfinite()
        return dh * torch.where(longer, most / norms, 1.0).to(dh.dtype)[:, None]

    def _of_this_pass(self) -> "AnswerNorms":
        with self._lock:
            return of_this_pass(self._answers, AnswerNorms)


class AnswerNorms:
    """What one backward pass found out: |dL/dh| of each sequence's answer, [B]."""

    def __init__(self):
        self.norms: Tensor | None = None

    def clear(self) -> None:
        self.norms = None


def _norms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dim=-1, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


class _Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h, clip, sequences):
        ctx.clip, ctx.sequences = clip, sequences
        return h.view_as(h)

    @staticmethod
    @once_differentiable
    def backward(ctx, dh):
        return ctx.clip.clip(dh, ctx.sequences), None, None
