"""Training that explodes: noticed by the gradient's norm against its running median, explained by a gradient report."""

import json
import math
import statistics
from collections import deque
from pathlib import Path

from diffmas.agents.gradient_report import GradientReport, largest_group, norm_of, worse
from diffmas.agents.system import MultiAgentSystem

__all__ = ["NAME", "Explosion", "explain"]

NAME = "gradient_explosion"  # of the report's files, .json and .png


class Explosion:
    """Says, once, that a norm is more than `factor` times its running median; None: never. Raises ValueError for 1 or less.

    >>> explosion = Explosion(100)
    >>> [explosion.times(norm) for norm in (1, 2, 3, 2, 1, 250, 900)]
    [None, None, None, None, None, 125.0, None]
    """

    LEAST, MOST = 5, 100  # norms that a median is of

    def __init__(self, factor: float | None = 100.0):
        if factor is not None and not (isinstance(factor, (int, float)) and factor > 1):
            raise ValueError(f"explosion_factor: expected a number > 1 or None, got {factor!r}")
        self.factor = factor
        self._norms: deque[float] = deque(maxlen=self.MOST)

    def times(self, norm: float) -> float | None:
        """How many times the median of the norms before it this one is, where that is too much for the first time."""
        if self.factor is None or not math.isfinite(norm):
            return None
        median = statistics.median(self._norms) if len(self._norms) >= self.LEAST else 0.0
        self._norms.append(norm)
        if not 0 < self.factor * median < norm:
            return None
        self.factor = None
        return norm / median


def explain(system: MultiAgentSystem, norm: float, times: float, micro_batches: list[tuple], directory: Path) -> str:
    """What happened, where, and what to try. micro_batches: arguments of `gradient_report`, of one step; the report of the one
    with the largest gradient goes to the directory. Without any, there is no report."""
    text = f"the norm of the gradient is {norm:.3g}, {times:.0f} times its running median. "
    if not micro_batches:
        return text + _advice(system)
    try:
        reports = (system.gradient_report(*batch) for batch in micro_batches)
        report = max(reports, key=lambda report: worse(report.norm))
    except RuntimeError as error:  # out of memory, say: training goes on as it would have
        return f"{text}Its report failed: {error}. {_advice(system)}"
    file = directory / NAME
    directory.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".json").write_text(json.dumps(report.to_dict(), indent=1), encoding="utf-8")
    report.plot(file.with_suffix(".png"))
    return f"{text}{_where(report)} The report is in {file}.json and .png. {_advice(system)}"


def _where(report: GradientReport) -> str:
    worst, segments = report.worst, report.segments()
    agent, kind = max(segments, key=lambda segment: worse(segments[segment]))
    return (
        f"Most of it comes from {worst}, {largest_group(worst.parameters, report.groups)} "
        f"(norm {norm_of(worst.parameters):.3g}); of all rows, the {kind} rows of {agent} get the largest gradient "
        f"({segments[agent, kind]:.3g})."
    )


def _advice(system: MultiAgentSystem) -> str:
    tries = []
    if system.trace_content != "all" and system.sinks == 0:
        tries.append(f"sinks=4 ({system.trace_content!r} without them drops the first tokens: pretrained models need these)")
    if system.latent_grad_clip is None and any(agent.latent_steps for agent in system.agents):
        tries.append("latent_grad_clip=0.2")
    if system.realign.mode in ("none", "soft_token"):
        tries.append(f"realign='ridge' or 'norm' for {system.realign.mode!r}")
    tries.append("a lower learning_rate, more warmup_steps, a smaller max_grad_norm")
    return f"Try {'; '.join(tries)}. This is said once; explosion_factor=None keeps it quiet."
