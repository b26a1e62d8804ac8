"""diffmas plan: which engine a team's training fits with, before anything is loaded."""

from dataclasses import asdict
from typing import Annotated

import typer
from rich.table import Table

from diffmas.cli.terminal import console

__all__ = ["plan"]

GB = 2**30


def plan(
    model: Annotated[str, typer.Option(help="a hub name or a directory; its config.json alone is read")],
    gpus: Annotated[int, typer.Option(help="that train together", min=1)],
    agents: Annotated[int, typer.Option(help="with the one that answers", min=1)] = 3,
    prompt: Annotated[int, typer.Option(help="tokens of an agent's prompt", min=1)] = 512,
    latent_steps: Annotated[int, typer.Option(help="of each agent but the last", min=0)] = 10,
    answer: Annotated[int, typer.Option(help="tokens of an answer", min=1)] = 256,
    batch: Annotated[int, typer.Option(help="questions at once on a GPU", min=1)] = 1,
    r: Annotated[int, typer.Option(help="rank of the LoRA; 0: all weights are trained", min=0)] = 8,
    dtype: Annotated[str, typer.Option(help="of the weights")] = "bfloat16",
    checkpointing: Annotated[bool, typer.Option("--checkpointing", help="with activation checkpointing")] = False,
    offload: Annotated[bool, typer.Option("--offload", help="with the rows of the trace on the host")] = False,
    memory: Annotated[float, typer.Option(help="of a GPU, in GiB", min=1)] = 80.0,
):
    """Show the memory that each engine needs on a GPU, by formula (docs/many_gpus.md); the model is not loaded."""
    from diffmas.cli.config import DTYPES

    if dtype not in (known := [name for name in DTYPES if name != "auto"]):  # auto: of the weights, which are not loaded
        raise ValueError(f"--dtype: expected one of {known}, got {dtype!r}")
    from diffmas.models.load import load_config

    config = load_config(model)
    import torch  # which is not waited for before

    from diffmas.training.plan import Episode, sizes_of
    from diffmas.training.plan import plan as needs_of

    sizes = sizes_of(config, r or None, getattr(torch, dtype))
    episode = Episode(agents, prompt, latent_steps, answer, batch)
    needs = needs_of(sizes, gpus, episode, checkpointing, offload)
    fitting = [need.engine for need in needs if need.total <= 0.9 * memory * GB]
    table = Table(
        title=f"{model}: {sizes.weights / 1e9:.2f} B weights, {sizes.trained / 1e6:.1f} M trained; GiB on each of {gpus} GPUs"
    )
    for column in ("engine", "weights", "trained", "pools", "activations", "all", "gathered"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for need in needs:
        parts = (need.weights, need.optimizer, need.pools, need.activations, need.total, need.gathered)
        table.add_row(need.engine, *(f"{x / GB:.1f}" for x in parts), style="" if need.engine in fitting else "dim")
    console.print(table)
    console.print(f"an episode: {episode.rows} rows, {episode.forwards} forwards; gathered: GiB that come to a GPU for one")
    less = "nothing fits; more GPUs, a smaller --batch, --checkpointing, --offload"
    console.print(f"in 0.9 of {memory:g} GiB: {f'{fitting[0]} is the first that fits' if fitting else less}")
    rows = [{**asdict(need), "total": need.total, "fits": need.engine in fitting} for need in needs]  # bytes on each GPU
    of_episode = {**asdict(episode), "rows": episode.rows, "forwards": episode.forwards}
    return {"model": model, "gpus": gpus, "sizes": asdict(sizes), "episode": of_episode, "engines": rows}
