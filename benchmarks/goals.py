"""What the project wants to reach, as data: the bar for every shape, and the goals of single regimes.

Ratios are a peer's time / ours in one interleaved run. The numbers are decisions, not measurements.
"""

from dataclasses import dataclass

__all__ = ["BAR", "GOALS", "Goal", "goal_of"]

BAR = 0.95  # no shape slower than this times the best peer


@dataclass(frozen=True)
class Goal:
    """At least `times` faster than `peer` (or `memory` times smaller than it) where op, regime, phase and shape fit."""

    op: str
    regime: str
    phase: str
    peer: str
    times: float = 0.0
    memory: float = 0.0
    device: str = "cpu"
    N: int = 0  # 0: any
    T: int = 0
    dtype: str = "float32"

    def fits(self, result) -> bool:
        row = result.first
        same = all(getattr(self, k) == row[k] for k in ("op", "regime", "phase", "device", "dtype"))
        return same and all(getattr(self, k) in (0, row[k]) for k in ("N", "T")) and self.peer in result.peers

    def met(self, result) -> bool:
        row = result.peers[self.peer]
        small = not self.memory or row["peak_bytes"] >= self.memory * result.ours["peak_bytes"]
        return row["ratio"] >= self.times and small

    def measured(self, result) -> str:
        row = result.peers[self.peer]
        found = [f"{row['ratio']:.2f}x as fast"] * bool(self.times)
        found += [f"{row['peak_bytes'] / result.ours['peak_bytes']:.2f}x smaller"] * bool(self.memory)
        return " and ".join(found)

    def __str__(self) -> str:
        wants = [f"{self.times:g}x as fast as"] * bool(self.times) + [f"{self.memory:g}x smaller than"] * bool(self.memory)
        return f"{' and '.join(wants)} {self.peer}"


ATTENTION, STEP = "cross_attention", "latent step"
GOALS = [
    *(Goal(ATTENTION, STEP, "forward", "sdpa", times, N=N) for N, times in ((2048, 2), (8192, 3), (32768, 3.5))),
    *(Goal(ATTENTION, STEP, "forward", "cat + sdpa", times, N=N) for N, times in ((2048, 3), (8192, 10), (32768, 12))),
    *(Goal(ATTENTION, STEP, "backward", "sdpa", times, N=N) for N, times in ((2048, 4), (8192, 8))),
    Goal(ATTENTION, STEP, "forward", "sdpa", 8, dtype="bfloat16"),
    Goal(ATTENTION, "prompt", "forward", "sdpa", 1.0),
    Goal(ATTENTION, "prompt", "backward", "sdpa", 1.0),
    Goal(ATTENTION, "few queries", "forward", "sdpa", 1.2),
    Goal("inject", "tokens", "forward", "eager", 6),
    Goal("inject", "one token", "forward", "eager", 10),
    Goal("inject", "one token", "forward", "eager + cat", 40),
    Goal("latent_step", "latent step", "forward", "DynamicCache", 2, N=8192),
    Goal("training_step", "agents", "step", "DynamicCache", 2, N=4096, T=16),
    Goal("attention_schedule", "agents", "step", "DynamicCache", 0, memory=5, N=4096, T=16),
]


def goal_of(result) -> Goal | None:
    """The hardest goal for a case that is not met, else any goal for it."""
    fitting = [goal for goal in GOALS if goal.fits(result)]
    return next((goal for goal in fitting if not goal.met(result)), fitting[0] if fitting else None)
