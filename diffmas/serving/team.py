"""A system under a name, and the questions that are put to it."""

import copy
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from diffmas.agents.agent import Agent
from diffmas.agents.prompts import Turn
from diffmas.agents.rounds import agent_and_round, takes_turn
from diffmas.agents.sampling import Sampling, end_tokens
from diffmas.agents.system import MultiAgentSystem
from diffmas.models.parts import causal_lm_of

__all__ = ["Question", "Settings", "Team"]

WHAT = "its prompt and answer"


class Fields(dict):
    """Of the prompts. steps: the question's own T, by agent, where it has one."""

    def __init__(self, fields: dict, steps: dict[str, int]):
        super().__init__(fields)
        self.steps = steps


class Settings(NamedTuple):
    """How an answer is decoded: what the questions of a batch have in common. None: the team's own. agent_output: whether every
    agent of the system's model writes a text, too."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stop: tuple[str, ...] = ()
    samples: int = 1
    agent_output: bool = False

    def options(self) -> dict:
        """As `MultiAgentSystem.generate` has them."""
        given = {"temperature": self.temperature, "top_p": self.top_p, "stop": list(self.stop), "samples": self.samples}
        return given | ({} if self.top_k is None else {"top_k": self.top_k})


@dataclass(frozen=True)
class Question:
    """One request to a team. fields: of its prompts. turns: of its agents. max_new_tokens: of each sample."""

    team: "Team"
    fields: Fields
    turns: list[Turn]
    max_new_tokens: int
    seed: int
    settings: Settings

    @property
    def prompt_tokens(self) -> int:
        """Of all agents."""
        return sum(len(turn.ids) for turn in self.turns)


class Team:
    """name: what a request calls it. system: answers; from now on in eval mode, and run by nobody else.

    Raises ValueError for a system that does not answer by its agents' turns on one trace, such as those of baselines.
    """

    def __init__(self, name: str, system: MultiAgentSystem):
        if type(system).communicate is not MultiAgentSystem.communicate:
            raise ValueError(f"team {name!r}: expected a MultiAgentSystem, got a {type(system).__name__}")
        self.name, self.agents = name, system.agents
        self.system = copy.copy(system.eval())  # the same modules, other agents
        self.system.agents = [replace(agent, latent_steps=_asked(agent)) for agent in system.agents]
        sampling = Sampling.of(system)
        if sampling.beams:
            raise ValueError(f"team {name!r}: expected a model that takes tokens one by one, its generation config has beams")
        self.max_new_tokens = sampling.max_new_tokens  # where a question does not say
        self.ends = end_tokens(causal_lm_of(system.model), system.tokenizer)
        # Once, before there are several threads: a tokenizer may have to leave truncation or padding behind.
        system.tokenizer("a")

    @classmethod
    def load(cls, path, name: str | None = None, model=None, **model_options) -> "Team":
        """The team of a directory, by default under the directory's name. Raises ValueError as `from_pretrained` does."""
        system = MultiAgentSystem.from_pretrained(path, model, **model_options)
        return cls(name or Path(path).resolve().name, system)

    def question(
        self, fields: dict, settings: Settings, max_new_tokens: int | None = None, seed: int | None = None,
        latent_steps: int | dict[str, int] | None = None,
    ) -> Question:  # fmt: skip
        """What is asked, checked and as tokens. latent_steps: T of all agents but the last, or of some by name; of
        one that takes rounds, its name stands for all of its turns that have none of their own.

        Raises ValueError naming what does not fit; `TooLong` if that is the context.
        """
        thinkers = [agent.name for agent in self.agents[:-1]]
        if isinstance(latent_steps, int):
            steps = dict.fromkeys(thinkers, latent_steps)
        else:
            steps = _by_turn(latent_steps or {}, thinkers)
        fields = Fields(fields, steps)
        room = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        turns = self.system.tokenize([fields], [room], WHAT)
        for n in range(1, len(self.agents)) if settings.agent_output else ():
            if self.agents[n - 1].model is not None:  # writes none
                continue
            shorter = copy.copy(self.system)
            shorter.agents = self.system.agents[:n]
            shorter.tokenize([fields], [room], WHAT)  # each text has to fit
        seed = secrets.randbits(31) if seed is None else seed
        return Question(self, fields, [row[0] for row in turns], room, seed, settings)

    def text_of(self, tokens: list[int], stop=()) -> str:
        """See `MultiAgentSystem.text_of`."""
        return self.system.text_of(tokens, list(stop))

    def why_ended(self, tokens: list[int], stop=()) -> str:
        """stop | length, of an answer that has all its tokens."""
        return "stop" if tokens[-1] in self.ends or self.text_of(tokens) != self.text_of(tokens, stop) else "length"


def _by_turn(steps: dict[str, int], turns: list[str]) -> dict[str, int]:
    """T by turn, of T by agent or turn. Raises ValueError for a name of neither."""
    found: dict[str, int] = {}
    for name, T in steps.items():
        mine = [turn for turn in turns if takes_turn(name, turn)]
        if not mine:
            known = list(dict.fromkeys(known for turn in turns for known in (agent_and_round(turn)[0], turn)))
            raise ValueError(f"latent_steps: expected names of agents that take some, {known}, got {name!r}")
        found |= {turn: T for turn in mine if turn == name or turn not in steps}
    return found


def _asked(agent: Agent):
    """T of a question: its own, or else the agent's."""

    def steps(fields: Fields) -> int:
        own = fields.steps.get(agent.name)
        return agent.steps(fields) if own is None else own

    return steps
