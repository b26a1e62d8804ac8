"""A team as a directory to give away: what `MultiAgentSystem.from_pretrained` reads, nothing else, and a model card."""

import os
import re
import shutil
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard, ModelCardData, try_to_load_from_cache
from huggingface_hub.utils import validate_repo_id

from diffmas.agents import file
from diffmas.agents.system import MultiAgentSystem
from diffmas.models.load import load_tokenizer

__all__ = ["check_push", "export", "push_to_hub"]

CARD = "README.md"
OPTIONS = ("realign", "trace_content", "positions", "sinks", "no_latents", "adapter_scope", "chat_template", "chat_options")


def export(team, out, base: str | None = None, overwrite: bool = False) -> Path:
    """Writes a team's adapters, learned realignment, tokenizer with its chat template, agents and a model card.

    team: a directory that `save_pretrained` or `diffmas train` wrote. out: a new directory, which is there whole or not at all.
    base: where others find the base model, by default where this team has it. overwrite: an earlier export, or an empty
    directory, may make room. No base model is loaded: that `base` is the right one shows where the team is. Returns out. Raises
    ValueError, before anything is written, for what is missing or damaged.

        >>> system.save_pretrained(directory / "team")
        >>> out = export(directory / "team", directory / "out", base="Qwen/Qwen3-0.6B")
        >>> MultiAgentSystem.from_pretrained(out, base_model).agents == system.agents
        True
    """
    team, out = Path(team), Path(out)
    described = file.read_agents(team)
    _check_place(team, out, overwrite)
    given = base or described["base_model"]
    if not given:
        raise ValueError(f"base: expected a name, since {team / file.AGENTS_FILE} has none")
    contents = {name: _read_adapter(team, name) for name in described["adapters"]}
    if described["realign"] == "learned":
        file.read_weights(team / file.MAP_FILE)
    tokenizer = file.load_saved_tokenizer(team) or load_tokenizer(described["base_model"] or given)
    described = {**described, "base_model": given}
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save_pretrained(str(partial))
    for name, config in contents.items():
        source, target = file.adapter_directory(team, name), file.adapter_directory(partial, name)
        target.mkdir(exist_ok=True)
        shutil.copyfile(source / file.WEIGHTS_FILE, target / file.WEIGHTS_FILE)
        file.write_json(target / file.CONFIG_FILE, {**config, "base_model_name_or_path": given})
    if described["realign"] == "learned":
        shutil.copyfile(team / file.MAP_FILE, partial / file.MAP_FILE)
    card(described, out.resolve().name).save(partial / CARD)
    file.write_json(partial / file.AGENTS_FILE, described)
    if out.is_dir():
        shutil.rmtree(out)
    os.replace(partial, out)
    return out


def _check_place(team: Path, out: Path, overwrite: bool) -> None:
    """Raises ValueError where something would be lost."""
    ours, there = team.resolve(), out.resolve()
    if ours == there or ours in there.parents or there in ours.parents:
        raise ValueError(f"out: expected a directory beside the team, got {out}")
    if not out.exists() or out.is_dir() and not any(out.iterdir()):
        return
    if not (overwrite and (out / file.AGENTS_FILE).is_file() and (out / CARD).is_file()):
        raise ValueError(f"out: expected a new directory, or overwrite with an earlier export, got {out}")


def _read_adapter(team: Path, name: str) -> dict:
    """The contents of an adapter's config; raises ValueError if that or its weights are missing or damaged."""
    directory = file.adapter_directory(team, name)
    file.read_weights(directory / file.WEIGHTS_FILE)
    return file.read_json(directory / file.CONFIG_FILE)


def _is_here(base: str) -> bool:
    """Whether a base model's name leads to a place of this machine."""
    return Path(base).expanduser().exists() or os.path.isabs(base)


def push_to_hub(out, repo: str, private: bool = True) -> str:
    """Uploads a directory of `export` into a model repository of the Hugging Face hub, which it makes if there is none; returns
    its address. Raises ValueError for a name that is none, and for a base model that others cannot load."""
    check_push(repo, file.read_agents(out)["base_model"])
    api = HfApi()
    address = api.create_repo(repo, private=private, exist_ok=True)
    api.upload_folder(repo_id=repo, folder_path=str(out), commit_message="A team of diffmas")
    return str(address)


def check_push(repo: str, base: str | None) -> None:
    """Raises ValueError for what `push_to_hub` refuses."""
    validate_repo_id(repo)
    if base is None or _is_here(base):
        raise ValueError(f"base: expected a hub name to push to {repo}, since others do not have {base!r}")


# ---- the card --------------------------------------------------------------------------------------------------------


def licence_of(base: str) -> dict:
    """What the card of a base model says of its licence, as far as it lies on this machine: license, license_name and
    license_link."""
    found = Path(base) / CARD if Path(base).is_dir() else None
    if found is None and re.fullmatch(r"[\w.-]+(/[\w.-]+)?", base) and not _is_here(base):
        found = try_to_load_from_cache(base, CARD)
    if not isinstance(found, (str, Path)) or not Path(found).is_file():
        return {}
    try:
        data = ModelCard.load(found).data.to_dict()
    except (ValueError, yaml.YAMLError):  # a README of another kind
        return {}
    return {key: data[key] for key in ("license", "license_name", "license_link") if data.get(key)}


def card(described: dict, title: str) -> ModelCard:
    """described: of `read_agents`."""
    base, licence = described["base_model"], licence_of(described["base_model"])
    data = ModelCardData(
        base_model=None if _is_here(base) else base, library_name="diffmas", pipeline_tag="text-generation",
        tags=["diffmas", "multi-agent", *(["peft"] if described["adapters"] else [])], **licence,
    )  # fmt: skip
    name = licence.get("license_name") or licence.get("license")
    parts = [
        f"# {title}",
        "A team of agents that share one language model and communicate through its key/value states (diffmas): each agent "
        "but the last takes latent steps, and the last one answers.",
        f"Base model: `{base}`. Adapters: {_adapters(described)}. Licence of the base model: "
        f"{name or 'not known where this was exported; see there'}.",
        "## Agents",
        *[_agent(agent, i == len(described["agents"]) - 1) for i, agent in enumerate(described["agents"])],
        "## Options",
        "\n".join(f"- {key}: `{described[key]}`" for key in OPTIONS),
        "## Use",
        _fenced(_loading(described, title), "python"),
        _fenced(f"diffmas serve {title}", "bash"),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _loading(described: dict, title: str) -> str:
    module, _, name = (described["class"] or MultiAgentSystem.class_name()).rpartition(".")
    module = "diffmas" if name == MultiAgentSystem.__name__ else module
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
    stop = f", stops when a step changes less than {agent['stop_change']}" if agent["stop_change"] and not last else ""
    reads = [_edge(edge) for edge in agent["reads"] or ()]
    T += f", reads {', '.join(reads) or 'nobody'}" if agent["reads"] is not None else ""
    T += f", at most {agent['max_rows']} rows" if agent["max_rows"] is not None else ""
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
