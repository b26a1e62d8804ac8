"""Which of the rows that an agent hands on a reader has.

A selection takes a view of one sequence and returns another one of some of the same rows: nothing is copied, and gradients
reach what is kept. The first rows of a view stay, whatever is selected: what all see, and the attention sinks.
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace

import numpy as np

from diffmas.trace.views import Heads, Segment, length_of, places, rows_of, without_first

__all__ = [
    "BUDGETED", "BY", "LEARNED", "MEASURED", "PLANNED", "QUESTION", "Score", "Select", "best", "check_by", "check_count",
    "lookup", "select_of", "selected", "within",
]  # fmt: skip

Row = list[Segment]
Score = Callable[[np.ndarray], np.ndarray]  # of rows of one view, in its order: how good each is
KINDS = ("prompt", "latent", "text")  # of the rows that an agent writes which is read
MEASURED = ("similarity", "attention")  # by a forward of the reader's prompt (diffmas.agents.scores)
LEARNED = "learned"  # by a weight of the edge (diffmas.agents.choice)
QUESTION = "question"  # what a learned choice may depend on beside the rows
BY = ("last", *MEASURED)
SPREAD = "every"  # of a budget: rows as far apart as it allows
BUDGETED = (*BY, *KINDS, SPREAD)


def _later(rows: np.ndarray) -> np.ndarray:
    return np.arange(len(rows), dtype=float)


def _span(rows: np.ndarray) -> np.ndarray:
    """As good as it gets for who asks how far a choice may reach: the first row and the last ones."""
    return np.concatenate(([np.inf], np.arange(1, len(rows)))) if len(rows) else np.zeros(0)


PLANNED: dict[str, Score] = dict.fromkeys((*MEASURED, LEARNED), _span)  # before anything has run


@dataclass(frozen=True)
class Select:
    """What a reader has of an agent's rows, one condition after the other.

    kind: prompt, latent or text, those of one kind alone. every: k, the last of these and every k-th before it. rows: at most
    so many of these, the best ones; by: last (those that were written last, the default), similarity, attention
    (`diffmas.agents.scores`) or learned (`diffmas.agents.choice`). of: of learned, "question" where the choice depends on the
    reader's prompt, too. temperature: of learned, how much noise training adds to its choice, 1 by default, 0 for none.
    layers: that see them; the others see the sinks alone (KVComm, arXiv 2510.03346).
    heads: the K/V heads of these layers that see them, or a list of such lists, one for each of `layers`; the other heads see
    the sinks alone.
    """

    kind: str | None = None
    every: int | None = None
    rows: int | None = None
    by: str | None = None
    of: str | None = None
    temperature: float | None = None
    layers: tuple[int, ...] | None = None
    heads: Heads | None = None

    def described(self) -> dict:
        """As plain data, without what is not said."""
        return {key: _plain(x) for key, x in asdict(self).items() if x is not None}

    @property
    def noise(self) -> float:
        """Of a choice that is learned, the temperature of its noise."""
        return 1.0 if self.temperature is None else self.temperature

    def highest(self, what: str) -> int:
        """The highest number of its layers or heads; -1 where all are meant."""
        numbers = getattr(self, what) or (-1,)
        return max(max(x) if isinstance(x, tuple) else x for x in numbers)


def _plain(x):
    return [_plain(y) for y in x] if isinstance(x, tuple) else x


def select_of(where: str, select) -> Select | None:
    """The selection that an edge names: None, a dict with fields of `Select`, or one of these. Raises ValueError that starts
    with `where` and names what does not fit."""
    if select is None:
        return None
    known = [f.name for f in fields(Select)]
    if not isinstance(select, (dict, Select)):
        raise ValueError(f"{where}: expected a dict with some of {known} or None, got {select!r}")
    if isinstance(select, dict):
        if unknown := [key for key in select if key not in known]:
            raise ValueError(f"{where}: expected some of {known}, got {unknown[0]!r}")
        select = Select(**select)
    if not select.described():
        raise ValueError(f"{where}: expected some of {known}, got none of them")
    if select.kind not in (None, *KINDS):
        raise ValueError(f"{where}: kind: expected one of {KINDS} or None, got {select.kind!r}")
    for name in ("every", "rows"):
        check_count(f"{where}: {name}", getattr(select, name))
    check_by(f"{where}: by", select.by, "rows", select.rows, (*BY, LEARNED))
    _check_of(f"{where}: of", select.of, select.by)
    _check_temperature(f"{where}: temperature", select.temperature, select.by)
    layers, heads = select.layers, select.heads
    order = range(len(layers)) if _several(layers) else ()
    if layers is not None:
        layers = _numbers(f"{where}: layers", layers, "layers")
        order = sorted(order, key=list(select.layers).__getitem__)
    if _several(heads) and isinstance(heads[0], (list, tuple)):
        if len(heads) != len(order):
            raise ValueError(
                f"{where}: heads: expected a list of numbers, or one for each of {len(order)} layers, got {heads!r}"
            )
        heads = tuple(_numbers(f"{where}: heads", heads[i], "K/V heads") for i in order)
    elif heads is not None:
        heads = _numbers(f"{where}: heads", heads, "K/V heads")
    return replace(select, layers=layers, heads=heads)


def _several(x) -> bool:
    return isinstance(x, (list, tuple)) and len(x) > 0


def _numbers(where: str, numbers, what: str) -> tuple[int, ...]:
    known = _several(numbers) and all(type(i) is int and i >= 0 for i in numbers)
    if not known or len(set(numbers)) < len(numbers):
        raise ValueError(f"{where}: expected numbers of {what}, from 0, at least one and each once, got {numbers!r}")
    return tuple(sorted(numbers))


def check_count(where: str, n) -> None:
    if n is not None and (isinstance(n, bool) or not isinstance(n, int) or n < 1):
        raise ValueError(f"{where}: expected an integer >= 1 or None, got {n!r}")


def _check_of(where: str, of, by: str | None) -> None:
    if of is not None and by != LEARNED:
        raise ValueError(f"{where}: expected None but with by={LEARNED!r}, got {of!r}")
    if of not in (None, QUESTION):
        raise ValueError(f"{where}: expected {QUESTION!r} or None, got {of!r}")


def _check_temperature(where: str, temperature, by: str | None) -> None:
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature is not None and by != LEARNED:
        raise ValueError(f"{where}: expected None but with by={LEARNED!r}, got {temperature!r}")
    if temperature is not None and not (number and 0 <= temperature < math.inf):
        raise ValueError(f"{where}: expected a number >= 0 or None, got {temperature!r}")


def check_by(where: str, by, name: str, count: int | None, known: tuple[str, ...] = BY) -> None:
    """by: how the best `count` rows are told, one of `known`. name: of `count`."""
    if by is not None and count is None:
        raise ValueError(f"{where}: expected None without {name}, got {by!r}")
    if by not in (None, *known):
        raise ValueError(f"{where}: expected one of {known} or None, got {by!r}")


def lookup(rows: np.ndarray, values: np.ndarray) -> Score:
    """values [n]: of distinct rows [n]."""
    order = np.argsort(rows)
    return lambda asked: values[order[np.searchsorted(rows, asked, sorter=order)]]


# ---- rows, of one sequence -------------------------------------------------------------------------------------------


def selected(row: Row, fixed: int, select: Select | None, scores: dict[str, Score]) -> Row:
    """The rows of a view, of which the first `fixed` stay. scores: by the measures that are known; where rows are to be chosen
    by another one, all stay that can be chosen."""
    if select is None:
        return row
    index = np.arange(length_of(row))
    if select.kind is not None:
        kinds = np.repeat([s.kind == select.kind for s in row], [s.length for s in row]).astype(bool)
        index = index[kinds | (index < fixed)]
    if select.every is not None:
        place = np.arange(len(index))  # counted from the last one
        index = index[(place[::-1] % select.every == 0) | (index < fixed)]
    row = places(row, index)
    row = row if select.rows is None else best(row, fixed, select.rows, select.by, scores)
    if select.layers is None and select.heads is None:
        return row
    first, rest = places(row, np.arange(fixed)), without_first(row, fixed)
    return first + [s._replace(layers=select.layers, heads=select.heads) for s in rest]


def best(row: Row, fixed: int, rows: int, by: str | None, scores: dict[str, Score]) -> Row:
    """The first `fixed` rows of a view, and of the others the best so many, in their order; of those that are as good as each
    other the last ones. by: one of BUDGETED. scores: as in `selected`."""
    index, others = np.arange(length_of(row)), length_of(row) - fixed
    if others <= rows:
        return row
    if by in KINDS:
        good = np.repeat([s.kind == by for s in row], [s.length for s in row])[fixed:]
    elif by == SPREAD:
        good = np.isin(np.arange(others), others - 1 - np.arange(rows) * others // rows)
    else:
        score = _later if by in (None, "last") else scores.get(by)
        if score is None:
            return row
        good = score(rows_of(row)[fixed:])
    best_last = np.argsort(good, kind="stable")
    return places(row, np.concatenate((index[:fixed], fixed + np.sort(best_last[-rows:]))))


def within(row: Row, sinks: int, max_rows: int | None, by: str | None, scores: dict[str, Score]) -> Row:
    """At most so many rows of a view: the first ones, `sinks`, and the best of the others."""
    return row if max_rows is None else best(row, sinks, max_rows - sinks, by, scores)
