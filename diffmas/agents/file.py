"""A trained system on disk: a plain PEFT adapter, the tokenizer with its chat template, and `agents.json` beside them with the
agents, the system's class and the adapter's base model.

Only plain data goes in and out: paths, models, dicts. `MultiAgentSystem` writes and builds itself with these functions.
"""

import hashlib
import json
import os
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffmas.agents import card
from diffmas.agents.agent import Agent
from diffmas.agents.options import Options
from diffmas.models.adapted import base_weights, trained_in_base
from diffmas.models.identity import model_fingerprint, sampled_fingerprint
from diffmas.models.load import load_base, load_tokenizer
from diffmas.models.local import first_of, gathered, say_features, shared, spread_like, whole
from diffmas.models.parts import causal_lm_of

__all__ = [
    "AGENTS_FILE", "HEAD", "add_adapter", "check_base", "check_class", "check_description", "check_kinds", "check_like",
    "check_same", "load_adapters", "load_model", "load_saved_tokenizer", "load_weights", "put_adapters", "read_adapters",
    "read_agents", "read_json", "read_map", "read_weights", "save", "save_model", "write_json",
]  # fmt: skip

AGENTS_FILE = "agents.json"
MAP_FILE = "realign.safetensors"  # only for a learned map
TOKENIZER_FILE = "tokenizer_config.json"
CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
FORMAT, SAMPLED_FORMAT = "diffmas-agents-2", "diffmas-agents-1"  # the first one's base_fingerprint was a sampled one
OF_CLASS = ("class", "own_options")  # of `MultiAgentSystem.describe()`; None, which fits to any, where older versions wrote
HEAD = {
    "format": str, "base_model": str | None, "base_fingerprint": str, "trained_in_base": list, "adapters": dict,
    "tokenizer": str | None,
}  # fmt: skip
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what PEFT multiplies the weights by


def read_json(file: Path):
    """The contents of a JSON file; raises ValueError naming the file if it is missing or damaged."""
    if not file.is_file():
        raise ValueError(f"{file}: expected this file, found none")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected whole JSON, got a damaged file ({error})") from error


def write_json(file: Path, data) -> None:
    """Writes JSON in one step: a crash leaves the whole file or none."""
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, file)


def adapters_of(model: nn.Module) -> dict[str, dict]:
    """The SCALE settings of every PEFT adapter of a model, by the adapter's name."""
    configs = getattr(model, "peft_config", {})
    return {name: {key: getattr(config, key, None) for key in SCALE} for name, config in configs.items()}


def adapter_directory(path: Path, name: str) -> Path:
    """The directory that PEFT writes an adapter of this name to."""
    return path if name == "default" else path / name


PROBE = "A text 12345.6 of\n\n  many  kinds: naïve, x² <b>, 汉字, é, \U0001f511."


def tokenizer_fingerprint(tokenizer) -> str:
    """Hash of what a tokenizer makes of text: its vocabulary, template and end-of-sequence token, and how it cuts PROBE."""
    made = {
        "vocabulary": sorted(tokenizer.get_vocab().items()), "template": getattr(tokenizer, "chat_template", None),
        "end": tokenizer.eos_token_id, "probe": list(tokenizer(PROBE)["input_ids"]),
    }  # fmt: skip
    return hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()[:32]


def check_description(description: dict) -> None:
    """Raises ValueError for an agent of `MultiAgentSystem.describe()` that a file cannot hold."""
    for agent in description["agents"]:
        if callable(agent["latent_steps"]):
            raise ValueError(
                f"agent {agent['name']!r}: latent_steps: expected an integer or the name of a field, which can be saved, got a "
                "function"
            )


def adapter_state_dict(model: nn.Module) -> dict[str, Tensor] | None:
    """What PEFT saves, whole, where processes share the weights; None where it finds that itself."""
    if not shared(model):
        return None
    base = {id(x) for x in base_weights(model).values() if not x.requires_grad}
    return {name: whole(x) for name, x in model.state_dict(keep_vars=True).items() if id(x) not in base}


def save(path, model: nn.Module, tokenizer, description: dict, learned_map: Tensor | None = None) -> None:
    """Writes a directory that `read_agents` and `load_model` read.

    model: with or without PEFT adapters. tokenizer: its. description: `MultiAgentSystem.describe()`. learned_map: [hidden,
    hidden] or None. agents.json comes last and in one step: a directory that has it is complete. Where several processes share
    the weights all of them have to call, and the first one writes.
    """
    check_description(description)
    path = Path(path)
    head = save_model(path, model, tokenizer)
    learned_map = None if learned_map is None else whole(learned_map)
    if not first_of(model):
        return
    if learned_map is not None:
        save_file({"weight": learned_map.cpu().contiguous()}, path / MAP_FILE)
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


def check_kinds(data, kinds: dict, where: str) -> None:
    """Raises ValueError unless `data` is an object of exactly these keys and kinds."""
    if not isinstance(data, dict):
        raise ValueError(f"{where}: expected an object, got {type(data).__name__}")
    if data.keys() != kinds.keys():
        missing, unknown = sorted(kinds.keys() - data.keys()), sorted(data.keys() - kinds.keys())
        raise ValueError(f"{where}: expected the keys {sorted(kinds)}, got none of {missing} and an unknown {unknown}")
    for key, kind in kinds.items():
        if not isinstance(data[key], kind | int if float in (kind, *get_args(kind)) else kind):
            raise ValueError(f"{where}: expected {key} of kind {getattr(kind, '__name__', kind)}, got {data[key]!r}")


def read_agents(path) -> dict:
    """The contents of agents.json; raises ValueError if there is none, or it is damaged or not as `save` writes it."""
    file = Path(path) / AGENTS_FILE
    if not file.is_file():
        raise ValueError(f"{path}: expected a directory with {AGENTS_FILE}, found none")
    described = read_json(file)
    found = described.get("format") if isinstance(described, dict) else type(described).__name__
    if found not in (FORMAT, SAMPLED_FORMAT):
        raise ValueError(f"{file}: expected format {FORMAT}, got {found}")
    described = _with_later_options(described)
    team = {"agents": list, "class": str | None, "own_options": dict | None, "others": dict}
    check_kinds(described, {**HEAD, **team, **get_type_hints(Options)}, str(file))
    kinds = get_type_hints(Agent)
    for i, agent in enumerate(described["agents"]):
        check_kinds(agent, {f.name: kinds[f.name] for f in fields(Agent)}, f"{file}: agents[{i}]")
    return described


def _with_later_options(described: dict) -> dict:
    """With the options that its diffmas did not know, at what it did without them."""
    if not isinstance(described.get("agents"), list):
        return described
    described = {**dict.fromkeys(OF_CLASS), **described}

    def filled(agents: list) -> list:
        names = ("stop_change", "role", "passes", "grad_passes", "reads", "max_rows", "max_rows_by", "model")
        later = dict.fromkeys((*names, "max_message_tokens", "message_temperature", "rounds", "later_prompt", "quantized"))
        return [{**later, **agent} if isinstance(agent, dict) else agent for agent in agents]

    own = described["own_options"]
    if isinstance(own, dict) and isinstance(own.get("roles"), list):  # agents of `diffmas.evaluation.Writers`
        described["own_options"] = {**own, "roles": filled(own["roles"])}
    # Where latent_only drops nothing, sinks change nothing.
    sinks = 0 if described.get("trace_content") == "latent_only" else Options.sinks
    later = {"sinks": sinks, "chat_options": None, "latent_grad_clip": None, "trained_in_base": [], "tokenizer": None}
    return {"others": {}, **later, **described, "agents": filled(described["agents"])}


def check_base(described: dict, model: nn.Module, path) -> None:
    """Raises ValueError unless agents.json was written for this base model."""
    if described["format"] == SAMPLED_FORMAT:
        mine = sampled_fingerprint(model)
    else:
        mine = model_fingerprint(model, described["trained_in_base"])
    if described["base_fingerprint"] != mine:
        raise ValueError(
            f"{path}: expected agents of this base model (fingerprint {mine}), got those of "
            f"{described['base_model'] or 'another model'} (fingerprint {described['base_fingerprint']})"
        )


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


def load_weights(path, model: nn.Module, tokenizer, description: dict, learned_map: nn.Parameter | None = None) -> None:
    """Copies the adapters (and learned map) of a directory into a model that has such adapters already, in place.

    tokenizer: the model's. description: `MultiAgentSystem.describe()`, which agents.json must agree with. Raises ValueError,
    before anything is changed, for a directory of another base model or tokenizer, other agents or options, or damaged weights.
    """
    check_description(description)
    path = Path(path)
    described = read_agents(path)
    check_base(described, model, path)
    check_class(path, described, description["class"])
    for key, value in json.loads(json.dumps(description)).items():
        if described.get(key) != value and not _unsaid(described, key):
            raise ValueError(f"{path / AGENTS_FILE}: expected {key} {value!r}, got {described.get(key)!r}")
    check_like(path / AGENTS_FILE, described, model, tokenizer)
    with gathered([p for p in (*model.parameters(), learned_map) if p is not None and p.requires_grad], True):
        read = read_adapters(path, model)
        new_map = None if learned_map is None else read_map(path, learned_map.shape)
        put_adapters(model, read)
        if new_map is not None:
            with torch.no_grad():
                learned_map.copy_(spread_like(new_map, learned_map))


def check_like(file: Path, head: dict, model: nn.Module, tokenizer) -> None:
    """Raises ValueError unless the adapters and the tokenizer in a file's HEAD are like these."""
    if head["tokenizer"] not in (None, mine := tokenizer_fingerprint(tokenizer)):
        raise ValueError(
            f"{file}: expected agents of this system's tokenizer and chat template (fingerprint {mine}), got those of others "
            f"(fingerprint {head['tokenizer']}), which stand beside it"
        )
    if head["adapters"] != (adapters := adapters_of(model)):
        raise ValueError(f"{file}: expected adapters {adapters}, got {head['adapters']}")


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


def _unsaid(described: dict, key: str) -> bool:
    return key in OF_CLASS and described[key] is None


def check_class(path, described: dict, expected: str) -> None:
    """Raises ValueError unless a directory, whose `read_agents` is `described`, is of this class of systems."""
    if described["class"] != expected and not _unsaid(described, "class"):
        raise ValueError(
            f"{path}: expected a system of the class {expected}, got one of {described['class']}; load it by that class "
            f"(or change the name in {AGENTS_FILE}, if the class has moved)"
        )


def check_same(path, described: dict, expected: dict) -> None:
    """Raises ValueError naming the directory and the first option, or field of an agent, that is not as expected.

    described: of `read_agents`. expected: some of the keys of `MultiAgentSystem.describe()`.
    """
    for key, value in expected.items():
        if _unsaid(described, key):
            continue
        found, of = described[key], ""
        if key == "agents" and described["adapter_scope"] != "per_role":  # where roles mean nothing
            value, found = ([{**agent, "role": None} for agent in agents] for agents in (value, found))
        if key == "agents" and value != found:
            pairs = list(zip(value, found))
            value, found = ([agent["name"] for agent in agents] for agents in (value, found))
            if value == found:
                of, key, value, found = next(
                    (f" of agent {a['name']!r}", k, a[k], b[k]) for a, b in pairs for k in a if a[k] != b[k]
                )
        if value != found:
            raise ValueError(f"{path}: expected {key} {value!r}{of}, got {found!r}")


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
