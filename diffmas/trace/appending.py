"""New tokens of a trace: where they are written, and how they become part of it.

`plan` says for a forward pass where every token is written and what it sees; the trace has not changed. `commit`, after the
last layer, is the one place where a trace gets longer.
"""

import operator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from diffmas.trace.cache import CacheFace
from diffmas.trace.forward_pass import ForwardPass, Table
from diffmas.trace.low_rank import CodedReads
from diffmas.trace.pool import DeferredKVGrad
from diffmas.trace.store import LEAST_SPARE, MOST_SPARE, Extent, Hold
from diffmas.trace.views import FROZEN, KINDS, Segment, apart, ranges_of

__all__ = ["AdapterOf", "Appending"]


class AdapterOf(NamedTuple):
    """of: by sequence, the number of its adapter, of `count` (diffmas.models.adapter_rows); in order, since an adapter's rows
    are in one piece."""

    count: int
    of: list[int]

    def ends(self, lengths: list[int]) -> list[int]:
        """Where the packed new tokens of each adapter end."""
        if len(self.of) != len(lengths) or self.of != sorted(self.of) or not {*self.of} <= {*range(self.count)}:
            what = f"the number of an adapter, of {self.count} and in order, for each of {len(lengths)} sequences"
            raise ValueError(f"adapter: expected {what}, got {self.of}")
        rows = [0] * self.count
        for number, n in zip(self.of, lengths):
            rows[number] += n
        return np.cumsum(rows).tolist()


class Appending(CacheFace):
    """What a `Trace` does with new tokens."""

    def plan(self, lengths: list[int], kind: str, positions: Tensor | None = None, reserve: int | list[int] = 0) -> ForwardPass:
        """A forward pass that appends lengths[b] tokens to sequence b, at positions [n] or the next ones.

        reserve: how many more tokens (of each sequence) will follow, so that their rows follow too. Nothing is part of the
        trace before `commit`; a forward pass that is dropped gives its rows back. Raises ValueError naming what does not fit.
        """
        if len(lengths) != self.batch_size:
            raise ValueError(f"trace: expected a batch of {self.batch_size} sequences, got {len(lengths)}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        lengths = self._counts("lengths", lengths)
        reserve = self._counts("reserve", reserve if isinstance(reserve, (list, tuple)) else [reserve] * self.batch_size)
        if positions is None:
            positions, after = _counted(self._next, lengths), [p + n for p, n in zip(self._next, lengths)]
        else:
            if not isinstance(positions, Tensor) or positions.dim() != 1 or positions.is_floating_point():
                raise ValueError(f"positions: expected a 1-D tensor of integers, got {positions!r}")
            positions = positions.cpu().numpy().astype(np.int64)
            if len(positions) != sum(lengths):
                raise ValueError(f"positions: expected {sum(lengths)} of them, got {len(positions)}")
            if len(positions) and positions.min() < 0:
                raise ValueError(f"position_ids: expected positions >= 0, got {int(positions.min())}")
            parts = np.split(positions, np.cumsum(lengths)[:-1])
            after = [max(p, int(part.max()) + 1) if len(part) else p for p, part in zip(self._next, parts)]
        self._check_limit(lengths)
        segments, extents, done = [list(row) for row in self._segments], list(self._extents), 0
        hold, one_by_one = Hold(self._store), max(lengths) == 1
        with self._store.allocation():
            for b, n in enumerate(lengths):
                while n:
                    extents[b] = self._extent_for(n, segments[b], extents[b], reserve[b], one_by_one, hold)
                    rows = min(n, extents[b].end - extents[b].filled)
                    start = self._store.write(extents[b], rows, self._lineage)
                    hold.claimed.append((start, start + rows))
                    self._append(segments[b], b, kind, start, positions[done : done + rows])
                    n, done = n - rows, done + rows
            slots = _counted([start for start, _ in hold.claimed], [end - start for start, end in hold.claimed])
            views, quantised, coded = zip(*(apart(ranges_of(row)) for row in segments))
            hold.read(list(views))
            reads = CodedReads(self._codings, list(coded), lengths) if any(coded) else None
        deferred, step = None, 0
        if kind == "latent" and max(lengths) == 1:
            deferred, step = self._deferred
            if not 0 < step < DeferredKVGrad.LONGEST or deferred.lengths != lengths:
                deferred, step = DeferredKVGrad(lengths), 0
            step += 1
        older = [apart(ranges_of(row))[0] for row, n in zip(self._segments, lengths) if n] if step == 1 else None
        table = Table(self._segments, segments, extents, after)
        forward_pass = ForwardPass(
            self.spec, self._store, lengths, positions, slots, hold.views, self._order, table, lineage=self._lineage,
            deferred=deferred, step=step, older=older, hold=hold, frozen=list(quantised) if any(quantised) else None,
            coded=reads, adapter_ends=None if self.adapter is None else self.adapter.ends(lengths),
        )  # fmt: skip
        forward_pass.kind = kind
        return forward_pass

    def _counts(self, name: str, values) -> list[int]:
        """One number of tokens for each sequence."""
        if len(values) != self.batch_size:
            raise ValueError(f"{name}: expected one for each of {self.batch_size} sequences, got {len(values)}")
        try:
            counts = [operator.index(x) for x in values]
        except TypeError:
            counts = [-1]
        if min(counts, default=0) < 0:
            raise ValueError(f"{name}: expected integers >= 0, got {list(values)}")
        return counts

    def claim(self, generation) -> bool:
        """Makes the trace that of a generate; False if another one runs on it. Of two threads one gets it."""
        with self._store.lock:
            free = self.generation is None
            if free:
                self.generation = generation
        return free

    def make_room(self, tokens: int) -> None:
        """Lets the pools grow at once for that many more tokens of each sequence and spare room, when they next have to."""
        self._store.rows = max(self._store.rows, self._store.top + (tokens + MOST_SPARE) * self.batch_size)

    def commit(self, forward_pass: ForwardPass) -> None:
        """Makes the new tokens part of the trace; raises RuntimeError if a layer did not write its rows."""
        if forward_pass.table is None or forward_pass.table.before is not self._segments:
            raise RuntimeError("this forward pass was planned on another trace, or the trace has changed since")
        missing = [i for i, ran in enumerate(forward_pass.work.ran) if not ran]
        if missing:
            raise RuntimeError(
                f"layers {missing} did not write to the trace: the keyword argument diffmas_trace did not reach them"
            )
        _, self._segments, self._extents, self._next = forward_pass.table
        if forward_pass.kind != "latent":
            with self._store.lock:
                self._store.token_ids.write(forward_pass.work.slots, forward_pass.ids)
        self._order = forward_pass.after
        self._deferred = (forward_pass.work.deferred, forward_pass.work.step)
        forward_pass.finish()

    def commit_repeated(self, forward_pass: ForwardPass, h: Tensor | None = None) -> None:
        """Commits a forward pass whose rows were written by another one that repeated itself. h: as `ForwardPass.repeated`
        takes it."""
        forward_pass.repeated(h)
        self.commit(forward_pass)

    def _check_limit(self, lengths) -> None:
        limit = self.spec.max_length
        if limit is not None:
            longest = max(have + new for have, new in zip(self.lengths, lengths))
            if longest > limit:
                raise ValueError(f"trace: expected at most {limit} tokens a sequence ({self.spec.why}), got {longest}")

    def _extent_for(
        self, tokens: int, row: list[Segment], extent: Extent | None, reserve: int, one_by_one: bool, hold: Hold
    ) -> Extent:  # fmt: skip
        """Where a sequence writes next: on in its extent, unless that is full or another fork has gone on there. one_by_one:
        whether the batch's sequences get a token each."""
        end = row[-1].end if row and row[-1].start < FROZEN else None
        if extent is not None and extent.filled == end:
            self._store.lengthen(extent, tokens + reserve)
            if extent.filled < extent.end:
                hold.extents.append(extent)
                return extent
        if any(end == start for start, _ in hold.claimed):
            end = None  # a fork in this batch has gone on there
        spare = least = reserve
        if not reserve and one_by_one:  # nobody said what comes: more such tokens, if that is how this extent was filled
            filled = extent.end - extent.start if extent is not None and extent.filled == end else 0
            spare, least = min(max(filled, LEAST_SPARE), MOST_SPARE), LEAST_SPARE
        extent = self._store.allocate(tokens, spare, end, least)
        hold.extents.append(extent)
        return extent

    def _append(self, row: list[Segment], sequence: int, kind: str, start: int, positions: np.ndarray) -> None:
        """Adds new rows to a sequence's segments, one for each run of consecutive positions."""
        jumps = (np.flatnonzero(np.diff(positions) != 1) + 1).tolist() if len(positions) > 1 else []
        bounds, agent = [0, *jumps, len(positions)], self.agent
        agent = agent[sequence] if isinstance(agent, list) else agent
        for first, last in zip(bounds, bounds[1:]):
            new = Segment(sequence, agent, kind, start + first, last - first, int(positions[first]))
            longer = row[-1].extended_by(new) if row else None
            if longer is None:
                row.append(new)
            else:
                row[-1] = longer


def _counted(starts: list[int], lengths: list[int]) -> np.ndarray:
    """lengths[i] numbers from starts[i] on, for every i; int64."""
    if len(starts) == 1:
        return np.arange(starts[0], starts[0] + lengths[0], dtype=np.int64)
    lengths = np.asarray(lengths, dtype=np.int64)
    done = lengths.cumsum() - lengths
    return np.repeat(np.asarray(starts, dtype=np.int64) - done, lengths) + np.arange(lengths.sum())
