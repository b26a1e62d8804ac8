"""The plots of the stored rows: how many times faster, and how time and memory grow."""

from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np

from diffmas.benchmarks.measure import OURS
from diffmas.benchmarks.result import END_TO_END, SHAPE, Result, results

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["fit", "plot", "scores"]

BLUE, GREY, ORANGE = "#2f6fde", "#9aa3af", "#e07b39"
STYLE = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#888888",
    "figure.facecolor": "white", "savefig.facecolor": "white", "svg.hashsalt": "diffmas", "svg.fonttype": "path",
}  # fmt: skip


def fit(x, y) -> tuple[float, float]:
    """y = a * x^b, least squares in logarithms -> a, b."""
    b, a = np.polyfit(np.log(x), np.log(y), 1)
    return float(np.exp(a)), float(b)


def headline(rows: list[dict]):
    """Speed against the best peer and the plain way, one line per regime: the geometric mean, and each case as a dot."""
    groups = defaultdict(list)
    for r in results(rows):
        if r.whole and r.best:
            name = r.op.replace("_", " ") + ("" if r.regime == r.op.replace("_", " ") else f": {r.regime}")
            groups[f"{name}, {r.phase}" if r.op not in END_TO_END else name].append(r)
    figure, axes = plt.subplots(figsize=(8, 1.1 + 0.27 * len(groups)))
    looks = (("plain", ORANGE, 1.2, "the plain Hugging Face way"), ("best", BLUE, 3.5, "the best peer"))
    for y, group in enumerate(groups.values()):
        for attribute, colour, width, label in looks:
            ratios = [getattr(r, attribute)[1] for r in group if getattr(r, attribute)]
            if not ratios:
                continue
            mean = float(np.exp(np.mean(np.log(ratios))))
            axes.plot([1, mean], [y, y], color=colour, linewidth=width, alpha=0.45, zorder=1, solid_capstyle="butt")
            axes.scatter(ratios, [y] * len(ratios), s=13, color=colour, zorder=2, linewidths=0, label="" if y else label)
            if attribute == "best":
                side = -1 if mean >= 1 else 1  # of the line at 1, where no dots are
                where = dict(xytext=(5 * side, 0), textcoords="offset points", va="center", ha="right" if side < 0 else "left")
                axes.annotate(f"{mean:.2f}x", (1, y), fontsize=7, color=BLUE, **where)
    axes.set_yticks(range(len(groups)), groups)
    axes.invert_yaxis()
    axes.axvline(1, color="#555555", linewidth=1, zorder=0)
    axes.set_xscale("log")
    low, high = axes.get_xlim()
    axes.set_xlim(min(low, 0.6), high)
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200) if axes.get_xlim()[0] <= t <= high]
    axes.set_xticks(ticks, [f"{t:g}x" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("diffmas is this many times faster; a dot is a case, a line the geometric mean")
    axes.legend(frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1, 1), title="faster than")
    axes.set_axisbelow(True)
    axes.grid(axis="x", color="#e5e7eb")
    return figure


def growth(rows: list[dict]):
    """How a training step's time and memory grow with N, T and the number of agents, ours and the plain way's; or None."""
    steps = [r for r in results(rows) if r.op in ("training_step", "attention_schedule") and r.phase == "step" and r.plain]
    panels = []
    for op in ("training_step", "attention_schedule"):
        for axis in ("N", "T", "agents"):
            series = _series([r for r in steps if r.op == op], axis)
            if series:
                panels.append((op, axis, series))
    if not panels:
        return None
    figure, grid = plt.subplots(2, len(panels), figsize=(2.9 * len(panels), 5), squeeze=False, layout="constrained")
    for (op, axis, series), column in zip(panels, grid.T):
        _draw(column, series, axis)
        fixed = ", ".join(f"{k}={series[0].first[k]}" for k in ("N", "T", "agents") if k != axis)
        column[0].set_title(f"{op.replace('_', ' ')}\n{series[0].first['model']} {fixed}", fontsize=8)
        column[1].set_xlabel({"N": "trace rows N", "T": "latent steps T of an agent", "agents": "agents"}[axis])
    return figure


def story(rows: list[dict]):
    """Time and memory of a training step against N, for the README; or None."""
    steps = [r for r in results(rows) if r.op == "training_step" and r.phase == "step" and r.plain]
    series = _series(steps, "N")
    if not series:
        return None
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
    _draw(axes, series, "N")
    title = "a training step of {agents} agents, {layers} layers of {model} shape, T = {T}"
    figure.suptitle(title.format(**series[0].first), fontsize=9)
    for each in axes:
        each.set_xlabel("rows N of the trace")
    return figure


def _draw(two, series: list[Result], axis: str) -> None:
    """Seconds and peak memory along an axis, ours and the plain way's, on two axes."""
    for axes, field, scale, unit in zip(two, ("seconds", "peak_bytes"), (1, 1e-6), ("seconds", "peak MB")):
        for provider, colour in ((OURS, BLUE), ("DynamicCache", ORANGE)):
            points = [(r.first[axis], r.rows[provider][field] * scale) for r in series if r.rows[provider].get(field)]
            if not points:
                continue
            x, y = map(np.array, zip(*sorted(points)))
            label = provider
            if axis == "N" and len(x) > 1:
                a, b = fit(x, y)
                label = f"{provider}: N^{b:.2f}"
            elif len(x) > 1:
                slope = np.polyfit(x, y, 1)[0]
                label = f"{provider}: {slope:+.3g} each"
            axes.plot(x, y, "o-", color=colour, markersize=4, label=label)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(unit)
        axes.legend(frameon=False, fontsize=7)
        axes.grid(color="#e5e7eb")


def _series(steps: list[Result], axis: str) -> list[Result]:
    """The longest run of cases that differ in `axis` only."""
    groups = defaultdict(list)
    for r in steps:
        groups[tuple(r.first[k] for k in (*SHAPE, "regime") if k != axis)].append(r)
    longest = max(groups.values(), key=len, default=[])
    return sorted(longest, key=lambda r: r.first[axis]) if len(longest) > 1 else []


def plot(rows: list[dict], out: Path) -> dict[str, Path]:
    """Writes headline, growth and, for the README, story as PNG and SVG; -> the SVGs of the first two by name."""
    written = {}
    with plt.rc_context(STYLE):
        for name, draw in (("headline", headline), ("growth", growth), ("story", story)):
            figure = draw(rows)
            for suffix in ("png", "svg"):
                (out / f"{name}.{suffix}").unlink(missing_ok=True)
                if figure is not None:
                    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                    figure.savefig(out / f"{name}.{suffix}", dpi=160, bbox_inches="tight", metadata=metadata)
                    written[name] = out / f"{name}.svg"
            plt.close(figure)
    return {name: path for name, path in written.items() if name != "story"}


def scores(goals: list[tuple], target: Path) -> bool:
    """Writes a PNG: what was measured as a part of its goal, a bar each. goals: as goals.scorecard gives them; -> whether any
    has a number."""
    shown = [(share, f"{case}: {goal}") for share, case, goal, _ in goals if share]
    if not shown:
        return False
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(figsize=(10, 1 + 0.22 * len(shown)))
        parts, names = zip(*shown)
        axes.barh(range(len(shown)), parts, color=[BLUE if part >= 1 else ORANGE for part in parts], height=0.7)
        axes.set_yticks(range(len(shown)), names, fontsize=7)
        axes.set_ylim(-1, len(shown))
        axes.invert_yaxis()
        axes.axvline(1, color="#555555", linewidth=1)
        axes.set_xscale("log")
        axes.set_xlabel("measured / goal; 1 and more is met")
        figure.savefig(target, dpi=160, bbox_inches="tight", metadata={"Software": None})
        plt.close(figure)
    return True
