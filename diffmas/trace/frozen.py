"""Quantised rows of a store: constants in 8 bits an element, that attention reads as they are.

They are numbered from FROZEN on (diffmas.trace.views), so a segment of them is cut, joined and compared like any other. Nobody
frees single ones: those behind the last one that is needed go when others come (`Store.freeze`), the rest with the store. A
forward pass keeps the rows that it reads (`LayerWork.frozen_rows`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from diffmas.ops.quantize import dequantize, quantize
from diffmas.trace.views import FROZEN, Segment, pool_rows, rows_of

__all__ = ["Frozen", "rows_seen", "renumbered"]

Layer = tuple[Tensor, Tensor, Tensor, Tensor]


def head_major(x: Tensor) -> Tensor:
    """[rows, heads, ...] whose rows of one head lie one behind the other."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


@dataclass(frozen=True, eq=False)
class Frozen:
    """bits: their format (diffmas.ops.quantize). dtype: of what they were quantised from, the first ones. layers:
    of each, the payloads of K and V [rows, Hkv, D] and their scales [rows, Hkv], as `cross_attention` takes them. ids [rows]:
    token ids, -1 where none is known.
    """

    bits: str
    dtype: torch.dtype
    layers: list[Layer]
    ids: np.ndarray

    @classmethod
    def of(cls, bits: str, kv: Sequence[tuple[Tensor, Tensor]], ids: np.ndarray) -> "Frozen":
        """Of rows K and V [rows, Hkv, D] of each layer."""
        layers = []
        for pair in kv:
            payloads, scales = zip(*(quantize(x, bits) for x in pair))
            layers.append(tuple(map(head_major, (*payloads, *scales))))
        return cls(bits, kv[0][0].dtype, layers, ids)

    @property
    def rows(self) -> int:
        return len(self.ids)

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for layer in self.layers for x in layer)

    def row_bytes(self, layer: int) -> int:
        return sum(x[:1].numel() * x.element_size() for x in self.layers[layer])

    def read(self, layer: int, start: int, length: int, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """K and V of some rows, as numbers of their own dtype or another."""
        *payloads, k_scale, v_scale = (x[start : start + length] for x in self.layers[layer])
        return tuple(dequantize(x, scale, dtype or self.dtype) for x, scale in zip(payloads, (k_scale, v_scale)))

    def first(self, rows: int) -> "Frozen":
        """So many of the rows, where they lie."""
        return replace(self, layers=[tuple(x[:rows] for x in layer) for layer in self.layers], ids=self.ids[:rows])

    def take(self, rows: np.ndarray) -> "Frozen":
        """These rows alone."""
        pick = lambda x: head_major(_bytes(x)[torch.from_numpy(rows).to(x.device)].view(x.dtype))
        return replace(self, layers=[tuple(map(pick, layer)) for layer in self.layers], ids=self.ids[rows])

    def with_rows(self, more: "Frozen") -> "Frozen":
        """These rows and others behind them. Raises ValueError for others of another format; their dtype may be another, as a
        context's in float32 whose readers run under autocast."""
        if more.bits != self.bits:
            raise ValueError(f"bits: expected rows in {self.bits}, as this trace has, got rows in {more.bits}")
        layers = [tuple(map(_behind, mine, theirs)) for mine, theirs in zip(self.layers, more.layers)]
        return replace(self, layers=layers, ids=np.concatenate((self.ids, more.ids)))

    def to(self, device) -> "Frozen":
        """device: of each layer, a function."""
        move = lambda i, layer: tuple(head_major(x.to(device(i))) for x in layer)
        return replace(self, layers=[move(i, layer) for i, layer in enumerate(self.layers)])


def _bytes(x: Tensor) -> Tensor:
    """Payloads as integers: not every operation knows float8."""
    return x.view(torch.int8) if x.element_size() == 1 else x


def _behind(x: Tensor, y: Tensor) -> Tensor:
    return head_major(torch.cat((_bytes(x), _bytes(y.to(x.device)))).view(x.dtype))


def rows_seen(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows of segments: those of pools, also where they are read with codes, and quantised ones, numbered from 0;
    each rising."""
    rows = np.unique(pool_rows(rows_of(segments)))
    frozen = rows >= FROZEN
    return rows[~frozen], rows[frozen] - FROZEN


def renumbered(segments: Sequence[Sequence[Segment]], own: np.ndarray, frozen: np.ndarray) -> list[list[Segment]]:
    """Segments whose rows have all become quantised ones: first `own`, then `frozen`, as `rows_seen` gives them."""

    def start(s: Segment) -> int:
        if s.start < FROZEN:
            return FROZEN + int(np.searchsorted(own, s.start))
        return FROZEN + len(own) + int(np.searchsorted(frozen, s.start - FROZEN))

    return [[s._replace(start=start(s)) for s in row] for row in segments]
