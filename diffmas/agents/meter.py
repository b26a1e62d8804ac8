"""What answering costs and how sure the model is of what it decodes, measured while it happens.

`measuring` gives whoever holds it a `Meter`; the agents say what they do with `phase` and `decoded`, which do nothing where
nobody measures.
"""

import contextlib
import contextvars
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from diffmas.trace.views import Size

__all__ = ["PHASES", "Cost", "Decoding", "Meter", "decoded", "has_read", "measuring", "phase"]

# What an agent's turn consists of: prompts, latent steps, making what the next one reads, text. "other": all the rest.
PHASES = ("prefill", "latent", "hand-over", "decode", "other")


@dataclass
class Cost:
    """seconds: by phase; a phase within another does not count twice. rows: appended to traces, by phase: tokens of prompts in
    "prefill", latent steps in "latent", tokens of messages, but not of answers, in "decode". read: by agent, what others wrote
    and it read in its turns (`Trace.sizes`), all questions together. trace_bytes: of the largest trace (`Trace.memory`)."""

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PHASES, 0.0))
    rows: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))
    read: dict[str, Size] = field(default_factory=dict)
    trace_bytes: int = 0

    @property
    def total(self) -> float:
        """Seconds of all phases."""
        return sum(self.seconds.values())


class Decoding:
    """How sure the model was: sums over the tokens that were decoded t-th, for every t. Of the model's own distribution, at
    temperature 1 and without top_p, however the tokens were drawn from it."""

    def __init__(self):
        self._sums: list[list[Tensor]] = []  # by t: [2], nll and entropy, on the device until somebody asks
        self.counts: list[int] = []  # by t: tokens

    def add(self, t: int, logits: Tensor, tokens: list[int]) -> None:
        """logits [n, V], and the n tokens that were chosen from them."""
        logp = logits.float().log_softmax(-1)
        nll = -logp.gather(1, torch.tensor(tokens, device=logp.device)[:, None]).sum()
        while len(self.counts) <= t:
            self._sums.append([])
            self.counts.append(0)
        self._sums[t].append(torch.stack((nll, torch.special.entr(logp.exp()).sum())))
        self.counts[t] += len(tokens)

    def _sum(self, which: int) -> list[float]:
        return [float(torch.stack(sums)[:, which].double().sum()) for sums in self._sums]

    @property
    def nll(self) -> float:
        """The sum of all tokens' negative log-likelihoods, in nats."""
        return sum(self._sum(0))

    @property
    def entropy(self) -> list[float]:
        """The mean entropy of the distribution that the t-th tokens come from, in nats, for t = 0, 1, ..."""
        return [total / n for total, n in zip(self._sum(1), self.counts)]


class Meter:
    """cost: so far. decoding: of what was decoded; the holder may put a new `Decoding` in its place."""

    def __init__(self, device: torch.device):
        self.cost, self.decoding = Cost(), Decoding()
        self._device, self._open, self._since = device, ["other"], 0.0

    def tick(self) -> None:
        """Adds the time since the last call to the innermost open phase."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        if self._since and self._open[-1] in self.cost.seconds:
            self.cost.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def phase(self, name: str, trace=None):
        self.tick()
        self._open.append(name)
        before = sum(trace.lengths) if trace is not None else 0
        try:
            yield
        finally:
            self.tick()
            self._open.pop()
        if trace is not None:
            self.cost.rows[name] += sum(trace.lengths) - before
            self.cost.trace_bytes = max(self.cost.trace_bytes, trace.memory())


_METER: contextvars.ContextVar[Meter | None] = contextvars.ContextVar("meter", default=None)


@contextlib.contextmanager
def measuring(device: torch.device):
    """A `Meter` of what this thread does inside. device: whose work is waited for."""
    meter = Meter(device)
    token = _METER.set(meter)
    meter.tick()
    try:
        yield meter
    finally:
        meter.tick()
        _METER.reset(token)


def phase(name: str, trace=None):
    """A context whose time, and rows that are appended to `trace` inside, count as this phase, one of PHASES."""
    meter = _METER.get()
    return contextlib.nullcontext() if meter is None else meter.phase(name, trace)


def has_read(agent: str, trace) -> None:
    """Tells that an agent begins a turn and sees this trace."""
    meter = _METER.get()
    if meter is not None:
        for size in trace.sizes.values():
            meter.cost.read[agent] = meter.cost.read.get(agent, Size()).plus(size)


def decoded(t: int, logits: Tensor, tokens: list[int]) -> None:
    """Tells that these tokens were decoded t-th, from logits [n, V]; the time that it takes counts as nobody's."""
    meter = _METER.get()
    if meter is not None:
        with meter.phase("statistics"):
            meter.decoding.add(t, logits, tokens)
