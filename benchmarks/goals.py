"""What the project wants to reach, as data: the bar for every shape, and the goals of single regimes.

Ratios are a peer's time / ours in one interleaved run. The numbers are decisions, not measurements.
"""

import math
from dataclasses import dataclass

from diffmas.benchmarks.measure import OURS

__all__ = ["BAR", "GOALS", "Goal", "goals_of", "scorecard"]

BAR = 0.95  # no shape slower than this times the best peer
SDPA = "the best of SDPA"


@dataclass(frozen=True)
class Goal:
    """Where op, regime, phase and shape fit, one of: at least `times` faster than `peer` (or `memory` times smaller than it);
    at `roofline` percent of what this machine can do; in `micros` microseconds; with a peak of memory of at most `peak` times
    what the call is given and returns. peer SDPA: the fastest of torch's."""

    op: str
    regime: str
    phase: str
    peer: str = ""
    times: float = 0.0
    memory: float = 0.0
    roofline: float = 0.0
    micros: float = 0.0
    peak: float = 0.0
    device: str = "cpu"
    N: int = 0  # 0: any
    n: int = 0
    T: int = 0
    dtype: str = "float32"

    def fits(self, result) -> bool:
        row = result.first
        same = all(getattr(self, k) == row[k] for k in ("op", "regime", "phase", "device", "dtype"))
        return same and all(getattr(self, k) in (0, row[k]) for k in ("N", "n", "T")) and self._value(result) is not None

    def _peer(self, result) -> dict | None:
        if self.peer != SDPA:
            return result.peers.get(self.peer)
        return min((r for name, r in result.peers.items() if name.startswith("sdpa")), key=lambda r: r["ratio"], default=None)

    def _value(self, result):
        """What is compared with the goal; None where it was not measured."""
        ours = result.ours
        if self.roofline:
            return ours.get("roofline_percent")
        if self.micros:
            return ours["seconds"] * 1e6 if ours.get("seconds") else None
        if self.peak:
            return _peak(result.first, ours["peak_bytes"]) if ours.get("peak_bytes") else None
        return self._peer(result)

    def share(self, result) -> float:
        """What was measured / what is wanted, or the other way round where less is better: 1 and more is met."""
        value = self._value(result)
        if self.roofline:
            return value / self.roofline
        if self.micros or self.peak:
            return (self.micros or self.peak) / value
        faster = value["ratio"] / self.times if self.times else math.inf
        smaller = value["peak_bytes"] / (self.memory * result.ours["peak_bytes"]) if self.memory else math.inf
        return min(faster, smaller)

    def met(self, result) -> bool:
        return self.share(result) >= 1

    def measured(self, result) -> str:
        value = self._value(result)
        if self.roofline:
            return f"{value:.0f} %"
        if self.micros or self.peak:
            return f"{value:.3g} µs" if self.micros else f"{value:.2f}x"
        found = [f"{value['ratio']:.2f}x as fast"] * bool(self.times)
        found += [f"{value['peak_bytes'] / result.ours['peak_bytes']:.2f}x smaller"] * bool(self.memory)
        return " and ".join(found)

    def __str__(self) -> str:
        if self.roofline:
            return f"{self.roofline:g} % of the roofline"
        if self.micros:
            return f"{self.micros:g} µs"
        if self.peak:
            return f"a peak of {self.peak:g}x of what is given and returned"
        wants = [f"{self.times:.3g}x as fast as"] * bool(self.times) + [f"{self.memory:g}x smaller than"] * bool(self.memory)
        return f"{' and '.join(wants)} {self.peer}"


def _peak(row: dict, peak_bytes: float) -> float:
    """Of attention of one sequence in 16 bits, all rows of whose pools are read: most memory held / the least possible."""
    Hq, Hkv = map(int, row["heads"].split("/"))
    q, pools, lse = 2 * Hq * row["D"] * row["n"], 4 * Hkv * row["D"] * row["N"], 4 * Hq * row["n"]
    given, returned = q + pools, q + lse
    if row["phase"] == "backward":
        given, returned = 3 * q + lse + 3 * pools, q  # q, o, do; pools and float32 gradients; dq
    return (given + peak_bytes) / (given + returned)


def _of_a_mask(N: int, n: int) -> float:
    """SDPA with a mask computes all n x N pairs, diffmas the visible ones: 0.9 of that ratio, and 1.1 for the rest."""
    return 1.1 * 0.9 * N / (N - (n - 1) / 2)


ATTENTION, STEP = "cross_attention", "latent step"
LONG = ("prompt", "prompt on a trace", "prompt on 63 segments")
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
    Goal(ATTENTION, "small-q", "forward", "sdpa", 1.2),
    Goal("inject", "tokens", "forward", "eager", 6),
    Goal("inject", "one token", "forward", "eager", 10),
    Goal("inject", "one token", "forward", "eager + cat", 40),
    Goal("latent_step", "latent step", "forward", "DynamicCache", 2, N=8192),
    Goal("training_step", "agents", "step", "DynamicCache", 2, N=4096, T=16),
    *(Goal("decoding", "whole model", "decode", "llama.cpp", 1.1, N=2056, dtype=dtype) for dtype in ("float32", "bfloat16")),
    *(
        Goal("decoding", "whole model", "prefill", peer, 1.3, dtype=dtype)
        for dtype in ("float32", "bfloat16")
        for peer in ("DynamicCache", "llama.cpp")
    ),
    Goal("attention_schedule", "agents", "step", "DynamicCache", 0, memory=5, N=4096, T=16),
    Goal("deferred_kv_grad", "latent steps", "backward", f"{OURS}, not deferred", 1.3),
    # Hopper: percent of the device's own matrix product, read and copy rates. 54 %: what Triton is to reach; 78 %: the best.
    *(
        Goal(*case, dtype="bfloat16", device="cuda")
        for case in (
            *((ATTENTION, regime, "forward", SDPA, 1.0) for regime in LONG),
            *((ATTENTION, regime, "forward", "flex", 1.15) for regime in LONG),
            *((ATTENTION, regime, "backward", SDPA, 1.0) for regime in LONG),
            *((ATTENTION, regime, "backward", "flex", 1.8) for regime in LONG),
            (ATTENTION, "short prompts", "forward", "flex", 3),
            (ATTENTION, "short prompts", "forward", "sdpa", 8),
            (ATTENTION, "short prompts", "backward", "flex", 2.5),
            (ATTENTION, STEP, "forward", "flashinfer", 1.1),
            *(
                (ATTENTION, f"{what} at an offset", phase, f"{OURS}, no offset", 1 / 1.03)
                for what in ("latent step", "prompt")
                for phase in ("forward", "backward")
            ),
            (ATTENTION, "readers of a prefix", "forward", f"{OURS}, each for itself", 1.0),
            ("inject", "tokens", "forward", "compiled + static", 1.7),
            ("inject", "tokens", "forward", "eager + cat", 8),
            ("inject", "tokens", "backward", "eager", 4),
        )
    ),
    *(
        Goal(*case, roofline=percent, dtype="bfloat16", device="cuda", **shape)
        for *case, percent, shape in (
            *((ATTENTION, "prompt", "forward", percent, dict(n=n)) for percent in (54, 78) for n in (4096, 16384)),
            *((ATTENTION, "prompt on 63 segments", "forward", percent, {}) for percent in (54, 78)),
            *((ATTENTION, "prompt", "backward", 66, dict(n=n)) for n in (4096, 16384)),
            *((ATTENTION, STEP, "forward", 90, dict(N=N)) for N in (16384, 65536)),
            (ATTENTION, "readers of a prefix", "forward", 85, dict(N=32768)),
            # 1.5 times a step's forward at 90 %, where a step has 4.6 / 4 of the forward's bytes.
            ("deferred_kv_grad", "latent steps", "backward", 69, {}),
            *(("inject", "tokens", "forward", 88, dict(n=n)) for n in (8192, 65536)),
            ("inject", "tokens", "backward", 80, dict(n=65536)),
        )
    ),
    *(Goal(ATTENTION, STEP, "forward", micros=7.5, N=N, dtype="bfloat16", device="cuda") for N in (1024, 4096)),
    Goal("inject", "one token", "forward", micros=4, dtype="bfloat16", device="cuda"),
    Goal("inject", "tokens", "forward", micros=4, n=64, dtype="bfloat16", device="cuda"),
    *(
        Goal(ATTENTION, regime, phase, peak=1.05, dtype="bfloat16", device="cuda")
        for regime in (STEP, "prompt")
        for phase in ("forward", "backward")
    ),
]


def goals_of(result) -> tuple[list[str], list[str]]:
    """The goals for a case that are met and those that are missed, each with what was measured."""
    met, missed = [], []
    for goal in GOALS:
        if goal.fits(result):
            (met if goal.met(result) else missed).append(f"{goal} ({goal.measured(result)})")
    return met, missed


def scorecard(results: list, device: str) -> list[tuple[float | None, str, str, str]]:
    """Every goal of the device beside what was measured: (its share, or None where nothing was; case; goal; number)."""
    lines = []
    for goal in GOALS:
        if goal.device != device:
            continue
        fitting = [result for result in results if goal.fits(result)]
        case = f"{goal.op} {goal.regime}, {goal.phase}".replace("_", " ")
        shape = " ".join(f"{name}={value}" for name in ("N", "n", "T") if (value := getattr(goal, name)))
        lines += [(goal.share(result), f"{case}, {result.shape}", str(goal), goal.measured(result)) for result in fitting]
        if not fitting:
            lines.append((None, f"{case}, {shape}" if shape else case, str(goal), "not measured"))
    return lines
