"""Rows of one model's trace on another's: packed, through a projector, and put there as segments."""

import numpy as np
import torch
from torch import Tensor

from diffmas.agents.projector import Fuser, Projector, Rows
from diffmas.trace import Segment, Trace
from diffmas.trace.views import by_sequence, length_of, places, without_first

__all__ = ["fused", "projected"]


def projected(projector: Projector, source: Trace, target: Trace) -> Trace:
    """What `target` sees, and behind it what `source` sees as rows of `target`'s model, at the positions that they have."""
    if not any(source.lengths):
        return target.fork(1)[0]
    read, segments = _moved(source)
    rows = projector(source.packed_rows(), _written(source), read)
    return target.extended(segments, rows)


def fused(fuser: Fuser, own: Trace, counts: list[int], source: Trace, sharer: str, partners: list[list[int]]) -> Trace:
    """What `own` sees, its last counts[b] rows of each sequence fused with rows of another model's trace.

    source: that trace; of it the rows that `sharer` wrote for its prompt. partners[b]: for each of the last rows, the number of
    the sharer's row, or -1 for none: it stays as it is.
    """
    rows = by_sequence(own)
    mine = own.reading([without_first(row, length_of(row) - n) for row, n in zip(rows, counts)])
    theirs = source.reading([[s for s in row if (s.agent, s.kind) == (sharer, "prompt")] for row in by_sequence(source)])
    pairs, first = [], [0, 0]  # of packed rows
    for n, their_n, of in zip(mine.lengths, theirs.lengths, partners, strict=True):
        pairs += [(first[0] + t, first[1] + other) for t, other in enumerate(of[:n]) if other >= 0]
        first = [first[0] + n, first[1] + their_n]
    if not pairs:
        return own
    (read, segments), at = _moved(mine), torch.tensor(pairs).T
    packed, added = mine.packed_rows(), theirs.packed_rows()
    own_rows, their_rows = (_taken(x, where) for x, where in zip((packed, added), at))
    made = fuser(their_rows, own_rows, _written(theirs)[at[1]], read[at[0]])
    new = [tuple(x.index_copy(0, at[0].to(x.device), y) for x, y in zip(*layer)) for layer in zip(packed, made)]
    before = own.reading([places(row, np.arange(length_of(row) - n)) for row, n in zip(rows, counts)])
    return before.extended(segments, new)


def _taken(rows: Rows, where: Tensor) -> Rows:
    return [tuple(x[where.to(x.device)] for x in pair) for pair in rows]


def _written(trace: Trace) -> Tensor:
    """The positions that packed rows were written at, [n] int64."""
    return torch.cat([torch.arange(s.position, s.position + s.length) for s in trace.segments])


def _moved(trace: Trace) -> tuple[Tensor, list[list[Segment]]]:
    """The positions that packed rows are read at, [n], and the segments of these rows as they are written there."""
    segments, at = [], 0
    for row in by_sequence(trace):
        segments.append([])
        for s in row:
            segments[-1].append(s._replace(start=at, position=s.position + s.offset, offset=0))
            at += s.length
    return torch.cat([trace.positions(b) for b in range(trace.batch_size)]), segments
