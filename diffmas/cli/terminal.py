"""What the commands share: where they write, how they fail, and options that several of them have."""

import contextlib
import contextvars
import functools
import inspect
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

__all__ = [
    "NOTHING_KEPT", "ConfigFile", "Device", "Fields", "Partly", "check_asked", "console", "device_of", "errors", "explained",
    "fields_of", "goes_on", "print_json", "warn", "with_json",
]  # fmt: skip

console = Console()
errors = Console(stderr=True)

ConfigFile = Annotated[Path, typer.Argument(help="config.yaml; see examples/train.yaml", show_default=False)]
Fields = Annotated[
    list[str] | None, typer.Option(help="another field of the prompts, as name=text; may be repeated", metavar="NAME=TEXT")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...; a GPU if there is one")]

AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on stdout; all that people read goes to stderr")]


NOTHING_KEPT = "nothing is kept: the same command starts again"
_how: contextvars.ContextVar[Callable[[], str]] = contextvars.ContextVar("how a command goes on after Ctrl-C")


class Partly(Exception):
    """A command that failed has results all the same. result: these; error: what is raised behind them."""

    def __init__(self, result: dict, error: Exception):
        super().__init__(str(error))
        self.result, self.error = result, error


def with_json(command):
    """Decorates a command that returns its results, as a dict: they are printed where somebody asks for --json."""

    @functools.wraps(command)
    def wrapped(*args, as_json: bool = False, **kwargs):
        error = None
        with contextlib.redirect_stdout(sys.stderr if as_json else sys.stdout):
            try:
                result = command(*args, **kwargs)
            except Partly as partly:
                result, error = partly.result, partly.error
        if as_json and result is not None:  # of several processes one has them
            print_json(result)
        if error is not None:
            raise error

    option = inspect.Parameter("as_json", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=AsJson)
    signature = inspect.signature(command)
    wrapped.__signature__ = signature.replace(parameters=[*signature.parameters.values(), option])
    wrapped.__annotations__ = {**command.__annotations__, "as_json": AsJson}
    return wrapped


def explained(command):
    """Decorates a command: the user's errors become one line on stderr and exit status 1, Ctrl-C one with status 130 that says
    what is kept (`goes_on`); others keep their traceback."""

    @functools.wraps(command)
    def wrapped(*args, **kwargs):
        goes_on(lambda: NOTHING_KEPT)
        try:
            return command(*args, **kwargs)
        # ImportError: what was asked for is not installed. FloatingPointError: diffmas.training.NonFiniteLoss.
        except (ValueError, OSError, ImportError, FloatingPointError) as error:
            errors.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            errors.print(f"interrupted; {_how.get()()}", style="red", markup=False, highlight=False, soft_wrap=True)
            raise typer.Exit(130) from error

    return wrapped


def goes_on(how: Callable[[], str]) -> None:
    """From here on Ctrl-C says what of the command's work is kept, and how it goes on; before, that nothing is."""
    _how.set(how)


def print_json(data) -> None:
    """One JSON object on stdout; numbers that are not finite, which JSON does not know, are null, paths texts."""

    def finite(x):
        if isinstance(x, dict):
            return {str(key): finite(value) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    def text(x):
        if isinstance(x, Path):
            return str(x)
        raise TypeError(f"expected what JSON has, or a Path, got {type(x).__name__}")

    typer.echo(json.dumps(finite(data), ensure_ascii=False, allow_nan=False, default=text))


def warn(line: str) -> None:
    """A line on stderr that nothing depends on."""
    errors.print(line, style="yellow", markup=False, highlight=False, soft_wrap=True)


def device_of(name: str | None) -> str:
    """The device that an option names, or the default one. Raises ValueError for one that is not here."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts
        raise ValueError(f"--device: expected cpu, cuda or cuda:1, of what is here, got {name!r} ({error})") from error
    return name


def fields_of(question: str, more: list[str] | None) -> dict[str, str]:
    """The fields of a question, by the options --question and --field. Raises ValueError for one that is not name=text."""
    fields = {"question": question} if question else {}
    for item in more or []:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--field: expected name=text, got {item!r}")
        fields[name] = text
    return fields


def check_asked(team: Path, fields: dict[str, str]) -> None:
    """Raises ValueError, before a model is loaded, for a question without a field that a team's prompts have. A directory of
    another class of systems is left to who loads it, which says so."""
    from diffmas.agents.agent import Agent
    from diffmas.agents.card import SYSTEM
    from diffmas.agents.file import read_agents

    described = read_agents(team)
    for agent in described["agents"] if described["class"] in (None, SYSTEM) else ():
        try:
            Agent(**agent).check(fields)
        except ValueError as error:
            raise ValueError(f"{error}; --question is the field question, --field NAME=TEXT any other") from error
