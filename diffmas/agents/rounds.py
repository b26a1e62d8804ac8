"""Agents that take more than one turn, written out as agents that take one each.

Neighbours in the list with the same `Agent.rounds` take their turns in rounds: first each of them once, then each again. A turn
is an agent of its own, ann@1 and ann@2, of ann's adapter. So whoever reads such a team knows no rounds: it has no circle.

    ann ⇄ bob, rounds: 2        ann@1 ─┬─► ann@2 ─┐
       └──► judge                      ╳          ├─► judge
                                bob@1 ─┴─► bob@2 ─┘
"""

from dataclasses import replace
from itertools import groupby

from diffmas.agents.agent import Agent
from diffmas.agents.graph import NOT_BEFORE, Read

__all__ = ["agent_and_round", "takes_turn", "unrolled"]


def agent_and_round(turn: str) -> tuple[str, str | None]:
    """("ann", "2") of ann@2; of a turn that is none of several, its name and None."""
    agent, _, number = turn.rpartition("@")
    return (agent, number) if agent and number.isdecimal() else (turn, None)


def takes_turn(name: str, turn: str) -> bool:
    """Whether an agent of this name takes the turn: it is its own, or one of its rounds."""
    return name in (turn, agent_and_round(turn)[0])


def unrolled(agents: list[Agent]) -> list[Agent]:
    """The turns of a team, in order. Raises ValueError for a read of the same round by or of an agent that takes none, and
    where some take rounds for a read of what is not there or not before the reader, by the names that were written.

    In a round, an agent reads what those of its rounds wrote in the round before, itself included, where its `reads` name them,
    or with {"agent": name, "round": "same"} what they wrote in this one, if they are before it; in the first round there is
    nothing before. Of others' rounds, the last turn is read.

        >>> ann, bob = (Agent(name, "{question}", 2, reads=["ann", "bob"], rounds=2) for name in ("ann", "bob"))
        >>> [(turn.name, [read.agent for read in turn.reads]) for turn in unrolled([ann, bob])]
        [('ann@1', []), ('bob@1', []), ('ann@2', ['ann@1', 'bob@1']), ('bob@2', ['ann@1', 'bob@1'])]
    """
    rounds = {agent.name: agent.rounds for agent in agents if agent.rounds is not None}
    if rounds:
        _check_reads(agents)
    turns: list[Agent] = []
    for count, block in groupby(agents, key=lambda agent: agent.rounds):
        block = list(block)
        beside = [] if count is None else [agent.name for agent in block]
        for number in range(1, (count or 1) + 1):
            turns += [_turn(agent, number, beside, rounds) for agent in block]
    return turns


def _check_reads(agents: list[Agent]) -> None:
    """Raises ValueError for an agent that reads what is not there, not before it, or there twice."""
    turns = {f"{agent.name}@{n}" for agent in agents for n in range(1, (agent.rounds or 0) + 1)}
    names = {agent.name for agent in agents}
    for i, agent in enumerate(agents):
        end = i
        while agent.rounds is not None and end < len(agents) and agents[end].rounds == agent.rounds:
            end += 1
        before, known = [other.name for other in agents[:i]], [other.name for other in agents[:end]]
        seen = set()
        for read in agent.reads or ():
            where = f"agent {agent.name!r}: reads"
            key = (read.agent, read.round)
            if key in seen or read.agent not in known and read.agent not in turns:
                why = "a second time" if key in seen else NOT_BEFORE if read.agent in names else "no agent"
                raise ValueError(f"{where}: expected some of {known}, each once, got {read.agent!r}, {why}")
            seen.add(key)
            if read.round == "same" and read.agent in known and read.agent not in before:
                raise ValueError(f"{where}: {read.agent}: round: expected None of an agent that is not before it, got 'same'")


def _turn(agent: Agent, number: int, beside: list[str], rounds: dict[str, int]) -> Agent:
    """An agent's turn in a round, of the first one in round 1. beside: whose rounds these are."""
    reads = agent.reads
    if reads is not None:
        reads = [turn for read in reads for turn in _read(agent, read, number, beside, rounds)]
    if agent.rounds is None:
        return replace(agent, reads=reads)
    prompt = agent.prompt if number == 1 or agent.later_prompt is None else agent.later_prompt
    return replace(
        agent, name=f"{agent.name}@{number}", role=agent.adapter, prompt=prompt, reads=reads, rounds=None, later_prompt=None
    )


def _read(agent: Agent, read: Read, number: int, beside: list[str], rounds: dict[str, int]) -> list[Read]:
    """What becomes of one of an agent's reads in a round: one of a turn, or none."""
    if read.agent in beside:
        number = number if read.round == "same" else number - 1
        return [replace(read, agent=f"{read.agent}@{number}", round=None)] if number else []
    if read.round is not None:
        raise ValueError(
            f"agent {agent.name!r}: reads: {read.agent}: round: expected None of an agent that has no rounds with it, got "
            f"{read.round!r}"
        )
    return [replace(read, agent=f"{read.agent}@{rounds[read.agent]}") if read.agent in rounds else read]
