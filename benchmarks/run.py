"""What `diffmas bench` does: pytest on the suite's modules, then table, plots and page from the CSV."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console

from diffmas.benchmarks import report, store

__all__ = ["HERE", "default_out", "modules", "rows", "run", "selected", "write_report"]

HERE = Path(__file__).resolve().parent  # one name for every file: diffmas/benchmarks is a symlink in a checkout


def modules() -> list[Path]:
    return sorted(HERE.glob("bench_*.py"))


def selected(module, quick: bool, only: str) -> list:
    """A module's cases: those of --quick if asked for, whose module name or key contains `only`. Those that take minutes, in a
    module's LONG, are measured where `only` names their regime, or one of them by its key."""
    name = module.__name__.rsplit(".", 1)[-1]
    found = [c for c in module.CASES if (c.quick or not quick) and (only in name or only in c.key)]
    return found + [c for c in getattr(module, "LONG", ()) if not quick and only and (only in c.regime or only == c.key)]


def default_out(quick: bool) -> Path:
    """Results of a full run in a checkout are kept with the suite, others under runs/."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    kept = HERE / "results"
    return kept / device if kept.is_dir() and not quick else Path("runs/bench") / device


def run(out: Path, quick: bool, only: str, threads: int, max_rounds: int, console: Console, missing: bool = False) -> int:
    """Measures, reports; -> pytest's exit status. ValueError for no such case, or without pytest-benchmark."""
    if find_spec("pytest_benchmark") is None or find_spec("pytest") is None:
        raise ValueError('diffmas bench needs pytest-benchmark: pip install "diffmas[test]"')
    import pytest

    names = [path.stem.removeprefix("bench_") for path in modules()]
    if not any(selected(import_module(f"diffmas.benchmarks.bench_{name}"), quick, only) for name in names):
        raise ValueError(f"--only: expected a text that is in a module's name ({', '.join(names)}) or a case's, got {only!r}")
    options = [f"--only={only}", f"--out={out}", f"--threads={threads}", f"--max-rounds={max_rounds}"]
    # The suite's own lines replace pytest's; -s, or they would be captured. It runs from site-packages as well.
    plain = ["-s", "-p", "no:terminal", "-p", "no:cacheprovider", "--import-mode=importlib", f"--rootdir={HERE}"]
    status = pytest.main(
        [*map(str, modules()), *plain, *options, *(["--quick"] if quick else []), *(["--missing"] if missing else [])]
    )
    if status == pytest.ExitCode.NO_TESTS_COLLECTED:
        console.print("no case is missing")
        return 0
    if status not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        on = ": the same command goes on" if missing else ".part: the same command starts again; with --missing it goes on"
        line = f"not finished: earlier results stay, this run's are in {out / store.FILE}{on}"
        console.print(line, markup=False, soft_wrap=True)
    elif (out / store.FILE).exists():
        write_report(out, console)
    return int(status)


def rows(out: Path) -> list[dict]:
    """All that is stored, with the values' own types."""
    return store.read(out / store.FILE) if (out / store.FILE).exists() else []


def write_report(out: Path, console: Console) -> None:
    target = report.write(out, console)
    for path in (out / store.FILE, target):
        console.print(str(path), markup=False, highlight=False, soft_wrap=True)
