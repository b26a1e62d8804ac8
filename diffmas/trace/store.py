"""The rows of all layers: which of them are free, who wrote them. Shared by a trace and all its forks.

Nobody counts references. Whatever reads rows is a *holder*, an object that names the ranges it needs: a view (`Trace`), and the
`Hold` of a forward pass, which lives as long as the pass may run again, forward or backward. A row is free when no holder that is
alive names it. Python's own reference counts say who is alive, so nothing has to be released, and nothing can be released twice;
the store looks only when it would otherwise have to grow.
"""

import threading
import weakref
from collections.abc import Iterable

import numpy as np
from torch import Tensor

from diffmas.trace.pool import Pool

__all__ = ["Extent", "Hold", "Store"]

LEAST_SPARE, MOST_SPARE = 4, 64  # rows beyond a token that opens an extent, where nobody said how many come


class Extent:
    """Rows [start, end) of one sequence, of which [start, filled) are written. Several views may end at `filled`, forks of one:
    the first that goes on takes the room."""

    __slots__ = ("start", "filled", "end")

    def __init__(self, start: int, end: int):
        self.start, self.filled, self.end = start, start, end


class Hold:
    """A holder of fixed ranges, and of the spare room of extents until a view has them."""

    def __init__(self, store: "Store", ranges: Iterable[tuple[int, int]] = ()):
        """ranges: (first row, the row after the last)."""
        self.ranges = list(ranges)
        self.extents: list[Extent] = []
        store.add_holder(self)

    def held(self) -> list[tuple[int, int]]:
        return self.ranges + [(e.filled, e.end) for e in self.extents]


class Store:
    """rows: what a pool has room for at least. `lock` guards everything here, and the extents of all views."""

    def __init__(self, layers: int, rows: int = 0):
        self.pools: list[Pool | None] = [None] * layers
        self.rows = rows
        self.top = 0  # every row that is held lies below
        self.needs_grad = [frozenset([0])]  # by lineage (see Pool): the lineages whose rows its readers leave gradients for
        self.lock = threading.RLock()
        self._writers = np.zeros(max(rows, 1), dtype=np.int64)  # the lineage each row was written in
        self._free: list[tuple[int, int]] = []  # known free ranges below `top`, rising
        self._holders = weakref.WeakSet()

    # ---- who holds what ----------------------------------------------------------------------------------------------

    def add_holder(self, holder) -> None:
        """holder: an object with held() -> [(first row, the row after the last)]."""
        with self.lock:  # not while another thread goes through them
            self._holders.add(holder)

    def _held(self) -> np.ndarray:
        """Whether a live holder names a row; [top] bool."""
        held = np.zeros(self.top, dtype=bool)
        for holder in list(self._holders):
            for start, end in holder.held():
                held[start:end] = True
        return held

    @property
    def rows_held(self) -> int:
        """Rows that a view, a forward pass or a graph needs, spare room of views included."""
        with self.lock:
            return int(self._held().sum())

    def _sweep(self) -> None:
        held = self._held()
        edges = np.flatnonzero(np.diff(np.concatenate(([True], held, [True])).astype(np.int8)))
        self._free = list(zip(edges[::2].tolist(), edges[1::2].tolist()))
        if self._free and self._free[-1][1] == self.top:
            self.top = self._free.pop()[0]

    # ---- rows --------------------------------------------------------------------------------------------------------

    def allocate(self, rows: int, spare: int = 0, after: int | None = None, least_spare: int | None = None) -> Extent:
        """An extent of `rows` rows and `spare` more: at row `after` where that is free, else in the first gap that holds them,
        else in one that holds `least_spare` more, else at the end. Give it a holder before the next call."""
        least_spare = spare if least_spare is None else least_spare
        found = self._find(rows, spare, after, least_spare)
        if found is None:
            self._sweep()
            found = self._find(rows, spare, after, least_spare) or self._find(rows, least_spare, None, least_spare)
        start, end = found or (self.top, self.top + rows + spare)
        self._take(start, end)
        return Extent(start, end)

    def _find(self, rows: int, spare: int, after: int | None, least_spare: int) -> tuple[int, int] | None:
        if after == self.top:
            return after, after + rows + spare
        for start, end in self._free:
            if after is not None and start <= after and end - after >= rows + least_spare:
                return after, min(end, after + rows + spare)
        return next(((start, start + rows + spare) for start, end in self._free if end - start >= rows + spare), None)

    def _take(self, start: int, end: int) -> None:
        """Makes rows [start, end) not free."""
        rest = [(a, b) for x, y in self._free for a, b in ((x, min(y, start)), (max(x, end), y)) if a < b]
        if start > self.top:
            rest.append((self.top, start))
        self._free, self.top = rest, max(self.top, end)
        if self.top > len(self._writers):
            more = np.zeros(max(self.top, 2 * len(self._writers)) - len(self._writers), dtype=np.int64)
            self._writers = np.concatenate((self._writers, more))

    def lengthen(self, extent: Extent, rows: int) -> None:
        """Gives an extent room for that many rows, if those behind it are free."""
        end = extent.filled + rows
        if end > extent.end and (extent.end == self.top or any(a == extent.end and end <= b for a, b in self._free)):
            self._take(extent.end, end)
            extent.end = end

    def rewind(self, extent: Extent, row: int) -> bool:
        """Lets a view whose rows end at `row` go on there, if nobody needs what was written in the extent since, nor the room
        behind it: after a crop, a forward that failed, a fork that was forgotten."""
        if not extent.start <= row < extent.filled or self._held()[row : extent.end].any():
            return False
        extent.filled = row
        self._take(row, extent.end)
        return True

    # ---- lineages ----------------------------------------------------------------------------------------------------

    def new_lineage(self, needs_grad=()) -> int:
        with self.lock:
            lineage = len(self.needs_grad)
            self.needs_grad.append(frozenset([*needs_grad, lineage]))
            return lineage

    def write(self, extent: Extent, rows: int, lineage: int) -> int:
        """Claims the next rows of an extent for a writer of this lineage; the first of them."""
        start = extent.filled
        extent.filled += rows
        self._writers[start : start + rows] = lineage
        return start

    def written_by(self, rows: np.ndarray, lineage: int) -> np.ndarray:
        return rows[self._writers[rows] == lineage]

    # ---- storage -----------------------------------------------------------------------------------------------------

    def pool(self, layer: int, k: Tensor, v: Tensor) -> Pool:
        """The layer's pool, with room for every row handed out; made from the first K that is written."""
        pool = self.pools[layer]
        if pool is None:
            if k.shape != v.shape:
                raise ValueError(f"layer {layer}: expected K and V of one shape, got {list(k.shape)} and {list(v.shape)}")
            with self.lock:  # another thread may have made it meanwhile
                pool = self.pools[layer] = self.pools[layer] or Pool(max(self.rows, self.top), *k.shape[1:], k.dtype, k.device)
        if pool.dtype != k.dtype or pool.device != k.device:
            raise ValueError(
                f"trace: layer {layer} holds {pool.dtype} on {pool.device}, this forward brings {k.dtype} on "
                f"{k.device}; use a new trace after changing the model's dtype, device or autocast"
            )
        with self.lock:  # `top` is not another thread's by the time that the pool has it
            pool.reserve(self.top, self.rows)
        return pool
