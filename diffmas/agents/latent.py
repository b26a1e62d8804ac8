"""Latent steps in a row: realign, one token's forward, no logits; T times.

On a GPU a step is bound by the launches of its kernels rather than by their work. Where no gradient is wanted, a step is
captured as a CUDA graph that moves its own forward pass on, and replayed: the host does nothing in between.
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
    """Appends T latent tokens to each sequence. h [B, hidden], the last hidden states -> those after the steps."""
    graphs = _graphs(patch, realign, h)
    for done in range(T):
        forward_pass = trace.plan([1] * trace.batch_size, "latent", reserve=T - done - 1)
        if graphs and done and T - done > LEAST_REPLAYS and forward_pass.repeatable(T - done):
            repeat = Repeat(patch, realign, trace, forward_pass, h)
            if repeat.capture():
                return repeat.run(T - done)
            graphs = False
        if graphs and not done:  # warm: what is compiled, cached or allocated once is not part of a capture
            h, graphs = _watched_step(patch, realign, trace, forward_pass, h)
        else:
            h = _step(patch, realign, trace, forward_pass, h)
    return h


def _step(patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor, **options) -> Tensor:
    return forward(patch, trace, forward_pass, inputs_embeds=realign(h)[None], **options).last_hidden_state[0]


def _graphs(patch: Patch, realign: nn.Module, h: Tensor) -> bool:
    """Whether steps may be captured: on one GPU, without gradients, outside of a capture, not where the model forbids it."""
    if torch.is_grad_enabled() or not h.is_cuda or patch.capture is False:
        return False
    weights = [*patch.body.parameters(), *realign.parameters(), *realign.buffers()]
    return all(w.device == h.device for w in weights) and not torch.cuda.is_current_stream_capturing()


def _watched_step(patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor) -> tuple[Tensor, bool]:
    """A step, and whether it can be captured: a model that waits for the device (routing of experts) cannot, and a capture
    that fails half-way leaves torch's allocator and generators in its state."""
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
    """One for all captures: a stream that products are captured on keeps their workspace, 32 MB, for good."""
    return torch.cuda.Stream(device)


class Repeat:
    """A latent step that repeats without the host: hidden states and forward pass move on in place."""

    def __init__(self, patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor):
        """forward_pass: of the first step; the extents it goes to have room for all the steps."""
        self.patch, self.realign, self.trace, self.forward_pass, self.h = patch, realign, trace, forward_pass, h.clone()
        self.graph: torch.cuda.CUDAGraph | None = None  # without one, steps run as they are

    def step(self) -> None:
        self.h.copy_(_step(self.patch, self.realign, self.trace, self.forward_pass, self.h, commit=False))
        self.forward_pass.step_on(self.h.device)

    def capture(self) -> bool:
        """From now on steps are replays of a CUDA graph; False, and nothing has changed, if the model cannot be captured."""
        self.forward_pass.on(self.h.device)  # its tables are not part of what is repeated
        graph, device = torch.cuda.CUDAGraph(), self.h.device
        try:
            # The model's device, whichever is current: launches elsewhere would run at once, and the graph would be empty. The
            # outer stream is where torch's own context ends when a capture fails; other threads may allocate meanwhile.
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

    def run(self, steps: int) -> Tensor:
        """Runs the steps, and tells the trace."""
        for _ in range(steps):
            self.graph.replay() if self.graph else self.step()
        self.trace.commit_repeated(self.forward_pass)
        for _ in range(steps - 1):
            self.trace.commit_repeated(self.trace.plan([1] * self.trace.batch_size, "latent"))
        return self.h
