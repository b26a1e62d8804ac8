"""Teams for an engine: checked before it starts, then its options, and a request for each question."""

import os
from pathlib import Path

from safetensors import safe_open
from transformers.generation import (
    InfNanRemoveLogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from diffmas.agents import file
from diffmas.agents.sampling import Sampling
from diffmas.agents.system import MultiAgentSystem
from diffmas.json_file import read_json
from diffmas.models.patch import unpatch_model
from diffmas.serving.team import Question, Team
from diffmas.serving.vllm.course import KEY, extra_args, prompt_of
from diffmas.serving.vllm.limits import TeamConfig
from diffmas.serving.vllm.plugin import check_installed

__all__ = ["Teams", "check_adapter", "check_team"]

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank
FIRST_NUMBER = 1 << 20  # of a team's adapter; those that users load are counted from 1
# What chooses tokens in both: transformers' rule, its value, and vLLM's name for it.
RULES = {
    TemperatureLogitsWarper: ("temperature", "temperature"), TopKLogitsWarper: ("top_k", "top_k"),
    TopPLogitsWarper: ("top_p", "top_p"), MinPLogitsWarper: ("min_p", "min_p"),
    RepetitionPenaltyLogitsProcessor: ("penalty", "repetition_penalty"),
    MinNewTokensLengthLogitsProcessor: ("min_new_tokens", "min_tokens"),
}  # fmt: skip


class Teams:
    """Trained teams of one base model that answer in one vLLM.

    directories: of each team, by the name that requests call it. model: the base model, a directory or hub name, by default the
    one that the teams name. Each team is loaded once on the CPU, to see that it is whole and of this base model; its weights
    are let go again. Raises ValueError naming what is missing, or what vLLM cannot do (docs/serving.md).

        >>> teams = Teams({"facts": "runs/facts"})
        >>> llm = vllm.LLM(**teams.engine_options())
        >>> prompt, params = teams.request(teams["facts"].question({"question": "where is the key"}, Settings(temperature=0)))
        >>> llm.generate([prompt], [params])
    """

    def __init__(self, directories: dict[str, str | os.PathLike], model: str | None = None):
        check_installed()
        paths = {name: Path(path).resolve() for name, path in directories.items()}
        described = {name: file.read_agents(path) for name, path in paths.items()}
        for name, team in described.items():
            check_team(name, team)
            for adapter in team["adapters"]:
                check_adapter(name, file.adapter_directory(paths[name], adapter))
        bases = {str(model or team["base_model"]) for team in described.values()}
        if len(bases) != 1:
            raise ValueError(f"model: expected one base model of all teams, got {sorted(bases)}")
        (self.base,) = bases
        self._numbers: dict[str, int] = {}  # of adapters, by directory
        self.configs = {name: self._config(name, paths[name], team) for name, team in described.items()}
        ranks = [rank for team in described.values() for scale in team["adapters"].values() for rank in _ranks(scale)]
        self._rank = max(ranks, default=1)
        self.teams = {name: self._load(name, path) for name, path in paths.items()}

    def __getitem__(self, name: str) -> Team:
        return self.teams[name]

    def _config(self, name: str, path: Path, described: dict) -> TeamConfig:
        loras = []
        for adapter in adapters_of(described):
            directory = None if adapter is None else str(file.adapter_directory(path, adapter))
            number = directory and self._numbers.setdefault(directory, FIRST_NUMBER + len(self._numbers))
            loras.append(directory and (f"{name}/{adapter}", number, directory))
        return TeamConfig(
            directory=str(path), base=self.base, realign=described["realign"], temperature=described["temperature"], loras=loras
        )

    def _load(self, name: str, path: Path) -> Team:
        system = MultiAgentSystem.from_pretrained(path, self.base, device="cpu")
        team = Team(name, system)
        unpatch_model(system.model)
        for x in (*system.parameters(), *system.buffers()):  # what is left counts tokens and positions
            x.data = x.data.new_empty(0)
        return team

    def engine_options(self) -> dict:
        """Arguments of `vllm.LLM` or `EngineArgs`, to which others may be added."""
        options = {"model": self.base, "enable_prompt_embeds": True, "additional_config": {KEY: self.configs}}
        rank = next((rank for rank in RANKS if rank >= self._rank), self._rank)  # vLLM says what it does not take
        # One slot stays empty: vLLM's ops on a CPU read the last one for tokens without an adapter beside others with one.
        loras = {"enable_lora": True, "max_loras": len(self._numbers) + 1, "max_lora_rank": rank}
        return options | (loras if self._numbers else {})

    def request(self, question: Question):
        """A prompt and the `SamplingParams` of a question that one of these teams was asked (`Team.question`).

        The answer's `token_ids` are what `MultiAgentSystem.generate_tokens` returns; `Team.text_of` is their text.
        """
        from vllm import SamplingParams

        team, settings = question.team, question.settings
        sampling = Sampling.of(team.system, question.max_new_tokens, seed=question.seed, **settings.options())
        params = SamplingParams(
            n=sampling.samples, max_tokens=question.max_new_tokens, stop_token_ids=sorted(team.ends), stop=sampling.stop,
            extra_args=extra_args(team.name, question.turns), **_choice(sampling, team),
        )  # fmt: skip
        return {"prompt_token_ids": prompt_of(question.turns)}, params


def _choice(sampling: Sampling, team: Team) -> dict:
    """How tokens are chosen, by vLLM's names. Raises ValueError for a rule that is not in both."""
    sampled = sampling.arguments["do_sample"]
    found = {"temperature": 1.0, "seed": sampling.seed} if sampled else {"temperature": 0.0}
    for rule in sampling.rules(team.system):
        if type(rule) in RULES:
            attribute, name = RULES[type(rule)]
            found[name] = getattr(rule, attribute)
        elif not isinstance(rule, InfNanRemoveLogitsProcessor):
            raise ValueError(f"team {team.name!r}: expected a generation config that vLLM has too, got a {type(rule).__name__}")
    return found


def check_team(name: str, described: dict) -> None:
    """described: of `read_agents`. Raises ValueError for a team whose rows are not those of one prompt from its start on."""
    for option, value, fits, why in (
        ("trace_content", described["trace_content"], "all", "rows that are dropped or moved would need a KV connector"),
        ("class", described["class"], (None, MultiAgentSystem.class_name()), "others may join or shift traces"),
        ("trained_in_base", described["trained_in_base"], [], "vLLM serves the base model's own weights"),
        ("others", described["others"], {}, "its agents are one model's"),
        *[(f"reads of agent {agent['name']!r}", agent["reads"], None, "a prompt reads all before it")
          for agent in described["agents"]],
        *[(f"max_rows of agent {agent['name']!r}", agent["max_rows"], None, "a prompt reads all before it")
          for agent in described["agents"]],
        *[(f"passes of agent {agent['name']!r}", agent["passes"], None, "latent steps go one by one")
          for agent in described["agents"][:-1]],
        *[(f"max_message_tokens of agent {agent['name']!r}", agent["max_message_tokens"], None, "it decodes the answer alone")
          for agent in described["agents"][:-1]],
        *[(f"quantized of agent {agent['name']!r}", agent["quantized"], None, "rows stay as they are written")
          for agent in described["agents"][:-1]],
        *[(f"low_rank of agent {agent['name']!r}", agent["low_rank"], False, "rows are read as they are written")
          for agent in described["agents"]],
        *[(f"stop_change of agent {agent['name']!r}", agent["stop_change"], None, "T has to be known before")
          for agent in described["agents"][:-1]],
    ):  # fmt: skip
        if value not in fits if isinstance(fits, tuple) else value != fits:
            raise ValueError(f"team {name!r}: {option}: expected {fits!r} in vLLM, got {value!r}: {why}")


def check_adapter(name: str, directory: Path) -> None:
    """Raises ValueError for an adapter that is not LoRA on linear layers between the embeddings; its rank and variants vLLM
    checks itself."""
    config = read_json(directory / file.CONFIG_FILE)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"team {name!r}: {directory}: expected a LoRA adapter in vLLM, got {config.get('peft_type')}")
    with safe_open(directory / file.WEIGHTS_FILE, "pt") as weights:
        for key in weights.keys():
            if ".layers." not in key or not key.endswith((".lora_A.weight", ".lora_B.weight")):
                raise ValueError(f"team {name!r}: {directory}: expected LoRA on layers alone in vLLM, got {key}")


def adapters_of(described: dict) -> list[str | None]:
    """The adapter of each agent, as `diffmas.agents.adapters.of_agent` switches them."""
    agents, first = described["agents"], next(iter(described["adapters"]), None)
    if described["adapter_scope"] == "per_role":
        return [agent["role"] or agent["name"] for agent in agents]
    last = described["adapter_scope"] == "final_only"
    return [None if last and i < len(agents) - 1 else first for i in range(len(agents))]


def _ranks(scale: dict) -> list[int]:
    return [scale["r"], *(scale.get("rank_pattern") or {}).values()]
