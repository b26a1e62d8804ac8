"""What is known of a gradient: norms by agent, forward pass and layer, as data, table and plot."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.table import Table

__all__ = ["GradientReport", "PassGradient", "largest_group", "layer_groups", "norm_of", "segments_of", "worse"]


@dataclass
class PassGradient:
    """Norms of the gradient that one forward pass of an agent gets; zeros where it ran without gradients.

    kind: prompt | latent | text (a message) | answer (the last agent's prompt and answer, one pass). step: of the latent steps,
    from 1, and of a message, which is behind them; else 0.
    hidden: of dL/dh of the last hidden states. rows: of dL/d(K, V) of the rows that it wrote, by layer. parameters: of its part
    of the trainable parameters' gradient, by layer and then of what is in no layer; None where that was not measured.
    """

    agent: str
    kind: str
    step: int
    hidden: float = 0.0
    rows: list[float] = field(default_factory=list)
    parameters: list[float] | None = None

    @property
    def name(self) -> str:
        return f"latent step {self.step}" if self.kind == "latent" else self.kind

    def __str__(self):
        return f"{self.agent}, {self.name}"


@dataclass
class GradientReport:
    """The gradient of a batch's loss, by agent, forward pass and layer; made by `MultiAgentSystem.gradient_report`.

    loss: of the batch. passes: in the order in which they ran. agents: of each, the norms of its part of the trainable
    parameters' gradient; parameters: those of the whole gradient; by layer and then of what is in no layer.

        >>> report = system.gradient_report(["where is the key"], ["in the garden"])
        >>> str(report.worst), report.segments()["planner", "latent"] > 0
        ('...', True)
        >>> report.plot(directory / "gradients.png")
        PosixPath('...gradients.png')
    """

    loss: float
    passes: list[PassGradient]
    agents: dict[str, list[float]]
    parameters: list[float]

    @property
    def norm(self) -> float:
        """Of the gradient of all trainable parameters."""
        return norm_of(self.parameters)

    @property
    def groups(self) -> dict[str, slice]:
        return layer_groups(len(self.parameters) - 1)

    @property
    def worst(self) -> PassGradient:
        """The pass with the largest part of the parameters' gradient."""
        return max(self.passes, key=lambda p: worse(norm_of(p.parameters)))

    def segments(self) -> dict[tuple[str, str], float]:
        """Norm of dL/d(rows), by agent and kind, of all rows that the agent wrote as its prompt, latent steps or answer."""
        return segments_of(self.passes, lambda p: norm_of(p.rows))

    def table(self, title: str = "") -> Table:
        """As a rich table; after each norm, which layers have most of it."""
        out = Table(title=title or f"loss {self.loss:.4g}, gradient norm {self.norm:.3g}")
        for head in ("agent", "forward pass"):
            out.add_column(head, no_wrap=True)
        for head in ("dL/dh", "dL/d(rows)", "most in", "parameters", "most in"):
            out.add_column(head, justify="right")
        for name, whole in self.agents.items():
            for p in (p for p in self.passes if p.agent == name):
                out.add_row(
                    name, p.name, _short(p.hidden), _short(norm_of(p.rows)), self._most(p.rows),
                    _short(norm_of(p.parameters)), self._most(p.parameters),
                )  # fmt: skip
            rows = [norm_of(layer) for layer in zip(*(p.rows for p in self.passes if p.agent == name))]
            out.add_row(
                name, "all", "", _short(norm_of(rows)), self._most(rows), _short(norm_of(whole)), self._most(whole),
                style="bold", end_section=True,
            )  # fmt: skip
        return out

    def _most(self, norms: list[float]) -> str:
        name = largest_group(norms, self.groups)
        return name if norm_of(norms) else "-"

    def plot(self, path) -> Path:
        """Writes a PNG: every pass's norms by layer, of its rows and of its part of the parameters' gradient."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import LogNorm
        from matplotlib.figure import Figure

        path, layers = Path(path), len(self.parameters) - 1
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(13, 1.6 + 0.22 * len(self.passes)), layout="constrained")
        FigureCanvasAgg(figure)  # pyplot would need a display and keep global state
        axes = figure.subplots(1, 3, sharey=True, width_ratios=(1, 2, 2))
        places = range(len(self.passes))
        axes[0].plot([_shown(p.hidden) for p in self.passes], places, "o")
        axes[0].set(title="dL/dh, last hidden states", xscale="log" if any(p.hidden for p in self.passes) else "linear")
        axes[0].set_yticks(places, [str(p) for p in self.passes])
        axes[0].tick_params(axis="x", which="both", labelrotation=90, labelsize="small")
        axes[0].grid(axis="x", alpha=0.3)
        for axis, title, norms in (
            (axes[1], "dL/d(rows)", [p.rows for p in self.passes]),
            (axes[2], "parameters", [p.parameters[:layers] for p in self.passes]),
        ):
            shown = [[_shown(x) for x in row] for row in norms]
            found = [x for row in shown for x in row if x == x]
            scale = LogNorm(min(found), max(found)) if found and min(found) < max(found) else None
            image = axis.imshow(shown, aspect="auto", norm=scale, interpolation="nearest")  # the first pass on top
            axis.set(title=title, xlabel="layer", xticks=range(0, layers, max(1, layers // 10)))
            figure.colorbar(image, ax=axis)
        figure.suptitle(f"norms of the gradient; loss {self.loss:.4g}, all parameters {self.norm:.3g}")
        figure.savefig(path, dpi=150)
        return path

    def to_dict(self) -> dict:
        """Plain data, for JSON."""
        segments = [{"agent": a, "kind": k, "rows": norm} for (a, k), norm in self.segments().items()]
        return {"norm": self.norm, "segments": segments, **asdict(self)}


def _shown(norm: float) -> float:
    """On a logarithmic scale: NaN leaves a gap."""
    return norm if math.isfinite(norm) and norm > 0 else math.nan


def _short(norm: float) -> str:
    return f"{norm:.2e}" if norm else "0"


def worse(norm: float) -> float:
    """A key to find the largest norm by: NaN is worse than any number."""
    return math.inf if math.isnan(norm) else norm


def norm_of(norms: Iterable[float]) -> float:
    """The norm of parts that have these norms."""
    return math.hypot(*norms)


def layer_groups(layers: int, groups: int = 4) -> dict[str, slice]:
    """Neighbouring layers in groups of about one size, by name.

    >>> layer_groups(30, 3)
    {'layers 0-9': slice(0, 10, None), 'layers 10-19': slice(10, 20, None), 'layers 20-29': slice(20, 30, None)}
    """
    groups = min(groups, layers)
    ends = [round(layers * i / groups) for i in range(groups + 1)]
    name = lambda first, end: f"layer {first}" if end - first == 1 else f"layers {first}-{end - 1}"
    return {name(*span): slice(*span) for span in zip(ends, ends[1:])}


def largest_group(norms: list[float], groups: dict[str, slice]) -> str:
    """The group with the largest norm; norms: by layer, and perhaps of what is in no layer."""
    parts = {name: norm_of(norms[span]) for name, span in groups.items()}
    if len(norms) > max(span.stop for span in groups.values()):
        parts["outside of layers"] = norms[-1]
    return max(parts, key=lambda name: worse(parts[name]))


def segments_of(passes: list[PassGradient], norm: Callable[[PassGradient], float]) -> dict[tuple[str, str], float]:
    """A norm of all passes of an agent and kind together."""
    found: dict[tuple[str, str], list[float]] = {}
    for p in passes:
        found.setdefault((p.agent, p.kind), []).append(norm(p))
    return {segment: norm_of(norms) for segment, norms in found.items()}
