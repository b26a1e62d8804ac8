"""Latent steps: T times, realign the last hidden state and forward one token per sequence, without logits.

Sequences that have taken their steps leave the batch: the later steps are forwards over the others alone.

On a GPU, launching a step's kernels takes longer than running them. A step is therefore captured as a CUDA graph, which
advances its own forward pass, and replayed: the host does nothing in between. With gradients: diffmas.agents.learning.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from diffmas.agents import learning
from diffmas.agents.gradient_clip import current_clip
from diffmas.agents.learning import LearningSteps
from diffmas.models.capture import LEAST_REPLAYS, capture_pass, possible
from diffmas.models.forward import forward
from diffmas.models.observers import hooked, observed, random_state
from diffmas.models.patch import Patch
from diffmas.trace import Trace
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["latent_steps"]

WHAT = "latent steps"


def latent_steps(
    patch: Patch, realign: nn.Module, trace: Trace, h: Tensor, T: list[int], stop_change: float | None = None
) -> Tensor:  # fmt: skip
    """Appends T[b] latent tokens to sequence b of the trace, or fewer: see `Agent`'s stop_change.

    h [B, hidden]: the last hidden state of each sequence. Returns the last hidden states after the steps, [B, hidden].
    """
    graphs, left, clip = stop_change is None and _can_repeat(patch, realign, h), list(T), current_clip()
    realign = functools.partial(realign, solved=realign.solved())
    while any(left):
        going = [b for b, n in enumerate(left) if n]
        rows = None if len(going) == len(left) else torch.tensor(going, device=h.device)
        clipped = None if clip is None else functools.partial(clip.step, sequences=rows)
        x, graphs = _run(patch, realign, trace, h if rows is None else h[rows], left, stop_change, graphs, clipped)
        h = x if rows is None else h.index_copy(0, rows, x)
    return h


def _run(
    patch: Patch, realign, trace: Trace, h: Tensor, left: list[int], stop_change, graphs: bool, clipped: Callable | None
) -> tuple[Tensor, bool]:  # fmt: skip
    """Steps of the sequences that have some left, until the first of them has none; counts them down in `left`.

    h [n, hidden]: of these sequences alone. clipped: gives h as each step takes it (`GradientClip.step`). Returns h after the
    steps, and whether later steps may be captured.
    """
    going, warm = [b for b, n in enumerate(left) if n], False
    lengths, steps = [int(n > 0) for n in left], min(left[b] for b in going)
    drawn = random_state(h.device) if graphs and torch.is_grad_enabled() else ()
    while steps:
        forward_pass, taken = trace.plan(lengths, "latent", reserve=[max(n - 1, 0) for n in left]), 0
        if graphs and warm:
            h, taken, graphs = _repeat(patch, realign, trace, forward_pass, h, steps, clipped)
        if not taken:
            x = h if clipped is None else clipped(h)
            before, h, taken = h, _step(patch, realign, trace, forward_pass, x), 1
            if drawn and not warm:
                graphs = all(map(torch.equal, drawn, random_state(h.device)))
            warm = True  # a first step warms up: what is compiled or allocated once is no part of a capture
        steps -= taken
        for b in going:
            left[b] -= taken
        for b, change in zip(going, _changes(before, h) if stop_change is not None else []):
            if change < stop_change:
                left[b] = steps = 0  # the others go on in a run of their own
    return h, graphs


def _repeat(
    patch: Patch, realign, trace: Trace, forward_pass: ForwardPass, h: Tensor, steps: int, clipped: Callable | None
) -> tuple[Tensor, int, bool]:  # fmt: skip
    """As many of the steps as can be taken by replaying one of them, or none. Returns h after them, how many, and whether
    later steps may be captured."""
    grads = torch.is_grad_enabled() and h.requires_grad
    if grads:
        steps = min(steps, forward_pass.run_left)
    if steps <= LEAST_REPLAYS or not forward_pass.repeatable(steps):
        return h, 0, True
    step = functools.partial(_step, patch, realign, None, forward_pass, commit=False)
    with forward_pass.still(), torch.set_grad_enabled(grads):
        repeat = LearningSteps(patch, forward_pass, h, clipped) if grads else Repeat(patch, forward_pass, h)
        if not repeat.capture(step):
            return h, 0, False
        return repeat.take(trace, h, steps), steps, True


@torch.no_grad()
def _changes(before: Tensor, after: Tensor) -> list[float]:
    """|after - before| / |before| of each row."""
    before, after = (x if x.dtype == torch.float64 else x.float() for x in (before, after))
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).tolist()


def _step(patch: Patch, realign, trace: Trace | None, forward_pass: ForwardPass, h: Tensor, **options) -> Tensor:
    return forward(patch, trace, forward_pass, inputs_embeds=realign(h)[None], **options).last_hidden_state[0]


def _can_repeat(patch: Patch, realign: nn.Module, h: Tensor) -> bool:
    """Whether steps may be captured: where nobody wants to see or change what happens in them."""
    weights = (w for some in (patch.body.parameters(), realign.parameters(), realign.buffers()) for w in some)
    grads = torch.is_grad_enabled()
    what, seen = (learning.WHAT, observed) if grads else (WHAT, hooked)
    if (grads and not patch.training_graphs) or not possible(patch, what, h.device, weights):
        return False
    return not seen([*patch.causal_lm.modules(), *realign.modules()], patch.hook_ids)


class Repeat:
    """A latent step that repeats without the host: hidden states and forward pass advance in place."""

    def __init__(self, patch: Patch, forward_pass: ForwardPass, h: Tensor):
        """forward_pass: of the first step; its extents have room for all the steps. h [B, hidden]: before it."""
        self.patch, self.forward_pass, self.h = patch, forward_pass, h.clone()
        self.graph: torch.cuda.CUDAGraph | None = None

    def capture(self, step) -> bool:
        """step: the latent step, of hidden states [B, hidden], on this forward pass. Returns False, with nothing changed, if
        the model cannot be captured."""
        self.graph = capture_pass(self.patch, WHAT, self.forward_pass, lambda: self.h.copy_(step(self.h)), self.h)
        return self.graph is not None

    def take(self, trace: Trace, h: Tensor, steps: int) -> Tensor:
        """Takes the steps and commits them to the trace; returns the last hidden states, [B, hidden]."""
        for _ in range(steps):
            self.graph.replay()
        trace.commit_repeated(self.forward_pass)
        for _ in range(steps - 1):
            trace.commit_repeated(trace.plan(self.forward_pass.lengths, "latent"))
        return self.h
