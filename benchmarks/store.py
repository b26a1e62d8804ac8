"""The CSV of results, in long form: one row per case, phase and provider. Rows are written as they come."""

import csv
import subprocess
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch

from diffmas.benchmarks.machine import Machine
from diffmas.benchmarks.measure import OURS, Case

__all__ = ["COLUMNS", "Store", "commit", "measured", "read", "stamp"]

FILE = "results.csv"
TEXT = {"op", "regime", "phase", "heads", "dtype", "model", "note", "provider", "why", "device", "machine"}
TEXT |= {"torch", "transformers", "diffmas", "commit", "date"}
MEASURED = ("seconds", "ratio", "spread", "rounds", "peak_bytes", "roofline_percent", "error", "budget", "canary", "why")
MACHINE = ("read", "read_cached", "copy", "copy_cached", "matmul", "matmul_16bit")
STAMP = ("device", "machine", "threads", *MACHINE, "cache_bytes", "torch", "transformers", "diffmas", "commit", "date")
COLUMNS = (*Case("", "").columns(), "provider", *MEASURED, *STAMP)
YOUNGER = {"canary"}  # columns that rows measured earlier lack


def commit(root: Path | None = None) -> str:
    """The commit that the package's source stands at, with -dirty if it was changed; "unknown" outside of a checkout."""
    root = root or Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed package may lie inside somebody else's repository
        return "unknown"
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return run.stdout.strip() or "unknown"


def stamp(machine: Machine) -> dict:
    """What every row says about where it was measured."""
    facts = machine.describe()
    out = {"device": facts["device"], "machine": facts["name"]}
    out |= {name: facts[name] for name in ("threads", "cache_bytes", *MACHINE)}
    out |= {"torch": torch.__version__, "transformers": version("transformers"), "diffmas": version("diffmas")}
    return out | {"commit": commit(), "date": datetime.now(UTC).isoformat(timespec="seconds")}


class Store:
    """Rows as they come, in FILE.part, which takes FILE's place when the run is over: an interrupted one costs neither the
    earlier rows nor its own. keep: earlier rows stay, but those of the cases that are measured again.
    at_once: a case's rows take their place when it is done."""

    def __init__(self, path: Path, constants: dict, keep: bool = False, at_once: bool = False):
        self.at_once, self.path, self.part, self.constants = at_once, path, path.with_suffix(".csv.part"), constants
        self._rows: list[dict] = _raw(path) if keep and path.exists() else []
        self._measured: set[tuple] = set()

    def add(self, rows: list[dict]) -> list[dict]:
        """-> the rows with the constants."""
        rows = [self.constants | row for row in rows]
        written = [{k: f"{v:.6g}" if isinstance(v, float) else "" if v is None else str(v) for k, v in r.items()} for r in rows]
        again = {_case(row) for row in written} - self._measured
        self._measured |= again
        self._rows = [row for row in self._rows if _case(row) not in again] + written
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.part, "w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(self._rows)
        if self.at_once:
            self.finish()
        return rows

    def finish(self) -> None:
        if self.part.exists() and self._measured:
            self.part.replace(self.path)


def _case(row: dict) -> tuple:
    """Of a row as text. A part of an end-to-end case has a phase of its own, but belongs to it."""
    names = [name for name in Case("", "").columns() if name != "phase" or not row["model"]]
    return tuple(row.get(name) or "0" for name in names)


def measured(path: Path, case: Case, machine: str, threads: int) -> bool:
    """Whether a file has our time of a case, of this machine with as many threads; of whatever commit."""
    key = _case({name: str(value) for name, value in case.columns().items()})
    here = {"machine": machine, "threads": str(threads), "provider": OURS}
    of_here = [row for row in _raw(path) if here.items() <= row.items()] if path.exists() else []
    return any(_case(row) == key and row["seconds"] for row in of_here)


def _raw(path: Path) -> list[dict]:
    read(path)  # refuses what is not ours
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def read(path: Path) -> list[dict]:
    """Rows with numbers as numbers and empty cells as None (0 for a shape, "" for a text). ValueError for another file."""
    with open(path, newline="") as file:
        reader = csv.DictReader(file)
        missing = set(COLUMNS) - YOUNGER - set(reader.fieldnames or ())
        if missing:
            raise ValueError(f"{path}: expected the columns of `diffmas bench`, {sorted(missing)} are missing")
        return [{k: _value(k, v) for k, v in row.items()} for row in reader]


def _value(name: str, text: str):
    if name in TEXT:
        return text
    if not text:
        return 0 if name in Case.__dataclass_fields__ else None
    return int(text) if text.lstrip("-").isdigit() else float(text)
