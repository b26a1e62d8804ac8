"""A layer's attention in parts: heads that do not see the same rows, rows that several sequences share, quantised rows.

Heads are told apart by slices of the tensors, which are views: ops take any strides of rows and heads. What a head sees in
several calls is merged; its backward is the sum of theirs, each with the o and lse of all rows.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.ops.fused import Composed
from diffmas.ops.register import call
from diffmas.trace.tables import Tables

__all__ = ["LayerAttention", "Part", "composed"]


class Part(NamedTuple):
    """Consecutive K/V heads of a layer that see the same rows, and where these are."""

    heads: slice
    tables: Tables
    views: dict[str, tuple | None]

    def rows(self, tensors: tuple[Tensor, ...] | None) -> tuple[Tensor, ...] | None:
        """Of tensors [rows, Hkv, ...], or none."""
        return tensors and tuple(x[:, self.heads] for x in tensors)

    def queries(self, group: int, *tensors: Tensor) -> list[Tensor]:
        """Of tensors [n, Hq, ...]. group: query heads of a K/V head."""
        return [x[:, self.heads.start * group : self.heads.stop * group] for x in tensors]


def composed(run: Callable) -> Callable:
    """What stands in for `call`: the two ops of a layer's backward one by one, each by `run`."""

    def both(name: str, like: Tensor, *args, backend: str, **found):
        if name != "inject_attend_backward":
            return run(name, like, *args, backend=backend, **found)
        parts = Composed(lambda part: functools.partial(run, part, like, backend=backend))
        return parts.inject_attend_backward(*args, **found)

    return both


class LayerAttention(NamedTuple):
    """Of a layer in a forward pass. n: its tokens. frozen: the quantised rows and their scales, where there are some."""

    layer: int
    n: int
    scale: float
    interleaved: bool
    backend: str
    frozen: tuple[Tensor, ...] | None

    def find(self, part: Part, kernel: str, k_pool: Tensor) -> Callable:
        """`AttentionWork.of` (name, q, view, causal)."""
        of = part.tables.work.of
        return functools.partial(of, kernel, self.layer, self.n, k_pool=k_pool, scale=self.scale, backend=self.backend)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def forward(self, parts: list[Part], q: Tensor, kv: tuple[Tensor, ...], whole: bool) -> tuple[Tensor, Tensor]:
        """q [n, Hq, D], rotated -> o, lse. whole: also rows that several sequences share are read by each."""
        if len(parts) == 1:
            return self._of_part(parts[0], q, kv, self.frozen, whole)
        group = q.shape[1] // kv[0].shape[1]
        of_each = (self._of_part(part, *part.queries(group, q), part.rows(kv), part.rows(self.frozen), whole) for part in parts)
        return tuple(torch.cat(x, 1) for x in zip(*of_each))

    def _of_part(self, part: Part, q: Tensor, kv, frozen, whole: bool) -> tuple[Tensor, Tensor]:
        find = self.find(part, "fwd", kv[0])
        states = [
            call(
                "cross_attention", q, q, *kv, *view, self.scale, causal, self.interleaved, backend=self.backend,
                **find(name, q, view, causal),
            )
            for name, view, causal, _ in _calls(part, whole)
        ]  # fmt: skip
        return self.with_frozen(part, q, states, frozen)

    def with_frozen(self, part: Part, q: Tensor, states: list, frozen: tuple[Tensor, ...] | None) -> tuple[Tensor, Tensor]:
        """The state of all rows, from those of what is not quantised."""
        if (view := part.views["frozen"]) is not None:
            found = self.find(part, "fwd", frozen[0])("frozen", q, view, False)
            args = (*frozen, *view, self.scale, self.interleaved)
            states = [*states, call("cross_attention_quantized", q, q, *args, backend=self.backend, **found)]
        return self.merged(q, states)

    def merged(self, q: Tensor, states: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """The state of all rows, from those of some each."""
        return functools.reduce(lambda a, b: call("merge_states", q, *a, *b, backend=self.backend), states)

    # ---- backward ----------------------------------------------------------------------------------------------------

    def backward(self, parts: list[Part], run: Callable, newest: bool) -> Callable:
        """`run`, but attention's backward is that of the parts. newest: whether dK and dV change for the newest rows alone."""

        def by_parts(name: str, q: Tensor, *args, **how):
            if name != "cross_attention_backward":
                return run(name, q, *args, **how)
            (do, _, q, o, lse, k, v), (dk, dv) = args[:7], args[16:18]
            if len(parts) == 1:
                return self._dq(parts[0], run, (do, q, o, lse), (k, v), self.frozen, (dk, dv), newest)
            group = q.shape[1] // k.shape[1]
            of_each = []
            for part in parts:
                *states, of_lse = part.queries(group, do, q, o, lse)
                rows = (part.rows(x) for x in ((k, v), self.frozen, (dk, dv)))
                of_each.append(self._dq(part, run, (*states, of_lse.contiguous()), *rows, newest))
            return torch.cat(of_each, 1)

        return composed(by_parts)

    def _dq(self, part: Part, run: Callable, states: tuple, kv, frozen, dkv, newest: bool) -> Tensor:
        """Of all rows; dK and dV of those that are not quantised, which have no gradient of their own."""
        (do, *rest), (_, q, *_) = states, states
        find, each = self.find(part, "dq", kv[0]), []
        for name, view, causal, tail in _calls(part, False):
            args = (*kv, *view, self.scale, causal, self.interleaved, *dkv, tail if newest else None, True)
            how = find(name, q, view, causal)
            each.append(run("cross_attention_backward", q, do, None, *rest, *args, backend=self.backend, **how))
        if (view := part.views["frozen"]) is not None:
            found = self.find(part, "dq", frozen[0])("frozen", q, view, False)
            args = (*states, *frozen, *view, self.scale, self.interleaved)
            each.append(call("cross_attention_quantized_backward", q, *args, backend=self.backend, **found))
        return functools.reduce(torch.add, each)


def _calls(part: Part, whole: bool) -> list[tuple]:
    """Of a view, or of the rows that several sequences share and of the rest: name, view, whether causal, and the grad_tail of
    the newest rows."""
    if part.views["shared"] is None or whole:
        return [("all", part.views["all"], True, part.tables.grad_tail)]
    shared, rest, none = part.views["shared"]
    return [("shared", shared, False, none), ("rest", rest, True, part.tables.grad_tail)]
