"""Results of several seeds as one: what a method does on average, over the same questions."""

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from diffmas.evaluation.files import figure, room_for, write_rows
from diffmas.evaluation.metrics import Difference, difference_of_rates, wilson
from diffmas.evaluation.run import gap, interval, narrow_table, percent

__all__ = ["Pooled", "best_of", "plot_entropy", "plot_pooled", "pool", "pooled_table", "write_pooled"]

Scores = dict[int, Sequence[float]]  # by seed, of each question: the share of right samples


@dataclass
class Pooled:
    """A method, or a condition of an audit, over seeds.

    case: of the study. by_seed: the accuracy of each seed. accuracy: their mean; [low, high]: its 95 % Wilson interval over
    questions, each with the mean of its seeds, so that an interval says nothing of other seeds: by_seed does. difference: to
    the row named `to`, paired over questions, each with the mean of the seeds that both have (`compared_seeds`); None for that
    row itself, and where no seed is common.
    """

    case: str
    name: str
    questions: int
    by_seed: dict[int, float]
    accuracy: float
    low: float
    high: float
    to: str | None
    difference: Difference | None
    compared_seeds: list[int]

    def row(self) -> dict:
        """The numbers by name, as in the CSV file; those that do not apply are None."""
        numbers = {"accuracy": self.accuracy, "low": self.low, "high": self.high, "compared_with": self.to}
        gap = dict(zip(("difference", "difference_low", "difference_high"), self.difference or (None,) * 3))
        seeds = {"by_seed": list(self.by_seed.values()), "seeds": list(self.by_seed), "compared_seeds": self.compared_seeds}
        return {"case": self.case, "name": self.name, "questions": self.questions, **numbers, **gap, **seeds}


def best_of(scores: dict[str, Scores], names: Iterable[str]) -> str | None:
    """Which of some rows is right most often, of those with the most seeds; None of none."""
    return max(names, key=lambda name: (len(scores[name]), statistics.fmean(_means(scores[name], scores[name]))), default=None)


def _means(of: Scores, seeds: Iterable[int]) -> list[float]:
    """Of each question, over seeds."""
    return [statistics.fmean(column) for column in zip(*(of[seed] for seed in seeds))]


def pool(case: str, scores: dict[str, Scores], to: str | None = None) -> list[Pooled]:
    """scores: by name. to: the row that others are compared with; by default the best of all but the last. Seeds that one of
    two rows lacks, as where a method failed, are left out of their difference. Raises ValueError for seeds of different
    questions."""
    for name, seeds in scores.items():
        if len(lengths := [len(seed) for seed in seeds.values()]) == 0 or len(set(lengths)) != 1:
            raise ValueError(f"scores: expected the same questions for all seeds of {name!r}, got {lengths}")
    if to is None:
        to = best_of(scores, list(scores)[:-1])
    rows = []
    for name, of in scores.items():
        accuracy = statistics.fmean(mean := _means(of, of))
        both = [] if to in (None, name) else [seed for seed in of if seed in scores[to]]
        difference = difference_of_rates(_means(of, both), _means(scores[to], both)) if both else None
        by_seed = {seed: statistics.fmean(shares) for seed, shares in of.items()}
        bounds = wilson(accuracy, len(mean))
        rows.append(Pooled(case, name, len(mean), by_seed, accuracy, *bounds, to, difference, both))
    return rows


def pooled_table(rows: list[Pooled], title: str = "") -> Table:
    """The rows as a rich table of at most 80 columns."""
    cells = [
        [f"{r.case}: {r.name}", percent(r.accuracy), interval(r.low, r.high), gap(r.difference),
         " ".join(f"{100 * x:.0f}" for x in r.by_seed.values())]
        for r in rows
    ]  # fmt: skip
    heads = ("case: method", "right %", "95 % interval", "difference", "seeds")
    to: dict[str, list[str]] = {}
    for r in rows:
        if r.to and r.to not in to.setdefault(r.case, []):
            to[r.case].append(r.to)
    said = [f"{case}: difference to {names[0]}" + ", an agent's to its own" * (len(names) > 1) for case, names in to.items()]
    seeds, fewer = {seed for r in rows for seed in r.by_seed}, {}
    for r in rows:
        if len(r.by_seed) < len(seeds):
            fewer.setdefault((r.case, tuple(r.by_seed)), []).append(r.name)
    said += [
        f"{case}: only seed{'s' * (len(has) > 1)} {', '.join(map(str, has))} of {', '.join(names)}"
        for (case, has), names in fewer.items()
    ]
    return narrow_table(title, heads, cells, "; ".join(said))


def write_pooled(rows: list[Pooled], path) -> Path:
    """Writes a CSV file with a line per row, and returns its path."""
    shown = lambda x: f"{x:.4f}" if isinstance(x, float) else " ".join(map(str, map(shown, x))) if isinstance(x, list) else x
    return write_rows(({name: shown(x) for name, x in r.row().items()} for r in rows), path)


def plot_pooled(rows: list[Pooled], path, title: str = "") -> Path:
    """Writes a PNG of accuracies with their intervals, a dot for each seed; returns its path."""
    path = room_for(path)
    cases = list(dict.fromkeys(r.case for r in rows))
    canvas = figure(9, 1 + 0.4 * (len(rows) + len(cases)))
    heights = [sum(r.case == case for r in rows) + 1 for case in cases]
    for axes, case in zip(canvas.subplots(len(cases), 1, squeeze=False, sharex=True, height_ratios=heights)[:, 0], cases):
        part = [r for r in rows if r.case == case]
        errors = [[100 * max(r.accuracy - r.low, 0) for r in part], [100 * max(r.high - r.accuracy, 0) for r in part]]
        axes.barh([r.name for r in part], [100 * r.accuracy for r in part], xerr=errors, capsize=3, alpha=0.7)
        for i, r in enumerate(part):
            axes.plot([100 * x for x in r.by_seed.values()], [i] * len(r.by_seed), "k.", markersize=4)
        axes.set(title=case, xlim=(0, 100))
        axes.invert_yaxis()
    axes.set(xlabel="right, % (95 % interval; a dot for each seed)")
    canvas.suptitle(title)
    canvas.savefig(path, dpi=150)
    return path


def plot_entropy(rows: list[dict], path) -> Path:
    """Writes a PNG of token-entropy curves, a panel for each case and a line for each method and seed; returns its path. rows:
    of {case, seed, method, token, nats}: the mean entropy of the distributions that the answers' t-th tokens come from."""
    path, cases = room_for(path), list(dict.fromkeys(row["case"] for row in rows))
    canvas = figure(9, 0.5 + 2.5 * len(cases))
    for axes, case in zip(canvas.subplots(len(cases), 1, squeeze=False)[:, 0], cases):
        part = [row for row in rows if row["case"] == case]
        for i, method in enumerate(dict.fromkeys(row["method"] for row in part)):
            seeds = dict.fromkeys(row["seed"] for row in part if row["method"] == method)
            for n, seed in enumerate(seeds):
                curve = [row for row in part if (row["method"], row["seed"]) == (method, seed)]
                label = "_" if n else method  # matplotlib leaves out of the legend what starts so
                axes.plot([1 + r["token"] for r in curve], [r["nats"] for r in curve], ".-", color=f"C{i % 10}", label=label)
        axes.set(title=case, ylabel="entropy, nats")
        axes.legend(fontsize="small")
    axes.set(xlabel="token of the answer")
    canvas.savefig(path, dpi=150)
    return path
