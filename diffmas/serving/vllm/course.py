"""Where, in the one prompt of a team's question, each agent has its prompt and its latent steps. Knows no engine."""

import functools
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from diffmas.agents.prompts import Turn

__all__ = ["KEY", "Course", "Run"]

KEY = "diffmas"  # of `SamplingParams.extra_args`: the team's name
PROMPTS, STEPS = "prompt_tokens", "latent_steps"  # beside it: of each agent


class Run(NamedTuple):
    """Positions from start to end that are one agent's: tokens of its prompt, or latent steps."""

    start: int
    end: int
    agent: int
    latent: bool


@dataclass(frozen=True)
class Course:
    """team: its name. runs: one after another, none of them empty."""

    team: str
    runs: tuple[Run, ...]

    @classmethod
    def of_turns(cls, team: str, prompts: Sequence[int], steps: Sequence[int]) -> "Course":
        """prompts, steps: prompt tokens and T of each agent, 0 and 0 where it has no turn. Raises ValueError for what is no
        team's."""
        if len(prompts) != len(steps):
            raise ValueError(f"{STEPS}: expected one for each of {len(prompts)} agents, got {len(steps)}")
        runs, at = [], 0
        for agent, (tokens, T) in enumerate(zip(prompts, steps)):
            for name, value in ((PROMPTS, tokens), (STEPS, T)):
                if type(value) is not int or value < 0:
                    raise ValueError(f"{name}: expected integers >= 0, got {value!r}")
            if T and not tokens:
                raise ValueError(f"{PROMPTS}: expected some of agent {agent}, which takes latent steps, got 0")
            for length, latent in ((tokens, False), (T, True)):
                if length:
                    runs.append(Run(at, at + length, agent, latent))
                    at += length
        if not runs:
            raise ValueError(f"{PROMPTS}: expected at least one agent with a prompt, got {list(prompts)}")
        return cls(team, tuple(runs))

    @classmethod
    def read(cls, extra_args: Mapping | None) -> "Course | None":
        """The course of a request that is a team's, from its `extra_args`; None for others. Raises ValueError."""
        if not extra_args or KEY not in extra_args:
            return None
        team, prompts, steps = (extra_args.get(key) for key in (KEY, PROMPTS, STEPS))
        if not isinstance(team, str):
            raise ValueError(f"{KEY}: expected a team's name, got {team!r}")
        for name, value in ((PROMPTS, prompts), (STEPS, steps)):
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}: expected a list with a number for each agent, got {value!r}")
        try:
            return _course(team, tuple(prompts), tuple(steps))
        except TypeError as error:  # what is in the lists cannot be hashed
            raise ValueError(f"{PROMPTS}, {STEPS}: expected integers >= 0") from error

    @property
    def end(self) -> int:
        """Positions of the prompt."""
        return self.runs[-1].end

    @property
    def agents(self) -> int:
        """One more than the last one's number."""
        return self.runs[-1].agent + 1

    def _at(self, position: int) -> int:
        return bisect_right(self.runs, position, key=lambda run: run.start) - 1

    def is_latent(self, position: int) -> bool:
        """Whether a vector goes in there, which the position before has to be computed for."""
        return position < self.end and self.runs[self._at(position)].latent

    def agent_at(self, position: int) -> int:
        """Whose it is; the last one's after the prompt."""
        return self.runs[self._at(position)].agent

    def chunk_end(self, start: int, end: int, adapters: Sequence) -> int:
        """How far a forward from `start` may go, at most to `end`: to the next vector that it does not have, or an agent with
        another adapter. adapters: of each agent."""
        runs = self.runs[self._at(start) :]
        for run in runs:
            if run.start >= end:
                break
            if run.start > start and (run.latent or adapters[run.agent] != adapters[runs[0].agent]):
                return run.start
            if run.latent and start + 1 < run.end:
                return start + 1
        return end

    def within(self, start: int, end: int) -> list[Run]:
        """The runs from start to end, cut there. What comes after the prompt is the last agent's."""
        after = Run(self.end, max(end, self.end), self.agents - 1, False)
        cut = (
            run._replace(start=max(run.start, start), end=min(run.end, end)) for run in (*self.runs[self._at(start) :], after)
        )
        return [run for run in cut if run.start < run.end]

    def key(self, start: int, end: int) -> str:
        """What else than its tokens, and all before them, makes a block's keys and values what they are: the team with its
        realign, whose adapter wrote it, and which positions are latent steps. A latent step's vector is a function of what
        stands before it, as a token's row is, so this names the vectors by what they are and not by their stand-ins."""
        runs = (f"{run.agent}{'~' if run.latent else ':'}{run.end - run.start}" for run in self.within(start, end))
        return f"{self.team} {' '.join(runs)}"


_course = functools.lru_cache(maxsize=4096)(Course.of_turns)


def extra_args(team: str, turns: Sequence[Turn]) -> dict:
    """What `Course.read` reads."""
    return {KEY: team, PROMPTS: [len(turn.ids) for turn in turns], STEPS: [turn.steps for turn in turns]}


def prompt_of(turns: Sequence[Turn]) -> list[int]:
    """Token ids, with a stand-in for each latent step: the token before them, so that rules about text see no other."""
    return [token for turn in turns for token in (*turn.ids, *turn.ids[-1:] * turn.steps)]
