"""Watches the forward passes of one question: which rows they wrote, from what, and what each of them attended to.

Hooks on the body, as a gradient report has them (`diffmas.agents.gradients`); attention tells its queries
(`LayerWork.attended`), of which the weights are computed once more in plain PyTorch: a kernel keeps none.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from diffmas.models.patch import patch_of
from diffmas.ops.reference import sequences
from diffmas.trace.attention_parts import Part
from diffmas.trace.store import Hold

__all__ = ["Pass", "Watch", "attention_weights"]

QUERIES = 128  # at once: weights of all heads are wide


@dataclass
class Pass:
    """A forward pass over n tokens of one sequence.

    slots, positions [n]: of the rows that it wrote. ids [n]: of its tokens; None for latent steps. h [n, hidden]: the last
    hidden states. fed, x [n, hidden]: of latent steps, the hidden states that went in, and the embeddings that these became.
    sees: by layer, [N], the slots that it saw, its own at the end. weights: by layer, [n, N], the mean over heads. hold: of the
    rows that it saw, which nobody else writes as long as it lives: a slot means one row in all passes that are kept.
    """

    agent: str
    kind: str
    slots: np.ndarray
    positions: np.ndarray
    ids: Tensor | None
    hold: Hold
    fed: Tensor | None = None
    x: Tensor | None = None
    h: Tensor | None = None
    sees: dict[int, np.ndarray] = field(default_factory=dict)
    weights: dict[int, Tensor] = field(default_factory=dict)


@torch.no_grad()
def attention_weights(q: Tensor, k_pool: Tensor, view: tuple, scale: float, interleaved: bool) -> tuple[Tensor, Tensor]:
    """softmax(q k') of one sequence, the mean over heads, [n, N]; and the rows [N] that it sees. Arguments: of
    `diffmas.ops.cross_attention`, causal."""
    ((_, _, rows, keys, _, visible, _),) = sequences(q, k_pool, k_pool, *view, True, interleaved)
    G, parts = q.shape[1] // keys.shape[1], []
    for queries, seen in zip(q.split(QUERIES), visible.split(QUERIES)):
        scores = torch.einsum("lhgd,nhd->hgln", queries.to(keys.dtype).unflatten(1, (-1, G)), keys) * scale
        parts.append(scores.masked_fill(~seen, -torch.inf).softmax(-1).mean((0, 1)).cpu())
    return torch.cat(parts), rows.cpu()


class Watch:
    """The passes of a system's forward over one question, from `__enter__` to `__exit__`; nobody else may run it meanwhile."""

    def __init__(self, system):
        self._system, self._body, self._hooks = system, patch_of(system.model).body, []
        self._realigned: tuple[Tensor, Tensor] | None = None
        self._running: Pass | None = None
        self.passes: list[Pass] = []

    def __enter__(self) -> "Watch":
        self._system.together = False  # a pass is one agent's
        self._hooks = [
            self._system.realign.register_forward_hook(self._realign),
            self._body.register_forward_pre_hook(self._before, with_kwargs=True),
            self._body.register_forward_hook(self._after),
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
        self._running = None
        if forward_pass is None or forward_pass.table is None:
            return
        if not forward_pass.work.plain:  # `LayerWork.attended` is not told
            raise ValueError("trace: expected rows as they were written, whose attention is shown, got quantised ones or codes")
        newest = next(row[-1] for row, n in zip(forward_pass.table.segments, forward_pass.lengths) if n)
        if newest.agent is None:  # measures which rows an agent reads
            return
        ids = kwargs.get("input_ids")
        self._running = Pass(
            newest.agent, newest.kind, forward_pass.work.slots.copy(), forward_pass.positions.copy(),
            None if ids is None else ids[0].cpu(), forward_pass.work.hold,
        )  # fmt: skip
        if newest.kind == "latent":
            self._running.fed, self._running.x = self._realigned
        forward_pass.work.attended = self._attended

    def _attended(self, layer: int, q: Tensor, o, lse, kv: tuple[Tensor, Tensor], parts: list[Part], *how) -> None:
        group, n = q.shape[1] // kv[0].shape[1], len(q)
        each = []
        for part in parts:
            (queries,), (keys,) = part.queries(group, q), part.rows(kv[:1])
            each.append(attention_weights(queries, keys, part.views["all"], *how))
        if len(each) == 1:
            ((weights, sees),) = each
        else:  # rows that a head does not see get nothing from it
            before = dict.fromkeys(row for _, rows in each for row in rows[:-n].tolist())
            sees = torch.tensor([*before, *each[0][1][-n:].tolist()])
            weights = each[0][0].new_zeros(n, len(sees))
            for (of_part, rows), part in zip(each, parts):
                share = (part.heads.stop - part.heads.start) / kv[0].shape[1]
                weights[:, (sees == rows[:, None]).int().argmax(1)] += share * of_part
        self._running.weights[layer], self._running.sees[layer] = weights, sees.numpy()

    def _after(self, body, args, output) -> None:
        if self._running is not None:
            h = output[0] if isinstance(output, tuple) else output.last_hidden_state
            self._running.h = h[0].detach()
            self.passes.append(self._running)
