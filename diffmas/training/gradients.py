"""What a trainer does with gradients apart from taking steps: norms every n steps, to its log, a CSV file and a plot; and one
warning when they explode."""

import contextlib
import csv
import logging
from pathlib import Path

from torch import Tensor
from transformers import TrainerCallback

from diffmas.agents.gradient_report import PassGradient, layer_groups, norm_of, segments_of
from diffmas.agents.gradients import GradientWatch, layers_of_parameters
from diffmas.agents.system import MultiAgentSystem
from diffmas.models.parts import attention_layers
from diffmas.models.patch import patch_of
from diffmas.training.explosion import Explosion, explain

__all__ = ["CSV", "PLOT", "GradientMonitor", "plot_gradients"]

logger = logging.getLogger(__name__)

CSV, PLOT = "gradients.csv", "gradients.png"
COLUMNS = ("step", "quantity", "agent", "kind", "latent_step", "layers", "norm")


class GradientMonitor(TrainerCallback):
    """What a `Trainer` does with gradients apart from taking steps; see there for report_steps and explosion_factor.

    Norms are those of an optimizer step's loss: of the sum over its micro-batches, and for rows and hidden states over this
    process's micro-batches.
    """

    def __init__(self, system: MultiAgentSystem, report_steps: int, explosion_factor: float | None):
        if isinstance(report_steps, bool) or not isinstance(report_steps, int) or report_steps < 0:
            raise ValueError(f"gradient_report_steps: expected an integer >= 0, got {report_steps!r}")
        self.system, self.report_steps, self.explosion_factor = system, report_steps, explosion_factor
        self.explosion = Explosion(explosion_factor)
        self.log = None  # of the trainer
        self.alone = True  # this process can run the model without the others
        self._body = patch_of(system.model).body
        self._layers = len(attention_layers(self._body))
        self._watch = GradientWatch(system)
        self._micro_batches: list[tuple] = []
        self._scalars: dict[str, float] = {}

    def without_gradients(self) -> None:
        """The engine keeps them to itself. Raises ValueError if norms of them were asked for."""
        if self.report_steps:
            raise ValueError(f"gradient_report_steps: expected 0 with DeepSpeed, got {self.report_steps}")
        self.explosion_factor = None

    @contextlib.contextmanager
    def running(self, directory: Path | None):
        """While a trainer runs; directory: for the files, None in a process that writes none."""
        self.explosion = Explosion(self.explosion_factor)
        try:
            yield
        finally:
            if self.report_steps and directory and (directory / CSV).is_file():
                plot_gradients(directory / CSV, directory / PLOT)

    @contextlib.contextmanager
    def micro_batch(self, step: int, batch: dict, num_items_in_batch):
        """Around a forward and backward of optimizer step `step`; batch: of `training.data.Collator`."""
        if self.explosion.factor is not None and self.alone:
            self._micro_batches.append((batch["questions"], batch["answers"], num_items_in_batch))
        with self._watch if self.reports(step) else contextlib.nullcontext():
            yield

    def reports(self, step: int) -> bool:
        return self.report_steps > 0 and step % self.report_steps == 0

    def needs_norms(self, step: int) -> bool:
        return self.explosion.factor is not None or self.reports(step)

    def before_step(self, step: int, parameters: list[Tensor], norms: list[float], scale: float, directory: Path | None):
        """parameters: those with a gradient, norms: of these. scale: of the losses that were watched."""
        micro_batches, self._micro_batches = self._micro_batches, []
        if self.reports(step):
            found = self._lines(parameters, norms, self._watch.take(scale))
            self._scalars = {_tag(line): line["norm"] for line in found if _is_logged(line)}
            if directory:
                _append(directory / CSV, [{"step": step, **line} for line in found])
        norm = norm_of(norms)
        times = self.explosion.times(norm)
        if times is not None and directory:
            logger.warning("step %d: %s", step, explain(self.system, norm, times, micro_batches, directory))

    def _lines(self, parameters: list[Tensor], norms: list[float], passes: list[PassGradient]) -> list[dict]:
        """Lines of the CSV file, without the step."""
        line = lambda quantity, norm, agent="", kind="", step="", layers="": dict(
            zip(COLUMNS[1:], (quantity, agent, kind, step, layers, norm))
        )
        groups = layer_groups(self._layers)
        by_layer: list[list[float]] = [[] for _ in range(self._layers + 1)]
        layer_of = layers_of_parameters(self._body)  # now: an engine may have put others in their place
        for p, norm in zip(parameters, norms):
            by_layer[layer_of.get(id(p), self._layers)].append(norm)
        by_layer = [norm_of(layer) for layer in by_layer]
        lines = [line("parameters", norm_of(by_layer))]
        lines += [line("parameters", norm_of(by_layer[span]), layers=name) for name, span in groups.items()]
        if by_layer[-1]:
            lines.append(line("parameters", by_layer[-1], layers="none"))
        lines += [line("rows", norm, *x) for x, norm in segments_of(passes, lambda p: norm_of(p.rows)).items()]
        lines += [line("hidden", norm, *x) for x, norm in segments_of(passes, lambda p: p.hidden).items()]
        for p in passes:
            lines.append(line("hidden", p.hidden, p.agent, p.kind, p.step))
            lines += [line("rows", norm_of(p.rows[span]), p.agent, p.kind, p.step, name) for name, span in groups.items()]
        return lines

    # ---- of transformers ---------------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **_) -> None:
        if self.report_steps and state.is_world_process_zero:
            _begin(Path(args.output_dir) / CSV, state.global_step)

    def on_step_end(self, args, state, control, **_) -> None:
        scalars, self._scalars = self._scalars, {}
        if scalars:
            due = control.should_log  # the loss and what belongs to it; a log takes it for done
            self.log(scalars)
            control.should_log = due


# ---- files -----------------------------------------------------------------------------------------------------------


def _is_logged(line: dict) -> bool:
    """Sums, and of each latent step what comes back through the next one; the file has all."""
    return line["latent_step"] == "" or line["quantity"] == "hidden" and line["kind"] == "latent"


def _tag(line: dict) -> str:
    step = f"step_{line['latent_step']}" if line["latent_step"] != "" else ""
    parts = (line["quantity"], line["agent"], line["kind"], line["layers"].replace(" ", "_"), step)
    return "/".join(("gradient", *filter(None, parts)))


def _read(path: Path) -> list[dict]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def _begin(path: Path, done: int) -> None:
    """A file without lines, or with those up to step `done` of the run that goes on."""
    earlier = [line for line in _read(path) if int(line["step"]) <= done] if done and path.is_file() else []
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writeheader()
    _append(path, earlier)


def _append(path: Path, lines: list[dict]) -> None:
    with path.open("a", newline="", encoding="utf-8") as file:
        csv.DictWriter(file, COLUMNS).writerows(lines)


def plot_gradients(csv_file, path) -> Path:
    """Writes a PNG of a run's gradients.csv: the norms by step, of parameters by layers, and of dL/d(rows) and dL/dh by agent;
    and those of the last step's dL/dh by latent step.

    Returns its path. Raises FileNotFoundError if there is no such file.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = {"parameters": {}, "rows": {}, "hidden": {}, "latent steps": {}}
    lines = _read(Path(csv_file))
    last = lines[-1]["step"] if lines else None

    def add(panel: str, name: str, at: str, norm: str) -> None:
        places, norms = panels[panel].setdefault(name, ([], []))
        places.append(int(at))
        norms.append(float(norm) or float("nan"))  # on a logarithmic scale

    for line in lines:
        if line["latent_step"] == "":
            name = " ".join(filter(None, (line["agent"], line["kind"], line["layers"]))) or "all"
            add(line["quantity"], name, line["step"], line["norm"])
        elif line["step"] == last and _is_logged(line):
            add("latent steps", line["agent"], line["latent_step"], line["norm"])
    figure = Figure(figsize=(18, 4), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would need a display and keep global state
    titles = (
        "parameters, by layers",
        "dL/d(rows), by who wrote them",
        "dL/dh of the last hidden states",
        f"dL/dh, step {last}",
    )
    for axis, title, curves in zip(figure.subplots(1, 4), titles, panels.values()):
        for name, (places, norms) in curves.items():
            axis.plot(places, norms, marker=".", label=name)
        axis.set(title=title, xlabel="latent step" if curves is panels["latent steps"] else "step", yscale="log")
        axis.grid(alpha=0.3)
        if curves:
            axis.legend(fontsize="small")
    figure.suptitle("norms of the gradient, before clipping")
    figure.savefig(path, dpi=150)
    return Path(path)
