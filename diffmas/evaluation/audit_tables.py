"""What an audit found, as a table, a CSV file and a plot."""

from pathlib import Path

from rich.table import Table

from diffmas.evaluation.causal_audit import Condition, communicates
from diffmas.evaluation.files import figure, room_for, write_rows
from diffmas.evaluation.run import gap, narrow_table, percent

__all__ = ["audit_rows", "audit_table", "plot_audit", "verdict", "write_audit"]


def _name(c: Condition) -> str:
    return c.change if c.agent is None else f"{c.change}: {c.agent}"


def verdict(conditions: list[Condition]) -> str:
    """What the audit says, a line for the team and for each agent."""
    lines = []
    for c in conditions:
        if c.change == "other":
            who = c.agent or "the team"
            says = f"{who} communicates" if communicates(conditions, c.agent) else f"no evidence that {who} communicates"
            lines.append(f"{says} (own less other: {gap(c.gain)})")
    return "\n".join(lines)


def audit_table(conditions: list[Condition], title: str = "") -> Table:
    """The conditions as a rich table of at most 80 columns, with the verdict."""
    rows = []
    for c in conditions:
        saved = "" if c.saved is None else f"{c.saved.value:+.2f} [{c.saved.low:.2f}, {c.saved.high:.2f}]"
        rows.append([_name(c), percent(c.accuracy), gap(c.gain), f"{c.nll:.2f}", saved])
    heads = ("message", "right %", "own gains", "nats per answer", "own saves nats")
    return narrow_table(title, heads, rows, f"{len(conditions[0].scores)} questions\n{verdict(conditions)}")


def audit_rows(conditions: list[Condition]) -> list[dict]:
    """The numbers of each condition by name, as in the CSV file; those that do not apply are None."""
    rows = []
    for c in conditions:
        gain, saved = (
            dict(zip((name, f"{name}_low", f"{name}_high"), x or (None,) * 3))
            for name, x in (("gain", c.gain), ("saved", c.saved))
        )
        says = communicates(conditions, c.agent) if c.change == "other" else None
        head = {"message": c.change, "agent": c.agent, "questions": len(c.scores)}
        rows.append(
            {**head, "accuracy": c.accuracy, "low": c.low, "high": c.high, **gain, "nll": c.nll, **saved, "communicates": says}
        )
    return rows


def write_audit(conditions: list[Condition], path) -> Path:
    """Writes a CSV file with a line per condition, and returns its path."""
    return write_rows(audit_rows(conditions), path)


def plot_audit(conditions: list[Condition], path, title: str = "") -> Path:
    """Writes a PNG of accuracies and of what the own messages save, with intervals; returns its path."""
    path, names = room_for(path), [_name(c) for c in conditions]
    canvas = figure(10, 1.5 + 0.4 * len(names))
    left, right = canvas.subplots(1, 2, sharey=True)
    errors = [[100 * (c.accuracy - c.low) for c in conditions], [100 * (c.high - c.accuracy) for c in conditions]]
    left.barh(names, [100 * c.accuracy for c in conditions], xerr=errors, capsize=3, color="tab:blue", alpha=0.8)
    left.set(xlabel="accuracy, % (95 % interval)", xlim=(0, 100))
    left.invert_yaxis()
    for name, c in zip(names, conditions):
        if c.saved:
            value, low, high = c.saved
            right.errorbar(value, name, xerr=[[value - low], [high - value]], fmt="o", capsize=3, color="tab:orange")
    right.axvline(0, color="gray", linewidth=1)
    right.set(xlabel="nats per answer that the own messages save")
    canvas.suptitle(title or f"{len(conditions[0].scores)} questions")
    canvas.savefig(path, dpi=150)
    return path
