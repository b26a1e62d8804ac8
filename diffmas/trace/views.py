"""What a sequence sees: segments of a trace, and the ranges of pool rows that they come to.

A `Segment` says who wrote which rows at which positions; a `KVRange` is what the ops read. Both are runs of consecutive rows,
so cutting and comparing them is one piece of code.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple, TypeVar

import numpy as np

__all__ = [
    "CODED", "FROZEN", "JOINS", "KINDS", "SAID", "SINKS", "SPAN", "Heads", "KVRange", "Segment", "Size", "apart", "by_sequence",
    "common_prefix", "heads_in", "is_quantised", "joined", "length_of", "only", "packed", "places", "pool_rows", "ranges_of",
    "reindexed", "rows_of", "seen_in", "share", "table_of", "without_first", "without_rows",
]  # fmt: skip

KINDS = ("prompt", "latent", "text")
SAID = ("latent", "text")  # all but prompts
JOINS = ("keep", "shift", "reindex", "same_branch")
SINKS = 4  # first tokens that stay where others are dropped: attention sinks (StreamingLLM, arXiv 2309.17453)
SPAN = 1 << 40  # more rows than a pool has
FROZEN = SPAN  # a store's quantised rows are numbered from here on (diffmas.trace.frozen)
CODED = 1 << 50  # and those that are read with low-rank codes, a span for each coding (diffmas.trace.low_rank)
Heads = tuple[int, ...] | tuple[tuple[int, ...], ...]  # numbers of K/V heads; or such, of each of some layers
SAVED_ROWS = 2048  # a pass over shared rows must save reading this many, or its two more calls cost more


class Segment(NamedTuple):
    """Consecutive rows that one agent wrote for one sequence, at consecutive positions."""

    sequence: int
    agent: str | None
    kind: str  # prompt | latent | text
    start: int  # first row
    length: int  # rows
    position: int  # where its first token was written
    offset: int = 0  # it is read this many positions later
    layers: tuple[int, ...] | None = None  # that see it; None: all
    heads: Heads | None = None  # of these layers, all of them or one by one, that see it; None: all

    @property
    def end(self) -> int:
        return self.start + self.length

    @property
    def next_position(self) -> int:
        """The position after its last token, as it is read."""
        return self.position + self.offset + self.length

    def skip(self, rows: int) -> "Segment":
        return self._replace(start=self.start + rows, length=self.length - rows, position=self.position + rows)

    def extended_by(self, new: "Segment") -> "Segment | None":
        """The two as one, where `new` goes on in the next row, at the next position, by the same writer; else None."""
        mine = (self.agent, self.kind, self.end, self.position + self.length, self.offset, self.layers, self.heads)
        if mine != (new.agent, new.kind, new.start, new.position, new.offset, new.layers, new.heads):
            return None
        return self._replace(length=self.length + new.length)


class Size(NamedTuple):
    """Rows of a trace, and the bytes of their K and V in all layers."""

    rows: int = 0
    bytes: int = 0

    def plus(self, other: "Size") -> "Size":
        return Size(self.rows + other.rows, self.bytes + other.bytes)


class KVRange(NamedTuple):
    """Rows [start, start + length) of a pool, read `offset` positions later than they were written, by some layers or all, and
    some heads of these or all."""

    start: int
    length: int
    offset: int
    layers: tuple[int, ...] | None = None
    heads: Heads | None = None

    def skip(self, rows: int) -> "KVRange":
        return self._replace(start=self.start + rows, length=self.length - rows)


Rows = TypeVar("Rows", Segment, KVRange)


def length_of(view: Sequence[Rows]) -> int:
    return sum(x.length for x in view)


def by_sequence(trace) -> list[list[Segment]]:
    """The segments of each of a trace's sequences."""
    rows: list[list[Segment]] = [[] for _ in range(trace.batch_size)]
    for s in trace.segments:
        rows[s.sequence].append(s)
    return rows


def rows_of(view: Sequence[Rows]) -> np.ndarray:
    """The rows of a view, in order; int64."""
    return np.concatenate([np.arange(x.start, x.start + x.length) for x in view] or [np.zeros(0, dtype=np.int64)])


def common_prefix(a: Sequence[Rows], b: Sequence[Rows]) -> list[Rows]:
    """The rows that two views both begin with; one of them may have gone on within the last common element."""
    common = []
    for x, y in zip(a, b):
        n = min(x.length, y.length)
        if x._replace(length=n) != y._replace(length=n):
            break
        common.append(x._replace(length=n))
        if x.length != y.length:
            break
    return common


def without_first(view: Sequence[Rows], rows: int) -> list[Rows]:
    rest = []
    for x in view:
        skipped = min(rows, x.length)
        rows -= skipped
        if skipped < x.length:
            rest.append(x.skip(skipped) if skipped else x)
    return rest


def only(row: Sequence[Segment], kind: str | Sequence[str] | None, agent: str | None, sinks: int) -> list[Segment]:
    """The segments of one kind, or of some, and/or of one agent, and the first `sinks` tokens, whoever wrote them."""
    kept, before = [], 0
    kinds = (kind,) if isinstance(kind, str) else KINDS if kind is None else kind
    for s in row:
        asked_for = s.kind in kinds and agent in (None, s.agent)
        stay = s.length if asked_for else min(s.length, max(sinks - before, 0))
        if stay:
            kept.append(s._replace(length=stay))
        before += s.length
    return kept


def packed(rows: Sequence[Sequence[Segment]]) -> list[list[Segment]]:
    """The segments of sequences whose rows have been put one behind the other, from row 0 on (`Trace.packed_rows`)."""
    starts = accumulate((s.length for row in rows for s in row), initial=0)
    return [[s._replace(start=next(starts)) for s in row] for row in rows]


def places(view: Sequence[Segment], index: np.ndarray) -> list[Segment]:
    """The rows at some places of a view, rising: its segments, cut where rows between them are left out."""
    kept, first = [], 0
    for s in view:
        mine = index[(index >= first) & (index < first + s.length)] - first
        for run in np.split(mine, np.flatnonzero(np.diff(mine) > 1) + 1) if len(mine) else ():
            kept.append(s.skip(int(run[0]))._replace(length=len(run)))
        first += s.length
    return kept


def without_rows(view: Sequence[Segment], rows: Sequence[Segment]) -> list[Segment]:
    """The segments of a view without the rows that are in `rows`, cut where some of them are."""
    return places(view, np.flatnonzero(~np.isin(rows_of(view), rows_of(rows))))


def reindexed(rows: list[list[Segment]]) -> tuple[list[list[Segment]], list[int]]:
    """The same tokens, read at positions 0, 1, 2, ..., and the position that comes after, of each sequence."""
    moved, ends = [], []
    for segments in rows:
        row, at = [], 0
        for s in segments:
            row.append(s._replace(offset=at - s.position))
            at += s.length
        moved.append(row)
        ends.append(at)
    return moved, ends


def joined(branches: list[list[Segment]], positions: list[str], nexts: list[int]) -> tuple[list[Segment], int]:
    """The segments of one joined sequence, and the position after the last one. positions: of each branch, what is done with
    all of it but what all begin with; nexts: the position at which it would go on."""
    row = branches[0]
    for branch in branches[1:]:
        row = common_prefix(row, branch)
    row, shared = list(row), length_of(row)
    base = end = max((s.next_position for s in row), default=0)
    for branch, how, after in zip(branches, positions, nexts):
        own = without_first(branch, shared)
        if own and how == "reindex":
            starts = accumulate((s.length for s in own[:-1]), initial=end)
            own = [s._replace(offset=at - s.position) for s, at in zip(own, starts)]
        elif own and how != "keep":
            low = min(s.position + s.offset for s in own)
            move = (end if how == "shift" else base) - low
            own = [s._replace(offset=s.offset + move) for s in own]
        row += own
        end = max([end, *(s.next_position for s in own), *([after] if how == "keep" else [])])
    # A row that a sequence reads twice would get its gradient from two places at once.
    by_row = sorted((s.start, s.end) for s in row)
    if any(start < end for (_, end), (start, _) in zip(by_row, by_row[1:])):
        raise ValueError(
            "traces: expected branches that share only what all of them begin with, got tokens that two of them see elsewhere"
        )
    return row, end


def ranges_of(segments: Sequence[Segment]) -> list[KVRange]:
    """The ranges of one sequence's view; neighbours in the pool are read as one."""
    ranges: list[KVRange] = []
    for s in segments:
        last = ranges[-1] if ranges else None
        new = KVRange(s.start, s.length, s.offset, s.layers, s.heads)
        if last is not None and new[2:] == last[2:] and s.start == last.start + last.length:
            ranges[-1] = last._replace(length=last.length + s.length)
        else:
            ranges.append(new)
    return ranges


def heads_in(layer: int, layers: tuple[int, ...] | None, heads: Heads | None) -> tuple[int, ...] | None:
    """The heads of a layer that see what these see; None: all."""
    if layers is not None and layer not in layers:
        return ()
    return heads[layers.index(layer)] if heads and isinstance(heads[0], tuple) else heads


def seen_in(views: Sequence[Sequence[Rows]], layer: int, head: int) -> list[list[Rows]]:
    """What a K/V head of a layer sees of views."""
    seen = lambda heads: heads is None or head in heads
    return [[x for x in view if seen(heads_in(layer, x.layers, x.heads))] for view in views]


def is_quantised(rows: Rows) -> bool:
    return FROZEN <= rows.start < CODED


def pool_rows(rows: np.ndarray) -> np.ndarray:
    """The rows of pools that rows with codes are, the others as they are."""
    return np.where(rows >= CODED, rows % SPAN, rows)


def apart(view: Sequence[Rows]) -> tuple[list[Rows], list[Rows], list[Rows]]:
    """The rows of pools, quantised rows, these numbered from 0, and rows with codes."""
    quantised = [x._replace(start=x.start - FROZEN) for x in view if is_quantised(x)]
    return [x for x in view if x.start < FROZEN], quantised, [x for x in view if x.start >= CODED]


def table_of(views: Sequence[Sequence[KVRange]]) -> tuple[list[int], ...]:
    """indptr, start, length and offset of the views, as the ops take them."""
    return list(accumulate(map(len, views), initial=0)), *([x[i] for view in views for x in view] for i in range(3))


def share(views: Sequence[Sequence[KVRange]]) -> tuple[list[int], list[list[KVRange]], list[list[KVRange]]] | None:
    """Groups neighbouring sequences whose views begin with the same rows: the size of each group, what its sequences share,
    what is left of each sequence's view. None where that would not save reading SAVED_ROWS rows."""
    sizes, shared = [], []
    for view in views:
        common = common_prefix(shared[-1], view) if shared else []
        if common and sizes[-1] * length_of(common) >= (sizes[-1] - 1) * length_of(shared[-1]):
            sizes[-1], shared[-1] = sizes[-1] + 1, common
        else:
            sizes.append(1)
            shared.append(list(view))
    if sum((size - 1) * length_of(ranges) for size, ranges in zip(sizes, shared)) < SAVED_ROWS:
        return None
    shared = [ranges if size > 1 else [] for size, ranges in zip(sizes, shared)]
    group = np.repeat(np.arange(len(sizes)), sizes)
    return sizes, shared, [without_first(view, length_of(shared[g])) for view, g in zip(views, group)]
