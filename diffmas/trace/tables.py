"""A forward pass as int64 tensors on one device: where its tokens go, and the tables of segments that they see."""

from collections.abc import Sequence
from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.attention_work import AttentionWork
from diffmas.trace.views import KVRange, length_of, share, table_of

__all__ = ["Tables"]

DECODE_TOKENS = 8  # up to this many a sequence, reading K and V costs more than the products


class Tables:
    """slots, positions [n]; q_indptr [B + 1]; grad_tail [B]; and for each view the arguments of `cross_attention`. One copy to
    the device for all of them, without a wait. work: what attention finds in these views."""

    def __init__(
        self, device: torch.device, lengths: list[int], slots: np.ndarray, positions: np.ndarray, grad_tail: list[int],
        views: list[list[KVRange]], older: list[list[KVRange]] | None, frozen: list[list[KVRange]] | None = None,
    ):  # fmt: skip
        parts = [list(accumulate(lengths, initial=0)), grad_tail, *table_of(views)]
        if older is not None:
            parts += table_of(older)
        if frozen is not None:
            ends, frozen = _grouped(lengths, frozen)
            parts += [ends, *table_of(frozen)]
        # Few queries of several sequences are served faster by one pass over the rows that all of them read.
        groups = share(views) if 1 < len(lengths) and max(lengths) <= DECODE_TOKENS else None
        rows = {"all": sum(map(length_of, views)), "frozen": sum(map(length_of, frozen or []))}
        if groups is not None:
            sizes, shared, rest = groups
            rows |= {"shared": sum(map(length_of, shared)), "rest": sum(map(length_of, rest))}
            ends = [0, *(end for end, last in zip(accumulate(lengths), _last_of_each(sizes)) if last)]
            parts += [ends, *table_of(shared), *table_of(rest)]
        self._packed = _upload(np.concatenate((slots, positions, list(chain.from_iterable(parts)))), device)
        self._sizes = [len(slots), len(positions), *map(len, parts)]
        self._step: Tensor | None = None  # what a latent step adds to `_packed`
        self.slots, positions, self.q_indptr, self.grad_tail, *tables = self._packed.split_with_sizes(self._sizes)
        self.position_ids = positions[None]
        self._all, tables = tables[:4], tables[4:]
        self._older = self._frozen = self._groups = self._shared = self._rest = None
        if older is not None:
            self._older, tables = tables[:4], tables[4:]
        if frozen is not None:
            self._frozen, tables = tables[:5], tables[5:]
        if groups is not None:
            self._groups, self._shared, self._rest = tables[0], tables[1:5], tables[5:]
        self.work = AttentionWork(rows)
        self._at_offsets: dict | None = None
        self.as_written = self._views(None)

    def _views(self, inv_freq: Tensor | None) -> dict[str, tuple | None]:
        """By name: q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq. older: without q_indptr; shared: two views;
        frozen: of quantised rows."""
        older = shared = frozen = None
        if self._older is not None:
            older = _read(self._older, inv_freq)
        if self._groups is not None:
            shared = (self._groups, *_read(self._shared, inv_freq)), (self.q_indptr, *_read(self._rest, inv_freq))
        if self._frozen is not None:
            frozen = (self._frozen[0], *_read(self._frozen[1:], inv_freq))
        return {"all": (self.q_indptr, *_read(self._all, inv_freq)), "older": older, "shared": shared, "frozen": frozen}

    def at_offsets(self, inv_freq: Tensor) -> dict[str, tuple | None]:
        """The views for layers that rotate, where a segment is read at a position offset."""
        if self._at_offsets is None:
            self._at_offsets = self._views(inv_freq)
        return self._at_offsets

    def can_move(self, run: bool, room: int) -> None:
        """Makes ready for `move`. run: the rows of a run's earlier steps learn too, one more with every step. room: rows that
        all views together may get."""
        self.work.can_move(room)
        self._step = torch.zeros_like(self._packed)
        slots, positions, _, grad_tail, *tables = self._step.split_with_sizes(self._sizes)
        slots.fill_(1)
        positions.fill_(1)
        if run:
            grad_tail.copy_(self.q_indptr.diff())
        # The newest range of each view is a row longer; nobody reads a view that has no new row.
        tables[2][self._all[0][1:] - 1] = 1
        if self._rest is not None:
            tables[-2][self._rest[0][1:] - 1] = 1

    def move(self, steps: int) -> None:
        """Becomes those of the pass so many latent steps later, or earlier; one addition, that whoever saved these for a
        gradient does not see."""
        self._packed.data.add_(self._step, alpha=steps)


def _grouped(lengths: list[int], frozen: list[list[KVRange]]) -> tuple[list[int], list[list[KVRange]]]:
    """Neighbouring sequences that see the same quantised rows as one with the queries of all, none of which is masked: where
    the queries of each begin, and their views."""
    ends, distinct = [0], []
    for view, end in zip(frozen, accumulate(lengths)):
        if distinct and distinct[-1] == view:
            ends[-1] = end
        else:
            distinct.append(view)
            ends.append(end)
    return ends, distinct


def _read(table: Sequence[Tensor], inv_freq: Tensor | None) -> tuple:
    indptr, start, length, offset = table
    return indptr, start, length, offset if inv_freq is not None else None, inv_freq


def _last_of_each(sizes: list[int]) -> list[bool]:
    """Whether a sequence is the last of its group."""
    return [i == size - 1 for size in sizes for i in range(size)]


def _upload(x: np.ndarray, device: torch.device) -> Tensor:
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
