"""From stored rows to what a person looks at: a line per case, the terminal table, plots, one self-contained HTML page.

Everything is drawn from the CSV: running it again on stored results gives the same.
"""

import base64
import html
import json
from collections import defaultdict
from pathlib import Path

import matplotlib
import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffmas.benchmarks import store
from diffmas.benchmarks.goals import BAR, goals_of
from diffmas.benchmarks.measure import OURS, Case

matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402

__all__ = ["Result", "fit", "line", "results", "shortfalls", "table", "write"]

SHAPE = ("N", "n", "batch", "heads", "D", "T", "agents", "model", "layers", "dtype")
ORDER = ("training_step", "attention_schedule", "generation", "latent_step", "cross_attention", "inject")  # as they are shown
END_TO_END = ("latent_step", "training_step", "generation")
PLAIN = ("DynamicCache", "cat + sdpa", "eager + cat")  # what most people run today


# ---- rows to results -------------------------------------------------------------------------------------------------


class Result:
    """One case (or one part of an end-to-end case): our row, and all rows by provider."""

    def __init__(self, rows: list[dict]):
        self.rows = {r["provider"]: r for r in rows}
        first = rows[0]
        self.op, self.regime, self.phase, self.note = (first[k] for k in ("op", "regime", "phase", "note"))
        self.first, self.ours = first, self.rows.get(OURS, {})
        self.peers = {name: r for name, r in self.rows.items() if name != OURS and r.get("ratio")}
        self.whole = not first["model"] or first["phase"] in ("forward", "step")  # not a part of another row

    @property
    def shape(self) -> str:
        default = {"batch": 1, "dtype": "float32", "D": 128}
        if self.first["model"]:  # has its own heads
            default |= {"heads": self.first["heads"], "D": self.first["D"]}
        shown = [(k, self.first[k]) for k in SHAPE if self.first[k] and self.first[k] != default.get(k)]
        return " ".join(str(v) if k in ("dtype", "heads") else f"{k}={v}" for k, v in shown)

    @property
    def best(self) -> tuple[str, float] | None:
        """The fastest peer and its time / ours; another way of our own is none."""
        others = ((n, r["ratio"]) for n, r in self.peers.items() if not n.startswith(f"{OURS},"))
        return min(others, key=lambda x: x[1], default=None)

    @property
    def plain(self) -> tuple[str, float] | None:
        """The way most people run today and its time / ours."""
        return next(((n, self.peers[n]["ratio"]) for n in PLAIN if n in self.peers), None)

    @property
    def memory(self) -> float | None:
        """The plain way's peak bytes / ours."""
        row = next((self.peers[n] for n in PLAIN if n in self.peers), None)
        if row is None or not row.get("peak_bytes") or not self.ours.get("peak_bytes"):
            return None
        return row["peak_bytes"] / self.ours["peak_bytes"]

    @property
    def judgement(self) -> tuple[bool | None, str]:
        """Whether it is as fast as the bar asks, and in words."""
        if not self.ours.get("seconds"):
            return False, self.ours.get("why") or "no result"
        if self.best is None:
            return None, "no peer"
        met, missed = goals_of(self)
        if self.best[1] < BAR:
            return False, f"below {BAR}x of {self.best[0]}: {_times(self.best[1])}"
        wrong = [name for name, row in self.rows.items() if (row.get("why") or "").startswith(("wrong", "failed"))]
        if wrong:
            return None, f"no number for {', '.join(wrong)}: {self.rows[wrong[0]]['why']}"
        if missed:
            return None, f"goal missed: {'; '.join(missed)}"
        return True, f"goal met: {'; '.join(met)}" if met else "ok"


def results(rows: list[dict]) -> list[Result]:
    """Rows grouped by case: whole systems first, then ops, each in the order of the rows."""
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[k] for k in Case("", "").columns())].append(row)
    place = lambda r: ORDER.index(r.op) if r.op in ORDER else len(ORDER)
    return sorted((Result(group) for group in groups.values()), key=place)


def _scaled(value: float | None, units) -> str:
    """In the largest unit that leaves at least 1 of it."""
    if not value:
        return ""
    unit, scale = next(((u, s) for u, s in units if value >= s), units[-1])
    return f"{value / scale:.3g} {unit}"


def _time(seconds: float | None) -> str:
    return _scaled(seconds, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)))


def _bytes(n: float | None) -> str:
    return _scaled(n, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def _times(ratio: float | None) -> str:
    return f"{ratio:,.{2 if ratio < 100 else 0}f}x" if ratio else ""


MARK = {True: "✓", None: "·", False: "✗"}
COLOUR = {True: "green", None: "yellow", False: "red"}


def line(rows: list[dict]) -> Text:
    """What the terminal shows of a case as soon as it is measured."""
    result = results(rows)[0]
    good, words = result.judgement
    best = f"{_times(result.best[1])} of {result.best[0]}" if result.best else ""
    head = f"{result.op} · {result.regime} · {result.phase} · {result.shape}"
    return Text.assemble((MARK[good] + " ", COLOUR[good]), f"{head}  {_time(result.ours.get('seconds'))}  ", (best, "bold"),
                         ("" if words == "ok" else f"  {words}", "dim"))  # fmt: skip


def table(rows: list[dict], title: str) -> Table:
    """The terminal's table: one line per case, a section per op."""
    caption = (
        "best, plain: time of the best peer and of the plain Hugging Face way / ours, medians of interleaved rounds; "
        "memory: the plain way's peak / ours. Above 1, diffmas is ahead."
    )
    out = Table(title=Text(title), caption=caption)
    for name in ("case", "shape", "time", "roofline", "best", "plain", "memory"):
        out.add_column(name, justify="left" if name in ("case", "shape") else "right", overflow="fold")
    out.add_column("best peer", overflow="fold")
    before = None
    for r in results(rows):
        if not r.whole:
            continue
        if r.op != before:
            out.add_section()
            out.add_row(Text(r.op, "bold"))
            before = r.op
        good, words = r.judgement
        percent = r.ours.get("roofline_percent")
        case = Text.assemble((MARK[good] + " ", COLOUR[good]), f"{r.regime}, {r.phase}")
        best = Text(_times(r.best[1]), COLOUR[good]) if r.best else ""
        out.add_row(
            case, Text(r.shape), _time(r.ours.get("seconds")), f"{percent:.0f} %" if percent else "", best,
            _times(r.plain and r.plain[1]), _times(r.memory), Text(r.best[0] if r.best else words),
        )  # fmt: skip
    return out


def shortfalls(rows: list[dict]) -> list[str]:
    """What is below the bar, wrong, or short of its goal, one line each."""
    return [
        f"{MARK[r.judgement[0]]} {r.op} {r.regime}, {r.phase}, {r.shape}: {r.judgement[1]}"
        for r in results(rows)
        if r.whole and r.judgement[0] is not True
    ]


# ---- plots -----------------------------------------------------------------------------------------------------------

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
        for axes, field, scale, unit in zip(column, ("seconds", "peak_bytes"), (1, 1e-6), ("seconds", "peak MB")):
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
        fixed = ", ".join(f"{k}={series[0].first[k]}" for k in ("N", "T", "agents") if k != axis)
        column[0].set_title(f"{op.replace('_', ' ')}\n{series[0].first['model']} {fixed}", fontsize=8)
        column[1].set_xlabel({"N": "trace rows N", "T": "latent steps T of an agent", "agents": "agents"}[axis])
    return figure


def _series(steps: list[Result], axis: str) -> list[Result]:
    """The longest run of cases that differ in `axis` only."""
    groups = defaultdict(list)
    for r in steps:
        groups[tuple(r.first[k] for k in (*SHAPE, "regime") if k != axis)].append(r)
    longest = max(groups.values(), key=len, default=[])
    return sorted(longest, key=lambda r: r.first[axis]) if len(longest) > 1 else []


def plot(rows: list[dict], out: Path) -> dict[str, Path]:
    """Writes headline and growth as PNG and SVG; -> the SVGs by name."""
    written = {}
    with plt.rc_context(STYLE):
        for name, draw in (("headline", headline), ("growth", growth)):
            figure = draw(rows)
            for suffix in ("png", "svg"):
                (out / f"{name}.{suffix}").unlink(missing_ok=True)
                if figure is not None:
                    metadata = {"Date": None} if suffix == "svg" else {"Software": None}
                    figure.savefig(out / f"{name}.{suffix}", dpi=160, bbox_inches="tight", metadata=metadata)
                    written[name] = out / f"{name}.svg"
            plt.close(figure)
    return written


# ---- the page --------------------------------------------------------------------------------------------------------


def page(rows: list[dict], plots: dict[str, Path]) -> str:
    """One HTML file that needs nothing else: images as data, sortable and filterable tables."""
    template = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
    images = "".join(
        f'<figure><img alt="{name}" src="data:image/svg+xml;base64,{base64.b64encode(path.read_bytes()).decode()}"></figure>'
        for name, path in plots.items()
    )
    done = results(rows)
    whole = [r for r in done if r.whole]
    compared = [r for r in whole if r.best]
    ahead = sum(r.best[1] >= 1 for r in compared)
    behind = [r for r in whole if r.judgement[0] is False]
    counts = {
        "cases": str(len(whole)), "faster than every peer": f"{ahead} of {len(compared)}",
        f"below {BAR}x or failed": str(len(behind)), "rows in the CSV": str(len(rows)),
    }  # fmt: skip
    facts = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in counts.items())
    head = (
        "op",
        "regime",
        "phase",
        "shape",
        "diffmas",
        "% of roofline",
        "best peer",
        "ratio",
        "plain way",
        "memory",
        "verdict",
    )
    body = [_cells(r) for r in whole]
    parts = [_cells(r) for r in done if not r.whole]
    every = [_provider_cells(r, row) for r in done for row in r.rows.values()]
    wide = (
        "op",
        "regime",
        "phase",
        "shape",
        "provider",
        "time",
        "spread",
        "ratio",
        "peak memory",
        "% of roofline",
        "error",
        "note",
    )
    return (
        template.replace("{{machine}}", _machine(rows[0]))
        .replace("{{facts}}", facts)
        .replace("{{images}}", images)
        .replace("{{cases}}", _html_table(head, body))
        .replace("{{parts}}", _html_table(head, parts))
        .replace("{{rows}}", _html_table(wide, every))
        .replace("{{bar}}", str(BAR))
        .replace("{{sample}}", json.dumps(rows[0]["commit"])[1:-1])
    )


def _machine(row: dict) -> str:
    giga = lambda name: f"{row[name] / 1e9:.3g}"
    facts = (
        ("machine", row["machine"]), ("threads", row["threads"]), ("last-level cache", _bytes(row["cache_bytes"])),
        ("read, measured", f"{giga('read')} GB/s ({giga('read_cached')} in cache)"),
        ("copy, measured", f"{giga('copy')} GB/s ({giga('copy_cached')} in cache)"),
        ("matmul, measured", f"{giga('matmul')} GFLOP/s float32, {giga('matmul_16bit')} bfloat16"),
        ("versions", f"torch {row['torch']}, transformers {row['transformers']}, diffmas {row['diffmas']}"),
        ("commit", row["commit"]), ("date", row["date"]),
    )  # fmt: skip
    return "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(str(v))}</dd>" for k, v in facts)


def _cells(r: Result) -> list[tuple[str, object, str]]:
    """(text, sort key, class) of each cell."""
    good, words = r.judgement
    percent = r.ours.get("roofline_percent")
    best, plain = r.best or ("", None), r.plain or ("", None)
    seconds, shape = r.ours.get("seconds"), r.shape + (f" ({r.note})" if r.note else "")
    return [
        (r.op, r.op, ""), (r.regime, r.regime, ""), (r.phase, r.phase, ""), (shape, shape, "shape"),
        (_time(seconds), seconds or 0, "number"), (f"{percent:.0f}" if percent else "", percent or 0, "number"),
        (best[0], best[0], ""), (_times(best[1]), best[1] or 0, f"number {COLOUR[good]}"),
        (_times(plain[1]), plain[1] or 0, "number"), (_times(r.memory), r.memory or 0, "number"),
        (f"{MARK[good]} {words}", words, COLOUR[good]),
    ]  # fmt: skip


def _provider_cells(r: Result, row: dict) -> list[tuple[str, object, str]]:
    spread, percent, wrong = row.get("spread"), row.get("roofline_percent"), row.get("error")
    return [
        (r.op, r.op, ""), (r.regime, r.regime, ""), (r.phase, r.phase, ""), (r.shape, r.shape, "shape"),
        (row["provider"], row["provider"], "ours" if row["provider"] == OURS else ""),
        (_time(row.get("seconds")), row.get("seconds") or 0, "number"),
        (f"±{100 * spread:.0f} %" if spread is not None else "", spread or 0, "number"),
        (_times(row.get("ratio")), row.get("ratio") or 0, "number"),
        (_bytes(row.get("peak_bytes")), row.get("peak_bytes") or 0, "number"),
        (f"{percent:.0f}" if percent else "", percent or 0, "number"),
        (f"{wrong:.0e}" if wrong is not None else "", wrong or 0, "number"),
        (row.get("why") or "", row.get("why") or "", ""),
    ]  # fmt: skip


def _html_table(head, body) -> str:
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    rows = "".join(
        "<tr>"
        + "".join(f'<td class="{c}" data-key="{html.escape(str(k))}">{html.escape(t)}</td>' for t, k, c in cells)
        + "</tr>"
        for cells in body
    )
    return f"<table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table>"


# ---- all of it -------------------------------------------------------------------------------------------------------


def write(out: Path, console: Console) -> Path:
    """Table, plots and page from out/results.csv; -> the page."""
    rows = store.read(out / store.FILE)
    if not rows:
        raise ValueError(f"{out / store.FILE}: expected rows, found none")
    first = rows[0]
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=150)
    console.print(table(rows, f"{first['machine']}, {first['threads']} thread(s), commit {first['commit']}"))
    for text in shortfalls(rows):
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    target = out / "index.html"
    target.write_text(page(rows, plot(rows, out)), encoding="utf-8")
    return target
