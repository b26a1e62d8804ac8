"""diffmas export."""

from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.terminal import console, goes_on

__all__ = ["export"]


def export(
    team: Annotated[Path, typer.Argument(help="directory that `diffmas train` wrote", show_default=False)],
    out: Annotated[Path, typer.Argument(help="a new directory", show_default=False)],
    base: Annotated[str | None, typer.Option(help="where others find the base model, such as its hub name")] = None,
    push_to_hub: Annotated[str | None, typer.Option(metavar="REPO", help="upload it, as owner/name on the hub")] = None,
    private: Annotated[bool, typer.Option(help="whether a repository that is made for it is")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="an earlier export makes room")] = False,
):
    """Write a trained system to give away: adapters, realignment, agents, tokenizer, chat template, and a model card."""
    from diffmas.agents.file import read_agents

    described = read_agents(team)
    # Torch is not waited for before.
    from diffmas.agents import hub
    from diffmas.serving.export import export as write

    if push_to_hub is not None:
        hub.check_push(push_to_hub, base or described["base_model"])
    goes_on(lambda: f"nothing is written to {out}: the same command starts again")  # whole or not at all
    made = {"directory": write(team, out, base, overwrite)}
    goes_on(lambda: f"{out} is written, and its upload has not ended: the same command with --overwrite starts again")
    console.print(str(out), highlight=False, soft_wrap=True)
    if push_to_hub is not None:
        made["hub"] = hub.push_to_hub(out, push_to_hub, private)
        console.print(made["hub"], highlight=False, soft_wrap=True)
    return made
