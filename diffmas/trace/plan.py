"""Where rows live and where a forward pass writes and reads: stores, segments, extents and plans.

A `Store` owns the rows of every layer. Rows are handed out in *extents* with spare room, so that latent steps and decoding
extend a segment instead of adding one. One forward pass through the model is one `Plan`: where its tokens go and what they
see, fixed before the first layer runs and committed to the trace after the last one. A recomputed forward (activation
checkpointing) reads the same plan.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.pool import LatentRun, Pool, attend

__all__ = ["KINDS", "LONGEST_RUN", "SPARE_ROWS", "Extent", "Plan", "Segment", "Store"]

KINDS = ("prompt", "latent", "text")
SPARE_ROWS = 64  # room of an extent that is opened for single tokens
FEW_TOKENS = 8  # per sequence: reading K and V costs more than the products
SAVED_ROWS = 2048  # what a pass over shared rows must save reading, or its two more calls cost more
LONGEST_RUN = 64  # latent steps whose gradients to older rows wait for each other (diffmas.trace.pool)


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
    """The rows of all layers, the position and the lineage each was written at, and the next free row. Shared by forks."""

    def __init__(self, layers: int, rows: int):
        self.pools: list[Pool | None] = [None] * layers
        self.rows = rows  # what a pool has from the start
        self.used = 0
        self.learns = [frozenset([0])]  # per lineage (see Pool), whose rows its readers leave gradients for
        self.positions = np.zeros(max(rows, 1), dtype=np.int64)
        self.writers = np.zeros(max(rows, 1), dtype=np.int64)  # the lineage that each row was written in

    def allocate(self, rows: int) -> Extent:
        extent = Extent(self.used, self.used + rows)
        self.used += rows
        if self.used > len(self.positions):
            room = np.zeros(max(self.used, 2 * len(self.positions)) - len(self.positions), dtype=np.int64)
            self.positions, self.writers = np.concatenate((self.positions, room)), np.concatenate((self.writers, room))
        return extent

    def new_lineage(self, learns=()) -> int:
        self.learns.append(frozenset([*learns, len(self.learns)]))
        return len(self.learns) - 1

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


def upload(x: np.ndarray, device: torch.device) -> Tensor:
    """A copy of x on a device that the host does not wait for."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device, copy=True)


class Index:
    """Lists of integers as one int64 tensor: one copy to a device for all of them."""

    def __init__(self, *parts):
        self._packed = np.concatenate([np.asarray(p, dtype=np.int64) for p in parts])
        self._sizes = [len(p) for p in parts]
        self._on_device = {}

    def on(self, device: torch.device) -> tuple[Tensor, ...]:
        if device not in self._on_device:
            self._on_device[device] = upload(self._packed, device).split(self._sizes)
        return self._on_device[device]


class Run(NamedTuple):
    """Rows [start, start + length) of a pool, read `shift` positions later than they were written."""

    start: int
    length: int
    shift: int


def runs_of(segments: list[Segment]) -> list[Run]:
    """The runs of one sequence's view; neighbours in the pool are read as one."""
    runs: list[Run] = []
    for s in segments:
        if runs and (s.start, s.shift) == (runs[-1].start + runs[-1].length, runs[-1].shift):
            runs[-1] = runs[-1]._replace(length=runs[-1].length + s.length)
        else:
            runs.append(Run(s.start, s.length, s.shift))
    return runs


def table_of(views: list[list[Run]]) -> tuple[list[int], ...]:
    """indptr, start, length, shift of the views, as the ops take them."""
    indptr = np.cumsum([0, *map(len, views)]).tolist()
    return indptr, *([run[i] for view in views for run in view] for i in range(3))


def common_runs(a: list[Run], b: list[Run]) -> list[Run]:
    """The rows that two views both begin with."""
    common = []
    for x, y in zip(a, b):
        n = min(x.length, y.length)
        if x._replace(length=n) != y._replace(length=n):
            break
        common.append(x._replace(length=n))
        if x.length != y.length:
            break
    return common


def rows_in(view: list[Run]) -> int:
    return sum(run.length for run in view)


def without_first(view: list[Run], rows: int) -> list[Run]:
    """A view without its first rows."""
    rest = []
    for run in view:
        skip = min(rows, run.length)
        rows -= skip
        if skip < run.length:
            rest.append(Run(run.start + skip, run.length - skip, run.shift))
    return rest


def share(views: list[list[Run]]) -> tuple[list[int], list[list[Run]], list[list[Run]]] | None:
    """Neighbouring sequences whose views begin with the same rows: how many sequences are in each group, what the sequences
    of each group share, what is left of each sequence's view. None if that would not save reading SAVED_ROWS rows."""
    sizes, shared = [], []
    for view in views:
        common = common_runs(shared[-1], view) if shared else []
        if common and sizes[-1] * rows_in(common) >= (sizes[-1] - 1) * rows_in(shared[-1]):
            sizes[-1], shared[-1] = sizes[-1] + 1, common
        else:
            sizes.append(1)
            shared.append(view)
    if sum((size - 1) * rows_in(runs) for size, runs in zip(sizes, shared)) < SAVED_ROWS:
        return None
    shared = [runs if size > 1 else [] for size, runs in zip(sizes, shared)]
    group = np.repeat(np.arange(len(sizes)), sizes)
    return sizes, shared, [without_first(view, rows_in(shared[g])) for view, g in zip(views, group)]


class Plan:
    """One forward pass over n packed new tokens: their rows and positions, and what each sequence sees.

    Rides through the model's keyword arguments as one opaque object: containers and anything with `.to` get rebuilt or
    cast on the way by accelerate, DDP and FSDP, `past_key_values` is dropped by activation checkpointing.
    """

    def __init__(self, trace, lengths, positions, rows, segments, extents, run: LatentRun | None, step: int):
        """rows: where the tokens go; run, step: the latent run that this forward is a step of, counted from 1."""
        self.trace, self.lengths, self.positions = trace, lengths, positions
        self._segments, self._extents = segments, extents
        self._lineage = trace._lineage
        self._tokens_in, self._tokens_out = list(trace._tokens), [None] * len(trace._tokens)
        self._recorded = [False] * len(trace._tokens)  # whether a layer ran with gradients
        self._committed = False
        self._run, self._step = run, step
        self._positions_on: dict[torch.device, Tensor] = {}
        views = [runs_of(row) for row in segments]
        self._shifts = any(run.shift for view in views for run in view)
        self._index = Index(rows, np.cumsum([0, *lengths]), [step] * len(lengths) if run else lengths, *table_of(views))
        self._older = Index(*table_of([runs_of(row) for row in trace._segments])) if step == 1 else None
        # Few queries of several sequences are served faster by one pass over the rows that all of them read.
        groups = share(views) if 1 < len(lengths) and max(lengths) <= FEW_TOKENS else None
        self._shared = None
        if groups is not None:
            sizes, shared, rest = groups
            tokens = np.add.reduceat(lengths, np.cumsum([0, *sizes[:-1]]))
            self._shared = Index(np.cumsum([0, *tokens]), *table_of(shared), *table_of(rest))
        self.padding = None  # set by patch.py for a padded batch: how to restore its shape

    def step_on(self, device: torch.device) -> None:
        """Becomes the plan of the next latent step, on the device alone: one row and one position on, the newest run of each
        view a row longer. For a plan that repeats without the host (diffmas.agents.latent)."""
        slots, _, _, *views = self._index.on(device)
        slots += 1
        tables = [views] if self._shared is None else [views, self._shared.on(device)[5:]]
        for indptr, _, lens, _ in tables:
            lens[indptr[1:] - 1] += 1
        self.position_ids(device).add_(1)
        self.forget()

    def forget(self) -> None:
        """As if no layer had attended yet."""
        self._tokens_out = [None] * len(self._tokens_in)

    def skip(self) -> None:
        """Commits a plan whose rows were written under no_grad by another plan's steps."""
        self._tokens_out = list(self._tokens_in)
        self.commit()

    def position_ids(self, device: torch.device) -> Tensor:
        """The positions of the new tokens as models take them, [1, n]."""
        if device not in self._positions_on:
            self._positions_on[device] = upload(self.positions, device)[None]
        return self._positions_on[device]

    def upload(self, device: torch.device) -> None:
        """Brings everything that layers read to a device."""
        self.position_ids(device)
        for index in (self._index, self._shared, self._older):
            if index is not None:
                index.on(device)

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
        shifted = self._shifts and layer.rope != "none"
        inv_freq = trace._inv_freq(layer, k.device) if shifted else None
        view_of = lambda starts, lens, shifts: (starts, lens, shifts if shifted else None, inv_freq)  # noqa: E731
        slots, q_indptr, newest, seg_indptr, *segments = self._index.on(k.device)
        older = None
        if self._older is not None:
            older_indptr, *older_segments = self._older.on(k.device)
            older = (older_indptr, *view_of(*older_segments))
        shared = None
        if self._shared is not None and not torch.is_grad_enabled():
            group_indptr, prefix_indptr, *prefix, rest_indptr, a, b, c = self._shared.on(k.device)
            shared = (group_indptr, prefix_indptr, *view_of(*prefix)), (q_indptr, rest_indptr, *view_of(a, b, c))
        o, token = attend(
            pool, self._tokens_in[i], q, k, v, slots, (q_indptr, seg_indptr, *view_of(*segments)), scale=scale,
            interleaved=layer.rope == "interleaved", lineage=self._lineage, backend=trace._patch.backend,
            newest=newest, run=self._run, older=older, shared=shared, **inject,
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
        trace._latent = (self._run, self._step)
        for b, n in enumerate(self.lengths):
            if n:
                first = sum(self.lengths[:b])
                trace._next[b] = max(trace._next[b], int(self.positions[first : first + n].max()) + 1)
        self._committed = True
