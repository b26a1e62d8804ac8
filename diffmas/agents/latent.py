"""Latent steps in a row: realign, one token's forward, no logits; T times.

On a GPU a step is bound by the launches of its kernels rather than by their work. Where no gradient is wanted, a step is
captured as a CUDA graph that moves its own plan on, and replayed: the host does nothing in between.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from diffmas.models.patch import run
from diffmas.trace import Trace
from diffmas.trace.plan import Plan

__all__ = ["latent_steps"]

LEAST_REPLAYS = 3  # a capture costs about as much as a step


def latent_steps(body: nn.Module, realign: nn.Module, trace: Trace, h: Tensor, T: int) -> Tensor:
    """Appends T latent tokens to each sequence. h [B, hidden], the last hidden states -> those after the steps."""
    graphs = _graphs(body, realign, h)
    for done in range(T):
        plan = trace.plan([1] * trace.batch_size, "latent")
        if graphs and done and T - done > LEAST_REPLAYS and _repeatable(plan, T - done):
            repeat = Repeat(body, realign, plan, h)
            if repeat.capture():
                return repeat.run(T - done)
            graphs = False
        if graphs and not done:  # warm: what is compiled, cached or allocated once is not part of a capture
            h, graphs = _watched_step(body, realign, plan, h)
        else:
            h = _step(body, realign, plan, h)
    return h


def _step(body, realign, plan: Plan, h: Tensor, **options) -> Tensor:
    return run(body, plan, inputs_embeds=realign(h)[None], **options).last_hidden_state[0]


def _graphs(body: nn.Module, realign: nn.Module, h: Tensor) -> bool:
    """Whether steps may be captured: on one GPU, without gradients, outside of a capture, not where the model forbids it."""
    if torch.is_grad_enabled() or not h.is_cuda or getattr(body, "_diffmas_uncapturable", False):
        return False
    weights = [*body.parameters(), *realign.parameters(), *realign.buffers()]
    return all(w.device == h.device for w in weights) and not torch.cuda.is_current_stream_capturing()


def _repeatable(plan: Plan, steps: int) -> bool:
    """Whether `steps` steps stay in the extents and in the pools that there are: a capture must not move the storage."""
    store = plan.trace._store
    return all(e.end - e.filled >= steps - 1 for e in plan._extents) and all(p.rows >= store.used for p in store.pools)


def _watched_step(body, realign, plan: Plan, h: Tensor) -> tuple[Tensor, bool]:
    """A step, and whether it can be captured: a model that waits for the device (routing of experts) cannot, and a capture
    that fails half-way leaves torch's allocator and generators in its state."""
    if getattr(body, "_diffmas_watched", False):
        return _step(body, realign, plan, h), True
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        h_next = _step(body, realign, plan, h, commit=False)
    except RuntimeError as error:
        torch.cuda.set_sync_debug_mode(mode)
        _forbid(body, error)
        plan.forget()
        return _step(body, realign, plan, h), False
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    plan.commit()
    body._diffmas_watched = True
    return h_next, True


def _forbid(body: nn.Module, error: Exception) -> None:
    body._diffmas_uncapturable = True
    warnings.warn(f"latent steps run without a CUDA graph, which this model does not allow: {error}", stacklevel=2)


@functools.cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all captures: a stream that products are captured on keeps their workspace, 32 MB, for good."""
    return torch.cuda.Stream(device)


class Repeat:
    """A latent step that repeats without the host: hidden states and plan move on in place."""

    def __init__(self, body, realign, plan: Plan, h: Tensor):
        """plan: of the first step; the extents it goes to have room for all the steps."""
        self.body, self.realign, self.plan, self.h = body, realign, plan, h.clone()
        self.graph: torch.cuda.CUDAGraph | None = None  # without one, steps run as they are

    def step(self) -> None:
        self.h.copy_(_step(self.body, self.realign, self.plan, self.h, commit=False))
        self.plan.step_on(self.h.device)

    def capture(self) -> bool:
        """From now on steps are replays of a CUDA graph; False, and nothing has changed, if the model cannot be captured."""
        self.plan.upload(self.h.device)  # not part of what is repeated
        graph, device = torch.cuda.CUDAGraph(), self.h.device
        try:
            # The model's device, whichever is current: launches elsewhere would run at once, and the graph would be empty. The
            # outer stream is where torch's own context ends when a capture fails; other threads may allocate meanwhile.
            with torch.cuda.device(device), torch.cuda.stream(torch.cuda.current_stream(device)):
                with torch.cuda.graph(graph, stream=_capture_stream(device), capture_error_mode="thread_local"):
                    self.step()
        except torch.OutOfMemoryError:
            self.plan.forget()
            return False
        except RuntimeError as error:
            _forbid(self.body, error)
            self.plan.forget()
            return False
        self.graph = graph
        return True

    def run(self, steps: int) -> Tensor:
        """Runs the steps, and tells the trace."""
        for _ in range(steps):
            self.graph.replay() if self.graph else self.step()
        self.plan.skip()
        for _ in range(steps - 1):
            self.plan.trace.plan([1] * self.plan.trace.batch_size, "latent").skip()
        return self.h
