"""From stored rows to what a person looks at: a line per case, the terminal's table, what falls short, plots, one HTML page.

Everything is drawn from the CSV: running it again on stored results gives the same.
"""

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffmas.benchmarks import store
from diffmas.benchmarks.measure import OURS
from diffmas.benchmarks.page import page
from diffmas.benchmarks.plots import plot
from diffmas.benchmarks.result import COLOUR, MARK, ratio_text, results, time_text

__all__ = ["line", "shortfalls", "table", "write"]


def line(rows: list[dict]) -> Text:
    """What the terminal shows of a case as soon as it is measured."""
    result = results(rows)[0]
    good, words = result.judgement
    best = f"{ratio_text(result.best[1])} of {result.best[0]}" if result.best else ""
    head = f"{result.op} · {result.regime} · {result.phase} · {result.shape}"
    left_out = {name: r for name, r in result.peers.items() if name.startswith(f"{OURS},")}
    own = "".join(f"  {name.removeprefix(f'{OURS}, ')} {ratio_text(r['ratio'])}" for name, r in left_out.items())
    time = time_text(result.ours.get("seconds"))
    rest = own if words == "ok" else f"{own}  {words}"
    return Text.assemble((MARK[good] + " ", COLOUR[good]), f"{head}  {time}  ", (best, "bold"), (rest, "dim"))


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
        best = Text(ratio_text(r.best[1]), COLOUR[good]) if r.best else ""
        out.add_row(
            case, Text(r.shape), time_text(r.ours.get("seconds")), f"{percent:.0f} %" if percent else "", best,
            ratio_text(r.plain and r.plain[1]), ratio_text(r.memory), Text(r.best[0] if r.best else words),
        )  # fmt: skip
    return out


def shortfalls(rows: list[dict]) -> list[str]:
    """What is below the bar, wrong, or short of its goal, one line each."""
    return [
        f"{MARK[r.judgement[0]]} {r.op} {r.regime}, {r.phase}, {r.shape}: {r.judgement[1]}"
        for r in results(rows)
        if r.whole and r.judgement[0] is not True
    ]


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
