"""README.md's headline: a table and a plot between two HTML comments, written from the stored rows and from nothing else."""

import os
from collections import defaultdict
from pathlib import Path

import numpy as np

from diffmas.benchmarks import report, store

__all__ = ["BEGIN", "END", "block", "update"]

BEGIN, END = "<!-- bench: begin, written by `make bench-readme` -->", "<!-- bench: end -->"
WORDS = {
    "training_step": "training step of {agents} agents, {layers} layers of {model} shape, N = {N}, T = {T}",
    "attention_schedule": "its attention part alone, {agents} agents, {heads} heads, N = {N}, T = {T}",
    "generation": "generation by {agents} agents, {layers} layers of {model} shape, N = {N}, T = {T}",
    "latent_step": "latent step, {layers} layers of {model} shape, over {N} rows",
}


def block(rows: list[dict], results_dir: str, growth: bool) -> str:
    """What stands between the comments. results_dir: as the README reaches it; growth: whether its growth.png is there."""
    first, done = rows[0], [r for r in report.results(rows) if r.whole and r.best]
    commits = " and ".join(dict.fromkeys(r["commit"] for r in rows))  # parts of the suite may have been measured again
    lines = [
        f"Measured by `diffmas bench` on {first['machine']}, {first['threads']} thread, torch {first['torch']}, transformers "
        f"{first['transformers']}, commit {commits}. Ratios are medians of interleaved runs against the plain Hugging "
        "Face way (DynamicCache, torch.cat, autograd); no row without an equal result. All rows, peers and shapes: "
        f"`{results_dir}/index.html`.",
        "",
        f"![times faster than the best peer and the plain way]({results_dir}/headline.png)",
        "",
        "| random weights, vocabulary of 4096 | diffmas | faster | smaller | against the best peer |",
        "|---|---|---|---|---|",
    ]
    for op, words in WORDS.items():
        for r in done:
            if r.op == op and r.plain:
                best = f"{report._times(r.best[1])} {r.best[0]}"
                cells = (words.format(**r.first) + _batch(r), report._time(r.ours["seconds"]), report._times(r.plain[1]))
                lines.append(f"| {' | '.join((*cells, report._times(r.memory), best))} |")
    lines += ["", "Single ops against the best of all peers, lowest to highest over the shapes:", ""]
    lines += ["| op | regime | shapes | against the best peer |", "|---|---|---|---|"]
    groups = defaultdict(list)
    for r in done:
        if r.op not in WORDS:
            groups[r.op, f"{r.regime}, {r.phase}"].append(r.best[1])
    for (op, regime), ratios in groups.items():
        mean = float(np.exp(np.mean(np.log(ratios))))
        span = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 else ""
        lines.append(f"| {op} | {regime} | {len(ratios)} | {mean:.2f}x{span} |")
    if growth:
        lines += ["", f"![growth of time and memory with N, T and the number of agents]({results_dir}/growth.png)"]
    return "\n".join(lines)


def _batch(r: report.Result) -> str:
    return f", batch {r.first['batch']} of different lengths" if r.first["batch"] > 1 else ""


def update(results: Path, readme: Path) -> bool:
    """Rewrites the block; -> whether it changed. ValueError for a README without the comments or a CSV without rows."""
    if not (results / store.FILE).exists():
        raise ValueError(f"{results / store.FILE}: expected the rows of a run of `diffmas bench`, found no file")
    rows = store.read(results / store.FILE)
    if not rows:
        raise ValueError(f"{results / store.FILE}: expected rows, found none")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the comments {BEGIN!r} and {END!r} once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    place = Path(os.path.relpath(results.resolve(), readme.resolve().parent)).as_posix()
    new = f"{head}{BEGIN}\n{block(rows, place, (results / 'growth.png').exists())}\n{END}{tail}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text
