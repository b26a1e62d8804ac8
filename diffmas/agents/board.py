"""What the agents of a batch have written so far, and what the next one reads of it."""

import torch

from diffmas.agents import adapters
from diffmas.agents.graph import branches_of, handed_on
from diffmas.agents.meter import has_read, phase
from diffmas.agents.prompts import Turn, turn_of
from diffmas.agents.scores import scores
from diffmas.agents.selection import MEASURED, within
from diffmas.agents.turns import take_turns
from diffmas.trace import Segment, Trace

__all__ = ["Board"]


class Board:
    """The turns of one batch of questions.

    trace: a sequence for each question; what is on it, everybody reads. In a chain it goes from agent to agent. Else each agent
    leaves a view of what it hands on, and a reader joins those that it reads. groups: the agents that take their turn in one
    forward, in order.
    """

    def __init__(self, system, trace: Trace):
        self.system, self.graph = system, system.graph
        self._trace, self._handed = trace, {}
        self.groups = [group for level in self.graph.levels for group in _groups(system, level)]

    def read(self, i: int, questions: list[dict]) -> Trace:
        """What agent i reads in its turn."""
        if self.graph.chain:
            trace = self._trace
        else:
            with phase("hand-over"):
                trace = self._chosen(i, questions)
        has_read(self.system.agents[i].name, trace)
        return trace

    def _chosen(self, i: int, questions: list[dict]) -> Trace:
        """The rows that agent i has of those that it may read."""
        agent, trace, found = self.system.agents[i], self._joined(i, [{}] * len(questions)), [{}] * len(questions)
        measures, more = self.graph.measures(i), {agent.max_rows_by} & {*MEASURED}
        if max(trace.lengths) <= (agent.max_rows or 0) and self.system.agreement is None:
            more = set()
        if measures | more:
            found = scores(self.system, i, questions, trace, measures | more)
        if measures:
            trace = self._joined(i, found)
        if agent.max_rows is None:
            return trace
        budget = self.system.sinks, agent.max_rows, agent.max_rows_by
        return trace.reading([within(row, *budget, found[b]) for b, row in enumerate(_by_sequence(trace))])

    def _joined(self, i: int, scores: list[dict]) -> Trace:
        """What agent i reads, where the rows that it may choose from have these scores."""
        edges, sinks = self.graph.reads[i], self.system.sinks
        units = [self._handed[edge.agent] for edge in edges]
        base, *rows = map(_by_sequence, (self._trace, *units))
        branches = [branches_of(base[b], [unit[b] for unit in rows], edges, sinks, scores[b]) for b in range(len(base))]
        views = [unit.reading([row[k + 1] for row in branches]) for k, unit in enumerate(units)]
        return Trace.join([self._trace, *views], ["keep", *(edge.positions for edge in edges)])

    def write(self, group: list[int], questions: list[dict], turns: list[list[Turn]] | None = None, least_steps=()) -> None:
        """A group's turns. turns: of all agents, [agent][question]. least_steps: of each agent (`MultiAgentSystem.think`)."""
        system, first = self.system, group[0]
        learning = torch.is_grad_enabled() and first >= system.agents_without_grad
        least = max((least_steps[i] for i in group), default=0) if least_steps else 0
        with torch.set_grad_enabled(learning), adapters.of_agent(system, first):
            if self.graph.chain:
                own = None if turns is None else turns[first]
                self._trace = system.think(system.agents[first], questions, self.read(first, questions), own, least)
            else:
                self._write_together(group, questions, turns, least)

    def _write_together(self, group: list[int], questions, turns, least: int) -> None:
        system, B = self.system, len(questions)
        reads, agents = [self.read(i, questions) for i in group], [system.agents[i] for i in group]
        if turns is None:
            own = [
                turn_of(system, agent, b, fields, at)
                for agent, read in zip(agents, reads)
                for b, (fields, at) in enumerate(zip(questions, read.next_positions))
            ]
        else:
            own = [turn for i in group for turn in turns[i]]
        wide = Trace.stack(reads)
        wide.agent = [agent.name for agent in agents for _ in range(B)]
        take_turns(system, agents[0], wide, own, least)
        base, kind = _by_sequence(self._trace), "latent" if system.trace_content == "latent_only" else None
        with phase("hand-over"):
            for k, (i, read) in enumerate(zip(group, reads)):
                mine = wide.select(range(k * B, (k + 1) * B))
                mine.agent = None
                rows = zip(_by_sequence(mine), read.lengths, base)
                self._handed[i] = mine.reading(
                    [handed_on(row, n, common, system.agents[i].name, kind, system.sinks) for row, n, common in rows]
                )

    def written(self, i: int) -> Trace:
        """A view with the latent rows of agent i, who has had its turn."""
        return self._trace if self.graph.chain else self._handed[i]

    def select(self, sequences: list[int]) -> None:
        """Goes on with these questions alone."""
        self._trace = self._trace.select(sequences)
        self._handed = {i: trace.select(sequences) for i, trace in self._handed.items()}


def _groups(system, level: list[int]) -> list[list[int]]:
    """The agents of a level that can share a forward: of one adapter, that learn or do not, and that take their steps alike."""
    groups: dict[tuple, list[int]] = {}
    for i in level:
        agent = system.agents[i]
        adapter = agent.adapter if system.adapter_scope == "per_role" else None
        apart = None if system.together else i
        key = (adapter, i >= system.agents_without_grad, agent.passes, agent.grad_passes, agent.stop_change, apart)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def _by_sequence(trace: Trace) -> list[list[Segment]]:
    rows: list[list[Segment]] = [[] for _ in range(trace.batch_size)]
    for s in trace.segments:
        rows[s.sequence].append(s)
    return rows
