"""Results of several methods side by side as one picture."""

from pathlib import Path

from diffmas.agents.meter import PHASES
from diffmas.evaluation.files import figure, room_for, side_by_side
from diffmas.evaluation.run import Result

__all__ = ["drawn", "plot"]


def drawn(results: list[Result], title: str = ""):
    """A figure with all that the tables have: what is right and how sure, on the left; what it costs, on the right."""
    names = [r.method for r in results]
    canvas = figure(12, 9 + 1.2 * len(results))
    (right, gaps), (sure, alike), (cost, counts), (curves, memory) = canvas.subplots(4, 2)
    errors = [[100 * (r.accuracy - r.low) for r in results], [100 * (r.high - r.accuracy) for r in results]]
    right.barh(names, [100 * r.accuracy for r in results], xerr=errors, capsize=3, color="tab:blue", alpha=0.8)
    right.set(xlabel="accuracy, % (95 % interval)", xlim=(0, 100))
    for name, r in zip(names, results):
        value, low, high = (100 * x for x in r.difference or (0.0, 0.0, 0.0))
        gaps.errorbar(value, name, xerr=[[value - low], [high - value]], fmt="o", capsize=3, color="tab:orange")
    best = next((f" ({r.best_baseline})" for r in results if r.best_baseline), "")
    gaps.axvline(0, color="gray", linewidth=1)
    gaps.set(xlabel=f"less the best baseline{best}, points, paired (95 % interval)")
    side_by_side(sure, names, {
        "gold answer": [r.perplexity for r in results], "decoded answer": [r.decoded_perplexity for r in results],
    })  # fmt: skip
    sure.set(xlabel="perplexity per token", xscale="log")
    agree = {f"{k} agree": [100 * r.agree[k] for r in results] for k in (results[0].agree if results else {})}
    side_by_side(alike, names, {**agree, "majority right": [100 * r.vote_accuracy for r in results]})
    alike.set(xlabel="questions, %", xlim=(0, 100))
    left = [0.0] * len(results)
    for name in PHASES:
        seconds = [r.phases[name] for r in results]
        cost.barh(names, seconds, left=left, label=name, alpha=0.8)
        left = [a + b for a, b in zip(left, seconds)]
    cost.set(xlabel="seconds")
    columns = {"tokens decoded": "tokens", "latent steps": "latent_steps", "prompt tokens": "prompt_tokens"}
    side_by_side(counts, names, {label: [getattr(r, what) for r in results] for label, what in columns.items()})
    counts.set(xlabel="of all agents", xscale="symlog")
    for r in results:
        curves.plot(range(1, len(r.entropy_curve) + 1), r.entropy_curve, label=r.method, marker=".")
    curves.set(xlabel="token of the answer", ylabel="entropy, nats")
    memory.barh(names, [r.trace_bytes / 1e6 for r in results], color="tab:gray", alpha=0.8)
    memory.set(xlabel="the largest trace, MB")
    for axes in (right, gaps, sure, alike, cost, counts, memory):
        axes.invert_yaxis()
    for axes in (sure, alike, cost, counts, curves):
        axes.legend(fontsize="small")
    canvas.suptitle(title or f"{results[0].questions} questions, {results[0].samples} sample(s) each")
    return canvas


def plot(results: list[Result], path, title: str = "") -> Path:
    """Writes a PNG of what the tables have, and of the token-entropy curves; returns its path."""
    path = room_for(path)
    drawn(results, title).savefig(path, dpi=150)
    return path
