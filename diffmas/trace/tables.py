"""A forward pass as int64 tensors on one device: where its tokens go, and the tables of segments that they see."""

from itertools import accumulate, chain

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.attention_work import AttentionWork
from diffmas.trace.views import KVRange, length_of, share, table_of

__all__ = ["Tables", "grouped"]

DECODE_TOKENS = 8  # up to this many a sequence, reading K and V costs more than the products


class Tables:
    """slots, positions [n]; q_indptr [B + 1]; grad_tail [B]; and for each view the arguments of `cross_attention`. One copy to
    the device for all of them, without a wait. work: what attention finds in these views."""

    def __init__(
        self, device: torch.device, lengths: list[int], slots: np.ndarray, positions: np.ndarray, grad_tail: list[int],
        views: list[list[KVRange]], older: list[list[KVRange]] | None, frozen: list[list[KVRange]] | None = None,
    ):  # fmt: skip
        parts, self._where = [list(accumulate(lengths, initial=0)), grad_tail], {}

        def add(name: str, *tables: list[int]) -> None:
            self._where[name] = slice(len(parts), len(parts) + len(tables))
            parts.extend(tables)

        rows = {"all": sum(map(length_of, views)), "frozen": sum(map(length_of, frozen or []))}
        add("all", *table_of(views))
        if frozen is not None:
            ends, frozen = grouped(lengths, frozen)
            add("frozen", ends, *table_of(frozen))
        # Few queries of several sequences are served faster by one pass over the rows that all of them read.
        if (groups := share(views) if 1 < len(lengths) and max(lengths) <= DECODE_TOKENS else None) is not None:
            sizes, shared, rest = groups
            rows |= {"shared": sum(map(length_of, shared)), "rest": sum(map(length_of, rest))}
            add("shared", [0, *_ends(sizes, lengths)], *table_of(shared))
            add("rest", *table_of(rest))
            add("none", [0] * len(sizes))
        # So is the gradient of older rows for all steps of a run, of which this pass has one token of each of these sequences.
        if older is not None:
            groups = share(older)
            sizes, shared, rest = groups or ([], [], older)
            if groups is not None:
                add("older shared", [0, *accumulate(sizes)], *table_of(shared))
            add("older", list(range(len(rest) + 1)), *table_of(rest))
        self._packed = _upload(np.concatenate((slots, positions, list(chain.from_iterable(parts)))), device)
        self._sizes = [len(slots), len(positions), *map(len, parts)]
        self._step: Tensor | None = None  # what a latent step adds to `_packed`
        self.slots, positions, *self._parts = self._packed.split_with_sizes(self._sizes)
        self.q_indptr, self.grad_tail = self._parts[:2]
        self.position_ids = positions[None]
        self.work = AttentionWork(rows)
        self._at_offsets: dict | None = None
        self.as_written = self._views(None)

    def _views(self, inv_freq: Tensor | None) -> dict[str, tuple | None]:
        """By name: q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq. shared: of the rows that several sequences
        read, of the rest, and a grad_tail by which none of the first are new. older: as many as have to be read, counting
        sequences in place of queries. frozen: of quantised rows."""

        def view(name: str, ends: Tensor | None = None) -> tuple:
            tables = self._parts[self._where[name]]
            ends, (indptr, start, length, offset) = (ends, tables) if ends is not None else (tables[0], tables[1:])
            return ends, indptr, start, length, offset if inv_freq is not None else None, inv_freq

        there = self._where
        shared = (view("shared"), view("rest", self.q_indptr), *self._parts[there["none"]]) if "shared" in there else None
        older = tuple(view(name) for name in ("older shared", "older") if name in there) or None
        frozen = view("frozen") if "frozen" in there else None
        return {"all": view("all", self.q_indptr), "older": older, "shared": shared, "frozen": frozen}

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
        slots, positions, *parts = self._step.split_with_sizes(self._sizes)
        slots.fill_(1)
        positions.fill_(1)
        if run:
            parts[1].copy_(self.q_indptr.diff())
        # The newest range of each view is a row longer; nobody reads a view that has no new row.
        for name in ("all", "rest"):
            if name in self._where:
                parts[self._where[name]][2][self._parts[self._where[name]][0][1:] - 1] = 1

    def move(self, steps: int) -> None:
        """Becomes those of the pass so many latent steps later, or earlier; one addition, that whoever saved these for a
        gradient does not see."""
        self._packed.data.add_(self._step, alpha=steps)


def grouped(lengths: list[int], frozen: list[list[KVRange]]) -> tuple[list[int], list[list[KVRange]]]:
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


def _ends(sizes: list[int], lengths: list[int]) -> list[int]:
    """Where the queries of each group of neighbouring sequences end."""
    ends = list(accumulate(lengths))
    return [ends[last - 1] for last in accumulate(sizes)]


def _upload(x: np.ndarray, device: torch.device) -> Tensor:
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
