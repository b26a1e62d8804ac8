"""What a forward pass does in its layers: write K/V and attend. The backward of both: diffmas.trace.layer_backward.

The autograd graph holds this object, so it must not reach a trace, or a tensor that has a graph: such a circle is never freed.
"""

import itertools
import weakref
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from diffmas.ops.fused import in_layout_of, packed_table, with_heads
from diffmas.ops.register import call
from diffmas.trace.attention_parts import LayerAttention, Part
from diffmas.trace.layer_backward import LayerBackward
from diffmas.trace.low_rank import CodedReads
from diffmas.trace.pool import DeferredKVGrad, GradPools, Pool
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Hold, Store
from diffmas.trace.streams import stream_of
from diffmas.trace.tables import Tables
from diffmas.trace.views import KVRange, heads_in, seen_in

__all__ = ["Borrowed", "LayerWork", "work_of"]

_numbers = itertools.count()
_alive: "weakref.WeakValueDictionary[int, LayerWork]" = weakref.WeakValueDictionary()


def work_of(ticket: Tensor) -> "LayerWork":
    """By its number, a 0-d int64 CPU tensor: a compiled graph takes it as an input, and specializes on nothing."""
    work = _alive.get(ticket.item())
    if work is None:
        raise RuntimeError("this forward pass of a trace is over: no graph and no checkpoint holds it")
    return work


class Borrowed(NamedTuple):
    """For a layer's backward that is a graph task of its own inside of another: what that one has.

    grads: of each layer. kept: by layer, what the flush needs of a latent step; not with the other steps' yet, since the next
    step may come to lie in the same memory.
    """

    grads: list[GradPools]
    kept: dict[int, tuple[Tensor, ...]]


@dataclass(eq=False)
class LayerWork(LayerBackward):
    """n packed new tokens of B sequences. Fields: see `ForwardPass`."""

    spec: ModelSpec
    store: Store
    lengths: list[int]
    positions: np.ndarray
    slots: np.ndarray
    views: list[list[KVRange]]
    older_needs_grad: bool = False  # of rows that were written before, some do
    lineage: int = 0
    deferred: DeferredKVGrad | None = None
    step: int = 0
    older: list[list[KVRange]] | None = None
    hold: Hold | None = None
    frozen: list[list[KVRange]] | None = None
    coded: CodedReads | None = None
    adapter_ends: list[int] | None = None

    watch = None  # (layer, dK, dV [n, Hkv, D]) -> None: told the gradient of the rows that this pass wrote
    # (layer, rotated q [n, Hq, D], o, lse, (K, V), parts, scale, interleaved) -> None: told who attends to what, in what
    # `cross_attention` takes and returns; parts: of K/V heads, with views["all"] of each. o and lse are of all rows, also
    # of those that are not a pool's (ask `plain`): views["frozen"] of `frozen_rows`, and `coded`.
    attended = None
    borrowed: Borrowed | None = None  # as long as a backward of it runs inside of another

    def __post_init__(self):
        self.hold = self.hold or Hold(self.store, self.views)
        # The rows that `frozen` numbers, also when the store has others: a graph reads them where they lie.
        self.frozen_rows = self.store.frozen if self.frozen is not None else None
        self.ref = weakref.ref(self)  # for the graph's nodes; Begin's owns it
        self.committed = False  # its tokens are part of the trace: from now on layers can only be recomputed
        self.forget()
        self._flushes: dict[int, tuple] = {}  # by layer, for the pass that begins a run
        seen = (*self.views, *(self.frozen or ()), *(self.coded.views if self.coded is not None else ()))
        self._offsets = any(r.offset for view in seen for r in view)
        # Of each layer's first K/V heads, and at the end of all others, which of the ranges that not all see they see; those
        # that see the same have the same tables.
        some = {(r.layers, r.heads) for view in seen for r in view} - {(None, None)}
        self._sights = [_sights(layer.index, some) for layer in self.spec.layers] if some else None
        self._tables: dict[tuple[torch.device, frozenset | None], Tables] = {}
        number = next(_numbers)
        self.ticket = torch.from_numpy(np.array(number))  # a third of the time that torch.tensor takes
        _alive[number] = self

    @property
    def plain(self) -> bool:
        """Whether all rows that it sees are those of pools."""
        return self.frozen is None and self.coded is None

    def forget(self) -> None:
        """As if no layer had attended yet."""
        layers = len(self.spec.layers)
        self.ran, self.recorded = [False] * layers, [False] * layers
        self.choices: list[tuple[bool, DeferredKVGrad | None]] = [(False, None)] * layers

    def on(self, device: torch.device, layer: int = 0, head: int = 0) -> Tables:
        """What a K/V head of a layer on a device reads."""
        key = device, self._sights and self._sights[layer][min(head, len(self._sights[layer]) - 1)]
        tables = self._tables.get(key)
        if tables is None:
            views, older, frozen = self.views, self.older, self.frozen
            if self._sights is not None:
                views, older, frozen = (x and seen_in(x, layer, head) for x in (views, older, frozen))
            numbers = self.lengths, self.slots, self.positions, self.grad_tail
            tables = self._tables[key] = Tables(device, *numbers, views, older, frozen)
        return tables

    def all_on(self, device: torch.device) -> list[Tables]:
        """What all heads of all layers read, were they on that device."""
        places = {sight: (i, head) for i, layer in enumerate(self._sights or ()) for head, sight in enumerate(layer)}
        return [self.on(device, *place) for place in places.values()] or [self.on(device)]

    @property
    def grad_tail(self) -> list[int]:
        """The newest rows of each sequence's view that are its own, or its run's."""
        return [self.step * n for n in self.lengths] if self.deferred else self.lengths

    def _views(self, tables: Tables, layer: LayerSpec, device: torch.device) -> dict:
        if self._offsets and layer.rope != "none":
            return tables.at_offsets(self.spec.frequencies(layer, device))
        return tables.as_written

    def _parts(self, layer: LayerSpec, device: torch.device, heads: int) -> list[Part]:
        """What the heads of a layer see. heads: how many K/V heads it has."""
        i, sights = layer.index, self._sights and self._sights[layer.index]
        if not sights or len(sights) == 1:
            tables = self.on(device, i)
            return [Part(slice(0, heads), tables, self._views(tables, layer, device))]
        parts = []
        for _, same in itertools.groupby(range(heads), lambda head: sights[min(head, len(sights) - 1)]):
            first, *more = same
            tables = self.on(device, i, first)
            parts.append(Part(slice(first, first + 1 + len(more)), tables, self._views(tables, layer, device)))
        return parts

    def _attention(self, layer: LayerSpec, n: int, scale: float) -> LayerAttention:
        frozen = self.frozen_rows and self.frozen_rows.layers[layer.index]
        return LayerAttention(layer.index, n, scale, layer.rope == "interleaved", self.spec.backend, frozen)

    # ---- forward -----------------------------------------------------------------------------------------------------

    def together(self, layers: list[LayerSpec], device: torch.device, recording: bool) -> tuple[Tables, dict] | None:
        """What layers that rotate alike read, tables and views by name; None where it is not the same, where a layer has run
        already, or where somebody looks on. recording: for a gradient, which activation checkpointing may ask for again."""
        if self.attended is not None or self.coded is not None:
            return None
        if self.committed and recording:
            for layer in layers:
                self._check_recompute(layer.index, recording)
        elif self.committed or any(self.ran[x.index] for x in layers):
            return None
        if self._sights is not None and len({sight for layer in layers for sight in self._sights[layer.index]}) > 1:
            return None
        return self.read_by(layers[0], device)

    def read_by(self, layer: LayerSpec, device: torch.device) -> tuple[Tables, dict]:
        """What a layer reads: tables, and views by name."""
        tables = self.on(device, layer.index)
        return tables, self._views(tables, layer, device)

    def attend(self, layer: LayerSpec, q, k, v, cos, sin, q_weight, k_weight, eps: float, scale: float, recording: bool):
        """Layouts of q, k, v, cos, sin: see diffmas.ops.fused. -> o in that of q, q_rot [n, Hq, D], lse [n, Hq]."""
        i, interleaved, backend = layer.index, layer.rope == "interleaved", self.spec.backend
        if self.committed:
            self._check_recompute(i, recording)
        elif self.ran[i]:
            raise RuntimeError(f"layer {i} attended twice in one forward pass; a trace holds one K/V row per token and layer")
        if self.store.pools[i] is None and layer.head_dim is not None:  # a pool takes its shape from the first K
            n = sum(self.lengths)
            k, v = with_heads(k, n, layer.head_dim), with_heads(v, n, layer.head_dim)
        pool, device = self.store.pool(i, k, v), k.device
        parts = self._parts(layer, device, pool.heads)
        tables, views = parts[0].tables, parts[0].views
        if recording and not self.committed:
            self._choose(layer, pool, parts, scale)
        self.ran[i] = True
        n, whole = tables.slots.shape[0], self.attended is not None
        # Also while it reads: of two threads in one layer of one store, the second waits.
        with pool.writing(self.slots, self.views, self.committed) as kv:
            if len(parts) == 1 and (views["shared"] is None or whole):
                found = tables.work.of("fwd", i, n, "all", q, views["all"], True, k_pool=kv[0], scale=scale, backend=backend)
                q_rot, o, lse = call(  # the pool says how long a head is
                    "inject_attend", kv[0], q, k, v, cos, sin, tables.slots, q_weight, k_weight, eps, interleaved, *kv,
                    *views["all"], scale, backend=backend, **found,
                )  # fmt: skip
                if views["frozen"] is not None:
                    attention = self._attention(layer, n, scale)
                    o, lse = attention.with_frozen(parts[0], q_rot, [(o.view(q_rot.shape), lse)], attention.frozen)
            else:
                q_heads, *rows = (with_heads(x, n, pool.head_dim) for x in (q, k, v))
                rope = (packed_table(cos), packed_table(sin), tables.slots, q_weight, k_weight, eps, interleaved)
                q_rot = call("inject", q_heads, q_heads, *rows, *rope, *kv, backend=backend)
                o, lse = self._attention(layer, n, scale).forward(parts, q_rot, kv, whole)
            if self.coded is not None:
                coded = self.coded.attend(i, self._sights and self._sights[i], q_rot, kv, views["all"][5], scale, backend)
                o, lse = self._attention(layer, n, scale).merged(q_rot, [(o.view(q_rot.shape), lse), *coded])
            o = o if o.shape == q.shape else in_layout_of(q, o)
            if whole:
                self.attended(i, q_rot, o, lse, kv, parts, scale, interleaved)
        return o, q_rot, lse

    def _check_recompute(self, i: int, recording: bool) -> None:
        if torch._C._current_graph_task_id() == -1:
            raise RuntimeError("this forward pass is over: it can be used again by activation checkpointing only")
        if recording and not self.recorded[i]:
            raise RuntimeError(
                f"layer {i} is recomputed with gradients that its first run did not record: re-entrant activation "
                "checkpointing gives wrong gradients with a trace; use use_reentrant=False"
            )

    def choose(self, layers: list[LayerSpec], pools: list[Pool], scale: float) -> None:
        """For layers that read the same and are recorded now."""
        parts = self._parts(layers[0], pools[0].device, pools[0].heads)
        for layer, pool in zip(layers, pools):
            self._choose(layer, pool, parts, scale)

    def _choose(self, layer: LayerSpec, pool: Pool, parts: list[Part], scale: float) -> None:
        """Which rows this layer's backward gives a gradient: all of the view, or its own and its run's, and who adds the
        rest."""
        i, older_needs_grad = layer.index, self.older_needs_grad and layer.records
        self.recorded[i] = layer.records = True
        deferred = self.deferred
        if self.older is not None:
            deferred.flushed[i] = older_needs_grad
            if older_needs_grad:
                self._flushes[i] = (pool, parts, scale, layer.rope == "interleaved", stream_of(pool.device))
        if deferred is None or i not in deferred.flushed:  # not in a run, or in one whose first step was not recorded
            self.choices[i] = (not older_needs_grad, None)
        else:
            self.choices[i] = (True, deferred if deferred.flushed[i] else None)


def _sights(layer: int, some: set[tuple]) -> tuple[frozenset, ...]:
    """Of `some` (layers, heads), those that the first K/V heads of a layer are in; the last: any head behind these."""
    named = {seen: heads_in(layer, *seen) for seen in some}
    first = 1 + max((head for heads in named.values() for head in heads or ()), default=-1)
    sees = lambda heads, head: heads is None or head in heads
    return tuple(frozenset(x for x, heads in named.items() if sees(heads, head)) for head in range(first + 1))
