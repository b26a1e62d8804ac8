"""Forks of a trace and parts of it: other views of the same rows, of which nothing is copied."""

from typing import Self

from diffmas.trace.cache import CacheFace
from diffmas.trace.views import KINDS, SINKS, only, reindexed

__all__ = ["Viewing"]


class Viewing(CacheFace):
    """How a `Trace` is seen otherwise."""

    def __deepcopy__(self, memo=None) -> Self:
        """What a deep copy of a cache is for, to go on from it more than once, is a fork."""
        return self.fork(1)[0]

    __copy__ = __deepcopy__

    def fork(self, n: int) -> list[Self]:
        """n traces that share everything written so far and go on separately."""
        if n < 1:
            raise ValueError(f"n: expected at least 1 fork, got {n}")
        return [self._view(self._segments, self._extents) for _ in range(n)]

    def select(self, sequences: list[int]) -> Self:
        """A trace of the given sequences, in that order; one may be named several times (beams, samples)."""
        for b in sequences:
            if not 0 <= b < self.batch_size:
                raise ValueError(f"sequences: expected values in [0, {self.batch_size}), got {b}")
        pick = lambda xs: [xs[b] for b in sequences]  # noqa: E731
        view = self._view(pick(self._segments), pick(self._extents), pick(self._next))
        if self.adapter is not None:
            view.adapter = self.adapter._replace(of=pick(self.adapter.of))
        return view

    def detach(self) -> Self:
        """The same view as a constant: no gradient reaches what was written so far."""
        lineage = self._store.new_lineage()
        return self._view(self._segments, self._extents, order=self._order.detach(), lineage=lineage)

    def keep(
        self, kind: str | tuple[str, ...] | None = None, agent: str | None = None, positions: str = "keep", sinks: int = SINKS,
    ) -> Self:  # fmt: skip
        """A view of the segments of one kind, or of several, and/or of one agent, and of the first tokens. positions: keep, or
        reindex (renumbered from 0).

        sinks: the first so many tokens that a sequence sees stay, whoever wrote them: pretrained models use them as attention
        sink, and a view without them breaks their attention (StreamingLLM, arXiv 2309.17453). 0 keeps what is asked for alone.

        Raises ValueError for an agent that wrote nothing on this trace, and for sinks < 0; a kind that nobody wrote is a view
        of the sinks.
        """
        kinds = (kind,) if isinstance(kind, str) else kind
        if kinds is not None and not (isinstance(kinds, tuple) and kinds and {*kinds} <= {*KINDS}):
            raise ValueError(f"kind: expected one of {KINDS}, a tuple of some or None, got {kind!r}")
        if positions not in ("keep", "reindex"):
            raise ValueError(f"positions: expected 'keep' or 'reindex', got {positions!r}")
        if not isinstance(sinks, int) or sinks < 0:
            raise ValueError(f"sinks: expected an integer >= 0, got {sinks!r}")
        agents = {s.agent for s in self.segments if s.agent is not None}
        if agent is not None and agent not in agents:
            raise ValueError(f"agent: expected one of {sorted(agents)}, who wrote on this trace, or None, got {agent!r}")
        rows, ends = [only(row, kind, agent, sinks) for row in self._segments], None
        if positions == "reindex":
            rows, ends = reindexed(rows)
        return self._view(rows, self._extents, ends)

    def drop_newest(self, counts: list[int]) -> None:
        """Forgets the newest counts[b] tokens of sequence b. Raises ValueError unless there is a count >= 0 for each."""
        counts = self._counts("counts", counts)
        rows, nexts = [], []
        for segments, after, count in zip(self._segments, self._next, counts):
            row, left = list(segments), count
            while row and left > 0:
                cut = min(left, row[-1].length)
                left -= cut
                if cut == row[-1].length:
                    row.pop()
                else:
                    row[-1] = row[-1]._replace(length=row[-1].length - cut)
            rows.append(row)
            nexts.append(max((s.next_position for s in row), default=0) if count > 0 else after)
        self._become(self._view(rows, self._extents, nexts))
