"""`diffmas bench --compare REV`: another commit's library against this source tree's, on the cases of this suite.

REV is checked out and built in a temporary worktree; each of the two runs in a process of its own, and they take samples in
turns, so that a noisy machine disturbs both alike.
"""

import contextlib
import csv
import importlib
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from diffmas.benchmarks.measure import NOISE, drowned
from diffmas.benchmarks.result import results
from diffmas.benchmarks.run import HERE, modules, selected

__all__ = ["compare", "failed"]


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=HERE.parent, capture_output=True, text=True)


@contextlib.contextmanager
def worktree(rev: str, console: Console) -> Iterator[Path]:
    """A built checkout of `rev` whose suite is this one. ValueError for no such commit and for one that does not build."""
    if not (HERE.parent / ".git").exists():  # an installed package may lie inside somebody else's repository
        raise ValueError(f"--compare: expected a checkout of diffmas, found none at {HERE.parent}")
    found = _git("rev-parse", "--verify", "--quiet", rev + "^{commit}")
    if found.returncode:
        raise ValueError(f"--compare: expected a commit, branch or tag of the checkout at {HERE.parent}, got {rev!r}")
    with tempfile.TemporaryDirectory(prefix="diffmas-compare-") as parent:
        root = Path(parent) / "source"
        added = _git("worktree", "add", "--detach", str(root), found.stdout.strip())
        try:
            if added.returncode:
                raise ValueError(f"--compare: git worktree: {added.stderr.strip()[-300:]}")
            with console.status(Text(f"building {rev}")):
                command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
                built = subprocess.run(command, cwd=root, capture_output=True, text=True)
            info = root / "diffmas" / "build_info.json"
            error = json.loads(info.read_text())["error"] if info.exists() else built.stderr.strip()[-300:]
            if built.returncode or error:
                raise ValueError(f"--compare: {rev} does not build: {error}")
            suite = root / "diffmas" / "benchmarks"
            suite.unlink(missing_ok=True)
            suite.symlink_to(HERE)
            yield root
        finally:
            _git("worktree", "remove", "--force", str(root))


class Worker:
    """One commit's process."""

    def __init__(self, root: Path, threads: int):
        command = [sys.executable, "-m", "diffmas.benchmarks.worker", str(threads)]
        self.process = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **command) -> dict:
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            raise ValueError(f"--compare: the process that measured ended with exit code {self.process.wait()}") from None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()


def _round(old: Worker, new: Worker, turn: int) -> tuple[float, float]:
    """A sample of each; who is first changes from turn to turn."""
    order = (old, new) if turn % 2 else (new, old)
    seconds = {worker: worker.ask(sample=True)["seconds"] for worker in order}
    return seconds[old], seconds[new]


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, ("case", "rev", "rev_seconds", "seconds", "times_faster", "rev_why", "why"))
        writer.writeheader()
        writer.writerows(rows)


def compare(
    rev: str, quick: bool, only: str, threads: int, max_rounds: int, console: Console, out: Path | None = None
) -> list[dict]:
    """Prints the table, writes its rows to out/compare.csv if asked for; returns them. ValueError for what the user gave."""
    cases = []
    for path in modules():
        module = importlib.import_module(f"diffmas.benchmarks.{path.stem}")
        cases += [(path.stem, case) for case in selected(module, quick, only)]
    if not cases:
        raise ValueError(f"--only: expected a text that is in a module's name or a case's, got {only!r}")
    title = Text(f"diffmas: this tree against {rev}")
    table = Table("case", "shape", "phase", escape(rev), "this tree", "times faster", title=title)
    rows = []
    with worktree(rev, console) as root, Worker(root, threads) as old, Worker(HERE.parent, threads) as new:
        for name, case in cases:
            with console.status(Text(case.key)):
                answers = [w.ask(prepare=[name, case.key], seconds=0.4 if quick else 1.5) for w in (old, new)]
                shown = results([case.columns() | {"provider": ""}])[0].shape
                head = f"{case.op} {case.regime}", shown, case.phase
                whys = [answer.get("why", "") for answer in answers]
                rows.append({"case": case.key, "rev": rev, "rev_why": whys[0], "why": whys[1]})
                if any(whys):
                    table.add_row(*head, *map(Text, whys), "")
                    continue
                rounds = min(max_rounds, *(answer["rounds"] for answer in answers))
                pairs = [_round(old, new, turn) for turn in range(rounds)]
            if any(map(drowned, zip(*pairs))):
                rows[-1]["rev_why"] = NOISE
                table.add_row(*head, "", Text(NOISE), "")
                continue
            before, after = (statistics.median(side) for side in zip(*pairs))
            ratio = statistics.median(a / b for a, b in pairs)
            colour = "green" if ratio > 1.03 else "red" if ratio < 0.97 else "default"
            table.add_row(*head, f"{before * 1e3:.3g} ms", f"{after * 1e3:.3g} ms", f"[{colour}]{ratio:.2f}x[/]")
            rows[-1] |= {"rev_seconds": before, "seconds": after, "times_faster": ratio}
            console.print(f"{case.key}  {ratio:.2f}x", markup=False, highlight=False)
    console.print(table)
    if out:
        _write(out / "compare.csv", rows)
    return rows


def failed(rows: list[dict]) -> bool:
    """Whether a case failed in this tree, or none was compared."""
    return any(row["why"] for row in rows) or not any("seconds" in row for row in rows)
