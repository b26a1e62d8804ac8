"""config.yaml: a whole experiment as dataclasses; a key or value that does not fit is refused by name.

    model: Qwen/Qwen3-0.6B
    agents:
      - {name: planner, prompt: "Plan how to answer: {question}", latent_steps: 10}
      - {name: solver, prompt: "Answer: {question}"}
    data: {train: train.jsonl, validation_fraction: 0.1}

`Config` lists the keys, `load` reads a file. Relative paths start at the file's directory.
"""

import contextlib
import difflib
import types
import typing
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path

import yaml

from diffmas.agents.options import Options
from diffmas.agents.prompts import Agent

__all__ = ["Config", "build_model", "build_system", "load", "read_data", "training_arguments"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Lora:
    """LoRA, as `diffmas.training.lora_config` takes it."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class Data:
    """Files of JSON lines (`diffmas.training.data`).

    validation: a file; or instead validation_fraction, the share of the training rows that is held out, drawn with seed.
    """

    train: str | None = None
    validation: str | None = None
    validation_fraction: float | None = None
    seed: int = 0


@dataclass
class Generation:
    """Decoding, as `MultiAgentSystem.generate` takes it."""

    max_new_tokens: int = 256
    temperature: float = 0.6
    top_p: float = 0.95
    seed: int = 0
    stop: list[str] | None = None


@dataclass
class Evaluation:
    """`diffmas evaluate`.

    data: a file of JSON lines, by default the validation rows. methods: some of METHODS. samples: answers per question.
    batch_size: questions at once. max_message_tokens: of each message in the method "text". extract, match: see
    `diffmas.evaluation.Scorer`. limit: only so many rows, from the first.
    """

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
    """The keys of config.yaml.

    model: a hub name, a directory or a GGUF file. dtype: of the weights, one of DTYPES. system: options of
    `MultiAgentSystem`. training: any fields of transformers' TrainingArguments but output_dir, over the paper's settings
    (`default_arguments`). early_stopping_patience: how many evaluations without a better eval_loss end training.

    Raises ValueError naming a key whose value does not fit.
    """

    model: str
    agents: list[Agent]
    output_dir: str = "diffmas-output"
    dtype: str = "auto"
    system: Options = field(default_factory=Options)
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
    """`value` as `kind`; a number written as 5e-5 is a string in YAML 1.1. Raises ValueError that starts with `where`."""
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
    """The config of a YAML file; its relative paths start at the file's directory.

    Raises ValueError with the file, the key, what was expected and what was found; FileNotFoundError if there is no file.
    """
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
    if (path.parent / config.model).exists():
        config.model = str((path.parent / config.model).resolve())  # absolute, as agents.json will name it
    return config


# ---- building --------------------------------------------------------------------------------------------------------


def training_fields(given: dict) -> dict:
    """The `training` section, checked against TrainingArguments; numbers get the kinds of its fields.

    Raises ValueError naming a key that is unknown or does not fit.
    """
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
        if len(simple) == len(typing.get_args(kind) or (kind,)):  # transformers checks the other kinds
            value = _value(value, kind, f"training.{key}") if value is not None or type(None) in simple else value
        checked[key] = value
    return checked


def training_arguments(config: Config):
    """TrainingArguments: the paper's settings, an evaluation each epoch if there is validation data, then the config's."""
    from diffmas.training import default_arguments

    given = training_fields(config.training)
    if config.data.validation or config.data.validation_fraction:
        given = {"eval_strategy": "epoch", **given}
    return default_arguments(config.output_dir, **given)


def build_model(config: Config, device: str | None = None):
    """The base model on a device (by default the CPU), and its tokenizer."""
    from diffmas.models.load import load_model

    return load_model(config.model, dtype=config.dtype, device=device)


def build_system(config: Config, adapter: bool = True, device: str | None = None):
    """The system that a config describes. adapter: whether it gets new LoRA adapters, else it is the bare model."""
    from diffmas.agents.adapters import add_lora, lora_config
    from diffmas.agents.system import MultiAgentSystem

    model, tokenizer = build_model(config, device)
    options = dict(vars(config.system))
    if adapter:
        model = add_lora(model, config.agents, config.system.adapter_scope, lora_config(**vars(config.lora)))
    else:
        options["adapter_scope"] = "shared"
    return MultiAgentSystem(model, tokenizer, config.agents, **options)


def read_data(config: Config) -> tuple[list[dict], list[dict] | None]:
    """Training and validation rows; None for the latter if the config has none. Raises ValueError for rows that do not fit."""
    from diffmas.training.data import read_jsonl, split

    if not config.data.train:
        raise ValueError("data.train: expected a file of JSON lines, got none")
    train = read_jsonl(config.data.train, config.agents)
    if config.data.validation:
        return train, read_jsonl(config.data.validation, config.agents)
    if config.data.validation_fraction:
        return split(train, config.data.validation_fraction, config.data.seed)
    return train, None
