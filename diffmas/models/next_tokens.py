"""Forwards of one token a sequence, for decoding; as long as the same sequences go on, without the host.

A forward whose pass is the one before, one row and one position further, is that one's CUDA graph replayed. Everything else,
such as a sequence that leaves the batch, rows that lie elsewhere or pools that must grow, is a forward as usual, and needs
another graph. So one is captured when the sequences have gone on together for as long as a capture takes, which at worst
doubles the cost.
"""

import torch
from torch import Tensor

from diffmas.models.capture import LEAST_REPLAYS, capture_pass, possible
from diffmas.models.forward import forward
from diffmas.models.observers import hooked
from diffmas.trace import Trace
from diffmas.trace.forward_pass import ForwardPass, Place

__all__ = ["RESERVE", "NextTokens"]

WHAT = "decoding steps"
RESERVE = 512  # rows a sequence reserves at once for what it decodes


class NextTokens:
    """The forwards of one answer each of a batch of sequences.

    graphs: whether some of them may be replays.
    """

    def __init__(self, patch, device: torch.device):
        """patch: of the model (diffmas.models.patch.Patch). device: of the token ids."""
        self.patch, self.device = patch, device
        self.graphs = possible(patch, WHAT, device, patch.causal_lm.parameters())
        self.graphs = self.graphs and not hooked(patch.causal_lm.modules(), patch.hook_ids)
        self._place: Place | None = None  # where the last forward left off
        self._together = 0  # forwards, one after the other, of the same sequences
        self._repeat: Repeat | None = None

    def __call__(self, trace: Trace, tokens: Tensor, left: int) -> Tensor:
        """Appends a token to each sequence of the trace, tokens [n] of any device; returns their logits, [n, V]. left: tokens
        that are still to come, these included."""
        forward_pass = trace.plan([1] * len(tokens), "text", reserve=min(RESERVE, left))
        if self.graphs:
            follows = self._place is not None and forward_pass.follows(self._place)
            self._place, self._together = forward_pass.place(), self._together + 1 if follows else 0
            with forward_pass.still():
                self._repeat = self._repeat_of(forward_pass, len(tokens), left)
                if self._repeat is not None:
                    logits = self._repeat(tokens)
                    forward_pass.ids = tokens
                    trace.commit_repeated(forward_pass)
                    return logits
        return forward(self.patch, trace, forward_pass, head=True, input_ids=tokens.to(self.device)[None]).logits[0]

    def _repeat_of(self, forward_pass: ForwardPass, n: int, left: int) -> "Repeat | None":
        """What a forward pass may be a replay of: of the forward before, or of itself."""
        if not forward_pass.repeatable(1):
            return None
        if self._together and self._repeat is not None and self._repeat.writes_to(forward_pass):
            return self._repeat
        if self._together < LEAST_REPLAYS or left <= LEAST_REPLAYS:
            return None
        repeat = Repeat(self.patch, forward_pass, n, self.device)
        self.graphs = repeat.graph is not None
        return repeat if self.graphs else None


class Repeat:
    """A forward of one token a sequence, which advances its own forward pass; n: sequences."""

    def __init__(self, patch, forward_pass: ForwardPass, n: int, device: torch.device):
        """Captures it; where that fails, `graph` is None, and nothing has changed."""
        self._ids = torch.zeros(1, n, dtype=torch.long, device=device)
        self._storage = forward_pass.storage()

        def work() -> None:
            self._logits = forward(patch, None, forward_pass, head=True, commit=False, input_ids=self._ids).logits[0]

        self.graph = capture_pass(patch, WHAT, forward_pass, work, self._ids)

    def writes_to(self, forward_pass: ForwardPass) -> bool:
        """Whether its rows lie where they did."""
        return all(mine is kv for mine, kv in zip(self._storage, forward_pass.storage()))

    def __call__(self, tokens: Tensor) -> Tensor:
        self._ids.copy_(tokens[None])
        self.graph.replay()
        return self._logits.clone()
