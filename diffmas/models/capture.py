"""CUDA graphs, and putting right what a capture that failed leaves behind.

Whether work can be captured is found out by capturing it. torch could tell beforehand where work waits for the device, but only
by an error in every thread of the process that does.
"""

import contextlib
import functools
import threading
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from diffmas.trace.forward_pass import ForwardPass

__all__ = ["LEAST_REPLAYS", "attempt", "capture_pass", "captured", "on_capture_stream", "possible"]

LEAST_REPLAYS = 3  # a capture costs about as much as a step
TRIES = 3  # of a capture that runs out of memory: it costs as much as some steps each time

# Held while work is put on the stream of captures, or recorded there: what another thread put there meanwhile would not run,
# but be part of the graph.
_lock = threading.RLock()


@contextlib.contextmanager
def on_capture_stream(device: torch.device):
    """For work that autograd puts on the stream of captures, since its forward was captured there. It begins after what the
    current stream has ahead; autograd itself sees to that only where it starts from a gradient on the device."""
    with _lock:
        if device.type == "cuda":
            captures, current = _capture_stream(device), torch.cuda.current_stream(device)
            if captures != current:
                captures.wait_stream(current)
        yield


def possible(patch, what: str, device: torch.device, weights: Iterable[Tensor]) -> bool:
    """Whether to make an `attempt`: on one GPU, outside of a capture, unless an earlier one was in vain."""
    return patch.graphs and patch.tries.get(what, TRIES) > 0 and _on_one_gpu(device, weights)


def _on_one_gpu(device: torch.device, weights: Iterable[Tensor]) -> bool:
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return False
    return all(w.device == device for w in weights)


def attempt(patch, what: str, work: Callable, spare: Tensor) -> torch.cuda.CUDAGraph | None:
    """work() as a graph, on the device of `spare` (see `captured`); None where this model does not allow it, with one warning
    for all attempts. what: the work's name, by which a patch counts those that may still fail."""
    device = spare.device
    if patch.tries.get(what, TRIES) <= 0:
        return None
    try:
        # The device: launches on another one would run at once and leave the graph empty.
        with _lock, torch.cuda.device(device):
            graph = captured(work, _capture_stream(device), spare)
    except RuntimeError as error:
        full = isinstance(error, torch.OutOfMemoryError)  # which may be another's memory, and later there may be some
        patch.tries[what] = patch.tries.get(what, TRIES) - 1 if full else 0
        if patch.tries[what] <= 0:
            why = "for which there was no memory several times" if full else "which this model does not allow"
            warnings.warn(f"{what} run without a CUDA graph, {why}: {error}", stacklevel=2)
        return None
    patch.tries[what] = TRIES
    return graph


def capture_pass(
    patch, what: str, forward_pass: ForwardPass, work: Callable, spare: Tensor
) -> torch.cuda.CUDAGraph | None:  # fmt: skip
    """work(), which runs a forward pass, as a graph: the first replay runs the pass as it is, and each later one that of one
    token further on. None, with nothing changed, if it cannot be captured."""
    device, graph = spare.device, None

    def moved() -> None:  # first, so that until the next one whoever asks sees the pass that has run
        forward_pass.move(device, 1)
        work()

    forward_pass.can_move(device)  # uploads its tables, which must not be part of the capture
    forward_pass.move(device, -1)
    try:
        graph = attempt(patch, what, moved, spare)
    finally:
        if graph is None:
            forward_pass.move(device, 1)
            forward_pass.forget()
    return graph


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures. One, because a stream keeps the workspace of captured matrix products, 32 MB, for good."""
    return torch.cuda.Stream(device)


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
