"""A trained system on disk: a plain PEFT adapter, and `agents.json` beside it with the agents and whose adapter it is."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from diffmas.identity import model_fingerprint
from diffmas.patch import causal_lm_of

__all__ = ["AGENTS_FILE", "load", "load_adapter", "load_weights", "read_agents", "save"]

AGENTS_FILE = "agents.json"
REALIGN_FILE = "realign.safetensors"  # only for a learned map
WEIGHTS_FILE = "adapter_model.safetensors"
FORMAT = "diffmas-agents-1"


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
        **system.describe(),
    }  # fmt: skip
    partial = path / (AGENTS_FILE + ".partial")
    partial.write_text(json.dumps(described, indent=2, ensure_ascii=False) + "\n")
    os.replace(partial, path / AGENTS_FILE)


def read_agents(path) -> dict:
    """The contents of agents.json; raises ValueError if there is none or it is damaged."""
    file = Path(path) / AGENTS_FILE
    if not file.is_file():
        raise ValueError(f"{path}: expected a directory with {AGENTS_FILE}, found none")
    try:
        described = json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: expected whole JSON, got a damaged file ({error})") from error
    if not isinstance(described, dict) or described.get("format") != FORMAT:
        found = described.get("format") if isinstance(described, dict) else type(described).__name__
        raise ValueError(f"{file}: expected format {FORMAT}, got {found}")
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
    read = {}
    for name in system.model.peft_config:
        file = (path if name == "default" else path / name) / WEIGHTS_FILE
        read[name] = read_weights(file)
        expected = get_peft_model_state_dict(system.model, adapter_name=name)
        shapes, found = ({k: list(v.shape) for k, v in d.items()} for d in (expected, read[name]))
        if shapes != found:
            key = sorted(k for k in shapes.keys() | found.keys() if shapes.get(k) != found.get(k))[0]
            raise ValueError(f"{file}: expected {key} of shape {shapes.get(key)}, got {found.get(key)}")
    learned = read_weights(path / REALIGN_FILE)["weight"] if system.realign.mode == "learned" else None
    for name, weights in read.items():
        set_peft_model_state_dict(system.model, weights, adapter_name=name)
    if learned is not None:
        with torch.no_grad():
            system.realign.weight.copy_(learned)


def load_adapter(path, model, trainable: bool = False):
    """`model` with the PEFT adapter (or adapters, one per role) of a directory."""
    from peft import PeftModel

    path = Path(path)
    for config in (*path.glob("adapter_config.json"), *path.glob("*/adapter_config.json")):
        read_weights(config.parent / WEIGHTS_FILE)  # PEFT's error for a damaged file does not name it
    if (path / "adapter_config.json").is_file():
        return PeftModel.from_pretrained(model, str(path), is_trainable=trainable)
    roles = sorted(p.parent.name for p in path.glob("*/adapter_config.json"))
    for role in roles:
        if hasattr(model, "peft_config"):
            model.load_adapter(str(path / role), role, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, str(path / role), adapter_name=role, is_trainable=trainable)
    return model


def load(cls, path, model=None, tokenizer=None, **model_options):
    """See `MultiAgentSystem.from_pretrained`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from diffmas.system import Agent

    described = read_agents(path)
    name = model if isinstance(model, (str, os.PathLike)) else described["base_model"]
    if model is None or name is model:
        if not name:
            raise ValueError("model: expected a loaded model or a name, the agents file names none")
        model = AutoModelForCausalLM.from_pretrained(name, **model_options)
    if tokenizer is None:
        tokenizer = AutoTokenizer.from_pretrained(name)
    check_base(described, model, path)
    model = load_adapter(path, model)
    agents = [Agent(**agent) for agent in described["agents"]]
    options = {k: v for k, v in described.items() if k not in ("format", "base_model", "base_fingerprint", "agents")}
    system = cls(model, tokenizer, agents, **options)
    if system.realign.mode == "learned":
        with torch.no_grad():
            system.realign.weight.copy_(read_weights(Path(path) / REALIGN_FILE)["weight"])
    return system
