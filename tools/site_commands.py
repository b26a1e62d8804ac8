"""The site's page of commands, written from the commands themselves."""

import re

import typer

from diffmas.cli import app

__all__ = ["page"]

HEAD = """\
# Commands

`diffmas COMMAND --help` says the same. `diffmas --install-completion` has a shell complete commands and options.
Exit status: 0; 1 for an error, which is one line on stderr; 2 for a command line that is none; 130 after Ctrl-C.
"""


def page() -> str:
    """Markdown: for each command its usage, what it does, its arguments and its options."""
    group = typer.main.get_command(app)
    return "\n".join([HEAD, *(_section(name, command) for name, command in group.commands.items())])


def _section(name: str, command) -> str:
    context = type(command).context_class(command, info_name=f"diffmas {name}")
    said = re.sub(r"\n(?!\n)(?<!\n\n)", " ", command.help)
    rows = [p.get_help_record(context) for p in command.params]
    table = [f"| `{names}` | {_cell(says)} |" for names, says in filter(None, rows)]
    table = ["| | what it is |", "|---|---|", *table, ""] if table else []
    usage = command.get_usage(context).removeprefix("Usage: ")
    return "\n".join([f"## {name}\n", said, "", "```", usage, "```", "", *table])


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")
