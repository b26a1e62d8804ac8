"""Decoder layers of few rows as one op of the CPU's, `few_rows_layers`: what `LayerWork.attend` does, for all of them."""

import contextlib

import torch
from torch import Tensor

from diffmas.ops.huge_pages import gather_in_huge_pages
from diffmas.ops.linear import Parts
from diffmas.trace.layer_work import LayerWork
from diffmas.trace.pool import Pool
from diffmas.trace.spec import LayerSpec

__all__ = ["Weights", "arguments", "ends_of", "few_rows_layers", "ready"]

BIAS, LORA, WAITS = 1, 2, 4  # what a linear has beside its weight; whether its adapter learns


class Weights:
    """Those of consecutive layers, as lists in the order that the op takes them in."""

    def __init__(self, kv_size: int, adapters: int = 1):
        self.kv_size = kv_size  # numbers of a row of K
        self.adapters = adapters  # of a linear, at most
        self.norms: list[Tensor] = []  # before attention and before the feed-forward part
        self.eps: list[float] = []
        self.linears: list[Tensor] = []  # of q, k, v, o, gate, up and down
        self.parts: list[int] = []
        self.scales: list[float] = []  # of each adapter, or as many zeros
        self.head_norms: list[Tensor] = []  # of q and k
        self.head_eps: list[float] = []
        self.learning: list[Tensor] = []  # a and b of the adapters that learn

    def add(self, linears: list[Parts], norms: list[tuple[Tensor, float]], learning: bool = False) -> None:
        """Of a layer its seven linears, and (weight, eps) of its two norms, and of its heads' two, if they have some. learning:
        whether adapters that are trained learn."""
        for weight, bias, adapters in linears:
            of_adapters = [x for a, b, _ in adapters for x in (a, b)]
            learns = learning and any(x.requires_grad for x in of_adapters)
            self.linears += [x for x in (weight, bias, *of_adapters) if x is not None]
            self.parts.append((BIAS if bias is not None else 0) + (LORA if adapters else 0) + (WAITS if learns else 0))
            self.scales += [scale for *_, scale in adapters] or [0.0] * self.adapters
            self.learning += of_adapters if learns else ()
        for (weight, eps), of_rows in zip(norms, (True, True, False, False)):
            (self.norms if of_rows else self.head_norms).append(weight)
            (self.eps if of_rows else self.head_eps).append(eps)

    @property
    def of_layers(self) -> tuple[list, ...]:
        return self.norms, self.eps, self.linears, self.parts, self.scales


def ends_of(work: LayerWork, weights: Weights) -> list[int]:
    """Where the rows of each of several adapters end, as the ops take it."""
    return work.adapter_ends if weights.adapters > 1 else []


def ready(work: LayerWork, layers: list[LayerSpec], device: torch.device, learning: bool = False) -> bool:
    """Whether these layers can run in one op: not where they do not read the same, or somebody wants to know of each."""
    if work.store.offloaded and len(layers) > 1:  # only one layer's rows are here at a time
        return False
    return work.together(layers, device, learning) is not None


def arguments(
    work: LayerWork, layers: list[LayerSpec], weights: Weights, cos: Tensor, sin: Tensor, scale: float, kv: list[tuple]
) -> tuple:
    """What the op takes in both directions. kv: of each layer, K and V first."""
    tables, views = work.read_by(layers[0], cos.device)
    view, rest, *_ = views["shared"] or (views["all"], None)
    frozen = [] if views["frozen"] is None else [t for layer in layers for t in work.frozen_rows.layers[layer.index]]
    return (
        *weights.of_layers, ends_of(work, weights), cos, sin, tables.slots, weights.head_norms,
        weights.head_eps[0] if weights.head_eps else 0.0, layers[0].rope == "interleaved", [x[0] for x in kv],
        [x[1] for x in kv], _listed(view), _listed(rest), view[5], scale, frozen, _listed(views["frozen"]),
    )  # fmt: skip


def few_rows_layers(
    work: LayerWork, layers: list[LayerSpec], x: Tensor, weights: Weights, cos: Tensor, sin: Tensor, scale: float,
    learning: bool = False,
) -> list[Tensor]:  # fmt: skip
    """x [1, n, hidden] through layers that are alike and ready, with their K/V written: y and, for a gradient, what backward
    needs."""
    head_dim = layers[0].head_dim
    like = x.new_empty((0, weights.kv_size // head_dim, head_dim))
    pools = [work.store.pool(layer.index, like, like) for layer in layers]
    _gather([pool for pool in pools if pool.scattered])
    if learning and not work.committed:
        work.choose(layers, pools, scale)
    for layer in layers:
        work.ran[layer.index] = True
    with contextlib.ExitStack() as held:  # in the order that everybody takes them
        kv = [held.enter_context(pool.writing(work.slots, work.views, work.committed)) for pool in pools]
        args = arguments(work, layers, weights, cos, sin, scale, kv)
        return torch.ops.diffmas_native.few_rows_layers(x, *args, learning)


def _gather(pools: list[Pool]) -> None:
    """Pools of 2,048 short rows are read a fifth faster."""
    gather_in_huge_pages(x for pool in pools for x in pool.kv)
    for pool in pools:
        pool.scattered = False


def _listed(view: tuple | None) -> list[Tensor]:
    """What there is of q_indptr, seg_indptr, seg_start, seg_len and seg_offset."""
    return [] if view is None else [x for x in view[:5] if x is not None]
