"""CUDA graphs, and putting right what a capture that failed leaves behind.

Whether work can be captured is found out by capturing it. torch could tell beforehand where work waits for the device, but only
by an error in every thread of the process that does.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["captured"]


def captured(work: Callable, stream: torch.cuda.Stream, spare: Tensor) -> torch.cuda.CUDAGraph:
    """Captures work() on a stream of the current device, whose other streams and threads may go on meanwhile.

    spare: any tensor of the device; it stays as it is. Raises what work raises, or torch where it cannot be captured; memory
    and random numbers are then as before, and other work still can be.
    """
    try:
        return _capture(work, stream)
    except BaseException:
        with contextlib.suppress(RuntimeError):
            _capture(spare.zero_, stream)  # torch's generators count on a capture until one ends well; this one never runs
        raise


def _capture(work: Callable, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
    try:
        # The outer stream is where torch's own context ends when a capture fails. "thread_local": other threads may allocate.
        with (
            torch.cuda.stream(torch.cuda.current_stream()),
            torch.cuda.graph(graph, pool, stream, capture_error_mode="thread_local"),
        ):
            work()
    except BaseException:
        _leave(pool)
        raise
    return graph


def _leave(pool: tuple[int, int]) -> None:
    """After a capture that failed: torch's end of it throws before its allocator leaves the pool, and in there the allocator
    lets no other capture begin."""
    with contextlib.suppress(AttributeError, RuntimeError, TypeError):  # torch's own affair, or the pool has been left
        torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), pool)
        torch._C._cuda_releasePool(torch.cuda.current_device(), pool)
