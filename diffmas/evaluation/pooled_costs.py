"""How sure a study's answers are, how often samples agree and what answers cost, by case and method: tables and one picture.

costs: a `Result.row` with case and seed for each case, seed and method, as in costs.csv. Shown are means over seeds, of
perplexities the geometric ones.
"""

import math
import re
import statistics
from pathlib import Path

from rich.table import Table

from diffmas.agents.meter import PHASES
from diffmas.evaluation.files import figure, room_for, side_by_side
from diffmas.evaluation.run import narrow_table, percent

__all__ = ["cost_tables", "plot_costs"]

NAN = math.nan
PERPLEXITIES = {"gold answer": "perplexity", "decoded answer": "decoded_perplexity"}
SECONDS = {name: f"seconds_{name.replace('-', '_')}" for name in PHASES}


def cost_tables(costs: list[dict], title: str = "") -> list[Table]:
    """Rich tables of at most 80 columns: perplexity, entropy and agreement; tokens, latent steps and seconds by phase."""
    sure, cost, agree = [], [], _agreements(costs)
    several = {"agree %": "agreement", **{f"{name} agree %": key for name, key in agree.items()}} if agree else {}
    for case, method, seeds in _groups(costs):
        name, shares = f"{case}: {method}", [_mean(seeds, key) for key in several.values()]
        certain = [*(_geometric(seeds, key) for key in PERPLEXITIES.values()), _mean(seeds, "entropy")]
        sure.append([name, *map("{:.3g}".format, certain), *("" if math.isnan(x) else percent(x) for x in shares)])
        seconds = (_mean(seeds, key) for key in ("seconds", *list(SECONDS.values())[:-1]))
        counts = [f"{_mean(seeds, key):,.0f}" for key in ("tokens", "latent_steps")]
        cost.append([name, *counts, *(f"{x:.2f}" if x < 10 else f"{x:,.0f}" for x in seconds)])
    gold, decoded = "perplexity gold", "perplexity decoded"
    heads = ("case: method", gold, decoded, "entropy nats", *several)
    phases = [f"{name.replace('-', ' ')} s" for name in PHASES[:-1]]
    return [
        narrow_table(title, heads, sure, "means over seeds"),
        narrow_table("", ("case: method", "tokens decoded", "latent steps", "all s", *phases), cost),
    ]


def plot_costs(costs: list[dict], path, title: str = "") -> Path:
    """Writes a PNG: perplexity of the gold and of the decoded answers, seconds by phase, and how often samples agree, where
    there are several; returns its path."""
    path, agree, groups = room_for(path), _agreements(costs), _groups(costs)
    canvas = figure(14, 2 + 0.4 * len(groups))
    sure, cost, *alike = canvas.subplots(1, 3 if agree else 2, sharey=True)
    names = [f"{case}: {method}" for case, method, _ in groups]
    side_by_side(sure, names, {label: [_geometric(seeds, key) for *_, seeds in groups] for label, key in PERPLEXITIES.items()})
    sure.set(xlabel="perplexity per token", xscale="log", xlim=(1, None))
    left = [0.0] * len(names)
    for label, key in SECONDS.items():
        seconds = [_mean(seeds, key) for *_, seeds in groups]
        cost.barh(range(len(names)), seconds, left=left, label=label, alpha=0.8)
        left = [a + (0.0 if math.isnan(b) else b) for a, b in zip(left, seconds)]
    cost.set(xlabel="seconds, by phase")
    for axes in alike:
        side_by_side(axes, names, {label: [100 * _mean(seeds, key) for *_, seeds in groups] for label, key in agree.items()})
        axes.set(xlabel="samples that agree, % of questions", xlim=(0, 100))
    sure.invert_yaxis()  # of all
    for axes in (sure, cost, *alike):  # above, where no bars are
        axes.legend(fontsize="small", loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False)
    canvas.suptitle(title)
    canvas.savefig(path, dpi=100)
    return path


def _groups(costs: list[dict]) -> list[tuple[str, str, list[dict]]]:
    """(case, method, a row for each seed), in the order of appearance."""
    keys = dict.fromkeys((row["case"], row["method"]) for row in costs)
    return [(*key, [row for row in costs if (row["case"], row["method"]) == key]) for key in keys]


def _agreements(costs: list[dict]) -> dict[str, str]:
    """{"3 of 4": column}, of all numbers of samples that there are."""
    found = dict.fromkeys(key for row in costs for key in row if re.fullmatch(r"agree_\d+_of_\d+", key))
    return {key.removeprefix("agree_").replace("_", " "): key for key in found}


def _mean(seeds: list[dict], key: str) -> float:
    """NaN where no seed has it, and for the agreement of one sample with itself."""
    values = [row[key] for row in seeds if row.get(key) is not None and (key != "agreement" or row["samples"] > 1)]
    return statistics.fmean(values) if values else NAN


def _geometric(seeds: list[dict], key: str) -> float:
    return math.exp(_mean([{key: math.log(row[key])} for row in seeds if row.get(key) is not None], key))
