"""Reads what `diffmas.agents.file.writing` wrote: into a model with such adapters, or with the adapters onto a base model."""

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffmas.agents.adapters import peft_wraps
from diffmas.agents.file.description import (
    AGENTS_FILE,
    SCALE,
    adapters_of,
    check_base,
    check_class,
    check_description,
    check_like,
    check_same,
    read_agents,
    unsaid,
)
from diffmas.json_file import read_json
from diffmas.models.load import load_base, load_tokenizer
from diffmas.models.local import gathered, say_features, spread_like

__all__ = [
    "CHOICES_FILE", "CONFIG_FILE", "MAP_FILE", "WEIGHTS_FILE", "adapter_directory", "add_adapter", "load_adapters",
    "load_model", "load_saved_tokenizer", "load_weights", "put_adapters", "read_adapters", "read_choices", "read_map",
    "read_weights",
]  # fmt: skip

MAP_FILE = "realign.safetensors"  # only for a learned map
CHOICES_FILE = "choices.safetensors"  # only where rows are chosen by what was learned
TOKENIZER_FILE = "tokenizer_config.json"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def adapter_directory(path: Path, name: str) -> Path:
    """The directory that PEFT writes an adapter of this name to."""
    return path if name == "default" else path / name


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file; raises ValueError naming it if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file}: expected a file of weights, found none")
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a whole safetensors file, got a damaged one ({error})") from error


def read_map(path, shape) -> Tensor:
    """The learned realignment map of a directory; raises ValueError if it is not of this shape."""
    file, shape = Path(path) / MAP_FILE, list(shape)
    read = read_weights(file)
    found = {key: list(value.shape) for key, value in read.items()}
    if found != {"weight": shape}:
        raise ValueError(f"{file}: expected weight of shape {shape}, got {found}")
    return read["weight"]


def read_choices(path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the edges of a directory's team have learned; raises ValueError if it is not like `like`."""
    if not like:
        return {}
    file = Path(path) / CHOICES_FILE
    read = read_weights(file)
    wanted, found = ({key: list(value.shape) for key, value in some.items()} for some in (like, read))
    if found != wanted:
        raise ValueError(f"{file}: expected weights {wanted}, got {found}")
    return read


def load_weights(
    path, model: nn.Module, tokenizer, description: dict, learned_map: nn.Parameter | None = None,
    choices: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Copies the adapters (learned map, choices) of a directory into a model that has such adapters already, in place.

    tokenizer: the model's. description: `MultiAgentSystem.describe()`, which agents.json must agree with. Raises ValueError,
    before anything is changed, for a directory of another base model or tokenizer, other agents or options, or damaged weights.
    """
    check_description(description)
    path = Path(path)
    described = read_agents(path)
    check_base(described, model, path)
    check_class(path, described, description["class"])
    for key, value in json.loads(json.dumps(description)).items():
        if described.get(key) != value and not unsaid(described, key):
            raise ValueError(f"{path / AGENTS_FILE}: expected {key} {value!r}, got {described.get(key)!r}")
    check_like(path / AGENTS_FILE, described, model, tokenizer)
    with gathered([p for p in (*model.parameters(), learned_map) if p is not None and p.requires_grad], True):
        read = read_adapters(path, model)
        new_map = None if learned_map is None else read_map(path, learned_map.shape)
        learned = read_choices(path, choices or {})
        put_adapters(model, read)
        if new_map is not None:
            with torch.no_grad():
                learned_map.copy_(spread_like(new_map, learned_map))
        for name, x in learned.items():
            choices[name].copy_(x)


def read_adapters(path: Path, model: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The weights of a directory's adapters, by name; raises ValueError unless they are like the model's."""
    if not (adapters := adapters_of(model)):
        return {}
    from peft import get_peft_model_state_dict

    read = {}
    for name in adapters:
        file = adapter_directory(path, name) / WEIGHTS_FILE
        read[name] = read_weights(file)
        expected = get_peft_model_state_dict(model, adapter_name=name)
        shapes, found = ({k: list(v.shape) for k, v in d.items()} for d in (expected, read[name]))
        if shapes != found:
            key = sorted(k for k in shapes.keys() | found.keys() if shapes.get(k) != found.get(k))[0]
            raise ValueError(f"{file}: expected {key} of shape {shapes.get(key)}, got {found.get(key)}")
    return read


def put_adapters(model: nn.Module, read: dict[str, dict[str, Tensor]]) -> None:
    """Copies weights of `read_adapters` into the model's adapters."""
    for name, weights in read.items():
        from peft import get_peft_model_state_dict, set_peft_model_state_dict

        mine = get_peft_model_state_dict(model, adapter_name=name)
        weights = {key: spread_like(x, mine[key]) for key, x in weights.items()}
        set_peft_model_state_dict(model, weights, adapter_name=name)


@peft_wraps()
def load_adapters(path, model: nn.Module, adapters: dict[str, dict], trainable: bool = False) -> nn.Module:
    """A PEFT model around `model` with the adapters that agents.json names.

    Raises ValueError if one is missing, damaged, or not scaled as agents.json says.
    """
    from peft import PeftModel

    path = Path(path)
    for name, expected in adapters.items():
        directory = adapter_directory(path, name)
        config = read_json(directory / CONFIG_FILE)
        if (found := {key: config.get(key) for key in SCALE}) != expected:
            raise ValueError(f"{directory / CONFIG_FILE}: expected the adapter of {AGENTS_FILE}, {expected}, got {found}")
        read_weights(directory / WEIGHTS_FILE)  # PEFT's error for a damaged file does not name it
    for name in adapters:
        directory = str(adapter_directory(path, name))
        if hasattr(model, "peft_config"):
            model.load_adapter(directory, name, is_trainable=trainable)
        else:
            model = PeftModel.from_pretrained(model, directory, adapter_name=name, is_trainable=trainable)
    return say_features(model)


@peft_wraps()
def add_adapter(path, model: nn.Module, name: str, expected: dict | None = None) -> nn.Module:
    """A PEFT model around `model`, which may be one already, with the one adapter of a directory under another name.

    expected: what its agents.json has to say, as in `check_same`. Raises ValueError, before anything is loaded, for a directory
    of another base model, of other agents or options than expected, with damaged files, or whose agents do not share one
    adapter.
    """
    from peft import PeftModel

    path, described = Path(path), read_agents(path)
    check_base(described, model, path)
    check_same(path, described, expected or {})
    if list(described["adapters"]) != ["default"]:
        raise ValueError(f"{path}: expected one adapter that all agents share, got {sorted(described['adapters'])}")
    read_json(path / CONFIG_FILE)
    read_weights(path / WEIGHTS_FILE)  # PEFT's error for a damaged file does not name it
    if not hasattr(model, "peft_config"):
        return PeftModel.from_pretrained(model, str(path), adapter_name=name)
    model.load_adapter(str(path), name)
    return model


def load_saved_tokenizer(path, **options):
    """The tokenizer of a directory that `save` wrote; None if an older version did. options: as in `load_model`."""
    from transformers import AutoTokenizer

    if not (Path(path) / TOKENIZER_FILE).is_file():
        return None
    options = {key: options[key] for key in ("trust_remote_code", "use_fast") if key in options}
    try:
        return AutoTokenizer.from_pretrained(str(path), **options)
    except Exception as error:  # of whatever kind: its files are damaged
        raise ValueError(f"{path}: expected the whole files of a tokenizer, got damaged ones ({error})") from error


def load_model(
    path, system_class: str, model=None, tokenizer=None, trainable: bool = False, **model_options
) -> tuple[dict, nn.Module, object]:  # fmt: skip
    """The contents of a directory's agents.json, its base model with the directory's adapters, and the tokenizer.

    system_class: its name. model: a loaded base model, a directory or hub name, or None for the one that agents.json
    names. tokenizer: by default the directory's. trainable: whether the adapters are. model_options: of
    `diffmas.models.load.load_model`. Raises ValueError for a file of another class or model, and for a model that has adapters.
    """
    described = read_agents(path)
    check_class(path, described, system_class)
    if hasattr(model, "peft_config"):
        raise ValueError(f"model: expected a base model without adapters, got one with {sorted(model.peft_config)}")
    name = model if isinstance(model, (str, os.PathLike)) else described["base_model"]
    if model is None or name is model:
        if not name:
            raise ValueError("model: expected a loaded model or a name, the agents file names none")
        model = load_base(name, **model_options)
    if tokenizer is None:
        tokenizer = load_saved_tokenizer(path, **model_options) or load_tokenizer(name, **model_options)
    check_base(described, model, path)
    return described, load_adapters(path, model, described["adapters"], trainable), tokenizer
