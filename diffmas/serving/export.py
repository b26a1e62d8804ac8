"""A team as a directory to give away: what `MultiAgentSystem.from_pretrained` reads, nothing else, and a model card."""

import os
import shutil
from pathlib import Path

from diffmas.agents import card, file
from diffmas.agents.selection import LEARNED
from diffmas.json_file import read_json, write_json
from diffmas.models.load import load_tokenizer

__all__ = ["export"]


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
    if described["others"]:
        raise ValueError(f"{team}: expected a team of one model, got others beside it: {sorted(described['others'])}")
    _check_place(team, out, overwrite)
    given = base or described["base_model"]
    if not given:
        raise ValueError(f"base: expected a name, since {team / file.AGENTS_FILE} has none")
    contents = {name: _read_adapter(team, name) for name in described["adapters"]}
    selects = [read.get("select") or {} for agent in described["agents"] for read in agent["reads"] or ()]
    learned = [file.MAP_FILE] * (described["realign"] == "learned")
    if described["class"] in (None, card.SYSTEM):
        chosen = any(select.get("by") == LEARNED for select in selects)
    else:  # which may read by a graph of its own, as `Stitched` does
        chosen = (team / file.CHOICES_FILE).is_file()
    learned += [file.CHOICES_FILE] * chosen
    for name in learned:
        file.read_weights(team / name)
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
        write_json(target / file.CONFIG_FILE, {**config, "base_model_name_or_path": given})
    for name in learned:
        shutil.copyfile(team / name, partial / name)
    if (team / card.FACTS).is_file():
        shutil.copyfile(team / card.FACTS, partial / card.FACTS)
    card.write(partial, described, out.resolve().name)
    write_json(partial / file.AGENTS_FILE, described)
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
    if not (overwrite and (out / file.AGENTS_FILE).is_file() and (out / card.CARD).is_file()):
        raise ValueError(f"out: expected a new directory, or overwrite with an earlier export, got {out}")


def _read_adapter(team: Path, name: str) -> dict:
    """The contents of an adapter's config; raises ValueError if that or its weights are missing or damaged."""
    directory = file.adapter_directory(team, name)
    file.read_weights(directory / file.WEIGHTS_FILE)
    return read_json(directory / file.CONFIG_FILE)
