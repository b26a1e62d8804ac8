"""One forward pass of a model over new tokens: where they are written and what they see.

Everything is fixed before the first layer runs. `Trace.plan` makes a forward pass, `attend` is what every layer calls, `end`
takes the last hidden state, and `Trace.commit` makes the tokens part of the trace. A recomputed forward (activation
checkpointing) uses the same object and changes nothing.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmas.trace import autograd
from diffmas.trace.layer_work import LayerWork
from diffmas.trace.pool import DeferredKVGrad
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Extent, Store
from diffmas.trace.tables import Tables
from diffmas.trace.views import KVRange, Segment

__all__ = ["ForwardPass", "Place", "Table"]


class Table(NamedTuple):
    """A trace's segments before a forward pass and with its tokens; the rows and the position that each sequence goes on at."""

    before: list[list[Segment]]
    segments: list[list[Segment]]
    extents: list[Extent | None]
    next: list[int]


class Place(NamedTuple):
    """Where a forward pass leaves off: its rows and positions, and the segments with them."""

    slots: np.ndarray
    positions: np.ndarray
    segments: list[list[Segment]]


class ForwardPass:
    """n packed new tokens of B sequences.

    lengths [B]: new tokens of each sequence. positions, slots: of each token, [n] int64. views: what each sequence sees, its
    new rows at the end. past: the order token that it stands behind (diffmas.trace.autograd). table: what `Trace.commit` takes
    over. more: lineage (which gradient pools it uses), deferred and step (the run of latent steps that it is step number `step`
    of, from 1), older (with step 1, the views before the run of those who take it), hold (of the rows that it needs),
    frozen (the quantised rows that each sequence sees before its view, from 0 on), coded (those that it reads with codes),
    adapter_ends (where the new tokens of each of several adapters end, which have rows of their own).
    kind: of the rows that it writes. ids [n]: the tokens that it writes, where its caller knows them. batch: the caller's.
    ending: a function that is told the last hidden state, in any shape.

    Rides through the model's keyword arguments as one opaque object: containers and anything with `.to` get rebuilt or
    cast on the way by accelerate, DDP and FSDP, `past_key_values` is dropped by activation checkpointing.
    """

    def __init__(
        self, spec: ModelSpec, store: Store, lengths: list[int], positions: np.ndarray, slots: np.ndarray,
        views: list[list[KVRange]], past: Tensor, table: Table | None = None, **more,
    ):  # fmt: skip
        if table is None and (end := max((r.start + r.length for view in views for r in view), default=0)) > store.top:
            raise ValueError(
                f"views: expected rows that the store has handed out (Store.allocate), {store.top} of them, got {end}"
            )
        self.lengths, self.positions, self.table, self.past = lengths, positions, table, past
        self.work = LayerWork(spec, store, lengths, positions, slots, views, past.requires_grad, **more)
        self.order = autograd.begin(self.work, past) if torch.is_grad_enabled() else None
        self.after: Tensor | None = None  # what the next pass stands behind
        self.kind, self.ids, self.batch, self.ending = "prompt", None, None, None

    def on(self, device: torch.device) -> Tables:
        return self.work.on(device)

    def position_ids(self, device: torch.device) -> Tensor:
        """The positions of the new tokens as models take them, [1, n]."""
        return self.work.on(device).position_ids

    def last_rows(self) -> Tensor:
        """Packed index of each sequence's last new token, for one without any that of another; [B] int64 on the CPU."""
        return torch.from_numpy(np.cumsum(self.lengths) - 1)

    def attend(
        self, layer: LayerSpec, q: Tensor, k: Tensor, v: Tensor, scale: float, cos: Tensor | None = None,
        sin: Tensor | None = None, q_weight: Tensor | None = None, k_weight: Tensor | None = None, eps: float = 1e-6,
    ) -> Tensor:  # fmt: skip
        """Writes this pass's K/V of one layer and attends over their views; differentiable.

        q [n, Hq, D]; k, v [n, Hkv, D]; cos, sin, q_weight, k_weight, eps: as `diffmas.ops.inject` takes them. -> o [n, Hq, D].
        Or, not when compiling, as projections have them: q [1, n, Hq * D]; k, v [1, n, Hkv * D]; cos, sin [1, n, Dr].
        torch.compile traces this method: it reads flags and tensors, and everything else happens inside of the op.
        """
        work, compiling = self.work, torch.compiler.is_compiling()
        # Flags come last: torch.compile compiles anew for each that was looked at and has changed. A pass that is recomputed
        # records what it did: the layer may have recorded since, for the first time.
        recording = torch.is_grad_enabled() and (
            q.requires_grad or k.requires_grad or v.requires_grad
            or (q_weight is not None and q_weight.requires_grad) or (k_weight is not None and k_weight.requires_grad)
            or (work.older_needs_grad and layer.records and (compiling or not work.committed or work.recorded[layer.index]))
        )  # fmt: skip
        if compiling:
            order = self.order if recording else None
            args = (q, k, v, order, cos, sin, q_weight, k_weight, eps, scale, work.ticket, layer.number)
            return torch.ops.diffmas.attend(*args)[0]
        if recording:
            if q_weight is not None and q_weight.requires_grad:
                q_weight = q_weight.view_as(q_weight)  # a torch function, which whoever gives aliases of parameters sees
            if k_weight is not None and k_weight.requires_grad:
                k_weight = k_weight.view_as(k_weight)
            return autograd.attend(q, k, v, self.order, q_weight, k_weight, (work, layer, cos, sin, eps, scale))
        return work.attend(layer, q, k, v, cos, sin, q_weight, k_weight, eps, scale, False)[0]

    def end(self, h: Tensor) -> None:
        """After the last layer; h: the last hidden state, in any shape."""
        if self.ending is not None:
            self.ending(h)
        self.after = self.past
        if torch.is_grad_enabled() and any(self.work.recorded):
            self.after = autograd.end(h, self.work.spec.anchored)
        if self.order is not None:  # recomputations take another: this object keeps no graph
            self.order = torch.zeros(0, requires_grad=True)

    def finish(self) -> None:
        """Its tokens are part of the trace: from now on layers can only be recomputed."""
        self.work.committed = True
        self.work.hold.extents = []  # the trace has them
        # The graph of a checkpoint holds this object, so it must not lead to a graph: such a circle is never freed.
        self.table = self.past = self.after = self.ids = self.batch = self.ending = None

    # ---- repeated on the device (diffmas.models.capture) ---------------------------------------------------------------

    def still(self):
        """A context in which no other thread allocates rows and no pool moves."""
        return self.work.store.still()

    def storage(self) -> list[tuple[Tensor, ...]]:
        """K and V of every layer's pool, where they lie now; and the quantised rows that it reads."""
        frozen = self.work.frozen_rows
        return [pool.kv for pool in self.work.store.pools] + (frozen.layers if frozen is not None else [])

    @property
    def run_left(self) -> int:
        """How many latent steps, from this one on, share a flush that stands before an earlier one."""
        return DeferredKVGrad.LONGEST - self.work.step + 1 if self.work.step > 1 else 0

    def repeatable(self, steps: int) -> bool:
        """Whether `steps` steps from this one stay in their extents and in the pools there are, on the device: a capture must
        not move these."""
        rooms, store = (e.end - e.filled for e, n in zip(self.table.extents, self.lengths) if n), self.work.store
        roomy = all(pool is not None and pool.rows >= store.top for pool in store.pools)
        here = not store.offloaded and self.work.coded is None
        return here and all(room >= steps - 1 for room in rooms) and roomy

    def place(self) -> Place:
        return Place(self.work.slots, self.positions, self.table.segments)

    def follows(self, before: Place) -> bool:
        """Whether it is what a pass that left off there becomes by a `move` of 1: all its sequences go on in the next row, at
        the next position, and nothing else has changed."""
        if self.table.before is not before.segments or len(self.positions) != len(before.positions):
            return False
        return bool((self.work.slots == before.slots + 1).all() and (self.positions == before.positions + 1).all())

    def can_move(self, device: torch.device) -> None:
        """Makes ready for `move`: uploads what it moves."""
        room = sum(e.end - e.filled for e, n in zip(self.table.extents, self.lengths) if n)
        for tables in self.work.all_on(device):
            tables.can_move(self.work.deferred is not None, room)

    def move(self, device: torch.device, steps: int) -> None:
        """Becomes the pass so many steps of one token later, or earlier, on the device alone: rows and positions further."""
        for tables in self.work.all_on(device):
            tables.move(steps)

    def forget(self) -> None:
        """As if no layer had attended yet."""
        self.work.forget()

    def repeated(self, h: Tensor | None = None) -> None:
        """As if all layers had attended: another pass that repeated itself has written its rows. h: its last hidden states,
        where it has a gradient."""
        self.work.ran, self.after = [True] * len(self.work.ran), self.past if h is None else autograd.end(h)
