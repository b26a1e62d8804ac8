"""Norms of the gradient in a study's trainings: of all parameters, and of what comes back to the readers' latent steps."""

import csv
import statistics
from pathlib import Path

from diffmas.evaluation.files import figure, room_for, write_rows

__all__ = ["norms_of_training", "plot_norms", "write_norms"]

PARAMETERS = "parameters"
# Of each agent, all of its latent steps together; by the quantity of a training's gradients.csv.
OF_LATENT_STEPS = {"rows": "rows of a reader's latent steps", "hidden": "hidden states of a reader's latent steps"}


def norms_of_training(history: list[dict], file) -> list[dict]:
    """{"norm of", "agent", "step", "norm"}. history: a trainer's log, with the norm of all parameters before clipping; file:
    the gradients.csv that `gradient_report_steps` leaves, of which zeros are left out: nothing comes back there."""
    found = [
        {"norm of": PARAMETERS, "agent": "", "step": entry["step"], "norm": entry["grad_norm"]}
        for entry in history if "grad_norm" in entry
    ]  # fmt: skip
    with Path(file).open(newline="", encoding="utf-8") as lines:
        for line in csv.DictReader(lines):
            of_all = line["kind"] == "latent" and line["latent_step"] == "" and line["quantity"] in OF_LATENT_STEPS
            if of_all and float(line["norm"]):
                what, norm = OF_LATENT_STEPS[line["quantity"]], float(line["norm"])
                found.append({"norm of": what, "agent": line["agent"], "step": int(line["step"]), "norm": norm})
    return found


def write_norms(norms: list[dict], path) -> Path:
    """Writes a CSV file of the median and the largest of each case, seed and kind of norm, and how many these are of; returns
    its path. norms: those of `norms_of_training`, with "case" and "seed"."""
    keys = dict.fromkeys((row["case"], row["seed"], row["norm of"]) for row in norms)
    rows = []
    for key in keys:
        some = [row["norm"] for row in norms if (row["case"], row["seed"], row["norm of"]) == key]
        of = dict(zip(("case", "seed", "norm of"), key))
        rows.append({**of, "looks": len(some), "median": f"{statistics.median(some):.4g}", "largest": f"{max(some):.4g}"})
    return write_rows(rows, path)


def plot_norms(norms: list[dict], path) -> Path:
    """Writes a PNG of the norms by training step, a line for each case and seed: of all parameters, and of dL/d(rows) of the
    latent steps of the reader that has most; returns its path."""
    path = room_for(path)
    canvas = figure(12, 5)
    cases = list(dict.fromkeys(row["case"] for row in norms))
    titles = {
        PARAMETERS: "trainable parameters, before clipping",
        OF_LATENT_STEPS["rows"]: "rows of latent steps, the reader with most",
    }
    for axes, (what, title) in zip(canvas.subplots(1, 2), titles.items()):
        for case, seed in dict.fromkeys((row["case"], row["seed"]) for row in norms):
            largest: dict[int, float] = {}
            for row in norms:
                if (row["case"], row["seed"], row["norm of"]) == (case, seed, what):
                    largest[row["step"]] = max(row["norm"], largest.get(row["step"], 0.0))
            first = seed == next(row["seed"] for row in norms if row["case"] == case)
            label = case if first else "_"  # matplotlib leaves out of the legend what starts so
            axes.plot(list(largest), list(largest.values()), ".-", color=f"C{cases.index(case) % 10}", label=label)
        axes.set(title=title, xlabel="training step", yscale="log")
    axes.figure.axes[0].set(ylabel="norm of the gradient")
    axes.figure.axes[0].legend(fontsize="small")
    canvas.savefig(path, dpi=150)
    return path
