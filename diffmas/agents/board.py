"""What the agents of a batch have written so far, and what the next one reads of it."""

import contextlib

import torch

from diffmas.agents import adapters
from diffmas.agents.alignment import partners
from diffmas.agents.crossing import fused, projected
from diffmas.agents.described import readings
from diffmas.agents.graph import branches_of, handed_on, home
from diffmas.agents.low_rank import Coder
from diffmas.agents.meter import has_read, phase
from diffmas.agents.prompts import Turn, turn_of
from diffmas.agents.quantized import quantized
from diffmas.agents.scores import question_values, scores
from diffmas.agents.selection import MEASURED, QUESTION, within
from diffmas.agents.turns import take_turns
from diffmas.trace import Trace
from diffmas.trace.appending import AdapterOf
from diffmas.trace.views import SAID, by_sequence, length_of, rows_of, without_first

__all__ = ["Board"]


class Board:
    """The turns of one batch of questions.

    trace: a sequence for each question; what is on it, everybody of the system's model reads. In a chain it goes from agent to
    agent. Else each agent leaves a view of what it hands on, and a reader joins those that it reads. groups: the agents that
    take their turn in one forward, in order. seeds: of each question, of messages that are sampled (`diffmas.agents.messages`).
    """

    def __init__(self, system, trace: Trace, seeds: list[int] | None = None):
        self.system, self.graph, self._seeds = system, system.graph, seeds
        self._trace, self._handed = trace, {}
        self._models = [home(agent, readings(system.others)) for agent in system.agents]  # that write their rows
        names = dict.fromkeys(name for name in self._models if name is not None)
        self._beside = {name: Trace(system.others[name].model, trace.batch_size) for name in names}  # empty
        self._codings: dict[int, dict] = {}  # of agents with low_rank, by adapter
        self._crossed: dict[int, Trace] = {}  # of agents of other models, what is read of them by the system's model
        self._learning = torch.is_grad_enabled()
        shared = adapters.sharing(system, self.graph.levels)
        self.groups = [group for level in self.graph.levels for group in _groups(system, level, shared)]

    def read(self, i: int, questions: list[dict]) -> Trace:
        """What agent i reads in its turn."""
        if self.graph.chain:
            trace = self._trace
        else:
            with phase("hand-over"):
                trace = self._with_codes(i, self._chosen(i, questions))
        has_read(self.system.agents[i].name, trace)
        return trace

    def _with_codes(self, i: int, trace: Trace) -> Trace:
        """With the rows of agents with low_rank as the adapter of agent i has them."""
        if not self._codings or self._models[i] is not None or (name := adapters.name_of(self.system, i)) is None:
            return trace
        return trace.with_codes([codings[name] for codings in self._codings.values() if name in codings])

    def _coder(self, i: int) -> Coder:
        """For the turn of agent i, with low_rank: the adapters of those who read it, or of it."""
        system, near = self.system, {i}
        for k in range(i + 1, len(system.agents)):
            near |= {k} if near & {edge.agent for edge in self.graph.reads[k]} else set()
        names = {k: adapters.name_of(system, k) for k in sorted(near - {i}) if self._models[k] is None}
        learn = {name for k, name in names.items() if self._learning and k >= system.agents_without_grad}
        return Coder(system, {name: name in learn for name in dict.fromkeys(names.values()) if name is not None})

    def _chosen(self, i: int, questions: list[dict]) -> Trace:
        """The rows that agent i has of those that it may read."""
        agent, trace, found = self.system.agents[i], self._joined(i, [{}] * len(questions)), [{}] * len(questions)
        measures, more = self.graph.measures(i), {agent.max_rows_by} & {*MEASURED}
        if max(trace.lengths) <= (agent.max_rows or 0) and self.system.agreement is None:
            more = set()
        if measures | more:
            found = scores(self.system, i, questions, trace, measures | more)
        selects, choices, asked = self.graph.learned(i), self.system.choices, None
        learned = {j: self._unit(j, i) for j in selects}
        if any(select.of == QUESTION for select in selects.values()):
            asked = choices.asked(question_values(self.system, i, questions, trace))
        for j, unit in learned.items():
            good = choices.scores(i, j, unit, selects[j].noise, asked)
            found = [{**known, j: score} for known, score in zip(found, good)]
        if measures or learned:
            trace = self._joined(i, found)
        if agent.max_rows is not None:
            budget = self.system.sinks, agent.max_rows, agent.max_rows_by
            trace = trace.reading([within(row, *budget, found[b]) for b, row in enumerate(by_sequence(trace))])
        if learned and torch.is_grad_enabled():
            fixed = [max(length_of(row), self.system.sinks) for row in by_sequence(self._base(i))]
            rows = lambda unit: [rows_of(without_first(row, n)) for row, n in zip(by_sequence(unit), fixed)]
            trace = choices.gated(i, trace, {j: rows(unit) for j, unit in learned.items()}, asked)
        return trace

    def _joined(self, i: int, scores: list[dict]) -> Trace:
        """What agent i reads, where the rows that it may choose from have these scores."""
        edges, sinks = self.graph.reads[i], self.system.sinks
        units, trace = [self._unit(edge.agent, i) for edge in edges], self._base(i)
        base, *rows = map(by_sequence, (trace, *units))
        branches = [branches_of(base[b], [unit[b] for unit in rows], edges, sinks, scores[b]) for b in range(len(base))]
        views = [unit.reading([row[k + 1] for row in branches]) for k, unit in enumerate(units)]
        return Trace.join([trace, *views], ["keep", *(edge.positions for edge in edges)])

    def write(self, group: list[int], questions: list[dict], turns: list[list[Turn]] | None = None, least_steps=()) -> None:
        """A group's turns. turns: of all agents, [agent][question]. least_steps: of each agent (`MultiAgentSystem.think`)."""
        system, first = self.system, group[0]
        learning = torch.is_grad_enabled() and first >= system.agents_without_grad
        least = max((least_steps[i] for i in group), default=0) if least_steps else 0
        coded = system.agents[first].low_rank
        with contextlib.ExitStack() as held:
            if coded:  # nobody else may switch adapters, nor run, while the readers' are looked at and layers are hooked into
                held.enter_context(adapters.will_switch(system.model))
            coder = self._coder(first) if coded else None
            for context in (torch.set_grad_enabled(learning), coder, adapters.of_agent(system, *group)):
                held.enter_context(context or contextlib.nullcontext())
            if self.graph.chain:
                own, read = None if turns is None else turns[first], self.read(first, questions)
                self._trace = system.think(system.agents[first], questions, read, own, least, self._seeds)
            else:
                self._write_together(group, questions, turns, least)
                if coder is not None:
                    self._codings[first] = coder.encode(self._handed[first])

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
        if adapters.by_rows(system, group):
            wide.adapter = AdapterOf(len(group), [k for k in range(len(group)) for _ in range(B)])
        take_turns(system, agents[0], wide, own, least, self._seeds and self._seeds * len(group))
        common, kind = self._base(group[0]), SAID if system.trace_content == "latent_only" else None
        base = by_sequence(common)
        with phase("hand-over"):
            for k, (i, read) in enumerate(zip(group, reads)):
                mine = wide.select(range(k * B, (k + 1) * B))
                mine.agent = mine.adapter = None
                rows = zip(by_sequence(mine), read.lengths, base)
                self._handed[i] = mine.reading(
                    [handed_on(row, n, to_all, system.agents[i].name, kind, system.sinks) for row, n, to_all in rows],
                    None if agents[k].max_rows is None else common,  # of which it may have read some rows alone
                )
                if self._codings:  # whoever reads them has codes of its own
                    own_codes = [coding for codings in self._codings.values() for coding, _ in codings.values()]
                    self._handed[i] = self._handed[i].without_codes(own_codes)
                if agents[k].quantized is not None:
                    fixed = [max(length_of(row), system.sinks) for row in base]
                    self._handed[i] = quantized(self._handed[i], fixed, agents[k].quantized)
                if i in self.graph.fuses:
                    self._handed[i] = self._fused(i, questions, own[k * B : (k + 1) * B])

    # ---- between models ----------------------------------------------------------------------------------------------

    def _base(self, i: int) -> Trace:
        """What all agents of the model of agent i read."""
        name = self._models[i]
        return self._trace if name is None else self._beside[name]

    def _unit(self, j: int, i: int) -> Trace:
        """What agent i reads of agent j."""
        name = self._models[j]
        if name == self._models[i]:
            return self._handed[j]
        if j not in self._crossed:
            # Whoever reads first, and learns or not: the rows are the same for all.
            with torch.set_grad_enabled(self._learning):
                self._crossed[j] = projected(self.system.others[name].projector, self._handed[j], self._trace)
        return self._crossed[j]

    def _fused(self, i: int, questions: list[dict], turns: list[Turn]) -> Trace:
        """What agent i hands on, with the rows of its prompt fused with those of the agent of another model."""
        system, j = self.system, self.graph.fuses[i]
        agent, sharer = system.agents[i], system.agents[j]
        of = [partners(system, agent, sharer, fields) for fields in questions]
        with torch.set_grad_enabled(self._learning):
            projector = system.others[sharer.model].projector
            return fused(projector, self._handed[i], [len(turn.ids) for turn in turns], self._handed[j], sharer.name, of)

    def written(self, i: int) -> Trace:
        """A view with the latent rows and the message of agent i, who has had its turn."""
        return self._trace if self.graph.chain else self._handed[i]

    def select(self, sequences: list[int]) -> None:
        """Goes on with these questions alone."""
        self._trace = self._trace.select(sequences)
        self._seeds = self._seeds and [self._seeds[b] for b in sequences]
        for traces in (self._handed, self._crossed, self._beside):
            traces.update({key: trace.select(sequences) for key, trace in traces.items()})


def _groups(system, level: list[int], shared: set[str]) -> list[list[int]]:
    """The agents of a level that can share a forward: of one model, of one adapter or of several that can have rows of their
    own (`shared`), that learn or do not, and that take their steps and write alike."""
    groups: dict[tuple, list[int]] = {}
    for i in level:
        agent = system.agents[i]
        own = system.writer(agent) is system and system.adapter_scope == "per_role" and agent.adapter not in shared
        adapter = (agent.model, agent.adapter if own else None)
        apart = i if agent.low_rank or not system.together else None
        steps = (agent.passes, agent.grad_passes, agent.stop_change)
        writes = (agent.max_message_tokens is None, agent.message_temperature)
        key = (adapter, i >= system.agents_without_grad, *steps, *writes, apart)
        groups.setdefault(key, []).append(i)
    return list(groups.values())
