"""Views of a trace whose rows are read with low-rank codes (diffmas.trace.low_rank)."""

from typing import Self

import numpy as np
import torch
from torch import Tensor

from diffmas.ops.low_rank import Codes
from diffmas.trace.cache import CacheFace
from diffmas.trace.low_rank import Coding, coded, encoded
from diffmas.trace.offload import runs_of
from diffmas.trace.store import Hold
from diffmas.trace.views import SPAN

__all__ = ["ReadingCodes"]


class ReadingCodes(CacheFace):
    """What a `Trace` does with codes of its rows."""

    def encode(
        self, rows: np.ndarray, layers: list[Codes], tables: tuple[Tensor, Tensor] | None, interleaved: bool = False
    ) -> tuple[Coding, Tensor]:
        """Codes of rows of this trace's storage, for `with_codes`: those of an adapter on k_proj and v_proj, x a' and scaled, x
        being the hidden states that the rows came from. With a gradient or without; and the order token of their readers.

        rows [n]: of pools, rising. layers: of each, what `diffmas.ops.low_rank` takes. tables: cos and sin [n, Dr / 2] of
        each pair, of the rows as they were written, and interleaved, how they pair; None where no keys have codes. Raises
        ValueError for rows on the host (`offload`).
        """
        store = self._store
        if store.offloaded:
            raise ValueError("offload: expected rows on the device, where they are read with codes, got rows on the host")
        coding, order = encoded(rows, layers, tables, interleaved, self._lineage, self._order.requires_grad)
        coding.hold = Hold(store)
        coding.hold.claimed = runs_of(rows)
        store.add_coding(coding)
        for layer, codes in zip(self.spec.layers, layers):
            layer.records |= coding.learns and any(x is not None and x.requires_grad for x in codes)
        return coding, order

    def with_codes(self, codings: list[tuple[Coding, Tensor]]) -> Self:
        """A view that reads the rows which there are codes of with these: as the adapter would have made them of the same
        hidden states. Differentiable: gradients reach the codes. codings: as `encode` gives them, of this trace's storage."""
        segments = self._segments
        for coding, _ in codings:
            segments = [[coded(s, coding) for s in row] for row in segments]
        orders = [order for coding, order in codings if coding.learns] if torch.is_grad_enabled() else []
        order = torch.cat([x.flatten() for x in (self._order, *orders)]) if orders else self._order
        return self._view(segments, self._extents, order=order)

    def without_codes(self, codings: list[Coding]) -> Self:
        """A view that reads the rows of these codings as the pools have them."""
        first = {coding.first for coding in codings}
        plain = lambda s: s._replace(start=s.start % SPAN) if s.start - s.start % SPAN in first else s
        return self._view([[plain(s) for s in row] for row in self._segments], self._extents)
