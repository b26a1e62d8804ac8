"""agents.json: what it has to say, and whether it is of this model, class and team. Who reads it does not wait for torch."""

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, get_args, get_type_hints

from diffmas.agents.agent import Agent
from diffmas.agents.options import Options
from diffmas.json_file import read_json

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "AGENTS_FILE", "FORMAT", "HEAD", "adapters_of", "check_base", "check_class", "check_description", "check_kinds",
    "check_like", "check_same", "read_agents", "tokenizer_fingerprint", "unsaid",
]  # fmt: skip

AGENTS_FILE = "agents.json"
FORMAT, SAMPLED_FORMAT = "diffmas-agents-2", "diffmas-agents-1"  # the first one's base_fingerprint was a sampled one
OF_CLASS = ("class", "own_options")  # of `MultiAgentSystem.describe()`; None, which fits to any, where older versions wrote
HEAD = {
    "format": str, "base_model": str | None, "base_fingerprint": str, "trained_in_base": list, "adapters": dict,
    "tokenizer": str | None,
}  # fmt: skip
SCALE = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern")  # what PEFT multiplies the weights by
PROBE = "A text 12345.6 of\n\n  many  kinds: naïve, x² <b>, 汉字, é, \U0001f511."


def adapters_of(model: "nn.Module") -> dict[str, dict]:
    """The SCALE settings of every PEFT adapter of a model, by the adapter's name."""
    configs = getattr(model, "peft_config", {})
    return {name: {key: getattr(config, key, None) for key in SCALE} for name, config in configs.items()}


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
        later["low_rank"] = False
        return [{**later, **agent} if isinstance(agent, dict) else agent for agent in agents]

    own = described["own_options"]
    if isinstance(own, dict) and isinstance(own.get("roles"), list):  # agents of `diffmas.evaluation.Writers`
        described["own_options"] = {**own, "roles": filled(own["roles"])}
    # Where latent_only drops nothing, sinks change nothing.
    sinks = 0 if described.get("trace_content") == "latent_only" else Options.sinks
    later = {"sinks": sinks, "chat_options": None, "latent_grad_clip": None, "trained_in_base": [], "tokenizer": None}
    return {"others": {}, **later, **described, "agents": filled(described["agents"])}


def check_base(described: dict, model: "nn.Module", path) -> None:
    """Raises ValueError unless agents.json was written for this base model."""
    from diffmas.models.identity import model_fingerprint, sampled_fingerprint

    if described["format"] == SAMPLED_FORMAT:
        mine = sampled_fingerprint(model)
    else:
        mine = model_fingerprint(model, described["trained_in_base"])
    if described["base_fingerprint"] != mine:
        raise ValueError(
            f"{path}: expected agents of this base model (fingerprint {mine}), got those of "
            f"{described['base_model'] or 'another model'} (fingerprint {described['base_fingerprint']})"
        )


def check_like(file: Path, head: dict, model: "nn.Module", tokenizer) -> None:
    """Raises ValueError unless the adapters and the tokenizer in a file's HEAD are like these."""
    if head["tokenizer"] not in (None, mine := tokenizer_fingerprint(tokenizer)):
        raise ValueError(
            f"{file}: expected agents of this system's tokenizer and chat template (fingerprint {mine}), got those of others "
            f"(fingerprint {head['tokenizer']}), which stand beside it"
        )
    if head["adapters"] != (adapters := adapters_of(model)):
        raise ValueError(f"{file}: expected adapters {adapters}, got {head['adapters']}")


def unsaid(described: dict, key: str) -> bool:
    """Whether an older version wrote agents.json, which did not know this key of `OF_CLASS`."""
    return key in OF_CLASS and described[key] is None


def check_class(path, described: dict, expected: str) -> None:
    """Raises ValueError unless a directory, whose `read_agents` is `described`, is of this class of systems."""
    if described["class"] != expected and not unsaid(described, "class"):
        raise ValueError(
            f"{path}: expected a system of the class {expected}, got one of {described['class']}; load it by that class "
            f"(or change the name in {AGENTS_FILE}, if the class has moved)"
        )


def check_same(path, described: dict, expected: dict) -> None:
    """Raises ValueError naming the directory and the first option, or field of an agent, that is not as expected.

    described: of `read_agents`. expected: some of the keys of `MultiAgentSystem.describe()`.
    """
    for key, value in expected.items():
        if unsaid(described, key):
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
