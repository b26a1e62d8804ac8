"""Rows of the CSV by case: our row and the peers', the best peer, the plain way, and whether it is good enough."""

from collections import defaultdict

from diffmas.benchmarks.goals import BAR, goals_of
from diffmas.benchmarks.measure import OURS, Case

__all__ = ["COLOUR", "END_TO_END", "MARK", "SHAPE", "Result", "bytes_text", "ratio_text", "results", "time_text"]

SHAPE = ("N", "n", "batch", "heads", "D", "T", "agents", "model", "layers", "dtype")
ORDER = ("training_step", "attention_schedule", "generation", "latent_step", "cross_attention", "inject")  # as they are shown
END_TO_END = ("latent_step", "training_step", "generation")
PLAIN = ("DynamicCache", "cat + sdpa", "eager + cat")  # what most people run today
DISTURBED = 1.2  # the canary's time / its best
MARK = {True: "✓", None: "·", False: "✗"}
COLOUR = {True: "green", None: "yellow", False: "red"}


class Result:
    """One case (or one part of an end-to-end case): our row, and all rows by provider."""

    def __init__(self, rows: list[dict]):
        self.rows = {r["provider"]: r for r in rows}
        first = rows[0]
        self.op, self.regime, self.phase, self.note = (first[k] for k in ("op", "regime", "phase", "note"))
        self.first, self.ours = first, self.rows.get(OURS, {})
        self.peers = {name: r for name, r in self.rows.items() if name != OURS and r.get("ratio")}
        parts = first["phase"] not in ("forward", "step") and self.op != "decoding"
        self.whole = not first["model"] or not parts  # not a part of another row

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
        good, words = self._verdict()
        if good is not True and (self.ours.get("canary") or 1) > DISTURBED:
            words += f"; the machine was disturbed, its canary took {self.ours['canary']:.2f}x of its best time"
        return good, words

    def _verdict(self) -> tuple[bool | None, str]:
        if not self.ours.get("seconds"):
            return False, self.ours.get("why") or "no result"
        if self.best is None:
            return None, "no peer"
        met, missed = goals_of(self)
        if self.best[1] < BAR:
            return False, f"below {BAR}x of {self.best[0]}: {ratio_text(self.best[1])}"
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


def time_text(seconds: float | None) -> str:
    return _scaled(seconds, (("s", 1), ("ms", 1e-3), ("µs", 1e-6)))


def bytes_text(n: float | None) -> str:
    return _scaled(n, (("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1)))


def ratio_text(ratio: float | None) -> str:
    return f"{ratio:,.{2 if ratio < 100 else 0}f}x" if ratio else ""
