"""Rows that wait on the host: K, V and their gradients are on the device only while a layer reads them.

A layer borrows them for one op. What it wrote goes back, and what the next layer will borrow is on its way meanwhile, on a
stream of its own. So the device holds the rows of two layers, however many there are; every forward and backward pass brings
what it sees of each layer over the bus once, a backward pass the gradients there and back, too.

A span [first row, row after the last) is what a pass needs of a pool; rows outside of it are not brought.
"""

import contextlib
import threading
import weakref
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from diffmas.trace.pool import GradPools, Pool, rows_of_heads
from diffmas.trace.views import KVRange

__all__ = ["Courier", "OffloadedPool"]

Span = tuple[int, int]
Pair = tuple[Tensor, Tensor]


def span_of(views: Sequence[Sequence[KVRange]], rows: Sequence[int] = (), newest: Sequence[int] | None = None) -> Span:
    """Of `rows`, and of what views see: all of it, or the newest[b] rows of view b."""
    first, after = (int(np.min(rows)), int(np.max(rows)) + 1) if len(rows) else (1 << 62, 0)
    for b, view in enumerate(views):
        left = 1 << 62 if newest is None else newest[b]
        for r in reversed(view):
            if left <= 0:
                break
            if r.length:
                first, after = min(first, r.start + max(0, r.length - left)), max(after, r.start + r.length)
                left -= r.length
    return min(first, after), after


def runs_of(rows: np.ndarray) -> list[Span]:
    """Rows as runs of consecutive ones."""
    parts = np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1) if len(rows) else []
    return [(int(part[0]), int(part[-1]) + 1) for part in parts]


class Home:
    """Two tensors [rows, heads, D] of zeros on the host. Not head-major as a pool is: rows [a, b) are one piece of memory, and
    their copy waits for nobody."""

    def __init__(self, rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.device, self.pinned, self.version = device, device.type == "cuda", 0
        self.pair = tuple(torch.zeros(rows, heads, head_dim, dtype=dtype, pin_memory=self.pinned) for _ in range(2))

    @property
    def rows(self) -> int:
        return self.pair[0].shape[0]

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.pair)

    def bring(self, span: Span, rows: int) -> Pair:
        """Both on the device, as kernels take them: `rows` rows, zeros but for the span."""
        first, after = span
        brought = []
        for mine in self.pair:
            there = rows_of_heads(rows, *mine.shape[1:], mine.dtype, self.device)[:rows]
            there[first:after].copy_(mine[first:after], non_blocking=True)
            brought.append(there)
        return tuple(brought)

    def take_back(self, pair: Pair, spans: list[Span]) -> None:
        for mine, there in zip(self.pair, pair):
            for first, after in spans:
                mine[first:after].copy_(there[first:after], non_blocking=True)
        self.version += 1

    def still(self) -> Pair:
        """Both, for the host: what was on its way has arrived."""
        if self.pinned:
            torch.cuda.synchronize(self.device)
        return self.pair


class Courier:
    """Brings what a layer borrows, and what the next one will before it asks; one for all pools of a store. On a GPU what is
    sent for comes on a stream of its own, after all that the current one was asked for: its rows are back by then."""

    def __init__(self):
        self.waited = 0  # how often what a layer took was not on its way
        self._coming: dict[tuple[Home, Span, int], tuple[int, Pair, torch.cuda.Event | None]] = {}
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._lock = threading.Lock()

    def take(self, home: Home, span: Span, rows: int) -> Pair:
        with self._lock:
            version, pair, event = self._coming.pop((home, span, rows), (None, None, None))
        if version != home.version:  # or it was written to after it was sent for
            self.waited += 1
            return home.bring(span, rows)
        if event is not None:
            here = torch.cuda.current_stream(home.device)
            here.wait_event(event)
            for x in pair:
                x.record_stream(here)
        return pair

    def send_for(self, wanted: list[tuple[Home, Span, int]]) -> None:
        """In place of what was sent for before."""
        with self._lock:
            self._coming = {}
            for home, span, rows in wanted:
                event, stream = None, self._stream(home)
                with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
                    pair = home.bring(span, rows)
                    event = None if stream is None else stream.record_event()
                self._coming[home, span, rows] = home.version, pair, event

    def _stream(self, home: Home) -> "torch.cuda.Stream | None":
        if not home.pinned:
            return None
        if home.device not in self._streams:
            self._streams[home.device] = torch.cuda.Stream(home.device)
        stream = self._streams[home.device]
        stream.wait_stream(torch.cuda.current_stream(home.device))
        return stream


class OffloadedPool(Pool):
    """One layer's K and V on the host. below: the pool of the layer before it."""

    def __init__(self, rows, heads, head_dim, dtype, device, courier: Courier, below: "OffloadedPool | None"):
        self.courier = courier
        self.above = self.below = lambda: None  # weak: the two name each other
        if below is not None:
            self.below, below.above = weakref.ref(below), weakref.ref(self)
        super().__init__(rows, heads, head_dim, dtype, device)

    def _allocate(self, rows: int) -> None:
        old, self.home = getattr(self, "home", None), Home(rows, *self._shape)
        for x, y in zip(old.still(), self.home.still()) if old is not None else ():
            y[: x.shape[0]] = x
        self.rows = rows

    @property
    def bytes(self) -> int:
        return self.home.bytes

    def read(self, ranges: list[slice]) -> Pair:
        return tuple(torch.cat([x[r] for r in ranges]) if ranges else x[:0].clone() for x in self.home.still())

    @contextlib.contextmanager
    def writing(self, rows: np.ndarray, views=(), backward: bool = False):
        with self.lock:
            span, other = span_of(views, rows), self.below() if backward else self.above()
            kv = self.courier.take(self.home, span, span[1])
            self.courier.send_for([(other.home, span, span[1])] if other is not None and other.rows >= span[1] else [])
            yield kv
            self.home.take_back(kv, runs_of(rows))

    def _new_grads(self) -> "OffloadedGrads":
        return OffloadedGrads(self, self._rows_used)


class OffloadedGrads(GradPools):
    """dK and dV on the host, too."""

    def __init__(self, pool: OffloadedPool, rows: int):
        super().__init__(pool.home.pair, rows)
        self._pool = pool

    def _zeros(self, rows: int, *shape) -> Home:
        return Home(rows, *shape[:-1], self._pool.device)

    @contextlib.contextmanager
    def lend(self, lineage: int, views, newest=None):
        with self._lock:  # to the end: what two threads add to it one after the other must not be lost
            span, changed = span_of(views), span_of(views, newest=newest)
            courier, home = self._pool.courier, self.of(lineage)
            kv = courier.take(self._pool.home, span, span[1])
            gradient = courier.take(home, changed, span[1])
            below = self._pool.below()
            courier.send_for([] if below is None else [
                (below.home, span, span[1]), (below.grads().of(lineage), changed, span[1]),
            ])  # fmt: skip
            yield *kv, *gradient
            home.take_back(gradient, [changed])

    def hand_on(self, rows: Tensor, readers: int, writers: int) -> None:
        rows = rows.cpu()
        for taken, given in zip(self.of(readers).still(), self.of(writers).still()):
            given[rows] += taken[rows]
        self.of(writers).version += 1
