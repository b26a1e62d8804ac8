"""What the commands share: where they write, how they fail, and options that several of them have."""

import functools
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = ["ConfigFile", "Device", "Fields", "console", "device_of", "errors", "explained", "fields_of"]

console = Console()
errors = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="config.yaml; see examples/train.yaml", show_default=False)]
Fields = Annotated[
    list[str] | None, typer.Option(help="another field of the prompts, as name=text; may be repeated", metavar="NAME=TEXT")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one")]


def explained(command):
    """Decorates a command: the user's errors become one line on stderr and exit status 1; others keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError, FloatingPointError) as error:  # the last is diffmas.training.NonFiniteLoss
            errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error

    return wrapped


def device_of(name: str | None) -> str:
    """The device that an option names, or the default one."""
    import torch

    return name or ("cuda" if torch.cuda.is_available() else "cpu")


def fields_of(question: str, more: list[str] | None) -> dict[str, str]:
    """The fields of a question, by the options --question and --field. Raises ValueError for one that is not name=text."""
    fields = {"question": question} if question else {}
    for item in more or []:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--field: expected name=text, got {item!r}")
        fields[name] = text
    return fields
