"""The rows of all layers: which of them are free, who wrote them. Shared by a trace and all its forks.

Nobody counts references. Whatever reads rows is a *holder*, an object that names the ranges it needs: a view (`Trace`), and
the `Hold` of a forward pass, which lives as long as the pass may run again, forward or backward. A row is free when no holder
that is alive names it. Python's own reference counts say who is alive, so nothing has to be released, and nothing can be
released twice. The store looks only where the rows that it knows to be free do not do, and once for a forward pass at most.
"""

import bisect
import contextlib
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.frozen import Frozen, rows_seen
from diffmas.trace.low_rank import Coding
from diffmas.trace.offload import Courier, OffloadedPool
from diffmas.trace.pool import Pool
from diffmas.trace.token_ids import TokenIds
from diffmas.trace.views import CODED, FROZEN, SPAN, Rows, Segment, is_quantised, pool_rows, rows_of

__all__ = ["Extent", "Hold", "Store", "ranges_in"]

LEAST_SPARE, MOST_SPARE = 4, 64  # rows beyond a token that opens an extent, where nobody said how many come
NO_END = 1 << 62


class Extent:
    """Rows [start, end) of one sequence, of which [start, filled) are written. Several views may end at `filled`, forks of one:
    the first that goes on takes the room."""

    __slots__ = ("start", "filled", "end")

    def __init__(self, start: int, end: int):
        self.start, self.filled, self.end = start, start, end


class Hold:
    """A holder of the rows that a forward pass reads, `views`. Before these are known, and until a view has them: of the rows
    that were claimed for it, and of the room of its extents."""

    def __init__(self, store: "Store", views: Sequence[Sequence[Rows]] = ()):
        self.claimed: list[tuple[int, int]] = []  # (first row, the row after the last)
        self.extents: list[Extent] = []
        self.read(views)
        store.add_holder(self)

    def read(self, views: Sequence[Sequence[Rows]]) -> None:
        """views: all that it reads, what was claimed included."""
        self.views, self._ranges = views, None
        self.claimed = []

    def held(self) -> tuple[np.ndarray, list[tuple[int, int]]]:
        if self._ranges is None:
            self._ranges = ranges_in(self.views)
        return self._ranges, self.claimed + [(e.filled, e.end) for e in self.extents]


def ranges_in(views: Sequence[Sequence[Rows]]) -> np.ndarray:
    """The distinct ranges of rows in views; [n, 2], first row and the row after the last."""
    return np.array(list({(x.start, x.start + x.length) for view in views for x in view}), dtype=np.int64).reshape(-1, 2)


class Store:
    """rows: what a pool has room for at least. offloaded: pools are on the host (diffmas.trace.offload). `lock` guards
    everything here, and the extents of all views."""

    def __init__(self, layers: int, rows: int = 0, offloaded: bool = False):
        self.pools: list[Pool | None] = [None] * layers
        self.offloaded, self._courier = offloaded, Courier()
        self.rows = rows
        self.frozen: Frozen | None = None  # quantised rows
        self._codings: weakref.WeakValueDictionary[int, Coding] = weakref.WeakValueDictionary()  # by the number of their row 0
        self._first_coding = CODED
        self.needs_grad = [frozenset([0])]  # by lineage (see Pool): the lineages whose rows its readers leave gradients for
        self.lock = threading.RLock()
        self.token_ids = TokenIds()
        self._writers = np.zeros(max(rows, 1), dtype=np.int64)  # the lineage each row was written in
        self._free = [(0, NO_END)]  # ranges that are known to be free, rising
        self._swept = False
        self._holders = weakref.WeakSet()

    # ---- who holds what ----------------------------------------------------------------------------------------------

    def add_holder(self, holder) -> None:
        """holder: an object with held() -> (ranges [n, 2], a list of more), each (first row, the row after the last)."""
        with self.lock:  # not while another thread goes through them
            self._holders.add(holder)

    def _ranges_held(self) -> np.ndarray:
        """What live holders name; [n, 2], first row and the row after the last. Rows with codes their coding holds."""
        held = [holder.held() for holder in list(self._holders)]
        more = [pair for _, pairs in held for pair in pairs]
        found = np.concatenate([np.array(more, dtype=np.int64).reshape(-1, 2), *(rows for rows, _ in held)])
        return found[found[:, 0] < CODED]

    def _held(self) -> np.ndarray:
        """Whether a live holder names a row; [top] bool."""
        ranges = self._ranges_held()
        ranges = ranges[ranges[:, 0] < FROZEN]  # quantised rows have no gaps to fill (`freeze`)
        starts, ends = (np.bincount(x, minlength=self.top + 1) for x in ranges.T)
        return (starts - ends).cumsum()[:-1] > 0

    @property
    def top(self) -> int:
        """Every row that is held lies below."""
        return self._free[-1][0]

    @property
    def rows_held(self) -> int:
        """Rows that a view, a forward pass or a graph needs, spare room of views included."""
        with self.lock:
            return int(self._held().sum())

    def _sweep(self) -> None:
        held = self._held()
        edges = (np.flatnonzero(held[1:] != held[:-1]) + 1).tolist()
        if not held[:1].any():
            edges.insert(0, 0)
        if len(edges) % 2 == 0:
            edges.append(self.top)
        self._free = list(zip(edges[::2], [*edges[1::2], NO_END]))
        self._swept = True

    # ---- rows --------------------------------------------------------------------------------------------------------

    def allocation(self) -> threading.RLock:
        """Inside, the store is the caller's, and looks once for rows that were let go."""
        self._swept = False  # not under the lock: whoever has it may look twice
        return self.lock

    @contextlib.contextmanager
    def still(self):
        """No other thread allocates rows, and no pool moves its storage: for graphs that were captured with its addresses."""
        with contextlib.ExitStack() as stack:
            for lock in (self.lock, *(pool.lock for pool in self.pools if pool)):  # in the order that everybody takes them
                stack.enter_context(lock)
            yield

    def allocate(self, rows: int, spare: int = 0, after: int | None = None, least_spare: int | None = None) -> Extent:
        """An extent of `rows` rows and `spare` more: at row `after` where that is free, else in the first gap that holds them,
        else in one that holds `least_spare` more, else at the end. Give it a holder before the next call."""
        least = rows + (spare if least_spare is None else least_spare)
        most = rows + spare
        found = self._at(after, least)
        if found is None and (after is not None or (found := self._gap(most)) is None) and not self._swept:
            self._sweep()
            found = self._at(after, least)
        found = found or self._gap(most) or self._gap(least) or (len(self._free) - 1, self.top)
        index, start = found
        end = min(start + most, self._free[index][1])
        self._take(index, start, end)
        return Extent(start, end)

    def _at(self, row: int | None, rows: int) -> tuple[int, int] | None:
        """Where in the list `rows` free rows from `row` on are, and `row`."""
        if row is None:
            return None
        index = bisect.bisect(self._free, (row, NO_END)) - 1
        return (index, row) if index >= 0 and self._free[index][1] - row >= rows else None

    def _gap(self, rows: int) -> tuple[int, int] | None:
        """The first gap of that many rows, and its first row."""
        last = len(self._free) - 1
        return next(((i, start) for i, (start, end) in enumerate(self._free) if end - start >= rows and i < last), None)

    def _take(self, index: int, start: int, end: int) -> None:
        first, last = self._free[index]
        self._free[index : index + 1] = [(a, b) for a, b in ((first, start), (end, last)) if a < b]
        if self.top > len(self._writers):
            more = np.zeros(max(self.top, 2 * len(self._writers)) - len(self._writers), dtype=np.int64)
            self._writers = np.concatenate((self._writers, more))

    def lengthen(self, extent: Extent, rows: int) -> None:
        """Gives an extent room for that many rows, if those behind it are known to be free."""
        end = extent.filled + rows
        found = self._at(extent.end, end - extent.end) if end > extent.end else None
        if found is not None:
            self._take(*found, end)
            extent.end = end

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
        rows = np.unique(pool_rows(rows))
        rows = rows[rows < FROZEN]
        return rows[self._writers[rows] == lineage]

    # ---- what rows hold ----------------------------------------------------------------------------------------------

    def read(self, layer: int, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
        """A copy of rows of K and V, where they are kept; quantised ones in the pool's dtype, where there is one, those with
        codes as these make them."""
        pool = self.pools[layer]
        if pool is not None and all(s.start < FROZEN for s in segments):
            return pool.read([slice(s.start, s.end) for s in segments])
        dtype = None if pool is None else pool.dtype
        parts = [self.frozen.read(layer, 0, 0, dtype) if pool is None else pool.read([])]
        for s in segments:
            first = s.start % SPAN
            if is_quantised(s):
                parts.append(self.frozen.read(layer, first, s.length, dtype))
                continue
            kv = pool.read([slice(first, first + s.length)])
            parts.append(self._codings[s.start - first].built(layer, first, kv) if s.start >= CODED else kv)
        return tuple(torch.cat(x) for x in zip(*parts))

    def bytes_of(self, layer: int, segments: Sequence[Segment]) -> int:
        """Of K and V of rows, each of them once, and of the codes that some are read with."""
        own, quantised = rows_seen(segments)
        total = len(own) * self.pools[layer].row_bytes if len(own) else 0
        total += len(quantised) * self.frozen.row_bytes(layer) if len(quantised) else 0
        for coding in self.codings_of(segments):
            own = [s for s in segments if coding.first <= s.start < coding.first + SPAN]
            total += len(np.unique(rows_of(own))) * coding.row_bytes(layer)
        return total

    def ids(self, segments: Sequence[Segment]) -> np.ndarray:
        """The token ids of rows, -1 where none is known."""
        rows = pool_rows(rows_of(segments))
        with self.lock:
            ids, frozen = self.token_ids.read(rows), rows >= FROZEN
            if frozen.any():
                ids[frozen] = self.frozen.ids[rows[frozen] - FROZEN]
        return ids

    def freeze(self, rows: Frozen, hold: Hold) -> int:
        """Takes over quantised rows, which `hold` names until a view does; the number of the first one. They come behind the
        last one that is needed: what nobody sees beyond it goes."""
        with self.lock:
            kept = 0 if self.frozen is None else max(int(self._ranges_held()[:, 1].max(initial=0)) - FROZEN, 0)
            self.frozen = self.frozen.first(kept).with_rows(rows) if kept else rows
            hold.claimed.append((FROZEN + kept, FROZEN + kept + rows.rows))
        return FROZEN + kept

    def heads(self, layer: int) -> int:
        """K/V heads of a layer that has rows."""
        return self.frozen.layers[layer][0].shape[1] if self.pools[layer] is None else self.pools[layer].heads

    def add_coding(self, coding: Coding) -> None:
        """Numbers the rows of a coding, which lives as long as somebody else has it."""
        with self.lock:
            coding.first, self._first_coding = self._first_coding, self._first_coding + SPAN
            self._codings[coding.first] = coding

    def codings_of(self, segments: Sequence[Segment]) -> list[Coding]:
        """Those that segments are read with."""
        if not self._codings:
            return []
        return [self._codings[first] for first in dict.fromkeys(s.start - s.start % SPAN for s in segments if s.start >= CODED)]

    def code_bytes(self) -> int:
        """Of all codes that somebody has, and of their tables, which several have."""
        codings = list(self._codings.values())
        tables = {id(x): x for coding in codings for x in coding.tables or ()}
        return sum(coding.bytes for coding in codings) + sum(x.numel() * x.element_size() for x in tables.values())

    def device(self, layer: int) -> torch.device | None:
        """Where a layer's rows lie; None where it has none yet."""
        if self.pools[layer] is not None:
            return self.pools[layer].device
        return None if self.frozen is None else self.frozen.layers[layer][0].device

    # ---- storage -----------------------------------------------------------------------------------------------------

    def pool(self, layer: int, k: Tensor, v: Tensor) -> Pool:
        """The layer's pool, with room for every row handed out; made from the first K that is written."""
        pool = self.pools[layer]
        if pool is None:
            if k.shape != v.shape:
                raise ValueError(f"layer {layer}: expected K and V of one shape, got {list(k.shape)} and {list(v.shape)}")
            with self.lock:  # another thread may have made it meanwhile
                if self.pools[layer] is None:
                    self.pools[layer] = self._new_pool(layer, max(self.rows, self.top), *k.shape[1:], k.dtype, k.device)
                pool = self.pools[layer]
        if pool.dtype != k.dtype or pool.device != k.device:
            raise ValueError(
                f"trace: layer {layer} holds {pool.dtype} on {pool.device}, this forward brings {k.dtype} on "
                f"{k.device}; use a new trace after changing the model's dtype, device or autocast"
            )
        with self.lock:  # `top` is not another thread's by the time that the pool has it
            pool.reserve(self.top, self.rows)
        return pool

    def _new_pool(self, layer: int, *shape) -> Pool:
        if not self.offloaded:
            return Pool(*shape)
        return OffloadedPool(*shape, self._courier, self.pools[layer - 1] if layer else None)
