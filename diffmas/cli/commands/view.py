"""diffmas view."""

from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.made_with import in_a_line
from diffmas.cli.terminal import Device, Fields, check_asked, console, device_of, fields_of

__all__ = ["view"]

FIGURES = (".pdf", ".svg", ".png")


def view(
    path: Annotated[
        Path, typer.Argument(metavar="TEAM_OR_TRACE", help="directory that `diffmas train` wrote, or a trace that was saved")
    ],
    question: Annotated[str, typer.Option(help="the field {question} of the agents' prompts")] = "",
    field: Fields = None,
    answer: Annotated[str | None, typer.Option(help="the right one: its loss, and where its gradient goes")] = None,
    text: Annotated[bool, typer.Option("--text", help="the same agents also write each other text, without adapter")] = False,
    output: Annotated[Path, typer.Option(help="the page, one HTML file")] = Path("view.html"),
    figure: Annotated[Path | None, typer.Option(help="the same for a paper: .pdf, .svg or .png")] = None,
    model: Annotated[
        str | None, typer.Option(help="base model, if it is not where it was; of a trace, whose tokens are to be read")
    ] = None,
    sequence: Annotated[int, typer.Option(help="of a trace: which of its sequences", min=0)] = 0,
    nearest: Annotated[int, typer.Option(help="tokens shown of each latent step", min=1)] = 8,
    max_new_tokens: Annotated[int, typer.Option(help="of the answer, and of a text agent's message", min=1)] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="of what is sampled")] = 0,
    device: Device = None,
):
    """See a team at work on one question: who says what to whom, as a page to open in a browser."""
    fields = fields_of(question, field)
    if figure is not None and figure.suffix.lower() not in FIGURES:
        raise ValueError(f"--figure: expected a file {' or '.join(FIGURES)}, got {figure}")
    if not path.exists():
        raise ValueError(f"{path}: expected the directory of a team or a saved trace, found none")
    if path.is_dir():
        if not fields:
            raise ValueError("--question: expected a question, or fields of the prompts with --field, got none")
        check_asked(path, fields)
    elif fields or answer is not None or text:
        raise ValueError("--question, --field, --answer, --text: expected none with a saved trace, whose model has run")
    from diffmas.evaluation.look import look_at, look_at_file, page, plot  # torch is not waited for before

    if path.is_dir():
        from diffmas.agents.system import MultiAgentSystem

        system = MultiAgentSystem.from_pretrained(path, model, trainable=answer is not None).to(device_of(device))
        look = look_at(
            system, fields, answer, text_agents=text, nearest=nearest, max_new_tokens=max_new_tokens, temperature=temperature,
            seed=seed,
        )  # fmt: skip
        look.facts.append(("made with", in_a_line(seed)))
    else:
        from diffmas.models.load import load_tokenizer

        look = look_at_file(path, None if model is None else load_tokenizer(model), sequence)
    files = [page(look, output), *([] if figure is None else [plot(look, figure)])]
    for file in files:
        console.print(str(file), highlight=False, soft_wrap=True)
    return {"files": files, "look": look.to_dict()}
