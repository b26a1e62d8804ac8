"""config.yaml: a whole experiment as dataclasses; a key or value that does not fit is refused by name.

    model: Qwen/Qwen3-0.6B
    agents:
      - {name: planner, prompt: "Plan how to answer: {question}", latent_steps: 10}
      - {name: solver, prompt: "Answer: {question}"}
    data: {train: train.jsonl, validation_fraction: 0.1}

Or a published task, whose questions, agents and verdicts stand for what the file does not say:

    model: Qwen/Qwen3-0.6B
    task: gsm8k

`Config` lists the keys, `load` reads a file. Relative paths start at the file's directory.
"""

import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from diffmas.agents.agent import Agent
from diffmas.agents.described import check_agents, readings
from diffmas.agents.graph import check_graph
from diffmas.agents.options import Options
from diffmas.agents.rounds import unrolled
from diffmas.cli.methods import METHODS
from diffmas.cli.plain_data import parsed
from diffmas.cli.training_section import training_fields
from diffmas.evaluation.scorer import check_scoring
from diffmas.evaluation.tasks import task
from diffmas.training.settings import RECIPES

__all__ = ["DTYPES", "Config", "check_methods", "load"]

DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class Lora:
    """LoRA, as `diffmas.training.lora_config` takes it."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.0
    target_modules: str | list[str] = "all-linear"


@dataclass
class OtherModel:
    """Another model beside the first one (`diffmas.agents.member.Other`).

    model: a hub name, a directory or a GGUF file. projector: its kind, projector or c2c, and options of
    `diffmas.agents.projector.Projector` or `Fuser`. lora: whether it gets an adapter of its own, of the section lora; else it
    is frozen. Others: as `diffmas.agents.member.Other` takes them.
    """

    model: str
    projector: dict = field(default_factory=lambda: {"kind": "projector"})
    lora: bool = False
    realign: str = "ridge"
    temperature: float = 1.0
    chat_template: bool | None = None
    chat_options: dict | None = None

    @property
    def reading(self) -> str:
        """As of the `Other` or `Encoder` that it names."""
        return {"c2c": "fused", "encoder": "embeddings"}.get(self.projector.get("kind"), "rows")


@dataclass
class Data:
    """Files of JSON lines (`diffmas.training.data`); with a task, files in its published form, instead of the hub.

    task, part: whose rows are trained on, by default the config's task and "train"; with a file in `train`, task is the one in
    whose published form it is, and `validation` too. limit: only so many training rows, from the first. validation: a file; or
    instead validation_fraction, the share of the training rows that is held out, drawn with seed.
    """

    train: str | None = None
    task: str | None = None
    part: str | None = None
    limit: int | None = None
    validation: str | None = None
    validation_fraction: float | None = None
    seed: int = 0


@dataclass
class Generation:
    """Decoding, as `MultiAgentSystem.generate` takes it: what is not said is the model's own. max_new_tokens: by default the
    task's."""

    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    stop: list[str] | None = None


@dataclass
class Evaluation:
    """`diffmas evaluate`.

    data: a file of JSON lines, by default the task's test part, or without a task the validation rows. methods: some of
    METHODS; the default goes without latent_mas where there are other models. samples: answers per question. batch_size:
    questions at once, each with all samples. max_message_tokens: of each message in the methods "text" and "text_sft". extract,
    match: see `diffmas.evaluation.Scorer`; by default the task's, or all and exact. limit: only so many rows, from the first.
    """

    data: str | None = None
    methods: list[str] = field(default_factory=lambda: ["single", "text", "latent_mas", "diffmas"])
    samples: int = 1
    batch_size: int = 8
    max_message_tokens: int = 256
    extract: str | None = None
    match: str | None = None
    limit: int | None = None


def check_methods(names: list[str]) -> None:
    """Raises ValueError naming a method that is none of METHODS."""
    if unknown := [m for m in names if m not in METHODS]:
        raise ValueError(f"evaluation.methods: expected some of {METHODS}, got {unknown[0]!r}")


@dataclass
class Config:
    """The keys of config.yaml.

    model: a hub name, a directory or a GGUF file. task: one of `diffmas tasks`. agents: by default the task's, with
    latent_steps as their T, and with passes and grad_passes (`diffmas.Agent`). dtype: of the weights, one of DTYPES.
    others: other models of the team, `OtherModel` by name. c2c: the model that the method "c2c" is to hear from.
    system: options of `MultiAgentSystem`. training: any fields of transformers' TrainingArguments but output_dir, over a
    recipe, default or paper (`default_arguments`). gradient_report_steps, explosion_factor: see `diffmas.Trainer`.
    early_stopping_patience: how many evaluations without a better eval_loss end training.

    Raises ValueError naming a key whose value does not fit.
    """

    model: str
    agents: list[Agent] = field(default_factory=list)
    task: str | None = None
    latent_steps: int | None = None
    passes: int | None = None
    grad_passes: int | None = None
    output_dir: str = "diffmas-output"
    dtype: str = "auto"
    system: Options = field(default_factory=Options)
    others: dict = field(default_factory=dict)
    c2c: OtherModel | None = None
    lora: Lora = field(default_factory=Lora)
    data: Data = field(default_factory=Data)
    recipe: str = "default"
    training: dict = field(default_factory=dict)
    gradient_report_steps: int = 0
    explosion_factor: float | None = 100.0
    early_stopping_patience: int | None = None
    generation: Generation = field(default_factory=Generation)
    evaluation: Evaluation = field(default_factory=Evaluation)

    def __post_init__(self):
        published = task(self.task) if self.task is not None else None
        theirs = published.agents(latent_steps=self.latent_steps) if published else []
        passes = {"passes": self.passes, "grad_passes": self.grad_passes}
        theirs = [replace(agent, **passes) if agent.latent_steps else agent for agent in theirs]
        for name in ("latent_steps", *passes):
            if getattr(self, name) is not None and (not theirs or (self.agents or theirs) != theirs):
                raise ValueError(f"{name}: expected it for a task's agents, got it with agents that have their own")
        self.agents = unrolled(self.agents or theirs)
        if not self.agents:
            raise ValueError("agents: expected at least one agent or a task, got neither")
        self.others = {
            name: other if isinstance(other, OtherModel) else parsed(OtherModel, other, f"others.{name}.")
            for name, other in self.others.items()
        }
        check_agents(self.agents, self.others)  # all that can be told before the model is loaded, whose layers nobody knows yet
        check_graph(self.agents, self.system.trace_content, self.system.sinks, math.inf, math.inf, readings(self.others))
        self.system.agents_without_grad(len(self.agents))
        if self.system.temperature <= 0:
            raise ValueError(f"system.temperature: expected a positive number, got {self.system.temperature}")
        if self.generation.max_new_tokens is None and published:
            self.generation.max_new_tokens = published.max_new_tokens
        for name, some in (("dtype", DTYPES), ("recipe", tuple(RECIPES))):
            if getattr(self, name) not in some:
                raise ValueError(f"{name}: expected one of {some}, got {getattr(self, name)!r}")
        self._check_numbers()
        try:
            check_scoring(self.evaluation.extract, self.evaluation.match)
        except ValueError as error:
            raise ValueError(f"evaluation.{error}") from error
        if self.data.validation and self.data.validation_fraction is not None:
            raise ValueError("data.validation_fraction: expected it alone, got it together with data.validation")
        self._check_training_task()
        check_methods(self.evaluation.methods)
        if self.early_stopping_patience is not None and not (self.data.validation or self.data.validation_fraction):
            raise ValueError(
                "early_stopping_patience: expected data.validation or data.validation_fraction with it, got neither"
            )

    @property
    def training_task(self) -> str | None:
        """The task whose rows are trained on, or whose form data.train has."""
        return self.data.task or self.task

    @property
    def training_part(self) -> str:
        return self.data.part or "train"

    def _check_training_task(self) -> None:
        data, name = self.data, self.training_task
        try:
            parts = sorted(task(name).splits) if name is not None else []
        except ValueError as error:
            raise ValueError(f"data.{error}") from error
        if data.part is not None and (name is None or data.train):
            with_what = "a file in data.train, which is of any part" if data.train else "no task"
            raise ValueError(f"data.part: expected none with {with_what}, got {data.part!r}")
        if (data.part or data.task) and not data.train and self.training_part not in parts:
            key, got = ("part", data.part) if data.part else ("task", data.task)
            raise ValueError(f"data.{key}: expected a part of {name} to train on, of {parts}, got {got!r}")
        same = name is not None and self.task is not None and name.removesuffix("_plus") == self.task.removesuffix("_plus")
        if data.part == "test" and same and not self.evaluation.data:  # HumanEval+ and MBPP+ have the questions of others
            raise ValueError(f"data.part: expected another part than that which {self.task} is evaluated on, got 'test'")

    def _check_numbers(self) -> None:
        data, evaluation, generation = self.data, self.evaluation, self.generation
        for name, value in {
            "data.limit": data.limit, "evaluation.limit": evaluation.limit, "evaluation.samples": evaluation.samples,
            "evaluation.batch_size": evaluation.batch_size, "evaluation.max_message_tokens": evaluation.max_message_tokens,
            "generation.max_new_tokens": generation.max_new_tokens, "lora.r": self.lora.r,
            "early_stopping_patience": self.early_stopping_patience,
        }.items():  # fmt: skip
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        if self.gradient_report_steps < 0:
            raise ValueError(f"gradient_report_steps: expected 0 or more, got {self.gradient_report_steps}")
        if generation.temperature is not None and generation.temperature < 0:
            raise ValueError(f"generation.temperature: expected 0 or more, got {generation.temperature}")
        if generation.top_p is not None and not 0 < generation.top_p <= 1:
            raise ValueError(f"generation.top_p: expected a number in (0, 1], got {generation.top_p}")


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
        config = parsed(Config, data if data is not None else {})
        training_fields(config.training)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    near = lambda name: str(path.parent / name) if name else name  # noqa: E731
    config.data.train, config.data.validation = near(config.data.train), near(config.data.validation)
    config.evaluation.data, config.output_dir = near(config.evaluation.data), near(config.output_dir)
    for one in (config, *config.others.values(), *([config.c2c] if config.c2c else [])):
        if (path.parent / one.model).exists():
            one.model = str((path.parent / one.model).resolve())  # absolute, as agents.json will name it
    return config
