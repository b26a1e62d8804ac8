"""One layer's K/V storage, and the gradient of each backward pass that reads it."""

import contextlib
import threading
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Variable

from diffmas.ops.huge_pages import ask_for_huge_pages

__all__ = ["DeferredKVGrad", "GradPools", "Pool", "of_this_pass", "rows_of_heads"]


def rows_of_heads(rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """[rows, heads, D], head-major. Zero-filled: a kernel that copies whole tiles (a GPU's bulk copies) reads past a segment's
    end, and 0 * NaN is NaN."""
    if head_dim % 16:
        rows += -rows % 16  # a head's stride stays a multiple of 16: GPU kernels are compiled for that, or not
    x = torch.empty(heads, rows, head_dim, dtype=dtype, device=device)
    ask_for_huge_pages(x)
    return x.zero_().transpose(0, 1)


def of_this_pass(known: weakref.WeakValueDictionary, make: Callable):
    """What belongs to the backward pass that is running on this thread; made when the pass first asks, gone with the pass.

    Keyed by the pass (autograd's graph task): passes that overlap or nest, and one that was aborted, do not see each other's.
    Autograd's graph task keeps it alive, through a callback, its `clear`, that runs, and is let go, at its end. The caller has
    a lock for `known`: a pass on a GPU may ask from two threads, as nodes without a tensor on the device run on the thread that
    called backward()."""
    task = torch._C._current_graph_task_id()
    if task == -1:
        raise RuntimeError("a gradient of a trace was asked for outside of a backward pass")
    found = known.get(task)
    if found is None:
        found = known[task] = make()
        Variable._execution_engine.queue_callback(found.clear)
    return found


class Pool:
    """K and V of one layer: `k`, `v` [rows, Hkv, D], stored head-major so that the rows of one head are contiguous.

    Growing moves the storage, never a row's number. Who writes rows holds `lock`, so that none is written to a storage that was
    left (`writing`); a reader takes the storage that there is, which has all rows that were written before.
    """

    scattered = False  # its storage is new: with its neighbours' it may fill huge pages that it does not fill alone

    def __init__(self, rows: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device, self.heads, self.head_dim = dtype, device, heads, head_dim
        self.lock = threading.RLock()
        self._shape = (heads, head_dim, dtype, device)
        self._used = rows  # rows that were asked for; growth makes more
        self._grads: weakref.WeakValueDictionary[int, GradPools] = weakref.WeakValueDictionary()
        with torch.inference_mode(False), torch.no_grad():  # the pool outlives an inference-mode caller
            self._allocate(rows)

    def _allocate(self, rows: int) -> None:
        """New storage, with the rows that there are."""
        self.scattered = True
        old, new = getattr(self, "kv", ()), tuple(rows_of_heads(rows, *self._shape) for _ in range(2))
        for x, y in zip(old, new):
            y[: x.shape[0]] = x
        self.kv, self.rows = new, new[0].shape[0]

    @property
    def k(self) -> Tensor:
        return self.kv[0]

    @property
    def v(self) -> Tensor:
        return self.kv[1]

    def reserve(self, rows: int, room: int = 0) -> None:
        """Makes room for `rows` rows; where that is not there, for twice the rows there are or `room`, so that n appends copy
        O(n) rows in all."""
        self._used = rows
        if rows <= self.rows:
            return
        with self.lock, torch.inference_mode(False), torch.no_grad():
            if rows > self.rows:  # else another thread has made it
                self._allocate(max(rows, room, 2 * self.rows))

    @property
    def bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.kv)

    @property
    def row_bytes(self) -> int:
        return sum(x[:1].numel() * x.element_size() for x in self.kv)

    def read(self, ranges: list[slice]) -> tuple[Tensor, ...]:
        """A copy of rows of K and V, where the storage lies."""
        return tuple(torch.cat([x[r] for r in ranges]) if ranges else x[:0].clone() for x in self.kv)

    def writing(self, rows: np.ndarray, views=(), backward: bool = False) -> "Pool":
        """A context: inside, K and V are the caller's, to write `rows` of them and read what `views` see. backward: the layer
        below comes next. Its value is (K, V), on the device."""
        return self

    def __enter__(self) -> tuple[Tensor, Tensor]:
        self.lock.acquire()
        return self.kv

    def __exit__(self, *error) -> None:
        self.lock.release()

    def grads(self) -> "GradPools":
        """The gradient of the backward pass that is running on this thread (`of_this_pass`)."""
        with self.lock:
            return of_this_pass(self._grads, self._new_grads)

    def _new_grads(self) -> "GradPools":
        return GradPools(self.kv, self._rows_used)

    @property
    def _rows_used(self) -> int:
        return min(self.rows, -(-self._used // 16) * 16)


class DeferredKVGrad:
    """Consecutive latent steps of the same sequences, whose gradients to older rows wait for each other. lengths: of a step, 1
    for a sequence that takes it, else 0. `flushed` says, for each layer that the first step wrote with gradients, whether a
    flush stands before it in the graph; if not, all older rows are constants."""

    LONGEST = 64  # steps

    def __init__(self, lengths: list[int]):
        self.lengths = lengths
        self.flushed: dict[int, bool] = {}
        self.lora = None  # of LoRA's weights, where there are any: diffmas.trace.lora_run


class GradPools:
    """What one backward pass leaves in a pool: dK and dV, float32 (float64 for float64 pools), zeros at first, one pair per
    *lineage*: what reads a row as a constant must not add to the gradient that the row's writer takes out."""

    def __init__(self, kv: tuple[Tensor, Tensor], rows: int):
        self.k, self.v = (x[:rows] for x in kv)  # as they were when the pass began: none of its rows was written later
        self._by_lineage: dict[int, tuple[Tensor, Tensor]] = {}
        self._steps: dict[tuple[int, DeferredKVGrad], list[tuple[Tensor, ...]]] = {}
        self._lock = threading.RLock()

    def of(self, lineage: int) -> tuple[Tensor, Tensor]:
        with self._lock:
            if lineage not in self._by_lineage:
                dtype = torch.float64 if self.k.dtype == torch.float64 else torch.float32
                self._by_lineage[lineage] = self._zeros(self.k.shape[0], *self.k.shape[1:], dtype, self.k.device)
            return self._by_lineage[lineage]

    def _zeros(self, rows: int, *shape) -> tuple[Tensor, Tensor]:
        return tuple(rows_of_heads(rows, *shape)[:rows] for _ in range(2))

    def lend(self, lineage: int, views, newest=None) -> contextlib.AbstractContextManager[tuple[Tensor, ...]]:
        """Inside, K, V, dK and dV on the device, for what `views` see. newest: only for the newest[b] rows of view b do dK and
        dV change."""
        return contextlib.nullcontext((self.k, self.v, *self.of(lineage)))

    def hand_on(self, rows: Tensor, readers: int, writers: int) -> None:
        """Adds the gradient of distinct rows that one lineage has to another's."""
        for taken, given in zip(self.of(readers), self.of(writers)):
            given[rows] += taken[rows]

    def steps(self, lineage: int, deferred: DeferredKVGrad) -> list[tuple[Tensor, ...]]:
        """(do, q, o, lse) of the latent steps that the pass has been through, the last step first."""
        with self._lock:
            return self._steps.setdefault((lineage, deferred), [])

    def clear(self) -> None:
        self._by_lineage, self._steps = {}, {}
