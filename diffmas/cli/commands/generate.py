"""diffmas generate."""

from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.terminal import Device, device_of, errors

__all__ = ["generate"]


def generate(
    adapter: Annotated[Path, typer.Option(help="directory that `diffmas train` wrote", show_default=False)],
    question: Annotated[str, typer.Option(help="the field {question} of the agents' prompts")] = "",
    field: Annotated[list[str] | None, typer.Option(help="another field of the prompts, as name=text; may be repeated")] = None,
    model: Annotated[
        str | None, typer.Option(help="base model (directory, GGUF file or hub name), if it is not where it was")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of an answer", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy")] = None,
    top_p: float | None = None,
    seed: int | None = None,
    samples: Annotated[int | None, typer.Option(help="answers", min=1)] = None,
    device: Device = None,
):
    """Answer a question with a trained system. What is not given is the model's own generation config's, or 256 tokens at
    temperature 0.6 and top-p 0.95."""
    from diffmas.agents.system import MultiAgentSystem

    fields = {"question": question} if question else {}
    for item in field or []:
        name, equals, text = item.partition("=")
        if not equals:
            raise ValueError(f"--field: expected name=text, got {item!r}")
        fields[name] = text
    system = MultiAgentSystem.from_pretrained(adapter, model).to(device_of(device))
    texts = system.generate(
        [fields], max_new_tokens, temperature, top_p, seed, samples=samples, progress=errors.is_terminal
    )  # fmt: skip
    for text in texts[0]:
        typer.echo(text)
