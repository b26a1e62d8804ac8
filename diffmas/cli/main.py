"""Command line: demo, init, schema, train, generate, tasks, evaluate, audit, study, view, plan, serve, export, bench, env."""

from typing import Annotated

import typer

from diffmas import __version__
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
from diffmas.cli.terminal import explained

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"diffmas {__version__}")
        raise typer.Exit


@app.callback(help=__doc__)
def _of_all(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="and exit")] = False,
):
    pass


for command in (demo, init, schema, train, generate, tasks, evaluate, audit, study, view, plan, serve, export, bench, env):
    app.command()(explained(command))


if __name__ == "__main__":
    app()
