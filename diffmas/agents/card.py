"""The model card of a team's directory: README.md, from its agents.json and from what is known of its training and results.

card.json has the facts that agents.json does not: {"data": {...}, "training": {...}, "metrics": [...], "made_with": {...}}
(`diffmas.agents.facts`). What a person wrote into README.md outside of the marks stays, in any encoding.
"""

import json
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache

__all__ = ["CARD", "FACTS", "contents", "is_here", "kept", "licence_of", "read_facts", "write"]

CARD, FACTS = "README.md", "card.json"
BEGIN, END = "<!-- diffmas: begin -->", "<!-- diffmas: end -->"
OPTIONS = ("realign", "trace_content", "positions", "sinks", "no_latents", "adapter_scope", "chat_template", "chat_options")
SYSTEM = "diffmas.agents.system.MultiAgentSystem"


def write(path: Path, described: dict, title: str | None = None) -> None:
    """Writes the card of a directory, or warns why it cannot: a team is whole without. described: of
    `diffmas.agents.file.read_agents`. title: by default the directory's name. A card that somebody wrote alone stays."""
    try:
        _write(path, described, title)
    except (OSError, ValueError) as error:
        warnings.warn(f"{path / CARD}: the model card was not written: {error}", stacklevel=2)


def _write(path: Path, described: dict, title: str | None) -> None:
    file = path / CARD
    before = file.read_text(encoding="utf-8", errors="surrogateescape") if file.is_file() else None
    data, text = contents(described, title or path.resolve().name, read_facts(path))
    if before is not None and BEGIN in before and END in before:
        text = before[: before.index(BEGIN)] + text + before[before.index(END) + len(END) :]
    elif before is not None and "library_name: peft" not in before:  # PEFT's own card says nothing of the team
        text = before
    else:
        text = f"---\n{data.to_yaml()}\n---\n\n{text}\n"
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text, encoding="utf-8", errors="surrogateescape")
    os.replace(partial, file)


@contextmanager
def kept(path: Path) -> Iterator[None]:
    """Others may write a card there meanwhile, such as PEFT, which fails at one that it cannot read; then it is as it was."""
    file, aside = path / CARD, path / f"{CARD}.kept"
    if file.is_file() and not aside.is_file():  # one that is there is of whoever did not come to the end
        os.replace(file, aside)
    try:
        yield
    finally:
        if aside.is_file():
            os.replace(aside, file)
        else:
            file.unlink(missing_ok=True)


def read_facts(path) -> dict:
    """What card.json says; nothing where there is none, or a damaged one."""
    try:
        facts = json.loads((Path(path) / FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return facts if isinstance(facts, dict) else {}


def is_here(base: str) -> bool:
    """Whether a base model's name leads to a place of this machine."""
    return Path(base).expanduser().exists() or os.path.isabs(base)


def licence_of(base: str) -> dict:
    """What the card of a base model says of its licence, as far as it lies on this machine: license, license_name and
    license_link."""
    if not base:
        return {}
    try:
        found = Path(base) / CARD if Path(base).is_dir() else None
        if found is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not is_here(base):
            found = try_to_load_from_cache(base, CARD)
        if not isinstance(found, (str, Path)) or not Path(found).is_file():
            return {}
        data = ModelCard.load(found).data.to_dict()
    except (OSError, ValueError, yaml.YAMLError):  # no name that the hub has, or a README of another kind
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def contents(described: dict, title: str, facts: dict | None = None) -> tuple[ModelCardData, str]:
    """Metadata and text of a card. described: of `diffmas.agents.file.read_agents`. facts: of card.json."""
    base = described["base_model"] or "not known"
    licence, elsewhere = licence_of(described["base_model"]), described["base_model"] and not is_here(base)
    data = ModelCardData(
        base_model=base if elsewhere else None, library_name="diffmas", pipeline_tag="text-generation",
        tags=["diffmas", "multi-agent", *(["peft"] if described["adapters"] else [])], **licence,
    )  # fmt: skip
    name = licence.get("license_name") or licence.get("license")
    parts = [
        BEGIN,
        f"# {title}",
        f"A team of agents that {_models(described)} (diffmas): {_turns(described['agents'])}.",
        f"Base model: `{base}`. Adapters: {_adapters(described)}. Licence of the base model: "
        f"{name or 'not known where this was saved; see there'}.",
        "## Agents",
        *[_agent(agent, i == len(described["agents"]) - 1) for i, agent in enumerate(described["agents"])],
        "## Options",
        "\n".join(f"- {key}: `{described[key]}`" for key in OPTIONS),
        *_known(facts or {}),
        "## Use",
        f"Where this directory is (from the hub: `hf download OWNER/NAME --local-dir {title}`) and diffmas is installed:",
        _fenced(_loading(described, title), "python"),
        _fenced(f"diffmas serve {title}", "bash"),
        END,
    ]
    return data, "\n\n".join(parts)


def _models(described: dict) -> str:
    if not described["others"]:
        return "share one language model and communicate through its key/value states"
    names = ", ".join(f"`{name}`" for name in described["others"])
    return f"communicate through key/value states of its base model, to which what other models ({names}) make is brought"


def _turns(agents: list[dict]) -> str:
    """What the agents before the last one do, and the last one."""
    if len(agents) == 1:
        return "one agent, which answers"
    kinds = {(agent["latent_steps"] != 0, agent["max_message_tokens"] is not None) for agent in agents[:-1]}
    verbs = [verb for n, verb in enumerate(("takes latent steps", "writes text")) if any(kind[n] for kind in kinds)]
    alike = " and ".join(verbs) or "hands on its prompt"
    does = f"each agent but the last {alike}" if len(kinds) == 1 else "what each does before the last one is said below"
    return f"{does}, and the last one answers"


def _known(facts: dict) -> list[str]:
    """Sections of what card.json knows."""
    parts = []
    for head, key in (("Data", "data"), ("Training", "training"), ("Made with", "made_with")):
        if facts.get(key):
            parts += [f"## {head}", "\n".join(f"- {name.replace('_', ' ')}: {_shown(x)}" for name, x in facts[key].items())]
    if metrics := facts.get("metrics"):
        lines = ["| data | method | right, % | 95 % interval | questions | samples | seed |", "|---|---|---|---|---|---|---|"]
        for m in metrics:
            interval = f"[{100 * m['low']:.1f}, {100 * m['high']:.1f}]"
            cells = (m["data"], m["method"], f"{100 * m['accuracy']:.1f}", interval, m["questions"], m["samples"], m["seed"])
            lines.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
        parts += ["## Results", "\n".join(lines), "Wilson's intervals over questions."]
    return parts


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {x}" for name, x in value.items())
    return "not known" if value is None else str(value)


def _loading(described: dict, title: str) -> str:
    module, _, name = (described["class"] or SYSTEM).rpartition(".")
    if f"{module}.{name}" == SYSTEM:
        module = "diffmas"
    elif module.startswith("diffmas.evaluation."):  # where all of its classes are, whatever the file
        module = "diffmas.evaluation"
    fields = "{" + ", ".join(f'"{field}": "..."' for field in _fields(described)) + "}"
    return f"from {module} import {name}\n\nteam = {name}.from_pretrained({title!r}).eval()\nprint(team.generate([{fields}]))"


def _fields(described: dict) -> list[str]:
    """Of a question."""
    found: dict[str, None] = {}
    for agent in described["agents"]:
        found |= dict.fromkeys(re.findall(r"(?<!\{)\{(\w+)", agent["prompt"]))
        found |= {agent["latent_steps"]: None} if isinstance(agent["latent_steps"], str) else {}
    return list(found)


def _adapters(described: dict) -> str:
    kinds = [f"{name} (r = {scale['r']}, alpha = {scale['lora_alpha']})" for name, scale in described["adapters"].items()]
    return ", ".join(kinds) or "none"


def _agent(agent: dict, last: bool) -> str:
    T = "answers" if last else f"T = {agent['latent_steps']}"
    T += f" in {agent['passes']} passes" if agent["passes"] and not last else ""
    T += f", then writes up to {agent['max_message_tokens']} tokens" if agent["max_message_tokens"] and not last else ""
    stop = f", stops when a step changes less than {agent['stop_change']}" if agent["stop_change"] and not last else ""
    reads = [_edge(edge) for edge in agent["reads"] or ()]
    T += f", reads {', '.join(reads) or 'nobody'}" if agent["reads"] is not None else ""
    T += f", at most {agent['max_rows']} rows" if agent["max_rows"] is not None else ""
    T += f", read in {agent['quantized']}" if agent["quantized"] is not None and not last else ""
    T += ", on the bare model, read with each reader's adapter" if agent["low_rank"] else ""
    T += f", of the model {agent['model']}" if agent["model"] is not None else ""
    texts = [("System message", agent["system"]), ("Prompt", agent["prompt"])]
    return "\n\n".join(
        [f"### {agent['name']}: {T}{stop}", *(f"{what}:\n\n{_fenced(text, 'text')}" for what, text in texts if text)]
    )


def _edge(edge: dict) -> str:
    how = [edge["positions"]] * (edge["positions"] is not None)
    how += [f"{name} {value}" for name, value in edge.get("select", {}).items()]
    return edge["agent"] + (f" ({', '.join(how)})" if how else "")


def _fenced(text: str, language: str) -> str:
    """A text as it is, whatever it holds."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"
