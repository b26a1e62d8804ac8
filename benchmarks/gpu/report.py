"""What a run on a GPU found out, for a person: tables on the terminal and as markdown, every goal beside its number, a plot."""

from collections import Counter, defaultdict
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from diffmas.benchmarks import report, store
from diffmas.benchmarks.goals import scorecard
from diffmas.benchmarks.gpu.record import Record
from diffmas.benchmarks.plots import scores
from diffmas.benchmarks.result import COLOUR, MARK, results, time_text

__all__ = ["write"]

Lines = list[tuple[bool | None, tuple[str, ...]]]  # (good, neither, bad; the cells)


def _facts(record: Record) -> Lines:
    known = {row["name"]: row["value"] for row in record.rows(kind="fact")}
    return [(None, (name, value)) for name, value in known.items()]


def _steps(record: Record) -> Lines:
    """The last end of every step, with its tests and rows."""
    lines = []
    for row in {row["step"]: row for row in record.rows(kind="end")}.values():
        tests = {t["test"]: t["outcome"] for t in record.rows(row["step"], "test")}
        found = [f"{n} {outcome}" for outcome, n in Counter(tests.values()).items()]
        measured = {r["case"] for r in record.rows(row["step"], "row") if r.get("seconds")}
        found += [f"{len(measured)} cases"] * bool(measured)
        lines.append((row["status"] == "ok", (row["step"], row["status"], f"{row['seconds']:.0f} s", ", ".join(found))))
    return lines


def _wrong(record: Record) -> Lines:
    """Tests that fail, providers that ended a process or gave a wrong result."""
    last = {(row["step"], row["test"]): row for row in record.rows(kind="test")}.values()
    lines = [(False, (row["test"], row["why"])) for row in last if row["outcome"] == "failed"]
    tried = {(row["case"], row["provider"]): row for kind in ("guilty", "row") for row in record.rows(kind=kind)}
    for (case, provider), row in tried.items():
        if row["kind"] == "guilty" or (row.get("why") or "").startswith(("wrong", "failed")):
            lines.append((False, (f"{case}: {provider}", row["why"])))
    return lines


def _tiles(record: Record) -> Lines:
    found = defaultdict(list)
    for row in record.rows(kind="row"):
        if "tile" in row:
            found[row["line"]].append((row["seconds"], row["tile"]))
    return [
        (None, (line, ", ".join(f"{'x'.join(map(str, tile))} {time_text(seconds)}" for seconds, tile in sorted(tiles))))
        for line, tiles in found.items()
    ]


def _markdown(title: str, head: tuple[str, ...], lines: Lines) -> str:
    cell = lambda text: text.replace("|", "\\|").replace("\n", " ")
    rows = [head, ("---",) * len(head), *((f"{MARK[good]} {cells[0]}", *cells[1:]) for good, cells in lines)]
    return f"## {title}\n\n" + "\n".join("| " + " | ".join(map(cell, row)) + " |" for row in rows) + "\n"


def _terminal(title: str, head: tuple[str, ...], lines: Lines) -> Table:
    table = Table(title=Text(title))
    for name in head:
        table.add_column(name, overflow="fold")
    for good, cells in lines:
        table.add_row(Text.assemble((MARK[good] + " ", COLOUR[good]), cells[0]), *map(Text, cells[1:]))
    return table


def write(record: Record, out: Path, console: Console) -> int:
    """Prints the tables; writes summary.md, goals.png, and results.csv with its plots and page. -> 1 where something is wrong
    or did not end well, else 0."""
    if not console.is_terminal:  # a file or a pipe has no width of its own
        console = Console(width=150)
    kept = store.Store(out / store.FILE, {})
    by_case = defaultdict(dict)
    for row in record.rows(kind="row"):
        if "op" in row:
            by_case[row["case"]][row["provider"], row["phase"]] = {k: row.get(k) for k in store.COLUMNS}
    for group in by_case.values():
        kept.add(list(group.values()))
    kept.finish()
    rows = store.read(out / store.FILE) if by_case else []
    goals = scorecard(results(rows), "cuda")
    lines = [(None if share is None else share >= 1, cells) for share, *cells in goals]
    wrong, steps = _wrong(record), _steps(record)
    tables = [
        ("Environment", ("what", "is"), _facts(record)),
        ("Tiles, the fastest first", ("kernel, query rows, head size", "BLOCK_M x BLOCK_N x warps x stages"), _tiles(record)),
        ("Goals", ("case", "goal", "measured"), lines),
        ("What is wrong", ("where", "why"), wrong),
        ("Steps", ("step", "status", "time", "found"), steps),
    ]
    text = ["# One run on a GPU\n"]
    if rows:
        report.write(out, console)
        if scores(goals, out / "goals.png"):
            text.append("![what was measured, as a part of each goal](goals.png)\n")
    for title, head, content in tables:
        if content:
            console.print(_terminal(title, head, content))
            text.append(_markdown(title, head, content))
    (out / "summary.md").write_text("\n".join(text), encoding="utf-8")
    console.print(str(out / "summary.md"), markup=False, highlight=False, soft_wrap=True)
    return int(bool(wrong) or not all(good for good, _ in steps))
