"""Watches the forward passes of one question: which rows they wrote, from what, and what each of them attended to.

Hooks on the bodies, as a gradient report has them (`diffmas.agents.gradients`); attention tells its queries
(`LayerWork.attended`), of which the weights are computed once more in plain PyTorch: a kernel keeps none. Quantised rows are
the numbers that their bytes stand for, rows with codes what these make of them, as the kernels read them. Weights are measured
by attention's own lse, so that they sum to 1 where they are those of the kernel.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffmas.models.patch import patch_of
from diffmas.ops.quantize import dequantize
from diffmas.ops.reference import accumulator, sequences
from diffmas.trace.attention_parts import Part
from diffmas.trace.layer_work import LayerWork
from diffmas.trace.views import FROZEN, Segment, rows_of, table_of

__all__ = ["Pass", "Watch", "attention_weights"]

QUERIES = 128  # at once: weights of all heads are wide


@dataclass
class Pass:
    """A forward pass over n tokens of one sequence.

    positions [n]: of the rows that it wrote. segments: that it saw, its own rows at the end, N in all. ids [n]: of its tokens;
    None for latent rows. h [n, hidden]: the last hidden states. fed, x [n, hidden]: of latent steps, the hidden states that
    went in, and the embeddings that these became; None for what an encoder has made. sees: by layer, which of the N rows it
    saw, in order. weights: by layer, [n, rows that it saw], the mean over heads.
    """

    agent: str
    kind: str
    positions: np.ndarray
    segments: list[Segment]
    ids: Tensor | None
    fed: Tensor | None = None
    x: Tensor | None = None
    h: Tensor | None = None
    sees: dict[int, np.ndarray] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def attention_weights(
    q: Tensor, lse: Tensor, k_pool: Tensor, view: tuple, causal: bool, scale: float, interleaved: bool
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What one sequence pays to the rows of a view, the mean over heads, [n, N]; and these rows [N]. lse [n, Hq]: of all rows
    that it sees, in this view or not. Other arguments: of `diffmas.ops.cross_attention`."""
    ((_, _, rows, keys, _, visible, _),) = sequences(q, k_pool, k_pool, *view, causal, interleaved)
    G, parts = q.shape[1] // keys.shape[1], []
    by_head = lambda x: x.to(keys.dtype).unflatten(1, (-1, G))
    for queries, total, seen in zip(q.split(QUERIES), lse.split(QUERIES), visible.split(QUERIES)):
        scores = torch.einsum("lhgd,nhd->hgln", by_head(queries), keys) * scale - by_head(total).permute(1, 2, 0)[..., None]
        parts.append(scores.masked_fill(~seen, -torch.inf).exp().mean((0, 1)).cpu())
    return torch.cat(parts), rows.cpu()


class Watch:
    """The passes of a system's forward over one question, from `__enter__` to `__exit__`; nobody else may run it meanwhile."""

    def __init__(self, system):
        self._system, self._hooks = system, []
        self._realigned: tuple[Tensor, Tensor] | None = None
        self._running: Pass | None = None
        self._work: LayerWork | None = None  # of the pass that is running
        self._rows = self._order = np.zeros(0, dtype=np.int64)  # that it sees, by segment; and what sorts them
        self.passes: list[Pass] = []

    def __enter__(self) -> "Watch":
        self._system.together = False  # a pass is one agent's
        for member in (self._system, *(x for x in self._system.others.values() if x.reading != "embeddings")):
            body = patch_of(member.model).body
            self._hooks += [
                member.realign.register_forward_hook(self._realign),
                body.register_forward_pre_hook(self._before, with_kwargs=True),
                body.register_forward_hook(self._after),
            ]
        return self

    def __exit__(self, *_) -> None:
        self._system.together = True
        for hook in self._hooks:
            hook.remove()

    def _realign(self, realign, args, x) -> None:
        self._realigned = args[0].detach(), x.detach()

    def _before(self, body, args, kwargs) -> None:
        forward_pass = kwargs.get("diffmas_trace")
        self._running, (fed, x), self._realigned = None, self._realigned or (None, None), None
        if forward_pass is None or forward_pass.table is None:
            return
        segments = next(row for row, n in zip(forward_pass.table.segments, forward_pass.lengths) if n)
        newest = segments[-1]
        if newest.agent is None:  # measures which rows an agent reads
            return
        ids = kwargs.get("input_ids")
        self._running = Pass(
            newest.agent, newest.kind, forward_pass.positions.copy(), segments, None if ids is None else ids[0].cpu()
        )  # fmt: skip
        if newest.kind == "latent":
            self._running.fed, self._running.x = fed, x
        self._work, self._rows = forward_pass.work, rows_of(segments)
        self._order = np.argsort(self._rows)
        self._work.attended = self._attended

    def _sources(self, layer: int, n: int, kv: tuple[Tensor, Tensor], part: Part, dtype: torch.dtype) -> Iterator[tuple]:
        """Where some heads' rows are: the keys of all heads, what is seen of them, whether causal, and each key's number in
        segments, or what is added for it."""
        yield kv[0], part.views["all"], True, 0
        if (view := part.views["frozen"]) is not None:
            k, _, scale, _ = self._work.frozen_rows.layers[layer]
            yield dequantize(k, scale, dtype), view, False, FROZEN
        inv_freq, upload = part.views["all"][5], lambda x: torch.tensor(x, dtype=torch.int64, device=kv[0].device)
        for numbers, ranges, (k, _) in self._work.coded.seen(layer, kv) if self._work.coded is not None else ():
            *table, offsets = map(upload, ([0, n], *table_of([ranges])))
            yield k, (*table, None if inv_freq is None else offsets, inv_freq), False, numbers

    def _attended(
        self, layer: int, q: Tensor, o, lse: Tensor, kv: tuple[Tensor, Tensor], parts: list[Part], scale: float,
        interleaved: bool,
    ) -> None:  # fmt: skip
        (n, Hq, _), Hkv = q.shape, kv[0].shape[1]
        dtype = accumulator(q.dtype)
        weights, seen = torch.zeros(n, len(self._rows), dtype=dtype), np.zeros(len(self._rows), dtype=bool)
        for part in parts:  # rows that a head does not see get nothing from it
            queries, total = part.queries(Hq // Hkv, q, lse)
            share = (part.heads.stop - part.heads.start) / Hkv
            for keys, view, causal, numbers in self._sources(layer, n, kv, part, dtype):
                found, rows = attention_weights(queries, total, keys[:, part.heads], view, causal, scale, interleaved)
                rows = numbers[rows.numpy()] if isinstance(numbers, np.ndarray) else rows.numpy() + numbers
                at = self._order[np.searchsorted(self._rows, rows, sorter=self._order)]
                weights[:, at] += share * found.to(dtype)
                seen[at] = True
        self._running.weights[layer], self._running.sees[layer] = weights[:, seen], np.flatnonzero(seen)

    def _after(self, body, args, output) -> None:
        if self._running is not None:
            h = output[0] if isinstance(output, tuple) else output.last_hidden_state
            self._running.h = h[0].detach()
            self.passes.append(self._running)
