"""Latent steps: T times, realign the last hidden state and forward one token per sequence, without logits.

On a GPU, launching a step's kernels takes longer than running them. Without gradients a step is therefore captured as a CUDA
graph, which advances its own forward pass, and replayed: the host does nothing in between.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from diffmas.models.forward import forward
from diffmas.models.patch import Patch
from diffmas.trace import Trace
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["latent_steps"]

LEAST_REPLAYS = 3  # a capture costs about as much as a step


def latent_steps(patch: Patch, realign: nn.Module, trace: Trace, h: Tensor, T: int) -> Tensor:
    """Appends T latent tokens to each sequence of the trace.

    h [B, hidden]: the last hidden state of each sequence. Returns the last hidden states after the steps, [B, hidden].
    """
    graphs = _graphs(patch, realign, h)
    for done in range(T):
        forward_pass = trace.plan([1] * trace.batch_size, "latent", reserve=T - done - 1)
        if graphs and done and T - done > LEAST_REPLAYS and forward_pass.repeatable(T - done):
            with forward_pass.still():
                repeat = Repeat(patch, realign, trace, forward_pass, h)
                if repeat.capture():
                    return repeat.take(T - done)
            graphs = False
        if graphs and not done:  # warms up: compilation, caches and lasting allocations must not be part of a capture
            h, graphs = _watched_step(patch, realign, trace, forward_pass, h)
        else:
            h = _step(patch, realign, trace, forward_pass, h)
    return h


def _step(patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor, **options) -> Tensor:
    return forward(patch, trace, forward_pass, inputs_embeds=realign(h)[None], **options).last_hidden_state[0]


def _graphs(patch: Patch, realign: nn.Module, h: Tensor) -> bool:
    """Whether steps may be captured: on one GPU, without gradients, outside of a capture, by a model that allows it."""
    if torch.is_grad_enabled() or not h.is_cuda or patch.capture is False:
        return False
    weights = [*patch.body.parameters(), *realign.parameters(), *realign.buffers()]
    return all(w.device == h.device for w in weights) and not torch.cuda.is_current_stream_capturing()


def _watched_step(patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor) -> tuple[Tensor, bool]:
    """Takes a step and finds out whether it can be captured; returns the hidden states and the answer.

    A model that waits for the device, for example to route experts, cannot be captured. That must be known beforehand: a
    capture that fails half-way leaves torch's allocator and generators in the capturing state.
    """
    if patch.capture:
        return _step(patch, realign, trace, forward_pass, h), True
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        h_next = _step(patch, realign, trace, forward_pass, h, commit=False)
    except RuntimeError as error:
        torch.cuda.set_sync_debug_mode(mode)
        _forbid(patch, error)
        forward_pass.forget()
        return _step(patch, realign, trace, forward_pass, h), False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    trace.commit(forward_pass)
    patch.capture = True
    return h_next, True


def _forbid(patch: Patch, error: Exception) -> None:
    patch.capture = False
    warnings.warn(f"latent steps run without a CUDA graph, which this model does not allow: {error}", stacklevel=2)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The stream of all captures. One, because a stream keeps the workspace of captured matrix products, 32 MB, for good."""
    return torch.cuda.Stream(device)


class Repeat:
    """A latent step that repeats without the host: hidden states and forward pass advance in place."""

    def __init__(self, patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor):
        """forward_pass: of the first step; its extents have room for all the steps."""
        self.patch, self.realign, self.trace, self.forward_pass, self.h = patch, realign, trace, forward_pass, h.clone()
        self.graph: torch.cuda.CUDAGraph | None = None  # without one, steps run as they are

    def step(self) -> None:
        self.h.copy_(_step(self.patch, self.realign, self.trace, self.forward_pass, self.h, commit=False))
        self.forward_pass.step_on(self.h.device)

    def capture(self) -> bool:
        """Makes later steps replays of a CUDA graph. Returns False, with nothing changed, if the model cannot be captured."""
        self.forward_pass.on(self.h.device)  # uploads its tables, which must not be part of the capture
        graph, device = torch.cuda.CUDAGraph(), self.h.device
        try:
            # The model's device must be the current one: launches on another would run at once and leave the graph empty. The
            # outer stream context is restored when a capture fails. "thread_local": other threads may allocate meanwhile.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
                    self.step()
        except torch.OutOfMemoryError:
            self.forward_pass.forget()
            return False
        except RuntimeError as error:
            _forbid(self.patch, error)
            self.forward_pass.forget()
            return False
        self.graph = graph
        return True

    def take(self, steps: int) -> Tensor:
        """Takes the steps and commits them to the trace; returns the last hidden states, [B, hidden]."""
        for _ in range(steps):
            self.graph.replay() if self.graph else self.step()
        self.trace.commit_repeated(self.forward_pass)
        for _ in range(steps - 1):
            self.trace.commit_repeated(self.trace.plan([1] * self.trace.batch_size, "latent"))
        return self.h
