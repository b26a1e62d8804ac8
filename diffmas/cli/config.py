"""config.yaml: everything about a run, as dataclasses; what does not fit is refused by name.

    model: Qwen/Qwen3-0.6B
    agents:
      - {name: planner, prompt: "Plan how to answer: {question}", latent_steps: 10}
      - {name: solver, prompt: "Answer: {question}"}
    data: {train: train.jsonl, validation_fraction: 0.1}

`Config` lists the keys, `load` reads a file. Paths in a file are relative to the file.
"""

import contextlib
import difflib
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from diffmas.agents.system import Agent

__all__ = ["Config", "build_model", "build_system", "load", "read_data", "training_arguments"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class System:
    """Options of `MultiAgentSystem`, by its names and defaults; temperature is that of soft_token."""

    realign: str = "ridge"
    grad_scope: str = "full"
    trace_content: str = "all"
    last_k: int | None = None
    adapter_scope: str = "shared"
    no_latents: str = "prompt"
    positions: str = "keep"
    chat_template: bool | None = None
    temperature: float = 1.0


@dataclass
class Lora:
    """PEFT's LoraConfig; target_modules: "all-linear" or names."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class Data:
    """JSON lines. validation: a file; or validation_fraction of the training rows, drawn with seed."""

    train: str | None = None
    validation: str | None = None
    validation_fraction: float | None = None
    seed: int = 0


@dataclass
class Generation:
    """Decoding, by the names of `MultiAgentSystem.generate`."""

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    stop: list[str] | None = None


@dataclass
class Evaluation:
    """data: JSON lines (data.validation by default). methods: of single, text, latent_mas, diffmas. extract, match: see
    `diffmas.evaluation.Scorer`. limit: the first rows only."""

    data: str | None = None
    methods: list[str] = field(default_factory=lambda: ["single", "text", "latent_mas", "diffmas"])
    samples: int = 1
    batch_size: int = 8
    max_message_tokens: int = 256
    extract: str = "all"
    match: str = "exact"
    limit: int | None = None


METHODS = ("single", "text", "latent_mas", "diffmas")


@dataclass
class Config:
    """model: a hub name or a directory. dtype: of the weights. training: any fields of transformers' TrainingArguments
    but output_dir; what is not given is the paper's (`default_arguments`). early_stopping_patience: evaluations."""

    model: str
    agents: list[Agent]
    output_dir: str = "diffmas-output"
    dtype: str = "auto"
    system: System = field(default_factory=System)
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    training: dict = field(default_factory=dict)
    early_stopping_patience: int | None = None
    generation: Generation = field(default_factory=Generation)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        if not self.agents:
            raise ValueError("agents: expected at least one agent, got an empty list")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected one of {DTYPES}, got {self.dtype!r}")
        if self.data.validation and self.data.validation_fraction is not None:
            raise ValueError("data.validation_fraction: expected it alone, got it together with data.validation")
        if unknown := [m for m in self.evaluation.methods if m not in METHODS]:
            raise ValueError(f"evaluation.methods: expected some of {METHODS}, got {unknown[0]!r}")
        if self.early_stopping_patience is not None and not (self.data.validation or self.data.validation_fraction):
            raise ValueError(
                "early_stopping_patience: expected data.validation or data.validation_fraction with it, got neither"
            )


# ---- reading ---------------------------------------------------------------------------------------------------------


def _unknown(key: str, known, where: str) -> ValueError:
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else ""
    return ValueError(f"{where}{key}: expected one of {sorted(known)}, got an unknown key{hint}")


def _describe(kind) -> str:
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind))
    if is_dataclass(kind):
        return "a mapping"
    return "null" if kind is type(None) else str(kind) if typing.get_args(kind) else kind.__name__


def _value(value, kind, where: str):
    """`value` as `kind`; numbers written as 5e-5 are strings in YAML 1.1."""
    origin = typing.get_origin(kind)
    options = typing.get_args(kind) if origin in (typing.Union, types.UnionType) else (kind,)
    for option in options:
        base = typing.get_origin(option) or option
        if is_dataclass(base) and isinstance(value, dict):
            return _build(base, value, where + ".")
        if base is list and isinstance(value, list):
            item = typing.get_args(option)
            return [_value(v, item[0], f"{where}[{i}]") for i, v in enumerate(value)] if item else value
        if base is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            with contextlib.suppress(ValueError):
                return float(value)
        elif isinstance(base, type) and isinstance(value, base) and isinstance(value, bool) == (base is bool):
            return value
    raise ValueError(f"{where}: expected {_describe(kind)}, got {value!r}")


def _build(cls, data: dict, where: str = ""):
    kinds, known = typing.get_type_hints(cls), {f.name: f for f in fields(cls)}
    if not isinstance(data, dict):
        raise ValueError(f"{where or 'config'}: expected a mapping, got {type(data).__name__}")
    for key in data:
        if key not in known:
            raise _unknown(key, known, where)
    for name, f in known.items():
        if name not in data and f.default is MISSING and f.default_factory is MISSING:
            raise ValueError(f"{where}{name}: expected a value, got none")
    return cls(**{key: _value(value, kinds[key], where + key) for key, value in data.items()})


def load(path) -> Config:
    """The config of a YAML file, its paths made relative to the file. Raises ValueError that starts with the file and
    names the key, what was expected and what is there; FileNotFoundError without the file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a config file, found none")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got {error}") from error
    try:
        config = _build(Config, data if data is not None else {})
        training_fields(config.training)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    near = lambda name: str(path.parent / name) if name else name  # noqa: E731
    config.data.train, config.data.validation = near(config.data.train), near(config.data.validation)
    config.evaluation.data, config.output_dir = near(config.evaluation.data), near(config.output_dir)
    if (path.parent / config.model).is_dir():
        config.model = str((path.parent / config.model).resolve())  # agents.json names it, to be found from anywhere
    return config


# ---- building --------------------------------------------------------------------------------------------------------


def training_fields(given: dict) -> dict:
    """The `training` section, checked against TrainingArguments; numbers become what its fields are."""
    from transformers import TrainingArguments

    kinds = typing.get_type_hints(TrainingArguments)
    known = {f.name for f in fields(TrainingArguments) if f.init} - {"output_dir"}
    checked = {}
    for key, value in given.items():
        if key == "output_dir":
            raise ValueError("training.output_dir: expected it at the top level as output_dir, got it here")
        if key not in known:
            raise _unknown(key, known, "training.")
        kind = kinds[key]
        simple = [k for k in (typing.get_args(kind) or (kind,)) if k in (bool, int, float, str, dict, list, type(None))]
        if len(simple) == len(typing.get_args(kind) or (kind,)):  # other kinds are transformers' to check
            value = _value(value, kind, f"training.{key}") if value is not None or type(None) in simple else value
        checked[key] = value
    return checked


def training_arguments(config: Config):
    """TrainingArguments: the paper's settings, evaluation each epoch if there is validation data, and the given ones."""
    from diffmas.training import default_arguments

    given = training_fields(config.training)
    if config.data.validation or config.data.validation_fraction:
        given = {"eval_strategy": "epoch", **given}
    return default_arguments(config.output_dir, **given)


def build_model(config: Config, device: str | None = None):
    """The base model and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(config.model, dtype=config.dtype)
    return model.to(device) if device else model, AutoTokenizer.from_pretrained(config.model)


def build_system(config: Config, adapter: bool = True, device: str | None = None):
    """The system that a config describes; adapter: with a new LoRA adapter (one per role if it says so)."""
    from diffmas.agents.system import MultiAgentSystem
    from diffmas.training import add_lora, lora_config

    model, tokenizer = build_model(config, device)
    options = dict(vars(config.system))
    if adapter:
        model = add_lora(model, config.agents, config.system.adapter_scope, lora_config(**vars(config.lora)))
    else:
        options["adapter_scope"] = "shared"
    return MultiAgentSystem(model, tokenizer, config.agents, **options)


def read_data(config: Config) -> tuple[list[dict], list[dict] | None]:
    """Training and validation rows; the latter None without any."""
    from diffmas.training.data import read_jsonl, split

    if not config.data.train:
        raise ValueError("data.train: expected a file of JSON lines, got none")
    train = read_jsonl(config.data.train, config.agents)
    if config.data.validation:
        return train, read_jsonl(config.data.validation, config.agents)
    if config.data.validation_fraction:
        return split(train, config.data.validation_fraction, config.data.seed)
    return train, None
