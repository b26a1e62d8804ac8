"""Command line: demo, init, schema, train, generate, tasks, evaluate, audit, study, view, plan, serve, export, bench, env."""

from typing import Annotated

import typer

from diffmas import __version__
from diffmas.cli import threads
from diffmas.cli.commands.export import export
from diffmas.cli.commands.generate import generate
from diffmas.cli.commands.init import init, schema
from diffmas.cli.commands.machine import bench, demo, env
from diffmas.cli.commands.measure import audit, evaluate, tasks
from diffmas.cli.commands.plan import plan
from diffmas.cli.commands.serve import serve
from diffmas.cli.commands.study import study
from diffmas.cli.commands.train import train
from diffmas.cli.commands.view import view
from diffmas.cli.terminal import explained, warn, with_json

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


OWN_THREADS = ("bench",)  # it has an option, and measures what a library's user gets
WITHOUT_RESULTS = (schema, serve)  # JSON itself; one that ends with Ctrl-C
LONG = ("demo", "train", "generate", "evaluate", "audit", "study", "view", "serve")


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffmas {__version__}")
        raise typer.Exit


@app.callback(
    help="Latent multi-agent systems of language models: train, compare, look at and serve them.\n\n"
    "Begin with `diffmas demo`, or with `diffmas init TASK`, which writes a config for train, evaluate and audit."
)
def _of_all(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="the version of diffmas")
    ] = False,
):
    name = context.invoked_subcommand
    ours = name not in OWN_THREADS and threads.choose(share=2 if name == "demo" else 1)  # its model is too small for more
    if ours and name in LONG and (line := threads.busy()):
        warn(line)


for command in (demo, init, schema, train, generate, tasks, evaluate, audit, study, view, plan, serve, export, bench, env):
    app.command()(explained(command if command in WITHOUT_RESULTS else with_json(command)))


if __name__ == "__main__":
    app()
