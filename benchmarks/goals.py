"""What the project wants to reach, as data: the bar for every shape, and the goals of single regimes.

Ratios are a peer's time / ours in one interleaved run. The numbers are decisions, not measurements.
"""

from dataclasses import dataclass

from diffmas.benchmarks.measure import OURS

__all__ = ["BAR", "GOALS", "Goal", "goals_of"]

BAR = 0.95  # no shape slower than this times the best peer


@dataclass(frozen=True)
class Goal:
    """At least `times` faster than `peer` (or `memory` times smaller than it, or at `roofline` percent of what this machine
    can do, whoever the peers are) where op, regime, phase and shape fit."""

    op: str
    regime: str
    phase: str
    peer: str = ""
    times: float = 0.0
    memory: float = 0.0
    roofline: float = 0.0
    device: str = "cpu"
    N: int = 0  # 0: any
    n: int = 0
    T: int = 0
    dtype: str = "float32"

    def fits(self, result) -> bool:
        row = result.first
        same = all(getattr(self, k) == row[k] for k in ("op", "regime", "phase", "device", "dtype"))
        same = same and all(getattr(self, k) in (0, row[k]) for k in ("N", "n", "T"))
        return same and (bool(result.ours.get("roofline_percent")) if self.roofline else self.peer in result.peers)

    def met(self, result) -> bool:
        if self.roofline:
            return result.ours["roofline_percent"] >= self.roofline
        row = result.peers[self.peer]
        small = not self.memory or row["peak_bytes"] >= self.memory * result.ours["peak_bytes"]
        return row["ratio"] >= self.times and small

    def measured(self, result) -> str:
        if self.roofline:
            return f"{result.ours['roofline_percent']:.0f} %"
        row = result.peers[self.peer]
        found = [f"{row['ratio']:.2f}x as fast"] * bool(self.times)
        found += [f"{row['peak_bytes'] / result.ours['peak_bytes']:.2f}x smaller"] * bool(self.memory)
        return " and ".join(found)

    def __str__(self) -> str:
        if self.roofline:
            return f"{self.roofline:g} % of the roofline"
        wants = [f"{self.times:.3g}x as fast as"] * bool(self.times) + [f"{self.memory:g}x smaller than"] * bool(self.memory)
        return f"{' and '.join(wants)} {self.peer}"


def _of_a_mask(N: int, n: int) -> float:
    """SDPA with a mask computes all n x N pairs, diffmas the visible ones: 0.9 of that ratio, and 1.1 for the rest."""
    return 1.1 * 0.9 * N / (N - (n - 1) / 2)


ATTENTION, STEP = "cross_attention", "latent step"
PREFILLS = {
    "prompt on a trace": ((2048, 256), (4096, 512), (8192, 1024)),
    "agents side by side": ((1024, 256), (4608, 512)),
}
GOALS = [
    *(Goal(ATTENTION, STEP, "forward", "sdpa", times, N=N) for N, times in ((2048, 2), (8192, 3), (32768, 3.5))),
    *(Goal(ATTENTION, STEP, "forward", "cat + sdpa", times, N=N) for N, times in ((2048, 3), (8192, 10), (32768, 12))),
    *(Goal(ATTENTION, STEP, "backward", "sdpa", times, N=N) for N, times in ((2048, 4), (8192, 8))),
    Goal(ATTENTION, STEP, "forward", "sdpa", 8, dtype="bfloat16"),
    Goal(ATTENTION, "prompt", "forward", "sdpa", 1.0),
    Goal(ATTENTION, "prompt", "backward", "sdpa", 1.0),
    *(
        Goal(ATTENTION, regime, "forward", "sdpa", _of_a_mask(N, n), N=N, n=n)
        for regime, shapes in PREFILLS.items()
        for N, n in shapes
    ),
    Goal(ATTENTION, STEP, "forward", roofline=85),  # its bound is the read rate that a torch sum measures
    Goal(ATTENTION, "few queries", "forward", "sdpa", 1.2),
    Goal("inject", "tokens", "forward", "eager", 6),
    Goal("inject", "one token", "forward", "eager", 10),
    Goal("inject", "one token", "forward", "eager + cat", 40),
    Goal("latent_step", "latent step", "forward", "DynamicCache", 2, N=8192),
    Goal("training_step", "agents", "step", "DynamicCache", 2, N=4096, T=16),
    Goal("attention_schedule", "agents", "step", "DynamicCache", 0, memory=5, N=4096, T=16),
    Goal("latent_run", "latent run", "backward", f"{OURS}, pushing", 1.3),
    # Hopper: percent of the device's own matrix product, read and copy rates.
    *(
        Goal(*case, dtype="bfloat16", device="cuda")
        for case in (
            (ATTENTION, "prompt", "forward", "flex", 1.15),
            (ATTENTION, "prompt on 63 segments", "forward", "flex", 1.15),
            (ATTENTION, "ragged prompts", "forward", "flex", 3),
            (ATTENTION, "ragged prompts", "forward", "sdpa", 8),
            (ATTENTION, STEP, "forward", "flashinfer", 1.1),
            ("inject", "tokens", "forward", "eager + cat", 8),
            ("inject", "tokens", "backward", "eager", 4),
        )
    ),
    *(
        Goal(*case, roofline=percent, dtype="bfloat16", device="cuda", **shape)
        for *case, percent, shape in (
            (ATTENTION, "prompt", "forward", 54, {}),
            (ATTENTION, "prompt", "backward", 66, {}),
            (ATTENTION, STEP, "forward", 90, dict(N=65536)),
            (ATTENTION, "readers of a prefix", "forward", 85, dict(N=32768)),
            ("inject", "tokens", "forward", 88, dict(n=65536)),
            ("inject", "tokens", "backward", 80, dict(n=65536)),
        )
    ),
]


def goals_of(result) -> tuple[list[str], list[str]]:
    """The goals for a case that are met and those that are missed, each with what was measured."""
    met, missed = [], []
    for goal in GOALS:
        if goal.fits(result):
            (met if goal.met(result) else missed).append(f"{goal} ({goal.measured(result)})")
    return met, missed
