"""One forward pass of a model over new tokens: where they are written and what they see.

Everything is fixed before the first layer runs; layers only leave their order tokens here. `Trace.plan` makes a forward pass and
`Trace.commit` makes its tokens part of the trace, once all layers have run. A recomputed forward (activation checkpointing) uses
the same object and changes nothing.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.autograd import attend, held_by_graph
from diffmas.trace.pool import DeferredKVGrad
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Extent, Hold, Store
from diffmas.trace.views import KVRange, Segment, share, table_of

__all__ = ["ForwardPass"]

DECODE_TOKENS = 8  # up to this many a sequence, reading K and V costs more than the products


class Table(NamedTuple):
    """A trace's segments before a forward pass, those with its tokens, and where each sequence goes on after it."""

    before: list[list[Segment]]
    segments: list[list[Segment]]
    extents: list[Extent | None]


@dataclass
class ForwardPass:
    """n packed new tokens of B sequences.

    positions, slots: of each token, [n] int64. views: what each sequence sees, its new rows at the end. order: the order token of
    each layer (diffmas.trace.autograd). lineage: which gradient pools it uses. deferred, step: the run of latent steps that it is
    step number `step` of, from 1; older: with step 1, the views before the run. table: what `Trace.commit` takes over. hold: of the rows
    that it needs. batch: of the caller, how its batch was packed.

    Rides through the model's keyword arguments as one opaque object: containers and anything with `.to` get rebuilt or
    cast on the way by accelerate, DDP and FSDP, `past_key_values` is dropped by activation checkpointing.
    """

    spec: ModelSpec
    store: Store
    lengths: list[int]
    positions: np.ndarray
    slots: np.ndarray
    views: list[list[KVRange]]
    order: list[Tensor]
    lineage: int = 0
    deferred: DeferredKVGrad | None = None
    step: int = 0
    older: list[list[KVRange]] | None = None
    table: Table | None = None
    hold: Hold | None = None
    batch: Any = None
    committed: bool = field(default=False, init=False)

    def __post_init__(self):
        self.order_after: list[Tensor | None] = [None] * len(self.order)
        self._recorded = [False] * len(self.order)  # whether a layer ran with gradients
        if self.hold is None:
            self.hold = Hold(self.store)
        self.hold.ranges = [(r.start, r.start + r.length) for view in self.views for r in view]
        self._held = held_by_graph(self.hold)
        self._on: dict[torch.device, _Index] = {}
        self._offsets = any(r.offset for view in self.views for r in view)

    def on(self, device: torch.device) -> "_Index":
        """What layers on a device read; copied there once, without a wait."""
        index = self._on.get(device)
        if index is None:
            index = self._on[device] = _Index(self, device)
        return index

    def position_ids(self, device: torch.device) -> Tensor:
        """The positions of the new tokens as models take them, [1, n]."""
        return self.on(device).position_ids

    def last_rows(self) -> Tensor:
        """Packed index of each sequence's last new token; [B] int64 on the CPU."""
        return torch.from_numpy(np.cumsum(self.lengths) - 1)

    def attend(self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, scale: float, **inject) -> Tensor:
        """Writes this forward's K and V of one layer and attends; q [n, Hq, D], k, v [n, Hkv, D] -> o [n, Hq, D].

        `inject`: the norms and rotary tables of `diffmas.trace.autograd.attend`.
        """
        i, recording = layer.index, torch.is_grad_enabled()
        if self.committed:
            self._check_recompute(i, recording)
        elif self.order_after[i] is not None:
            raise RuntimeError(f"layer {i} attended twice in one forward pass; a trace holds one K/V row per token and layer")
        pool = self.store.pool(i, k, v)
        index = self.on(k.device)
        view_of = index.at_offsets(self.spec, layer) if self._offsets and layer.rope != "none" else index.views
        o, order = attend(
            pool, self.order[i], q, k, v, index.slots, view_of["all"], scale=scale, interleaved=layer.rope == "interleaved",
            lineage=self.lineage, backend=self.spec.backend, grad_tail=index.grad_tail, deferred=self.deferred,
            older=view_of["older"], shared=None if recording else view_of["shared"],
            hold=self._held if recording else None, **inject,
        )  # fmt: skip
        if not self.committed:
            self.order_after[i], self._recorded[i] = order, recording
        return o

    def _check_recompute(self, i: int, recording: bool) -> None:
        if torch._C._current_graph_task_id() == -1:
            raise RuntimeError("this forward pass is over: it can be used again by activation checkpointing only")
        if recording and not self._recorded[i]:
            raise RuntimeError(
                f"layer {i} is recomputed with gradients that its first run did not record: re-entrant activation "
                "checkpointing gives wrong gradients with a trace; use use_reentrant=False"
            )

    def finish(self) -> None:
        """Its tokens are part of the trace: from now on layers can only be recomputed."""
        self.committed = True
        self.hold.extents = []  # the trace has them

    # ---- repeated on the device (diffmas.agents.latent) ---------------------------------------------------------------

    def repeatable(self, steps: int) -> bool:
        """Whether `steps` steps from this one stay in their extents and in the pools there are: a capture must not move these."""
        rooms = (e.end - e.filled for e in self.table.extents)
        return all(room >= steps - 1 for room in rooms) and all(p.rows >= self.store.top for p in self.store.pools)

    def step_on(self, device: torch.device) -> None:
        """Becomes the pass of the next latent step, on the device alone: one row and one position on."""
        self.on(device).step_on()
        self.forget()

    def forget(self) -> None:
        """As if no layer had attended yet."""
        self.order_after = [None] * len(self.order)


class _Index:
    """A forward pass as int64 tensors on one device, split from one copy: slots, positions, and the tables of segments."""

    def __init__(self, forward_pass: ForwardPass, device: torch.device):
        f = forward_pass
        q_indptr = np.cumsum([0, *f.lengths])
        grad_tail = [f.step] * len(f.lengths) if f.deferred else f.lengths
        parts = [f.slots, f.positions, q_indptr, grad_tail, *table_of(f.views)]
        if f.older is not None:
            parts += table_of(f.older)
        # Few queries of several sequences are served faster by one pass over the rows that all of them read.
        groups = share(f.views) if 1 < len(f.lengths) and max(f.lengths) <= DECODE_TOKENS else None
        if groups is not None:
            sizes, shared, rest = groups
            tokens = np.add.reduceat(f.lengths, np.cumsum([0, *sizes[:-1]]))
            parts += [np.cumsum([0, *tokens]), *table_of(shared), *table_of(rest)]
        packed = _upload(np.concatenate([np.asarray(p, dtype=np.int64) for p in parts]), device)
        self.slots, positions, self.q_indptr, self.grad_tail, *tables = packed.split([len(p) for p in parts])
        self.position_ids = positions[None]
        self._table, self._older, self._groups, self._shared, self._rest = tables[:4], None, None, None, None
        tables = tables[4:]
        if f.older is not None:
            self._older, tables = tables[:4], tables[4:]
        if groups is not None:
            self._groups, self._shared, self._rest = tables[0], tables[1:5], tables[5:]
        self.views = self._views(None)
        self._at_offsets = None

    def _views(self, inv_freq: Tensor | None) -> dict:
        """The arguments of attention by view: q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq."""
        read = lambda table: (*table[:3], table[3] if inv_freq is not None else None, inv_freq)
        return {
            "all": (self.q_indptr, *read(self._table)),
            "older": None if self._older is None else read(self._older),
            "shared": None if self._groups is None
            else ((self._groups, *read(self._shared)), (self.q_indptr, *read(self._rest))),
        }  # fmt: skip

    def at_offsets(self, spec: ModelSpec, layer: LayerSpec) -> dict:
        """The views for a layer that rotates its queries where a segment is read at a position offset."""
        inv_freq = spec.frequencies(layer, self.slots.device)
        if self._at_offsets is None:
            self._at_offsets = self._views(inv_freq)
        return self._at_offsets

    def step_on(self) -> None:
        """One row and one position on, the newest range of each view a row longer."""
        self.slots.add_(1)
        self.position_ids.add_(1)
        for table in (self._table, self._rest):
            if table is not None:
                indptr, _, length, _ = table
                length[indptr[1:] - 1] += 1


def _upload(x: np.ndarray, device: torch.device) -> Tensor:
    """A copy of x on a device that the host does not wait for."""
    x = torch.from_numpy(x)
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x
