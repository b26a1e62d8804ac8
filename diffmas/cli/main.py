"""The command line: demo, train, generate, tasks, evaluate, audit, study, plan, serve, export, bench, env."""

import typer

from diffmas.cli.commands.export import export
from diffmas.cli.commands.generate import generate
from diffmas.cli.commands.machine import bench, demo, env
from diffmas.cli.commands.measure import audit, evaluate, tasks
from diffmas.cli.commands.plan import plan
from diffmas.cli.commands.serve import serve
from diffmas.cli.commands.study import study
from diffmas.cli.commands.train import train
from diffmas.cli.terminal import explained

__all__ = ["app"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
for command in (demo, train, generate, tasks, evaluate, audit, study, plan, serve, export, bench, env):
    app.command()(explained(command))


if __name__ == "__main__":
    app()
