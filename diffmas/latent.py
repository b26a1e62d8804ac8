"""Latent steps in a row: realign, one token's forward, no logits; T times.

On a GPU a step is bound by the launches of its kernels rather than by their work. Where no gradient is wanted, a step is
captured as a CUDA graph that moves its own plan on, and replayed: the host does nothing in between.
"""

import warnings

import torch
from torch import Tensor, nn

from diffmas.patch import run
from diffmas.plan import Plan
from diffmas.trace import Trace

__all__ = ["latent_steps"]

LEAST_REPLAYS = 3  # a capture costs about as much as a step


def latent_steps(body: nn.Module, realign: nn.Module, trace: Trace, h: Tensor, T: int) -> Tensor:
    """Appends T latent tokens to each sequence. h [B, hidden], the last hidden states -> those after the steps."""
    left = T
    if left > LEAST_REPLAYS + 1 and _graphs(body, h):
        h = _step(body, realign, _plan(trace), h)  # compiles and caches what a capture must not
        plan = _plan(trace)
        if all(e.end - e.filled >= left - 2 for e in plan._extents):
            repeat = Repeat(body, realign, plan, h)
            if repeat.capture():
                return repeat.run(left - 1)
        h, left = _step(body, realign, plan, h), left - 2
    for _ in range(left):
        h = _step(body, realign, _plan(trace), h)
    return h


def _plan(trace: Trace) -> Plan:
    return trace.plan([1] * trace.batch_size, "latent")


def _step(body, realign, plan: Plan, h: Tensor, **options) -> Tensor:
    return run(body, plan, inputs_embeds=realign(h)[None], **options).last_hidden_state[0]


def _graphs(body: nn.Module, h: Tensor) -> bool:
    """Whether a step may be captured: on one GPU, without gradients, and not where it failed before."""
    if torch.is_grad_enabled() or not h.is_cuda or getattr(body, "_diffmas_uncapturable", False):
        return False
    return all(p.device == h.device for p in body.parameters())


class Repeat:
    """A latent step that repeats without the host: hidden states and plan move on in place."""

    def __init__(self, body, realign, plan: Plan, h: Tensor):
        """plan: of the first step; the extents it goes to have room for all the steps."""
        self.body, self.realign, self.plan, self.h = body, realign, plan, h.clone()
        self.replay = self.step

    def step(self) -> None:
        self.h.copy_(_step(self.body, self.realign, self.plan, self.h, commit=False))
        self.plan.step_on(self.h.device)

    def capture(self) -> bool:
        """From now on steps are replays of a CUDA graph; False, and nothing has changed, if the model cannot be captured."""
        self.plan.upload(self.h.device)  # not part of what is repeated
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            self.body._diffmas_uncapturable = True
            self.plan.forget()
            warnings.warn(f"latent steps run without a CUDA graph, which this model does not allow: {error}", stacklevel=2)
            return False
        self.replay = graph.replay
        return True

    def run(self, steps: int) -> Tensor:
        """Runs the steps, and tells the trace."""
        for _ in range(steps):
            self.replay()
        self.plan.skip()
        for _ in range(steps - 1):
            _plan(self.plan.trace).skip()
        return self.h
