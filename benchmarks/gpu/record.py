"""What a run on a GPU finds out, as JSON lines that several processes append: a row is on disk as soon as it is known."""

import json
import os
from pathlib import Path

__all__ = ["Record"]


class Record:
    """The rows of out/rows.jsonl.

    Each has a `step`, the `run` that it is of (a folder may have seen several), and a `kind`: fact | machine | test | row, the
    results; began, before a case or one of its providers is tried; guilty, the one that was being tried when a process
    ended; end, of a step.
    """

    def __init__(self, out: Path, run: int = 0):
        self.path, self.run = out / "rows.jsonl", run

    def add(self, step: str, kind: str, **values) -> None:
        line = json.dumps({"run": self.run, "step": step, "kind": kind, **values}) + "\n"
        file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        try:
            os.write(file, line.encode())  # at once, so that lines of two processes do not mix
            os.fsync(file)
        finally:
            os.close(file)

    def rows(self, step: str | None = None, kind: str | None = None) -> list[dict]:
        """Without a line that was cut off when its process ended."""
        if not self.path.exists():
            return []
        found = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if step in (None, row["step"]) and kind in (None, row["kind"]):
                found.append(row)
        return found

    def finished(self) -> set[str]:
        """Steps that once came to a good end."""
        return {row["step"] for row in self.rows(kind="end") if row["status"] == "ok"}

    def _spoiled(self, step: str) -> set[tuple[int, str]]:
        """Runs and cases in which something of ours failed, or anything ended a process."""
        rows = [row for row in self.rows(step) if row["kind"] in ("row", "guilty")]
        bad = lambda row: row["provider"].startswith("diffmas") and (row.get("why") or "").startswith(("wrong", "failed"))
        return {(row["run"], row["case"]) for row in rows if row["kind"] == "guilty" or bad(row)}

    def known(self, step: str) -> set[str]:
        """Cases with results, of this run or a whole earlier one."""
        spoiled = {(run, case) for run, case in self._spoiled(step) if run != self.run}
        return {row["case"] for row in self.rows(step, "row") if (row["run"], row["case"]) not in spoiled}

    def spoiled(self, step: str) -> bool:
        return any(run == self.run for run, _ in self._spoiled(step))

    def blame(self, step: str, why: str) -> bool:
        """Writes down what was being tried in this run when the step's process ended; -> whether there is such a case."""
        pending = {}
        for row in self.rows(step):
            if row["run"] != self.run or "case" not in row:
                continue
            if row["kind"] == "began":
                pending[row["case"]] = row["provider"]
            else:
                pending.pop(row["case"], None)
        for case, provider in pending.items():
            self.add(step, "guilty", case=case, provider=provider, why=why)
        return bool(pending)

    def guilty(self, step: str) -> dict[str, dict[str, str]]:
        """By case, who ended a process in this run, and how."""
        found: dict[str, dict[str, str]] = {}
        for row in self.rows(step, "guilty"):
            if row["run"] == self.run:
                found.setdefault(row["case"], {})[row["provider"]] = row["why"]
        return found
