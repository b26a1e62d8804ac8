"""Files that results go to: their directories are made."""

import csv
from collections.abc import Iterable
from pathlib import Path

__all__ = ["figure", "room_for", "side_by_side", "write_rows"]


def room_for(path) -> Path:
    """The path; its directory is there."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


def write_rows(rows: Iterable[dict], path) -> Path:
    """Writes a CSV file with a line per row, and returns its path. Columns: the rows' keys, in the order of appearance."""
    path, rows = room_for(path), list(rows)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return path


def figure(width: float, height: float):
    """A matplotlib figure of that many inches; pyplot would need a display and keep global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    return made


def side_by_side(axes, names: list[str], bars: dict[str, list[float]]) -> None:
    """Horizontal bars of several kinds, by label, for each name."""
    places, height = range(len(names)), 0.8 / len(bars)
    for i, (label, values) in enumerate(bars.items()):
        shift = (i - (len(bars) - 1) / 2) * height
        axes.barh([place + shift for place in places], values, height, label=label, alpha=0.8)
    axes.set(yticks=list(places), yticklabels=names)
