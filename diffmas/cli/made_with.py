"""What a result was made with: it names versions, commit and machine."""

import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["in_a_line", "made_with"]

PACKAGES = ("torch", "transformers", "peft", "diffmas")


@cache
def made_with() -> dict:
    """Versions, the commit if this file is part of a checkout, and the machine."""
    from diffmas.benchmarks.machine import cpu_name

    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "not installed"

    def git(*arguments) -> str | None:
        try:
            run = subprocess.run(
                ["git", "-C", str(Path(__file__).resolve().parent), *arguments], capture_output=True, text=True, check=False
            )  # fmt: skip
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    commit = git("rev-parse", "HEAD") if git("ls-files", "--error-unmatch", Path(__file__).name) else None
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += ", changed"
    return {"versions": versions, "commit": commit, "machine": cpu_name()}


def in_a_line(seed: int) -> str:
    """The same in short, for where people read it."""
    made = made_with()
    said = [f"{name} {number}" for name, number in made["versions"].items()]
    return ", ".join([*said, *([f"commit {made['commit']}"] if made["commit"] else []), f"seed {seed}"])
