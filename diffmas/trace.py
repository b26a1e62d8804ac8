"""The trace: the K/V memory that the agents of a batch of episodes share, append-only, as a transformers Cache.

Storage and view are two things. A `Store` owns the rows of every layer; a `Trace` owns, per sequence, the ordered list of
*segments* (runs of rows) that it sees. Forks, joins and `keep` make new views over the same rows and copy nothing. Rows
are handed out in *extents* with spare room, so that latent steps and decoding extend a segment instead of adding one.

One forward pass through the model is one `Plan`: where its tokens go and what they see, fixed before the first layer
runs and committed to the trace after the last one. A recomputed forward (activation checkpointing) reads the same plan.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import Cache

from diffmas.pool import Pool, attend, inherit, reposition

__all__ = ["KINDS", "Plan", "Segment", "Trace"]

KINDS = ("prompt", "latent", "text")
SPARE_ROWS = 64  # room of an extent that is opened for single tokens
JOINS = ("keep", "shift", "reindex", "same_branch")


class Segment(NamedTuple):
    """A run of consecutive rows written by one agent for one sequence."""

    sequence: int
    agent: str | None
    kind: str  # prompt | latent | text
    start: int  # first row
    length: int  # rows
    position: int  # the position its first token was written at
    shift: int = 0  # it is read this many positions later

    @property
    def end(self) -> int:
        return self.start + self.length


class Extent:
    """Rows [start, end) reserved for one sequence, of which [start, filled) are written."""

    def __init__(self, start: int, end: int):
        self.filled, self.end = start, end


class Store:
    """The rows of all layers, the position each was written at, and the next free row. Shared by forks."""

    def __init__(self, layers: int, rows: int):
        self.pools: list[Pool | None] = [None] * layers
        self.rows = rows  # what a pool has from the start
        self.used = 0
        self.lineages = 1  # how many were given out; see Pool
        self.positions = np.zeros(max(rows, 1), dtype=np.int64)

    def allocate(self, rows: int) -> Extent:
        extent = Extent(self.used, self.used + rows)
        self.used += rows
        if self.used > len(self.positions):
            grown = np.zeros(max(self.used, 2 * len(self.positions)), dtype=np.int64)
            grown[: len(self.positions)] = self.positions
            self.positions = grown
        return extent

    def new_lineage(self) -> int:
        self.lineages += 1
        return self.lineages - 1

    def pool(self, layer: int, k: Tensor, v: Tensor) -> Pool:
        """The layer's pool, with room for every row handed out; made from the first K that is written."""
        pool = self.pools[layer]
        if pool is None:
            if k.shape != v.shape:
                raise ValueError(f"layer {layer}: expected K and V of one shape, got {list(k.shape)} and {list(v.shape)}")
            pool = self.pools[layer] = Pool(max(self.rows, self.used), *k.shape[1:], k.dtype, k.device)
        if pool.k.dtype != k.dtype or pool.k.device != k.device:
            raise ValueError(
                f"trace: layer {layer} holds {pool.k.dtype} on {pool.k.device}, this forward brings {k.dtype} on "
                f"{k.device}; use a new trace after changing the model's dtype, device or autocast"
            )
        pool.reserve(self.used)
        return pool


class Plan:
    """One forward pass over n packed new tokens: their rows and positions, and what each sequence sees.

    Rides through the model's keyword arguments as one opaque object: containers and anything with `.to` get rebuilt or
    cast on the way by accelerate, DDP and FSDP, `past_key_values` is dropped by activation checkpointing.
    """

    def __init__(self, trace, lengths, positions, rows, segments, extents):
        self.trace, self.lengths, self.positions = trace, lengths, positions
        self._segments, self._extents = segments, extents
        self._lineage = trace._lineage
        self._tokens_in, self._tokens_out = list(trace._tokens), [None] * len(trace._tokens)
        self._recorded = [False] * len(trace._tokens)  # whether a layer ran with gradients
        self._committed = False
        self._index = self._pack(rows)
        self._on_device = {}
        self.padding = None  # set by patch.py for a padded batch: how to restore its shape

    def _pack(self, rows) -> tuple[Tensor, list[int], bool]:
        """All index tensors in one int64 tensor (one copy to a device), the sizes of its parts, and whether it shifts."""
        starts, lens, shifts, indptr = [], [], [], [0]
        for segments in self._segments:
            previous_end, previous_shift = -1, 0
            for s in segments:  # neighbours in the pool are read as one run
                if s.start == previous_end and s.shift == previous_shift:
                    lens[-1] += s.length
                else:
                    starts.append(s.start)
                    lens.append(s.length)
                    shifts.append(s.shift)
                previous_end, previous_shift = s.end, s.shift
            indptr.append(len(starts))
        q_indptr = np.concatenate(([0], np.cumsum(self.lengths)))
        parts = [rows, q_indptr, indptr, starts, lens, shifts]
        packed = torch.from_numpy(np.concatenate([np.asarray(p, dtype=np.int64) for p in parts]))
        return packed, [len(p) for p in parts], any(shifts)

    def _index_on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._on_device:
            packed, sizes, _ = self._index
            self._on_device[device] = packed.to(device).split(sizes)
        return self._on_device[device]

    @property
    def tokens(self) -> int:
        return int(sum(self.lengths))

    def last_rows(self) -> Tensor:
        """Packed index of each sequence's last new token; [B] int64 on the CPU."""
        return torch.from_numpy(np.cumsum(self.lengths) - 1)

    def attend(self, layer, q: Tensor, k: Tensor, v: Tensor, scale: float, **inject) -> Tensor:
        """Writes this forward's K and V of one layer and attends; q [n, Hq, D], k, v [n, Hkv, D] -> o [n, Hq, D].

        layer: the `patch.Layer` that says which layer it is and how it rotates. `inject`: see `pool.attend`.
        """
        i, trace = layer.index, self.trace
        if self._committed:
            self._check_recompute(i)
        elif self._tokens_out[i] is not None:
            raise RuntimeError(f"layer {i} attended twice in one forward pass; a trace holds one K/V row per token and layer")
        pool = trace._store.pool(i, k, v)
        slots, q_indptr, seg_indptr, seg_start, seg_len, seg_shift = self._index_on(k.device)
        inv_freq = None
        if self._index[2] and layer.rope != "none":
            inv_freq = trace._inv_freq(layer, k.device)
        view = (q_indptr, seg_indptr, seg_start, seg_len, seg_shift if inv_freq is not None else None, inv_freq)
        o, token = attend(
            pool, self._tokens_in[i], q, k, v, slots, view, scale=scale,
            interleaved=layer.rope == "interleaved", lineage=self._lineage, backend=trace._patch.backend, **inject,
        )  # fmt: skip
        if not self._committed:
            self._tokens_out[i], self._recorded[i] = token, torch.is_grad_enabled()
        return o

    def _check_recompute(self, i: int) -> None:
        if torch._C._current_graph_task_id() == -1:
            raise RuntimeError("this forward pass is over: its plan can be used again by activation checkpointing only")
        if torch.is_grad_enabled() and not self._recorded[i]:
            raise RuntimeError(
                f"layer {i} is recomputed with gradients that its first run did not record: re-entrant activation "
                "checkpointing gives wrong gradients with a trace; use use_reentrant=False"
            )

    def commit(self) -> None:
        """Makes the new tokens part of the trace; raises if a layer did not write its rows."""
        missing = [i for i, token in enumerate(self._tokens_out) if token is None]
        if missing:
            raise RuntimeError(
                f"layers {missing} did not write to the trace: the keyword argument diffmas_trace did not reach them"
            )
        trace = self.trace
        trace._segments, trace._extents, trace._tokens = self._segments, self._extents, self._tokens_out
        for b, n in enumerate(self.lengths):
            if n:
                first = sum(self.lengths[:b])
                trace._next[b] = max(trace._next[b], int(self.positions[first : first + n].max()) + 1)
        self._committed = True


class Trace(Cache):
    """The shared K/V memory of `batch_size` episodes over all layers of a patched model.

    model: a model that `diffmas.patch_model` was called on. capacity: tokens per sequence to make room for at once; the
    trace grows beyond it by itself. Pass it as `past_key_values` to the model's forward and generate. Padded tokens
    never enter it; the sequences of a batch may differ in length.

    Raises ValueError for a model that is not patched, a batch_size or capacity that is not positive.
    """

    def __init__(self, model, batch_size: int = 1, capacity: int | None = None):
        from diffmas.patch import patch_of

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
        self._tokens = [torch.zeros(0) for _ in range(layers)]  # see diffmas.pool
        self._lineage = 0
        self._spare = [0] * batch_size
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
                rows.append(np.arange(start, start + take))
                self._append(segments[b], Segment(b, self.agent, kind, start, take, int(where[0])))
                extents[b], left, done = extent, left - take, done + take
        rows = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
        self._spare = [0] * self.batch_size
        return Plan(self, list(lengths), positions, rows, segments, extents)

    def _check_limits(self, lengths, positions) -> None:
        limit = self._patch.max_length
        if limit is not None:
            longest = max(have + new for have, new in zip(self.lengths, lengths))
            if longest > limit:
                raise ValueError(f"trace: expected at most {limit} tokens per sequence (patch_model's max_length), got {longest}")
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
        Cache.__init__(view, layers=[])
        view._patch, view._store, view.agent = self._patch, self._store, self.agent
        view._segments = [[s._replace(sequence=b) for s in row] for b, row in enumerate(segments)]
        view._extents = list(extents) if extents is not None else [None] * len(segments)
        view._next = list(self._next if next_positions is None else next_positions)
        view._tokens = list(self._tokens if tokens is None else tokens)
        view._lineage = self._lineage
        view._spare = [0] * len(segments)
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
        """A view of the segments of one kind and/or one agent. positions: keep, or reindex (renumbered from 0)."""
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind: expected one of {KINDS} or None, got {kind!r}")
        if positions not in ("keep", "reindex"):
            raise ValueError(f"positions: expected 'keep' or 'reindex', got {positions!r}")
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

        The traces must be forks of one trace (fork an empty trace for agents that write independently). `positions` of
        what each wrote after the common part:
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
                raise ValueError("traces: expected forks of one trace, got traces of different origin")
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
        lineages = sorted({t._lineage for t in traces})
        if len(lineages) == 1:
            self._tokens = [torch.cat(column) for column in zip(*(t._tokens for t in traces))]
            return
        # Some branch is detached from rows that another learns: each gets the gradients of the rows that it sees.
        self._lineage = self._store.new_lineage()
        columns = [[] for _ in self._tokens]
        for lineage in lineages:
            own = [t for t in traces if t._lineage == lineage]
            runs = [np.arange(s.start, s.end) for t in own for s in t.segments]
            rows = torch.from_numpy(np.unique(np.concatenate(runs or [[]])))
            for i, pool in enumerate(self._store.pools):
                token = torch.cat([t._tokens[i] for t in own])
                if pool is not None and len(rows):
                    token = inherit(pool, token, rows.long().to(pool.k.device), self._lineage, lineage)
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
        from diffmas.trace_file import save

        save(self, path)

    @staticmethod
    def load(path, model) -> "Trace":
        """Reads a file of `save` back; raises ValueError if it is damaged or was written by another model or adapter."""
        from diffmas.trace_file import load

        return load(path, model)

    # ---- the transformers Cache interface ----------------------------------------------------------------------------
    # Hugging Face sees a left-padded cache of the longest sequence; the body's hook (patch.py) works on the ragged one.

    is_compileable = False
    is_croppable = True
    max_batch_size = batch_size

    @property
    def is_initialized(self) -> bool:
        return any(self._segments)

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return max(self.lengths)

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.get_seq_length()

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        new = query_length if isinstance(query_length, int) else len(query_length)  # a cache_position before 5.3
        return self.get_seq_length() + new, 0

    def get_max_length(self, layer_idx: int = 0) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def update(self, *args, **kwargs):
        raise ValueError("this model is not patched: call diffmas.patch_model(model) before passing it a Trace")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._become(self.select(indices.tolist()))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._become(self.select([b for b in range(self.batch_size) for _ in range(repeats)]))

    def crop(self, length: int) -> None:
        """Forgets the newest tokens: -length of each sequence, or (length > 0) all beyond the longest's first `length`."""
        length = int(length)  # assisted decoding passes a tensor
        self.drop_newest([-length if length <= 0 else max(0, self.get_seq_length() - length)] * self.batch_size)

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

    def reset(self) -> None:
        empty = [[] for _ in self._segments]
        self._become(self._view(empty, None, [0] * self.batch_size, [torch.zeros(0) for _ in self._tokens]))

    def activate_past_recording(self, *args, **kwargs) -> None:
        """Assisted decoding asks for it before it crops; nothing to record, rows stay where they are."""

    def _become(self, other: "Trace") -> None:
        for name in ("_segments", "_extents", "_next", "_tokens", "_lineage", "_spare"):
            setattr(self, name, getattr(other, name))
