"""A trained system on disk: a plain PEFT adapter, and `agents.json` beside it with the agents and whose adapter it is."""

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffmas.agents.system import Agent, MultiAgentSystem
from diffmas.models.identity import model_fingerprint
from diffmas.models.parts import causal_lm_of

__all__ = ["AGENTS_FILE", "load", "load_adapter", "load_weights", "read_agents", "read_json", "save", "write_json"]

AGENTS_FILE = "agents.json"
REALIGN_FILE = "realign.safetensors"  # only for a learned map
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FORMAT = "diffmas-agents-1"
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what the same weights are scaled by


def read_json(file: Path):
    """What is in a file of JSON; raises ValueError naming it if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file}: expected this file, found none")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected whole JSON, got a damaged file ({error})") from error


def write_json(file: Path, data) -> None:
    """In one step: the file is whole or not there."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def adapters_of(model) -> dict[str, dict]:
    """Every PEFT adapter of a model by name, with what scales its weights."""
    configs = getattr(model, "peft_config", {})
    return {name: {key: getattr(config, key, None) for key in SCALE} for name, config in configs.items()}


def adapter_place(path: Path, name: str) -> Path:
    """Where PEFT writes an adapter of this name."""
    return path if name == "default" else path / name


def save(system, path) -> None:
    """Adapter first, agents.json last and in one step: a directory with agents.json is complete."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    if hasattr(system.model, "peft_config"):
        system.model.save_pretrained(str(path))
    if system.realign.mode == "learned":
        save_file({"weight": system.realign.weight.detach().cpu().contiguous()}, path / REALIGN_FILE)
    base = causal_lm_of(system.model)
    described = {
        "format": FORMAT, "base_model": base.config._name_or_path, "base_fingerprint": model_fingerprint(base),
        "adapters": adapters_of(system.model), **system.describe(),
    }  # fmt: skip
    write_json(path / AGENTS_FILE, described)


def _check(data, kinds: dict, where: str) -> None:
    """Raises ValueError unless `data` is an object of exactly these keys and kinds."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    if data.keys() != kinds.keys():
        missing, unknown = sorted(kinds.keys() - data.keys()), sorted(data.keys() - kinds.keys())
        raise ValueError(f"{where}: expected the keys {sorted(kinds)}, got none of {missing} and an unknown {unknown}")
    for key, kind in kinds.items():
        if not isinstance(data[key], int | float if kind is float else kind):
            raise ValueError(f"{where}: expected {key} of kind {getattr(kind, '__name__', kind)}, got {data[key]!r}")


def read_agents(path) -> dict:
    """The contents of agents.json; raises ValueError if there is none, or it is damaged or not as `save` writes it."""
    file = Path(path) / AGENTS_FILE
    if not file.is_file():
        raise ValueError(f"{path}: expected a directory with {AGENTS_FILE}, found none")
    described = read_json(file)
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else type(described).__name__
        raise ValueError(f"{file}: expected format {FORMAT}, got {found}")
    head = {"format": str, "base_model": str | None, "base_fingerprint": str, "adapters": dict, "agents": list}
    options = {k: v for k, v in get_type_hints(MultiAgentSystem.__init__).items() if k not in ("model", "tokenizer", "return")}
    _check(described, {**options, **head}, str(file))
    kinds = get_type_hints(Agent)
    for i, agent in enumerate(described["agents"]):
        _check(agent, {f.name: kinds[f.name] for f in fields(Agent)}, f"{file}: agents[{i}]")
    return described


def check_base(described: dict, model, path) -> None:
    mine = model_fingerprint(model)
    if described["base_fingerprint"] != mine:
        raise ValueError(
            f"{path}: expected agents of this base model (fingerprint {mine}), got those of "
            f"{described['base_model'] or 'another model'} (fingerprint {described['base_fingerprint']})"
        )


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file; raises ValueError naming it if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file}: expected a file of weights, found none")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got a damaged one ({error})") from error


def read_map(system, path: Path) -> torch.Tensor:
    """The learned map of a directory; raises ValueError if it is not of this system's shape."""
    file, shape = path / REALIGN_FILE, list(system.realign.weight.shape)
    read = read_weights(file)
    found = {key: list(value.shape) for key, value in read.items()}
    if found != {"weight": shape}:
        raise ValueError(f"{file}: expected weight of shape {shape}, got {found}")
    return read["weight"]


def load_weights(system, path) -> None:
    """Puts the adapter (and learned map) of a directory into a system that has them already, in place.

    Raises ValueError, before anything is changed, for a directory of another base model, other agents or options, or
    damaged weights.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    path = Path(path)
    described, mine = read_agents(path), json.loads(json.dumps(system.describe()))
    check_base(described, system.model, path)
    for key, value in mine.items():
        if described.get(key) != value:
            raise ValueError(f"{path / AGENTS_FILE}: expected {key} {value!r}, got {described.get(key)!r}")
    adapters = adapters_of(system.model)
    if described["adapters"] != adapters:
        raise ValueError(f"{path / AGENTS_FILE}: expected adapters {adapters}, got {described['adapters']}")
    read = {}
    for name in adapters:
        file = adapter_place(path, name) / WEIGHTS_FILE
        read[name] = read_weights(file)
        expected = get_peft_model_state_dict(system.model, adapter_name=name)
        shapes, found = ({k: list(v.shape) for k, v in d.items()} for d in (expected, read[name]))
        if shapes != found:
            key = sorted(k for k in shapes.keys() | found.keys() if shapes.get(k) != found.get(k))[0]
            raise ValueError(f"{file}: expected {key} of shape {shapes.get(key)}, got {found.get(key)}")
    learned = read_map(system, path) if system.realign.mode == "learned" else None
    for name, weights in read.items():
        set_peft_model_state_dict(system.model, weights, adapter_name=name)
    if learned is not None:
        with torch.no_grad():
            system.realign.weight.copy_(learned)


def load_adapter(path, model, trainable: bool = False):
    """`model` with the PEFT adapters that agents.json names; raises ValueError if one is missing, damaged or another."""
    from peft import PeftModel

    path, adapters = Path(path), read_agents(path)["adapters"]
    for name, expected in adapters.items():
        place = adapter_place(path, name)
        config = read_json(place / CONFIG_FILE)
        if (found := {key: config.get(key) for key in SCALE}) != expected:
            raise ValueError(f"{place / CONFIG_FILE}: expected the adapter of {AGENTS_FILE}, {expected}, got {found}")
        read_weights(place / WEIGHTS_FILE)  # PEFT's error for a damaged file does not name it
    for name in adapters:
        place = str(adapter_place(path, name))
        if hasattr(model, "peft_config"):
            model.load_adapter(place, name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, place, adapter_name=name, is_trainable=trainable)
    return model


def load(cls, path, model=None, tokenizer=None, **model_options):
    """See `MultiAgentSystem.from_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    described = read_agents(path)
    if hasattr(model, "peft_config"):
        raise ValueError(f"model: expected a base model without adapters, got one with {sorted(model.peft_config)}")
    name = model if isinstance(model, (str, os.PathLike)) else described["base_model"]
    if model is None or name is model:
        if not name:
            raise ValueError("model: expected a loaded model or a name, the agents file names none")
        model = AutoModelForCausalLM.from_pretrained(name, **model_options)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    check_base(described, model, path)
    model = load_adapter(path, model)
    head = ("format", "base_model", "base_fingerprint", "adapters", "agents")
    options = {k: v for k, v in described.items() if k not in head}
    try:
        system = cls(model, tokenizer, [Agent(**agent) for agent in described["agents"]], **options)
    except ValueError as error:
        raise ValueError(f"{Path(path) / AGENTS_FILE}: {error}") from error
    if system.realign.mode == "learned":
        with torch.no_grad():
            system.realign.weight.copy_(read_map(system, Path(path)))
    return system
