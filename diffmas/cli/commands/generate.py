"""diffmas generate."""

import hashlib
import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer
from tqdm.auto import tqdm

from diffmas.cli.terminal import Device, Fields, check_asked, device_of, errors, fields_of, goes_on

__all__ = ["generate"]

TEXT = ("tokenizer", "chat_template", "special_tokens_map", "vocab", "merges")  # files by which prompts become tokens


def generate(
    adapter: Annotated[Path, typer.Option(help="directory that `diffmas train` wrote", show_default=False)],
    question: Annotated[str, typer.Option(help="the field {question} of the agents' prompts")] = "",
    field: Fields = None,
    questions: Annotated[
        Path | None, typer.Option(help="a file of JSON lines with the fields of the prompts, answered into --output")
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="with --questions: JSON lines with `answers`, and what made them beside; a file goes on")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="with --questions: so many at once", min=1)] = 16,
    model: Annotated[
        str | None, typer.Option(help="base model (directory, GGUF file or hub name), if it is not where it was")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="of an answer", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy", min=0)] = None,
    top_p: Annotated[
        float | None, typer.Option(help="tokens that hold this share of the probability; 1: all", min=0, max=1)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="of the samples; drawn, and told, where nobody gives one")] = None,
    samples: Annotated[int | None, typer.Option(help="answers", min=1)] = None,
    device: Device = None,
):
    """Answer a question, or a file of them, with a trained system.

    What is not given is the model's own generation config's,
    or 256 tokens at temperature 0.6 and top-p 0.95.
    """
    fields = fields_of(question, field)
    if top_p == 0:
        raise ValueError("--top-p: expected more than 0, got 0")
    if (questions is None) != (output is None):
        raise ValueError("--questions, --output: expected both or none, got one")
    if questions is not None and fields:
        raise ValueError("--questions: expected it without --question and --field, got both")
    from diffmas.agents.file import read_agents

    if questions is None:
        check_asked(adapter, fields)
    else:
        read_agents(adapter)
    # Torch is not waited for before.
    from diffmas.agents.system import MultiAgentSystem
    from diffmas.cli.made_with import made_with

    load = lambda: MultiAgentSystem.from_pretrained(adapter, model).to(device_of(device))  # noqa: E731
    options = dict(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, samples=samples)
    asked = {"adapter": str(adapter.resolve()), "team": _hash(adapter), "model": model, **options}
    if questions is not None:
        goes_on(lambda: f"what is answered is in {output}, and the same command goes on")
        return _answer_file(load, questions, output, batch_size, seed, asked, options)
    seed = secrets.randbits(30) if seed is None else seed
    (texts,) = load().generate([fields], seed=seed, progress=errors.is_terminal, **options)
    for text in texts:
        typer.echo(text)
    return {"made_with": {**made_with(), **asked, "seed": seed}, "fields": fields, "answers": texts}


def _answer_file(
    load: Callable, questions: Path, output: Path, batch_size: int, seed: int | None, asked: dict, options: dict
) -> dict:  # fmt: skip
    """Each line of questions with its answers, in batches. Every question has a seed of its own: a file that goes on is as if
    it had not stopped. load: gives the system, once it is clear that there is something to answer."""
    from diffmas.agents.agent import Agent
    from diffmas.agents.file import read_agents
    from diffmas.evaluation.files import room_for
    from diffmas.json_file import write_json
    from diffmas.training.data import fields_of_row, read_jsonl

    agents = [Agent(**agent) for agent in read_agents(asked["adapter"])["agents"]]
    rows = read_jsonl(questions, agents, answers=False)
    done, beside = _answered(output, rows), output.with_name(output.name + ".made_with.json")
    made = _made(beside if done else None, seed, asked, done == len(rows))
    if done == len(rows):
        return _told(made, done, output, beside)
    system = load()
    write_json(room_for(beside), made)
    with output.open("a", encoding="utf-8") as file, tqdm(total=len(rows), initial=done, desc="questions", leave=False) as bar:
        while done < len(rows):
            batch = rows[done : done + batch_size]
            seeds = [(made["seed"] * 1_000_003 + i) % (1 << 31) for i in range(done, done + len(batch))]
            texts = system.generate([fields_of_row(row) for row in batch], seed=seeds, **options)
            for row, answers in zip(batch, texts):
                file.write(json.dumps({**row, "answers": answers}, ensure_ascii=False) + "\n")
            file.flush()
            done += len(batch)
            bar.update(len(batch))
    return _told(made, done, output, beside)


def _told(made: dict, done: int, output: Path, beside: Path) -> dict:
    errors.print(f"{output}: {done} questions", highlight=False, soft_wrap=True)
    return {"made_with": made, "questions": done, "files": [output, beside]}


def _hash(team: Path) -> str:
    """Of what a team's directory answers with: agents, adapters, maps to other models, tokenizer and chat template."""
    from diffmas.agents.file import AGENTS_FILE, CONFIG_FILE, adapter_directory, read_agents

    places = {team, *(adapter_directory(team, name) for name in read_agents(team)["adapters"])}
    places |= {file.parent for file in (team / "others").rglob("*")}
    found = hashlib.sha256()
    for file in sorted(file for place in places for file in place.glob("*")):
        if file.suffix == ".safetensors" or file.name in (AGENTS_FILE, CONFIG_FILE) or file.name.startswith(TEXT):
            found.update(f"{file.relative_to(team).as_posix()} {file.stat().st_size}\n".encode())
            with file.open("rb") as content:
                while block := content.read(1 << 20):
                    found.update(block)
    return found.hexdigest()


def _made(left: Path | None, seed: int | None, asked: dict, all_done: bool) -> dict:
    """What answers are made with, by the file that is left of earlier ones, if any, and now. A seed that nobody gives is the
    earlier one, or drawn. Raises ValueError where the earlier ones were asked for otherwise, or nothing says how."""
    from diffmas.cli.made_with import made_with
    from diffmas.json_file import read_json

    if left is not None and not left.exists():
        raise ValueError(f"{left}: expected what the earlier answers were made with, found none; choose another --output")
    earlier = read_json(left) if left is not None else {}
    asked = {**asked, "seed": earlier.get("seed", secrets.randbits(30)) if seed is None else seed}
    for name, value in asked.items():
        if left is not None and (found := earlier.get(name)) != value:
            raise ValueError(f"{left}: expected answers of {name} {value!r}, found {found!r}; choose another --output")
    made = earlier.get("made_with", [])
    return {**asked, "made_with": made if all_done or made_with() in made else [*made, made_with()]}


def _answered(output: Path, rows: list[dict]) -> int:
    """How many of the rows a file has, from the first; a line that was cut is taken off. Raises ValueError for a file of
    others."""
    if not output.exists():
        return 0
    *lines, cut = output.read_text(encoding="utf-8").split("\n")
    for n, line in enumerate(lines):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict) or n >= len(rows) or row.pop("answers", None) is None or row != _plain(rows[n]):
            raise ValueError(f"{output}:{n + 1}: expected the answers to line {n + 1} of the questions, got others; remove it")
    if cut:
        output.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return len(lines)


def _plain(row: dict) -> dict:
    return {name: value for name, value in row.items() if name != "answers"}
