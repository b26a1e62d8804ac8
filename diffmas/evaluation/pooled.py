"""Results of several seeds as one: what a method does on average, over the same questions."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from diffmas.evaluation.files import figure, room_for, write_rows
from diffmas.evaluation.metrics import Difference, difference_of_rates, wilson
from diffmas.evaluation.run import gap, interval, narrow_table, percent

__all__ = ["Pooled", "plot_entropy", "plot_pooled", "pool", "pooled_table", "write_pooled"]


@dataclass
class Pooled:
    """A method, or a condition of an audit, over seeds.

    case: of the study. by_seed: the accuracy of each seed. accuracy: their mean; [low, high]: its 95 % Wilson interval over
    questions, each with the mean of its seeds, so that an interval says nothing of other seeds: by_seed does. difference: to
    the row named `to`, paired over questions; None for that one.
    """

    case: str
    name: str
    questions: int
    by_seed: list[float]
    accuracy: float
    low: float
    high: float
    to: str | None
    difference: Difference | None

    def row(self) -> dict:
        """The numbers by name, as in the CSV file; those that do not apply are None."""
        numbers = {"accuracy": self.accuracy, "low": self.low, "high": self.high, "compared_with": self.to}
        gap = dict(zip(("difference", "difference_low", "difference_high"), self.difference or (None,) * 3))
        return {"case": self.case, "name": self.name, "questions": self.questions, **numbers, **gap, "by_seed": self.by_seed}


def pool(case: str, scores: dict[str, Sequence[Sequence[float]]], to: str | None = None) -> list[Pooled]:
    """scores: by name, [seed][question], the share of right samples. to: the row that others are compared with; by default the
    best of all but the last. Raises ValueError for seeds of different questions."""
    means = {}
    for name, seeds in scores.items():
        if len({len(seed) for seed in seeds}) != 1:
            raise ValueError(f"scores: expected the same questions for all seeds of {name!r}, got {[len(s) for s in seeds]}")
        means[name] = [statistics.fmean(column) for column in zip(*seeds)]
    others = list(means)[:-1]
    if to is None and others:
        to = max(others, key=lambda name: statistics.fmean(means[name]))
    rows = []
    for name, mean in means.items():
        accuracy = statistics.fmean(mean)
        rows.append(
            Pooled(
                case, name, len(mean), [statistics.fmean(seed) for seed in scores[name]], accuracy,
                *wilson(accuracy, len(mean)), to, None if to in (None, name) else difference_of_rates(mean, means[to]),
            )
        )  # fmt: skip
    return rows


def pooled_table(rows: list[Pooled], title: str = "") -> Table:
    """The rows as a rich table of at most 80 columns."""
    cells = [
        [f"{r.case}: {r.name}", percent(r.accuracy), interval(r.low, r.high), gap(r.difference),
         " ".join(f"{100 * x:.0f}" for x in r.by_seed)]
        for r in rows
    ]  # fmt: skip
    heads = ("case: method", "right %", "95 % interval", "difference", "seeds")
    to: dict[str, list[str]] = {}
    for r in rows:
        if r.to and r.to not in to.setdefault(r.case, []):
            to[r.case].append(r.to)
    said = [f"{case}: difference to {names[0]}" + ", an agent's to its own" * (len(names) > 1) for case, names in to.items()]
    return narrow_table(title, heads, cells, "; ".join(said))


def write_pooled(rows: list[Pooled], path) -> Path:
    """Writes a CSV file with a line per row, and returns its path."""
    shown = lambda x: f"{x:.4f}" if isinstance(x, float) else " ".join(map(shown, x)) if isinstance(x, list) else x
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
            axes.plot([100 * x for x in r.by_seed], [i] * len(r.by_seed), "k.", markersize=4)
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
