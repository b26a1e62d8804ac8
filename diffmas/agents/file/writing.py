"""Writes a trained system: a plain PEFT adapter, the tokenizer with its chat template, agents.json, and a model card."""

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from diffmas.agents import card
from diffmas.agents.file.description import (
    AGENTS_FILE,
    FORMAT,
    adapters_of,
    check_description,
    tokenizer_fingerprint,
)
from diffmas.agents.file.reading import CHOICES_FILE, MAP_FILE
from diffmas.json_file import write_json
from diffmas.models.adapted import base_weights, trained_in_base
from diffmas.models.identity import model_fingerprint
from diffmas.models.local import first_of, shared, whole
from diffmas.models.parts import causal_lm_of

__all__ = ["save", "save_model"]


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """What PEFT saves, whole, where processes share the weights; None where it finds that itself."""
    if not shared(model):
        return None
    base = {id(x) for x in base_weights(model).values() if not x.requires_grad}
    return {name: whole(x) for name, x in model.state_dict(keep_vars=True).items() if id(x) not in base}


def save(
    path, model: nn.Module, tokenizer, description: dict, learned_map: Tensor | None = None,
    choices: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Writes a directory that `read_agents` and `load_model` read.

    model: with or without PEFT adapters. tokenizer: its. description: `MultiAgentSystem.describe()`. learned_map: [hidden,
    hidden] or None. choices: what edges have learned, by name. agents.json comes last and in one step: a directory that has it
    is complete. Where several processes share the weights all of them have to call, and the first one writes.
    """
    check_description(description)
    path = Path(path)
    head = save_model(path, model, tokenizer)
    learned_map = None if learned_map is None else whole(learned_map)
    if not first_of(model):
        return
    if learned_map is not None:
        save_file({"weight": learned_map.cpu().contiguous()}, path / MAP_FILE)
    if choices:
        save_file({name: x.cpu().contiguous() for name, x in choices.items()}, path / CHOICES_FILE)
    described = {**head, **description}
    (path / card.FACTS).unlink(missing_ok=True)  # of the weights that were there
    card.write(path, described)
    write_json(path / AGENTS_FILE, described)


def save_model(path: Path, model: nn.Module, tokenizer) -> dict:
    """Writes the adapters and the tokenizer; returns what HEAD lists of them, which names the model."""
    adapters, trained = adapter_state_dict(model), sorted(trained_in_base(model))
    fingerprint = model_fingerprint(model, trained)
    if first_of(model):
        path.mkdir(parents=True, exist_ok=True)
        tokenizer.save_pretrained(str(path))
        if hasattr(model, "peft_config"):
            with card.kept(path):
                model.save_pretrained(str(path), state_dict=adapters)
    return {
        "format": FORMAT, "base_model": causal_lm_of(model).config._name_or_path,
        "base_fingerprint": fingerprint, "trained_in_base": trained, "adapters": adapters_of(model),
        "tokenizer": tokenizer_fingerprint(tokenizer),
    }  # fmt: skip
