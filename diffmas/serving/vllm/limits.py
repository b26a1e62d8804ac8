"""What of an engine's settings does not go with teams; refused before the engine starts."""

import os
from typing import TypedDict

from diffmas.serving.vllm.course import KEY, Course

__all__ = ["TeamConfig", "check_engine", "check_request", "engine", "request", "teams_of"]

# Tried here against our own loop; of others it is not known whether vLLM's embeddings are what `Realign` takes them for.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
UNPROVEN = "that teams have not run with on a GPU"


class TeamConfig(TypedDict):
    """What the engine's processes are told of a team: plain data, in `additional_config`. loras: of each agent, None or name,
    number and path."""

    directory: str
    base: str
    realign: str
    temperature: float
    loras: list[tuple[str, int, str] | None]


def teams_of(vllm_config) -> dict[str, TeamConfig]:
    given = vllm_config.additional_config
    return given.get(KEY, {}) if isinstance(given, dict) else {}


def check_engine(vllm_config) -> None:
    """Raises ValueError naming the setting of an engine with teams that does not fit."""
    model, parallel, loras = vllm_config.model_config, vllm_config.parallel_config, vllm_config.lora_config
    family, asked = model.hf_text_config.model_type, "VLLM_USE_V2_MODEL_RUNNER" in os.environ
    for name, expected, found, fits in (
        ("VLLM_USE_V2_MODEL_RUNNER", f"0, or 1 for a runner {UNPROVEN}", "none", asked or not vllm_config.use_v2_model_runner),
        ("enable_prompt_embeds", "True: latent steps are input embeddings", False, model.enable_prompt_embeds),
        ("tensor_parallel_size", "1: realign needs whole embeddings", n := parallel.tensor_parallel_size, n == 1),
        ("pipeline_parallel_size", "1: a hidden state is the next input", n := parallel.pipeline_parallel_size, n == 1),
        ("speculative_config", "None: drafts know no latent steps", "one", vllm_config.speculative_config is None),
        ("kv_transfer_config", "None: others name blocks by stand-ins", "one", vllm_config.kv_transfer_config is None),
        ("model", f"one of the families {FAMILIES}", family, family in FAMILIES),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"{name}: expected {expected}, got {found}")
    used = {tuple(lora) for team in teams_of(vllm_config).values() for lora in team["loras"] if lora}
    if used and (loras is None or loras.max_loras < len(used)):
        found = "no LoRA" if loras is None else loras.max_loras
        raise ValueError(f"max_loras: expected at least {len(used)}, one for each adapter of the teams, got {found}")
    for name, team in teams_of(vllm_config).items():
        if team["base"] != model.model:
            raise ValueError(f"model: expected {team['base']}, the base model of team {name!r}, got {model.model}")
    for name, _, path in sorted(used):
        _check_adapter(name, path, loras)


def _check_adapter(name: str, path: str, lora_config) -> None:
    from vllm.lora.peft_helper import PEFTHelper

    try:
        PEFTHelper.from_local_dir(path, None).validate_legal(lora_config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"adapter {name!r}: expected one that vLLM takes, got another ({error})") from error


def check_request(asked, teams: dict[str, TeamConfig]) -> None:
    """asked: vLLM's `EngineCoreRequest`. Gives a team's request the adapter that its answer is written with. Raises ValueError,
    in the process that was asked: the engine's own would end by it."""
    params = asked.sampling_params
    course = None if params is None else Course.read(params.extra_args)
    if course is None:
        several = any(len(set(map(str, team["loras"]))) > 1 for team in teams.values())
        if several and asked.lora_request is not None:  # vLLM counts one adapter for each request
            raise ValueError("lora_request: expected none beside teams whose agents have different adapters")
        return
    if course.team not in teams:
        raise ValueError(f"{KEY}: expected one of this engine's teams, {sorted(teams)}, got {course.team!r}")
    team, tokens = teams[course.team], asked.prompt_token_ids
    if tokens is None or asked.prompt_embeds is not None or asked.mm_features or len(tokens) != course.end:
        found = "none" if tokens is None else len(tokens)
        raise ValueError(f"prompt: expected {course.end} token ids, as prompt_tokens and latent_steps have it, got {found}")
    if course.agents > len(team["loras"]):
        raise ValueError(f"prompt_tokens: expected at most {len(team['loras'])} agents, got {course.agents}")
    if asked.resumable:
        raise ValueError("resumable: expected a whole prompt, got one that goes on")
    if asked.lora_request is not None:
        raise ValueError("lora_request: expected none, a team has its own")
    if (lora := team["loras"][course.agents - 1]) is not None:
        from vllm.lora.request import LoRARequest

        asked.lora_request = LoRARequest(*lora)


def engine(original):
    """Around `InputProcessor.__init__`, which every engine runs in the user's process before it starts its own."""

    def checked(self, vllm_config, *args, **kwargs):
        if teams_of(vllm_config):
            check_engine(vllm_config)
        return original(self, vllm_config, *args, **kwargs)

    return checked


def request(original):
    """Around `InputProcessor.process_inputs`."""

    def checked(self, *args, **kwargs):
        asked = original(self, *args, **kwargs)
        check_request(asked, teams_of(self.vllm_config))
        return asked

    return checked
