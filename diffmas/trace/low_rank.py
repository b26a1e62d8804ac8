"""Rows of a store that are read with a low-rank part beside them (diffmas.ops.low_rank): as an adapter would have made them of
the hidden states that they came from.

A `Coding` has the codes of some rows for one adapter. Its rows are numbered from a place of its own on, beyond CODED, each as
far from there as the pool's row is from 0. So a segment of them is cut, joined and compared like any other, and several
adapters' are different rows, while the pool has one.

What codes are made of is differentiable, and `Encode` is a node in the order of forward passes, as a writer of rows is
(diffmas.trace.crossing): readers stand behind it, their backward adds to the coding's gradient, and its own takes it out.
"""

import threading
import weakref
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.ops.low_rank import (
    BY_ROW,
    FEW_ROWS,
    Codes,
    Tile,
    Whole,
    few_kernels,
    low_rank_attention,
    low_rank_attention_backward,
    rows_built,
)  # fmt: skip
from diffmas.ops.reference import accumulator
from diffmas.trace.pool import of_this_pass
from diffmas.trace.tables import grouped
from diffmas.trace.views import CODED, SPAN, KVRange, Segment, seen_in, table_of

__all__ = ["CodedReads", "Coding", "encoded"]


class CodeGrads:
    """What one backward pass leaves for codes: those of each layer, zeros at first, by lineage, as `GradPools`."""

    def __init__(self, layers: list[Codes]):
        self._layers, self._by_lineage, self._lock = layers, {}, threading.Lock()

    def of(self, lineage: int) -> list[Codes]:
        with self._lock:
            if lineage not in self._by_lineage:
                zeros = lambda x: None if x is None else torch.zeros_like(x, dtype=accumulator(x.dtype))
                self._by_lineage[lineage] = [Codes(*map(zeros, codes)) for codes in self._layers]
            return self._by_lineage[lineage]

    def take(self, lineage: int) -> list[Codes] | None:
        return self._by_lineage.pop(lineage, None)

    def hand_on(self, readers: int, writers: int) -> None:
        """Adds what one lineage has to another's."""
        for taken, given in zip(self.take(readers) or (), self.of(writers)):
            for x, y in zip(taken, given):
                if x is not None:
                    y += x

    def clear(self) -> None:
        self._by_lineage = {}


class Coding:
    """Of some rows, for one adapter.

    rows: of pools, rising. layers: their codes in each layer, constants. tables: cos and sin [n, Dr / 2] of each pair of the
    rows, where they were written, and interleaved, how they pair; None: no keys have codes. lineage: in which gradients reach
    what they are made of; learns: whether they do. base_learns: whether the pools' rows need a gradient."""

    def __init__(
        self, rows: np.ndarray, layers: list[Codes], tables, interleaved, lineage: int, learns: bool, base_learns: bool
    ):
        self.rows, self.layers, self.tables, self.interleaved = rows, layers, tables, interleaved
        self.lineage, self.learns, self.base_learns = lineage, learns, base_learns
        self.first = CODED  # the number of the pool's row 0 (`Store.add_coding`)
        self.hold = None  # of its rows, as long as it lives
        self._grads: weakref.WeakValueDictionary[int, CodeGrads] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def place(self, start: int, length: int) -> int | None:
        """Where the codes of consecutive rows of a pool begin; None where it has none of them. Raises ValueError where it has
        those of some alone."""
        first, after = np.searchsorted(self.rows, (start, start + length))
        if first == after:
            return None
        if after - first < length:
            raise ValueError(f"rows: expected codes of all of {start} to {start + length - 1} or of none, got {after - first}")
        return int(first)

    def grads(self) -> CodeGrads:
        """Of the backward pass that is running on this thread."""
        with self._lock:
            return of_this_pass(self._grads, lambda: CodeGrads(self.layers))

    def row_bytes(self, layer: int) -> int:
        """Of a row's codes."""
        codes = self.layers[layer]
        each = (x for name in BY_ROW if (x := getattr(codes, name)) is not None)
        return sum(x[:1].numel() * x.element_size() for x in each)

    @property
    def bytes(self) -> int:
        """Of all codes; what they are multiplied by is the adapter's, and the tables are those of other codings, too."""
        return len(self.rows) * sum(map(self.row_bytes, range(len(self.layers))))

    def built(self, layer: int, start: int, kv: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """K and V of rows from `start` on of which kv [n, Hkv, D] are the pool's."""
        at = self.place(start, len(kv[0]))
        own = slice(at, at + len(kv[0]))
        tables = None if self.tables is None else tuple(x[own].to(kv[0].device) for x in self.tables)
        return rows_built(*kv, self.layers[layer].of(own), tables, self.interleaved)


class Encode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coding, *flat):
        ctx.save_for_backward(*flat)
        ctx.coding = coding
        return torch.zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        given = ctx.saved_tensors  # raises where they have changed since
        layers = ctx.coding.grads().take(ctx.coding.lineage)
        if layers is None:
            return None, *(None for _ in given)
        found = [x for codes in layers for x in codes if x is not None]
        return None, *(dx.to(x.dtype) for dx, x in zip(found, given))


def encoded(
    rows: np.ndarray, layers: list[Codes], tables, interleaved, lineage: int, base_learns: bool
) -> tuple[Coding, Tensor]:
    """A coding of codes that may have a graph, and the order token that its readers stand behind."""
    flat = [x for codes in layers for x in codes if x is not None]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in flat)
    constants = [codes.constant() for codes in layers]
    coding = Coding(rows, constants, tables, interleaved, lineage, learns, base_learns)
    return coding, Encode.apply(coding, *flat) if learns else torch.zeros(0)


# Of a sequence's queries that the kernels of few queries take: each multiplies the codes again, and tiles do so once.
PIECES = 2
TILE = 1 << 18  # numbers of K, and as many of V, that are built at once: they stay in a CPU's second cache


class _Reads(NamedTuple):
    coding: Coding
    views: list[list[KVRange]]  # by sequence, rows of pools


class CodedReads:
    """What a forward pass reads of coded rows, all of them older than it. lengths: its new tokens of each sequence."""

    def __init__(self, codings: Sequence[Coding], views: list[list[KVRange]], lengths: list[int]):
        """views: by sequence, numbered as a coding's rows are."""
        own = lambda coding, r: coding.first <= r.start < coding.first + SPAN
        self._reads = [
            _Reads(c, [[r._replace(start=r.start - c.first) for r in view if own(c, r)] for view in views]) for c in codings
        ]
        self._found: dict[tuple, list[Whole | list[Tile] | None]] = {}
        self._lengths = lengths
        self.views = [[r for reads in self._reads for r in reads.views[b]] for b in range(len(views))]

    def _of(
        self, layer: int, sight: frozenset | None, q: Tensor, k: Tensor, backend: str
    ) -> list[tuple[Coding, Whole | list[Tile]]]:  # fmt: skip
        """What a layer reads of each coding. sight: the layers that see the same have the same. k: its pool."""
        few = FEW_ROWS // (q.shape[1] // k.shape[1]) if few_kernels(q, backend) else 0
        rows = max(TILE // k[0].numel(), 1)
        key = sight, k.device, rows, few
        if key not in self._found:
            seen = [(coding, seen_in(views, layer, 0)) for coding, views in self._reads]  # all heads see the same of them
            self._found[key] = [_found(coding, views, self._lengths, few, rows, k.device) for coding, views in seen]
        return [(reads.coding, found) for reads, found in zip(self._reads, self._found[key]) if found]

    def attend(
        self, layer: int, sight, q: Tensor, kv: tuple[Tensor, Tensor], inv_freq, scale: float, backend: str
    ) -> list[tuple[Tensor, Tensor]]:  # fmt: skip
        """o and lse of rotated q [n, Hq, D], of each coding."""
        found = []
        for coding, reads in self._of(layer, sight, q, kv[0], backend):
            rest = inv_freq, scale, coding.interleaved, backend
            found.append(low_rank_attention(q, *kv, coding.layers[layer], coding.tables, reads, *rest))
        return found

    def seen(self, layer: int, kv: tuple[Tensor, Tensor]) -> list[tuple[np.ndarray, list[KVRange], tuple[Tensor, Tensor]]]:
        """Of a pass over one sequence, for each coding that a layer reads: the numbers of the rows [n], as segments have them,
        which of these are read, and K and V [n, Hkv, D] as the codes make them. kv: the layer's pool."""
        found = []
        for coding, (view,) in self._reads:
            (view,) = seen_in([view], layer, 0)
            if view:
                own = [slice(r.start, r.start + r.length) for r in view]
                made = [coding.built(layer, rows.start, tuple(x[rows] for x in kv)) for rows in own]
                numbers = np.concatenate([np.arange(rows.start, rows.stop) for rows in own]) + coding.first
                starts = accumulate((r.length for r in view), initial=0)
                ranges = [r._replace(start=start) for start, r in zip(starts, view)]
                found.append((numbers, ranges, tuple(map(torch.cat, zip(*made)))))
        return found

    def backward(
        self, layer: int, sight, states: tuple[Tensor, ...], kv, grads: tuple[Tensor, Tensor], inv_freq, scale: float,
        backend: str, lineage: int, learning: bool,
    ) -> Tensor:  # fmt: skip
        """-> dq. states: do, q, o, lse. grads: the gradient pools; lineage: theirs. learning: whether older rows need a
        gradient."""
        dq = torch.zeros_like(states[1])
        for coding, reads in self._of(layer, sight, states[1], kv[0], backend):
            own = coding.grads().of(lineage)[layer] if learning and coding.learns else None
            rest = inv_freq, scale, coding.interleaved, backend, own, grads if learning and coding.base_learns else None
            dq += low_rank_attention_backward(*states, *kv, coding.layers[layer], coding.tables, reads, *rest)
        return dq


def _found(
    coding: Coding, views: list[list[KVRange]], lengths: list[int], few: int, most: int, device: torch.device
) -> Whole | list[Tile] | None:  # fmt: skip
    """What sequences with these views see of a coding's rows: all at once, where none has more queries than PIECES times
    `few`, or in tiles of at most `most` rows; None: nothing. Neighbours that see the same are one."""
    ends, views = grouped(lengths, views)
    places = [[(coding.place(r.start, r.length), r) for r in view] for view in views]
    if not any(places):
        return None
    if max(after - first for first, after in pairwise(ends)) > PIECES * few:
        return _tiles(coding, ends, places, most, device)
    return _whole(ends, places, few, device)


Places = list[list[tuple[int, KVRange]]]  # where the codes of each range begin, by sequence


def _whole(ends: list[int], places: Places, few: int, device: torch.device) -> Whole:
    """In pieces of so many queries, none of which is masked."""
    pieces = [(min(at + few, after), i) for i, (first, after) in enumerate(pairwise(ends)) for at in range(first, after, few)]
    seen = [places[i] for _, i in pieces]
    numbers = [0, *(end for end, _ in pieces)], *table_of([[r for _, r in view] for view in seen])
    upload = lambda numbers: torch.tensor(numbers, dtype=torch.int64, device=device)
    return Whole(upload([at for view in seen for at, _ in view]), tuple(map(upload, numbers)))


def _tiles(coding: Coding, ends: list[int], places: Places, most: int, device: torch.device) -> list[Tile]:
    """Each row is in one tile."""
    every = [np.arange(first, first + r.length) for view in places for first, r in view]
    seen, tiles = np.unique(np.concatenate(every)), []
    upload = lambda numbers: torch.tensor(numbers, dtype=torch.int64, device=device)
    for first in range(0, len(seen), most):
        codes, parts = seen[first : first + most], []
        for view in places:
            spans = [(*np.searchsorted(codes, (at, at + r.length)).tolist(), r.offset) for at, r in view]
            parts.append([KVRange(start, after - start, offset) for start, after, offset in spans if start < after])
        tables = (upload(x) for x in (ends, *table_of(parts)))
        tiles.append(Tile(_rows(coding.rows[codes], device), _rows(codes, device), tuple(tables)))
    return tiles


def _rows(rows: np.ndarray, device: torch.device) -> slice | Tensor:
    """Consecutive ones as a slice."""
    first, after = int(rows[0]), int(rows[-1]) + 1
    return slice(first, after) if after - first == len(rows) else torch.from_numpy(rows).to(device)


def coded(segment: Segment, coding: Coding) -> Segment:
    """The segment, read with the coding's codes, where it has some of it."""
    if segment.start >= SPAN or coding.place(segment.start, segment.length) is None:
        return segment
    return segment._replace(start=segment.start + coding.first)
