"""The trace: the K/V memory that the agents of a batch of episodes share, append-only, as a transformers Cache.

Storage and view are two things. A store (`diffmas.trace.plan`) owns the rows of every layer; a `Trace` owns, per sequence, the
ordered list of *segments* (runs of rows) that it sees. Forks, joins and `keep` make new views over the same rows and copy
nothing.
"""

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.cache import CacheFace
from diffmas.trace.plan import KINDS, LONGEST_RUN, SPARE_ROWS, Extent, Plan, Segment, Store
from diffmas.trace.pool import LatentRun, inherit, reposition

__all__ = ["Trace"]

JOINS = ("keep", "shift", "reindex", "same_branch")


class Trace(CacheFace):
    """The shared K/V memory of `batch_size` episodes over all layers of a patched model.

    model: a model that `diffmas.patch_model` was called on. capacity: tokens per sequence to make room for at once; the
    trace grows beyond it by itself. Pass it as `past_key_values` (`cache` since transformers 5.24) to the model's forward and
    generate. Padded tokens never enter it; the sequences of a batch may differ in length.

    Raises ValueError for a model that is not patched, a batch_size or capacity that is not positive.
    """

    def __init__(self, model, batch_size: int = 1, capacity: int | None = None):
        from diffmas.models.patch import patch_of

        super().__init__(layers=[])
        if batch_size < 1:
            raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
        if capacity is not None and capacity < 1:
            raise ValueError(f"capacity: expected at least 1 token per sequence, got {capacity}")
        self._patch = patch_of(model)
        layers = len(self._patch.layers)
        self._store = Store(layers, batch_size * (capacity or 0))
        self._segments: list[list[Segment]] = [[] for _ in range(batch_size)]
        self._extents: list[Extent | None] = [None] * batch_size
        self._next = [0] * batch_size  # the position of each sequence's next token
        self._tokens = [torch.zeros(0) for _ in range(layers)]  # see diffmas.trace.pool
        self._lineage = 0
        self._spare = [0] * batch_size
        self._latent: tuple[LatentRun | None, int] = (None, 0)  # the run that the last forward was a step of, its steps
        self.agent: str | None = None  # who writes next: recorded with every segment

    # ---- what it holds -----------------------------------------------------------------------------------------------

    @property
    def batch_size(self) -> int:
        return len(self._segments)

    @property
    def lengths(self) -> list[int]:
        """Tokens per sequence."""
        return [sum(s.length for s in segments) for segments in self._segments]

    @property
    def segments(self) -> list[Segment]:
        """The table of segments, sequence by sequence in the order they are read."""
        return [s for segments in self._segments for s in segments]

    @property
    def next_positions(self) -> list[int]:
        """The position each sequence's next token gets."""
        return list(self._next)

    def positions(self, sequence: int) -> Tensor:
        """The positions that a sequence's tokens are read at, in order; [length] int64."""
        parts = [self._store.positions[s.start : s.end] + s.shift for s in self._segments[sequence]]
        return torch.from_numpy(np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64))

    def keys_values(self, layer: int, sequence: int) -> tuple[Tensor, Tensor]:
        """A copy of one sequence's K and V rows as they were written (shifts are not applied); [length, Hkv, D] each."""
        pool = self._store.pools[layer]
        if pool is None:
            raise ValueError("keys_values: expected a trace that holds tokens, got an empty one")
        runs = [slice(s.start, s.end) for s in self._segments[sequence]]
        return tuple(torch.cat([x[run] for run in runs]) if runs else x[:0].clone() for x in (pool.k, pool.v))

    def memory(self) -> int:
        """Bytes that the pools of all layers occupy, spare room and forks included."""
        return sum(x.numel() * x.element_size() for p in self._store.pools if p for x in (p.k, p.v))

    def __repr__(self):
        return f"Trace(batch_size={self.batch_size}, lengths={self.lengths}, layers={len(self._tokens)})"

    def __len__(self):
        return len(self._tokens)

    # ---- appending ---------------------------------------------------------------------------------------------------

    def reserve(self, tokens: int | list[int]) -> None:
        """Says how many tokens each sequence will write after its next forward, so that they extend the same segment."""
        self._spare = list(tokens) if isinstance(tokens, (list, tuple)) else [int(tokens)] * self.batch_size

    def plan(self, lengths: list[int], kind: str, positions: Tensor | None = None) -> Plan:
        """The plan of a forward pass that appends lengths[b] tokens to sequence b; positions [n] or the next ones."""
        if len(lengths) != self.batch_size:
            raise ValueError(f"trace: expected a batch of {self.batch_size} sequences, got {len(lengths)}")
        if kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS}, got {kind!r}")
        if positions is None:
            steps = [np.arange(n, dtype=np.int64) + self._next[b] for b, n in enumerate(lengths)]
            positions = np.concatenate(steps) if steps else np.zeros(0, dtype=np.int64)
        else:
            positions = positions.cpu().numpy().astype(np.int64)
        if len(positions) != sum(lengths):
            raise ValueError(f"positions: expected {sum(lengths)} of them, got {len(positions)}")
        self._check_limits(lengths, positions)
        segments, extents, rows, done = [list(s) for s in self._segments], list(self._extents), [], 0
        for b, n in enumerate(lengths):
            left = n
            while left:
                extent = self._extent_for(b, left, segments[b], extents[b])
                take = min(left, extent.end - extent.filled)
                start, where = extent.filled, positions[done : done + take]
                extent.filled += take  # claimed: nobody else writes here, even if this forward fails
                self._store.positions[start : start + take] = where
                self._store.writers[start : start + take] = self._lineage
                rows.append(np.arange(start, start + take))
                self._append(segments[b], Segment(b, self.agent, kind, start, take, int(where[0])))
                extents[b], left, done = extent, left - take, done + take
        rows = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        self._spare = [0] * self.batch_size
        run, step = None, 0
        if kind == "latent" and all(n == 1 for n in lengths):
            run, step = self._latent if 0 < self._latent[1] < LONGEST_RUN else (LatentRun(), 0)
            step += 1
        return Plan(self, list(lengths), positions, rows, segments, extents, run, step)

    def _check_limits(self, lengths, positions) -> None:
        limit, why = self._patch.limit
        if limit is not None:
            longest = max(have + new for have, new in zip(self.lengths, lengths))
            if longest > limit:
                raise ValueError(f"trace: expected at most {limit} tokens a sequence ({why}), got {longest}")
        if len(positions) and positions.min() < 0:
            raise ValueError(f"position_ids: expected positions >= 0, got {int(positions.min())}")

    def _extent_for(self, b: int, tokens: int, segments: list[Segment], extent: Extent | None) -> Extent:
        """Where sequence b writes next: on in its open extent, unless that is full or another fork has gone on there."""
        if extent is not None and extent.filled < extent.end and segments and segments[-1].end == extent.filled:
            return extent
        spare = self._spare[b] or (SPARE_ROWS - 1 if tokens == 1 else 0)
        return self._store.allocate(tokens + spare)

    @staticmethod
    def _append(segments: list[Segment], new: Segment) -> None:
        last = segments[-1] if segments else None
        if (
            last is not None
            and (last.agent, last.kind, last.end, last.shift) == (new.agent, new.kind, new.start, 0)
            and last.position + last.length == new.position
        ):
            segments[-1] = last._replace(length=last.length + new.length)
        else:
            segments.append(new)

    # ---- views: nothing is copied ------------------------------------------------------------------------------------

    def _view(self, segments, extents=None, next_positions=None, tokens=None) -> "Trace":
        view = object.__new__(Trace)
        CacheFace.__init__(view, layers=[])
        view._patch, view._store, view.agent = self._patch, self._store, self.agent
        view._segments = [[s._replace(sequence=b) for s in row] for b, row in enumerate(segments)]
        view._extents = list(extents) if extents is not None else [None] * len(segments)
        view._next = list(self._next if next_positions is None else next_positions)
        view._tokens = list(self._tokens if tokens is None else tokens)
        view._lineage = self._lineage
        view._spare = [0] * len(segments)
        view._latent = (None, 0)
        return view

    def __deepcopy__(self, memo) -> "Trace":
        """What a deep copy of a cache is for, to go on from it more than once, is a fork."""
        return self.fork(1)[0]

    def fork(self, n: int) -> list["Trace"]:
        """n traces that share everything written so far and go on separately."""
        if n < 1:
            raise ValueError(f"n: expected at least 1 fork, got {n}")
        return [self._view(self._segments, self._extents) for _ in range(n)]

    def select(self, sequences: list[int]) -> "Trace":
        """A trace of the given sequences, in that order; one may be named several times (beams, samples)."""
        for b in sequences:
            if not 0 <= b < self.batch_size:
                raise ValueError(f"sequences: expected values in [0, {self.batch_size}), got {b}")
        pick = lambda xs: [xs[b] for b in sequences]  # noqa: E731
        return self._view(pick(self._segments), pick(self._extents), pick(self._next))

    def detach(self) -> "Trace":
        """The same view as a constant: no gradient reaches what was written so far."""
        view = self._view(self._segments, self._extents, tokens=[t.detach() for t in self._tokens])
        view._lineage = self._store.new_lineage()
        return view

    def keep(self, kind: str | None = None, agent: str | None = None, positions: str = "keep") -> "Trace":
        """A view of the segments of one kind and/or one agent. positions: keep, or reindex (renumbered from 0).

        Raises ValueError for an agent that wrote nothing on this trace; a kind that nobody wrote is an empty view.
        """
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS} or None, got {kind!r}")
        if positions not in ("keep", "reindex"):
            raise ValueError(f"positions: expected 'keep' or 'reindex', got {positions!r}")
        agents = {s.agent for s in self.segments if s.agent is not None}
        if agent is not None and agent not in agents:
            raise ValueError(f"agent: expected one of {sorted(agents)}, who wrote on this trace, or None, got {agent!r}")
        kept = [[s for s in row if kind in (None, s.kind) and agent in (None, s.agent)] for row in self._segments]
        view = self._view(kept, self._extents)
        return view._reindexed() if positions == "reindex" else view

    def _reindexed(self) -> "Trace":
        """The same tokens, read at positions 0, 1, 2, ..."""
        rows, ends = [], []
        for segments in self._segments:
            row, at = [], 0
            for s in segments:
                where = self._store.positions[s.start : s.end]
                for run in np.split(np.arange(s.length), np.flatnonzero(np.diff(where) != 1) + 1):
                    position = int(where[run[0]])
                    row.append(s._replace(start=s.start + int(run[0]), length=len(run), position=position, shift=at - position))
                    at += len(run)
            rows.append(row)
            ends.append(at)
        return self._view(rows, self._extents, ends)

    @staticmethod
    def join(traces: list["Trace"], positions: str = "shift") -> "Trace":
        """One trace that sees, per sequence, all that the given traces see, in their order; common segments once.

        The traces must be forks of one trace. Agents that write independently take forks of an empty one:
        `a, b = Trace(model, batch_size).fork(2)`. `positions` of what each wrote after the common part:
        keep: as written (branches overlap). shift: each branch is moved, as a block, behind the one before it.
        reindex: all tokens are renumbered 0, 1, 2, ... same_branch: all branches are moved to start where the common
        part ends. A shifted segment is served by rotating the queries that read it: no key is rewritten.
        """
        if not traces:
            raise ValueError("traces: expected at least one, got an empty list")
        if positions not in JOINS:
            raise ValueError(f"positions: expected one of {JOINS}, got {positions!r}")
        first = traces[0]
        for t in traces[1:]:
            if t._store is not first._store:
                raise ValueError(
                    "traces: expected forks of one trace, got traces of different origin; let the agents write on forks "
                    "of one empty trace: a, b = Trace(model, batch_size).fork(2)"
                )
            if t.batch_size != first.batch_size:
                raise ValueError(f"traces: expected batch size {first.batch_size} in all, got {t.batch_size}")
        rows, nexts = [], []
        for b in range(first.batch_size):
            row, end = Trace._join_sequence([t._segments[b] for t in traces], first._store.positions, positions)
            rows.append(row)
            nexts.append(max([end, *(t._next[b] for t in traces)]) if positions == "keep" else end)
        joined = first._view(rows, None, nexts)
        joined._order_after(traces)
        return joined._reindexed() if positions == "reindex" else joined

    @torch.enable_grad()  # a view, like fork and keep: that it was made under no_grad detaches nothing
    def _order_after(self, traces: list["Trace"]) -> None:
        """The next reader of the joined rows waits for the writers of every branch."""
        store, lineages = self._store, {t._lineage for t in traces}
        if len(lineages) == 1:
            self._tokens = [torch.cat(column) for column in zip(*(t._tokens for t in traces))]
            return
        # Some branch is detached from rows that another learns: the gradient of each row goes to the lineage that wrote it,
        # if a branch that sees the row learns it.
        writers = sorted(frozenset.union(*(store.learns[x] for x in lineages)))
        self._lineage = store.new_lineage(writers)
        columns = [[] for _ in self._tokens]
        for writer in writers:
            learners = [t for t in traces if writer in store.learns[t._lineage]]
            runs = [np.arange(s.start, s.end) for t in learners for s in t.segments]
            rows = np.unique(np.concatenate(runs or [[]])).astype(np.int64)
            rows = torch.from_numpy(rows[store.writers[rows] == writer])
            for i, pool in enumerate(store.pools):
                token = torch.cat([t._tokens[i] for t in learners])
                if pool is not None and len(rows):
                    token = inherit(pool, token, rows.to(pool.k.device), self._lineage, writer)
                columns[i].append(token)
        self._tokens = [torch.cat(column) for column in columns]

    @staticmethod
    def _join_sequence(branches, stored, positions) -> tuple[list[Segment], int]:
        """The segments of one joined sequence, and the position after the last one."""
        where = lambda s: stored[s.start : s.end] + s.shift  # noqa: E731
        row = list(branches[0])
        for branch in branches[1:]:
            row = Trace._common(row, branch)
        shared = sum(s.length for s in row)
        base = max((int(where(s).max()) + 1 for s in row), default=0)
        end = base
        for branch in branches:
            own = Trace._without_first(branch, shared, stored)
            if not own:
                continue
            low = min(int(where(s).min()) for s in own)
            move = {"keep": 0, "reindex": 0, "shift": end - low, "same_branch": base - low}[positions]
            row += [s._replace(shift=s.shift + move) for s in own]
            end = max(end, max(int(where(s).max()) + 1 for s in own) + move)
        return row, end

    @staticmethod
    def _common(a: list[Segment], b: list[Segment]) -> list[Segment]:
        """The tokens that two branches both begin with; one of them may have gone on within the last common segment."""
        common = []
        for x, y in zip(a, b):
            n = min(x.length, y.length)
            if x._replace(length=n) != y._replace(length=n):
                break
            common.append(x._replace(length=n))
            if x.length != y.length:
                break
        return common

    @staticmethod
    def _without_first(segments: list[Segment], tokens: int, stored) -> list[Segment]:
        rest = []
        for s in segments:
            skip = min(tokens, s.length)
            tokens -= skip
            if skip < s.length:
                start = s.start + skip
                rest.append(s._replace(start=start, length=s.length - skip, position=int(stored[start])))
        return rest

    def repack(self) -> "Trace":
        """A copy of what it sees in fresh rows, one run per sequence, with shifts applied to the keys; differentiable.

        Worth it before a long decode over many or shifted segments. Positions become the ones they were read at.
        """
        lengths = self.lengths
        src, shift, rows, done = [], [], [], self._store.allocate(sum(lengths)).filled
        for segments in self._segments:
            row = []
            for s in segments:
                src.append(np.arange(s.start, s.end))
                shift.append(np.full(s.length, s.shift))
                self._store.positions[done : done + s.length] = self._store.positions[s.start : s.end] + s.shift
                self._store.writers[done : done + s.length] = self._lineage
                row.append(s._replace(start=done, position=s.position + s.shift, shift=0))
                done += s.length
            rows.append(row)
        src = torch.from_numpy(np.concatenate(src) if src else np.zeros(0, dtype=np.int64))
        shift = torch.from_numpy(np.concatenate(shift) if shift else np.zeros(0, dtype=np.int64))
        dst = torch.arange(done - len(src), done)
        tokens = list(self._tokens)
        for layer in self._patch.layers:
            pool = self._store.pools[layer.index]
            if pool is None or not len(src):
                continue
            pool.reserve(self._store.used)
            at = pool.k.device
            turn = shift if layer.rope != "none" else torch.zeros_like(shift)
            inv_freq = self._inv_freq(layer, at) if turn.any() else torch.zeros(0, device=at)
            index = (src.to(at), dst.to(at), turn.to(at))
            tokens[layer.index] = reposition(
                pool, tokens[layer.index], *index, inv_freq, layer.rope == "interleaved", self._lineage, self._patch.backend
            )
        return self._view(rows, None, self._next, tokens)

    def _inv_freq(self, layer, device) -> Tensor:
        if layer.rope not in ("half", "interleaved"):
            raise ValueError(f"layer {layer.index}: cannot move keys: how it rotates them ({layer.rope}) is not known")
        return self._patch.inv_freq(device)

    # ---- files -------------------------------------------------------------------------------------------------------

    def save(self, path) -> None:
        """Writes what it sees to one safetensors file, with the identity of model, adapter and RoPE, and a checksum."""
        from diffmas.trace.file import save

        save(self, path)

    @staticmethod
    def load(path, model) -> "Trace":
        """Reads a file of `save` back; raises ValueError if it is damaged or was written by another model or adapter."""
        from diffmas.trace.file import load

        return load(path, model)

    def drop_newest(self, counts: list[int]) -> None:
        """Forgets the newest counts[b] tokens of sequence b."""
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
            ends = [int(self._store.positions[s.start : s.end].max()) + s.shift + 1 for s in row]
            rows.append(row)
            nexts.append(max(ends, default=0) if count > 0 else after)
        self._become(self._view(rows, self._extents, nexts))

    def _become(self, other: "Trace") -> None:
        for name in ("_segments", "_extents", "_next", "_tokens", "_lineage", "_spare", "_latent"):
            setattr(self, name, getattr(other, name))
