"""What a config describes, built: model, system, rows, scorer, and the methods that are compared."""

import functools
from dataclasses import replace
from pathlib import Path

from diffmas.cli.config import Config, OtherModel
from diffmas.cli.methods import TRAINED
from diffmas.cli.terminal import warn
from diffmas.cli.training_section import training_fields
from diffmas.evaluation.tasks import Task, task

__all__ = [
    "base_model", "check_adapters", "evaluation_rows", "methods_of", "scorer_of", "trained_as", "trained_system",
    "training_arguments", "training_rows", "untrained_system",
]  # fmt: skip


OF_TRAINING = ("grad_scope", "last_k", "adapter_scope", "latent_grad_clip")  # options that say how an adapter was trained
MBPP = ("mbpp", "mbpp_plus")  # tasks with the same questions
TOLD = ("agents", "trace_content", "sinks", "positions", "no_latents")  # what the last agent of a team reads


def training_arguments(config: Config):
    """TrainingArguments: a recipe's settings, with validation data an evaluation each epoch, or with each checkpoint, then the
    config's. Raises ValueError for values that do not fit, and for trackers that are not installed."""
    from transformers.integrations import get_available_reporting_integrations

    from diffmas.training import default_arguments

    given = training_fields(config.training)
    if config.data.validation or config.data.validation_fraction:
        steps = given.get("eval_steps", given.get("save_steps"))
        free = steps is not None and not {"save_strategy", "eval_strategy"} & given.keys()
        given = {**({"eval_steps": steps} if free else {"eval_strategy": "epoch"}), **given}
    try:
        arguments = default_arguments(config.output_dir, config.recipe, **given)
    except ValueError as error:
        raise ValueError(f"training: {error}") from error
    installed = get_available_reporting_integrations()
    if missing := [name for name in arguments.report_to if name not in (*installed, "flyte")]:  # which nobody can look for
        raise ValueError(f"training.report_to: expected some of what is installed, {installed}, got {missing[0]!r}")
    return arguments


def base_model(config: Config, device: str | None = None):
    """The base model on a device (by default the CPU), and its tokenizer."""
    from diffmas.models.load import load_model

    model, tokenizer = load_model(config.model, dtype=config.dtype, device=device)
    asks_a_chat = config.task is not None and isinstance(task(config.task), Task)
    if asks_a_chat and config.system.chat_template is None and not getattr(tokenizer, "chat_template", None):
        _say_no_template(config.model, config.task)
    return model, tokenizer


@functools.cache  # once, however often it is loaded
def _say_no_template(model: str, name: str) -> None:
    warn(
        f"{model}: its tokenizer has no chat template, so that the prompts of {name} stay plain text: take the chat or "
        "instruct form of the model, or say that this is meant by chat_template: false in a config's section system"
    )


def other_of(described: OtherModel, config: Config, receiver, adapter: bool = True, device: str | None = None, loaded=None):
    """Another model, with a new projector to `receiver`. adapter: whether it may get a new LoRA adapter. loaded: it and its
    tokenizer, by default as `described` names them."""
    from diffmas.agents.adapters import add_lora, lora_config
    from diffmas.agents.other_file import load_encoder, made
    from diffmas.models.load import load_model, load_tokenizer

    encodes, how = described.projector.get("kind") == "encoder", dict(vars(described))
    name, projector, lora = (how.pop(key) for key in ("model", "projector", "lora"))
    if encodes and (wrong := [k for k in ("realign", "temperature") if how.pop(k) != getattr(OtherModel, k)] + ["lora"] * lora):
        raise ValueError(f"others: {wrong[0]}: expected none with an encoder, which takes no latent steps and is not trained")
    options = {"dtype": config.dtype, "device": device}
    if loaded is None and encodes:
        loaded = load_encoder(name, **options), load_tokenizer(name)
    model, tokenizer = loaded or load_model(name, **options)
    if adapter and lora:
        model = add_lora(model, config=lora_config(**vars(config.lora)))
    return made(projector, model, tokenizer, receiver, **how).to(device or "cpu")


def untrained_system(config: Config, adapter: bool = True, device: str | None = None):
    """The system that a config describes. adapter: whether it gets new LoRA adapters, else it is the bare model."""
    from diffmas.agents.adapters import add_lora, lora_config
    from diffmas.agents.described import readings
    from diffmas.agents.graph import home
    from diffmas.agents.system import MultiAgentSystem

    model, tokenizer = base_model(config, device)
    options = dict(vars(config.system))
    if adapter:
        own = [agent for agent in config.agents if home(agent, readings(config.others)) is None]
        model = add_lora(model, own, config.system.adapter_scope, lora_config(**vars(config.lora)))
    else:
        options["adapter_scope"] = "shared"
    if config.others:
        options["others"] = {name: other_of(one, config, model, adapter, device) for name, one in config.others.items()}
    return MultiAgentSystem(model, tokenizer, config.agents, **options)


def c2c_system(config: Config, device: str | None = None):
    """Who answers alone as `diffmas.evaluation.C2C` with the config's c2c; what it trains is the projector."""
    from diffmas import evaluation
    from diffmas.agents.system import MultiAgentSystem

    if config.c2c is None:
        raise ValueError("c2c: expected the model whose rows are fused (in config.yaml, c2c: {model: NAME}), got none")
    if config.c2c.lora:
        raise ValueError("c2c.lora: expected false, since the projector alone is trained, got true")
    model, tokenizer = base_model(config, device)
    other = other_of(_that_fuses(config.c2c), config, model, False, device)
    chat = {"chat_template": config.system.chat_template, "chat_options": config.system.chat_options}
    system = MultiAgentSystem(model, tokenizer, [replace(alone(config), reads=None)], realign="none", **chat)
    return evaluation.c2c(system, other).system


def _that_fuses(described: OtherModel) -> OtherModel:
    """As a config's c2c may leave it unsaid."""
    return replace(described, projector={**described.projector, "kind": "c2c"})


def trained_system(config: Config, adapter: Path | None, device: str | None = None, other_agents: bool = False):
    """The system of a directory that `diffmas train` wrote, or without one the config's on the bare model; in eval mode.

    other_agents: whether the config's agents may have other prompts and latent steps than those that were trained. Raises
    ValueError for a directory whose agents, other models, or options that matter to an answer, are not the config's."""
    from diffmas.agents.file import check_same, read_agents
    from diffmas.agents.system import MultiAgentSystem

    if adapter is None:
        return untrained_system(config, adapter=False, device=device).eval()
    wanted = {k: v for k, v in vars(config.system).items() if k not in OF_TRAINING and (k, v) != ("chat_template", None)}
    described, agents = read_agents(adapter), [agent.described() for agent in config.agents]
    as_trained = described["agents"]
    if other_agents and len(agents) == len(as_trained):  # its name and its role stay an agent's own
        as_trained = [{**mine, "name": its["name"], "role": its["role"]} for mine, its in zip(agents, as_trained)]
    check_same(adapter, {**described, "agents": as_trained}, {"agents": agents, **wanted})
    check_same(adapter, {**described, "others": sorted(described["others"])}, {"others": sorted(config.others)})
    beside = {name: one.model for name, one in config.others.items()}
    system = MultiAgentSystem.from_pretrained(adapter, config.model, others=beside, dtype=config.dtype, device=device).eval()
    for name, one in config.others.items():
        _check_other(f"{adapter}: others, {name!r}", one, system.others[name])
    if not other_agents:
        return system
    description = {**system.describe(), "agents": agents}
    again = MultiAgentSystem.of_description(system.model, system.tokenizer, description, others=dict(system.others))
    again.realign.load_state_dict(system.realign.state_dict())
    found, expected = (sorted(x.choices.state_dict()) for x in (system, again))
    if found != expected:
        raise ValueError(f"{adapter}: expected rows chosen by 'learned' of {expected}, as the config's agents, got {found}")
    again.choices.load_state_dict(system.choices.state_dict())
    return again.eval()


def _check_other(where: str, expected: OtherModel, other) -> None:
    """Raises ValueError naming the first option that another model of a team has otherwise, if it matters to an answer."""
    from diffmas.agents.projector import layer_map

    described = other.describe()
    found, projector = {**described.pop("projector"), **described}, dict(expected.projector)
    projector.pop("dropout", None)
    if isinstance(projector.get("layers"), str):
        between = other.projector
        sizes = len(between.sharer_rows), len(between.receiver_rows)
        projector["layers"] = layer_map(projector["layers"], *sizes, gaps=between.fuses)
    own = {k: v for k, v in vars(expected).items() if k in found and (k, v) != ("chat_template", None)}
    for key, value in {**own, **projector}.items():
        if key not in found or found[key] != value:
            raise ValueError(f"{where}: expected {key} {value!r}, got {found.get(key)!r}")


def trained_as(config: Config, method: str) -> Config:
    """The config as `diffmas train --method` takes it: other methods than diffmas train one adapter that all agents share, in
    an output_dir of their own, OUTPUT_DIR-METHOD. Raises ValueError for a method that is not trained."""
    if method not in TRAINED:
        raise ValueError(f"--method: expected one of {TRAINED}, got {method!r}")
    if method == "diffmas":
        return config
    return replace(
        config, output_dir=f"{config.output_dir}-{method}", system=replace(config.system, adapter_scope="shared")
    )  # fmt: skip


# ---- rows ------------------------------------------------------------------------------------------------------------


def _rows(config: Config, name: str | None, path: str | None, part: str, limit: int | None = None) -> list[dict]:
    """The rows of a file, in the published form of the task `name` if there is one; without a file, of a part of the task."""
    from diffmas.training.data import check_row, read_jsonl

    if name is None:
        return read_jsonl(path, config.agents)[:limit]
    rows = task(name).rows(part, path, limit)
    check_row(rows[0], f"task {name}", config.agents)
    return rows


def _not_asked(config: Config, name: str | None, path: str | None, part: str, limit: int | None = None) -> list[dict]:
    """As `_rows`, without those of MBPP that `diffmas evaluate` asks: MBPP+ has questions of each of MBPP's parts."""
    apart = name == config.task and not path and not config.evaluation.data  # two parts of one set
    if apart or not {name, config.task} <= {*MBPP}:
        return _rows(config, name, path, part, limit)
    asked = {row["mbpp"] for row in _rows(config, config.task, config.evaluation.data, "test")} - {None}
    rows = [row for row in _rows(config, name, path, part) if row["mbpp"] not in asked]
    if not rows:
        raise ValueError(f"data: expected questions that {config.task} does not ask, found none in {path or f'{name}, {part}'}")
    return rows[:limit]


def training_rows(config: Config) -> tuple[list[dict], list[dict] | None]:
    """Training and validation rows; None for the latter if the config has none. Raises ValueError for rows that do not fit."""
    from diffmas.training.data import split

    name = config.training_task
    if not config.data.train and name is None:
        raise ValueError("data.train: expected a file of JSON lines, got none")
    train = _not_asked(config, name, config.data.train, config.training_part, config.data.limit)
    if config.data.validation:
        return train, _not_asked(config, name, config.data.validation, "validation")
    if config.data.validation_fraction:
        return split(train, config.data.validation_fraction, config.data.seed)
    return train, None


def evaluation_rows(config: Config) -> list[dict]:
    """The rows that `diffmas evaluate` asks. Raises ValueError if the config names none, and for rows that do not fit."""
    limit = config.evaluation.limit
    if config.evaluation.data or config.task is not None:
        return _rows(config, config.task, config.evaluation.data, "test", limit)
    rows = training_rows(config)[1]
    if rows is None:
        raise ValueError("evaluation.data: expected a file of JSON lines (or validation data, or a task), got none")
    return rows[:limit]


# ---- what is compared ------------------------------------------------------------------------------------------------


def scorer_of(config: Config, training: bool = False):
    """What judges answers: the config's extract and match, or else the task's. training: of the rows to train on, some of which
    are asked where there are no others."""
    from diffmas.evaluation import Scorer

    given = {k: v for k in ("extract", "match") if (v := getattr(config.evaluation, k)) is not None}
    held_out = config.task is None and not config.evaluation.data
    name = config.training_task if training or held_out else config.task
    return task(name).scorer() if name is not None and not given else Scorer(**given)


def _published(config: Config, agents):
    """The config's task if these agents are its own, whose prompts it has in other forms; else None."""
    if config.task is None:
        return None
    published = task(config.task)
    of_agents, of_task = ([(a.name, a.prompt, a.system) for a in some] for some in (agents, published.agents()))
    return published if of_agents == of_task else None


def alone(config: Config):
    """The agent that answers alone: a task has its own prompt for it, else it is the last agent."""
    published = _published(config, config.agents)
    return published.agents("single")[0] if published else config.agents[-1]


def text_team(config: Config, system):
    """The agents as they are when they write text: a task has its own prompts for each, unless the system has others than the
    task's."""
    from diffmas.evaluation.baselines import with_agents

    published = _published(config, system.agents)
    return with_agents(system, published.agents("text")) if published else system


def check_adapters(names, adapters) -> None:
    """Raises ValueError for a method that is nothing without an adapter, before any model is loaded."""
    for name in ("text_sft", "c2c"):
        if name in names and name not in adapters:
            option = f"--{name.replace('_', '-')}"
            raise ValueError(f"evaluation.methods: {name!r} needs {option} DIR, which `diffmas train --method {name}` writes")


def methods_of(config: Config, system, names, adapters: dict[str, Path] | None = None) -> dict:
    """The methods by name, in the order of METHODS. adapters: directories of `diffmas train --method`, by method; "text_sft"
    and "c2c" need one, "stitch" is untrained without one. Raises ValueError for one that is missing, or of another base model,
    method, team or c2c."""
    from diffmas import evaluation
    from diffmas.agents.file import add_adapter
    from diffmas.evaluation.text_sft import WRITER

    adapters = dict(adapters or {})
    described = system.describe()
    expected = {
        "text_sft": {"class": evaluation.Writers.class_name(), "agents": [WRITER.described()]},
        "stitch": {"class": evaluation.Stitched.class_name(), **{key: described[key] for key in TOLD}},
    }
    check_adapters(names, adapters)
    fused = adapters.pop("c2c", None)
    for name, directory in adapters.items():
        system.model = add_adapter(directory, system.model, name, expected[name])
    writing, one = text_team(config, system), alone(config)
    tokens = config.evaluation.max_message_tokens
    makers = {
        "single": lambda: evaluation.single_agent(system, one),
        "text": lambda: evaluation.TextAgents(writing, tokens),
        "text_sft": lambda: evaluation.TextAgents(writing, tokens, "text_sft"),
        "latent_mas": lambda: evaluation.latent_mas(system),
        "stitch": lambda: evaluation.stitch(system, "stitch" if "stitch" in adapters else False),
        "c2c": lambda: _fused(config, system, one, fused),
        "diffmas": lambda: evaluation.Latent(system),
    }
    return {name: make() for name, make in makers.items() if name in names}


def _fused(config: Config, system, one, directory: Path):
    """The method of a directory of `diffmas train --method c2c`. Raises ValueError for one that is not as the config's c2c."""
    from diffmas.evaluation import load_c2c

    described = config.c2c and _that_fuses(config.c2c)
    beside = described and described.model
    method = load_c2c(directory, system, one, other=beside, dtype=config.dtype, device=system.device)
    if described:
        (other,) = method.system.others.values()
        _check_other(f"{directory}: c2c", described, other)
    return method
