"""README.md's results: a few rows and a plot between two HTML comments, written from the stored rows and from nothing else."""

import os
from collections import defaultdict
from pathlib import Path

from diffmas.benchmarks import store
from diffmas.benchmarks.result import Result, ratio_text, results, time_text

__all__ = ["BEGIN", "END", "STORY", "block", "update"]

BEGIN, END = "<!-- bench: begin, written by `make bench-readme` -->", "<!-- bench: end -->"
# The cases that tell what to expect: short and long, even and ragged, a real model's shape, attention alone, and some not won.
STORY = (
    dict(op="training_step", model="small", agents=3, N=512, T=16, batch=1),
    dict(op="training_step", model="small", agents=3, N=8192, T=16, batch=1),
    dict(op="training_step", model="small", agents=3, N=4096, T=16, batch=8),
    dict(op="training_step", model="8B"),
    *(dict(op="training_step", model="135M", N=N, dtype="bfloat16") for N in (355, 268, 1693, 1753)),
    *(dict(op="decoding", phase="decode", N=N, batch=b, dtype="bfloat16") for N, b in ((8, 1), (2056, 1), (2056, 8))),
    dict(op="decoding", phase="prefill", dtype="bfloat16"),
    dict(op="attention_schedule", heads="4/2", agents=3, N=4096, T=16),
    dict(op="generation", model="small", N=4096, T=10),
    dict(op="latent_step", model="small", N=1024),
    dict(op="latent_step", model="0.6B", N=32768),
)
WORDS = {
    "training_step": "training step of {agents} agents, {model}, N = {N}, T = {T}",
    "decoding": "a forward of n = {n} new tokens, {model}, N = {N}",
    "attention_schedule": "attention of a training step, {agents} agents, {heads} heads, N = {N}, T = {T}",
    "generation": "generation by {agents} agents, {model}, N = {N}, T = {T}",
    "latent_step": "one latent step, {model}, N = {N}",
}


def block(rows: list[dict], results_dir: str, growth: bool) -> str:
    """What stands between the comments. results_dir: as the README reaches it; growth: whether plots of growth are there."""
    first, done = rows[0], [r for r in results(rows) if r.whole and r.best]
    commits = " and ".join(dict.fromkeys(r["commit"] for r in rows))  # parts of the suite may have been measured again
    ahead = sum(r.best[1] >= 1 for r in done)
    lines = [
        f"diffmas is faster than every peer in {ahead} of {len(done)} cases of `diffmas bench`. Measured on "
        + f"{first['machine']}, {first['threads']} thread, torch {first['torch']}, transformers {first['transformers']}, "
        + f"commit {commits}: medians of interleaved runs, no number without an equal result.",
        "The plain way is DynamicCache, torch.cat and autograd; models have random weights; a trace gets N rows, an agent "
        + "takes T latent steps.",
        "",
        "| | diffmas | speed, plain way | peak memory, plain way | speed, best peer |",
        "|---|---|---|---|---|",
    ]
    for wanted in STORY:
        for r in done:
            if r.plain and all(r.first[k] == v for k, v in wanted.items()):
                best = f"{ratio_text(r.best[1])} {r.best[0]}"
                cells = (_words(r), time_text(r.ours["seconds"]), ratio_text(r.plain[1]), ratio_text(r.memory), best)
                lines.append(f"| {' | '.join(cells)} |")
                break
    ops = _ops(done)
    lines += ["", *([f"Single ops against their best peer, over all shapes: {ops}."] if ops else [])]
    links = [f"[{store.FILE}]({results_dir}/{store.FILE})"]
    links += [f"[growth with N, T and the number of agents]({results_dir}/growth.png)"] if growth else []
    links += [f"[all ops against their best peer]({results_dir}/headline.png)"]
    lines.append(f"Every row: {', '.join(links)}. `make bench` writes a page with sortable tables.")
    lines += ["", f"![time and memory of a training step against N]({results_dir}/story.png)"] if growth else []
    return "\n".join(lines)


def _words(r: Result) -> str:
    layers = f"{r.first['layers']} layer{'s' if r.first['layers'] > 1 else ''} of {r.first['model']} shape"
    text = WORDS[r.op].format(**r.first | {"model": layers})
    text += f", {r.first['dtype']}" if r.first["dtype"] != "float32" else ""
    lengths = " of different lengths" if r.regime.startswith("ragged") else ""
    return text + (f", batch {r.first['batch']}{lengths}" if r.first["batch"] > 1 else "")


def _ops(done: list[Result]) -> str:
    """The lowest and the highest ratio of each op and phase."""
    groups = defaultdict(lambda: defaultdict(list))
    for r in done:
        if r.op not in WORDS and not r.first["model"]:
            groups[r.op][r.phase].append(r.best[1])
    spans = lambda xs: f"{min(xs):.2f} to {max(xs):.2f}x" if len(xs) > 1 else f"{xs[0]:.2f}x"
    return "; ".join(
        f"{op} " + ", ".join(f"{phase} {spans(ratios)}" for phase, ratios in phases.items()) for op, phases in groups.items()
    )


def update(results_dir: Path, readme: Path) -> bool:
    """Rewrites the block; -> whether it changed. ValueError for a README without the comments or a CSV without rows."""
    if not (results_dir / store.FILE).exists():
        raise ValueError(f"{results_dir / store.FILE}: expected the rows of a run of `diffmas bench`, found no file")
    rows = store.read(results_dir / store.FILE)
    if not rows:
        raise ValueError(f"{results_dir / store.FILE}: expected rows, found none")
    text = readme.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{readme}: expected the comments {BEGIN!r} and {END!r} once each")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    place = Path(os.path.relpath(results_dir.resolve(), readme.resolve().parent)).as_posix()
    new = f"{head}{BEGIN}\n{block(rows, place, (results_dir / 'growth.png').exists())}\n{END}{tail}"
    if new != text:
        readme.write_text(new, encoding="utf-8")
    return new != text
