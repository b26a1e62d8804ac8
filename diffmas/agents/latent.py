"""Latent steps: T times, realign the last hidden state and forward one token per sequence, without logits.

Sequences that have taken their steps leave the batch: the later steps are forwards over the others alone.

On a GPU, launching a step's kernels takes longer than running them. Without gradients a step is therefore captured as a CUDA
graph, which advances its own forward pass, and replayed: the host does nothing in between.
"""

import functools
import warnings

import torch
from torch import Tensor, nn

from diffmas.agents.capture import captured
from diffmas.models.forward import forward
from diffmas.models.patch import TRIES, Patch
from diffmas.trace import Trace
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["latent_steps"]

LEAST_REPLAYS = 3  # a capture costs about as much as a step


def latent_steps(
    patch: Patch, realign: nn.Module, trace: Trace, h: Tensor, T: list[int], stop_change: float | None = None
) -> Tensor:  # fmt: skip
    """Appends T[b] latent tokens to sequence b of the trace, or fewer: see `Agent`'s stop_change.

    h [B, hidden]: the last hidden state of each sequence. Returns the last hidden states after the steps, [B, hidden].
    """
    graphs, left = stop_change is None and _graphs(patch, realign, h), list(T)
    realign = functools.partial(realign, solved=realign.solved())
    while any(left):
        going = [b for b, n in enumerate(left) if n]
        rows = None if len(going) == len(left) else torch.tensor(going, device=h.device)
        x, graphs = _run(patch, realign, trace, h if rows is None else h[rows], left, stop_change, graphs)
        h = x if rows is None else h.index_copy(0, rows, x)
    return h


def _run(patch: Patch, realign, trace: Trace, h: Tensor, left: list[int], stop_change, graphs: bool) -> tuple[Tensor, bool]:
    """Steps of the sequences that have some left, until the first of them has none; counts them down in `left`.

    h [n, hidden]: of these sequences alone. Returns it after the steps, and whether later steps may be captured.
    """
    going, first = [b for b, n in enumerate(left) if n], True
    lengths, steps = [int(n > 0) for n in left], min(left[b] for b in going)
    while steps:
        forward_pass = trace.plan(lengths, "latent", reserve=[max(n - 1, 0) for n in left])
        if graphs and not first and steps > LEAST_REPLAYS and forward_pass.repeatable(steps):
            with forward_pass.still():
                repeat = Repeat(patch, realign, trace, forward_pass, h)
                if repeat.capture():
                    for b in going:
                        left[b] -= steps
                    return repeat.take(steps), graphs
            graphs = False
        before, h = h, _step(patch, realign, trace, forward_pass, h)
        steps, first = steps - 1, False  # a first step warms up: what is compiled or allocated once is no part of a capture
        for b in going:
            left[b] -= 1
        for b, change in zip(going, _changes(before, h) if stop_change is not None else []):
            if change < stop_change:
                left[b] = steps = 0  # the others go on in a run of their own
    return h, graphs


@torch.no_grad()
def _changes(before: Tensor, after: Tensor) -> list[float]:
    """|after - before| / |before| of each row."""
    before, after = (x if x.dtype == torch.float64 else x.float() for x in (before, after))
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).tolist()


def _step(patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor, **options) -> Tensor:
    return forward(patch, trace, forward_pass, inputs_embeds=realign(h)[None], **options).last_hidden_state[0]


def _graphs(patch: Patch, realign: nn.Module, h: Tensor) -> bool:
    """Whether steps may be captured: on one GPU, without gradients, outside of a capture, by a model that allows it."""
    if torch.is_grad_enabled() or not h.is_cuda or not patch.tries:
        return False
    weights = [*patch.body.parameters(), *realign.parameters(), *realign.buffers()]
    return all(w.device == h.device for w in weights) and not torch.cuda.is_current_stream_capturing()


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
        device = self.h.device
        try:
            with torch.cuda.device(device):  # launches on another device would run at once and leave the graph empty
                self.graph = captured(self.step, _capture_stream(device), self.h)
        except BaseException as error:
            self.forward_pass.forget()
            if not isinstance(error, RuntimeError):
                raise
            full = isinstance(error, torch.OutOfMemoryError)  # which may be another's memory, and later there may be some
            self.patch.tries = self.patch.tries - 1 if full else 0
            if self.patch.tries <= 0:
                why = "for which there was no memory several times" if full else "which this model does not allow"
                warnings.warn(f"latent steps run without a CUDA graph, {why}: {error}", stacklevel=2)
        else:
            self.patch.tries = TRIES
        return self.graph is not None

    def take(self, steps: int) -> Tensor:
        """Takes the steps and commits them to the trace; returns the last hidden states, [B, hidden]."""
        for _ in range(steps):
            self.graph.replay() if self.graph else self.step()
        self.trace.commit_repeated(self.forward_pass)
        for _ in range(steps - 1):
            self.trace.commit_repeated(self.trace.plan(self.forward_pass.lengths, "latent"))
        return self.h
