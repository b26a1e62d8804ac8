"""Who reads whom in a team, and where a reader has the rows that it reads.

By default a team is a chain: each agent reads all that was written before it. `Agent(reads=[...])` names the agents that one
reads, out of those before it in the list, in the order in which it has their rows: parallel agents that read nobody and are
joined, a tree, a solver that reads some of many. Agents of one *level* do not read each other, and take their turn together.
What goes round is written out before, turn by turn (`diffmas.agents.rounds`).
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from diffmas.agents.selection import LEARNED, MEASURED, Score, Select, select_of, selected
from diffmas.trace.views import JOINS, Segment, length_of, only, without_first, without_rows

__all__ = ["NOT_BEFORE", "Edge", "Graph", "Read", "branches_of", "check_graph", "handed_on", "home", "reads_of"]

Row = list[Segment]

NOT_BEFORE = "which is not before it; who read each other take `rounds`"


@dataclass(frozen=True)
class Read:
    """An edge of a team: the agent whose rows are read.

    positions: where the reader has them, as `Trace.join` takes it: shift (as a block behind what stands before), keep (where
    they were written), reindex (without gaps behind what stands before), same_branch (from the start, beside the others).
    None: shift, or the system's reindex. select: which of the rows it has (`diffmas.agents.selection.Select`), None: all.
    round: "same" reads what an agent wrote in this round, and not in the one before (`diffmas.agents.rounds`).
    """

    agent: str
    positions: str | None = None
    select: Select | None = None
    round: str | None = None

    def described(self) -> dict:
        """As plain data."""
        select = {} if self.select is None else {"select": self.select.described()}
        of_round = {} if self.round is None else {"round": self.round}
        return {"agent": self.agent, "positions": self.positions, **select, **of_round}


def reads_of(reader: str, reads) -> tuple[Read, ...] | None:
    """The edges that an agent's `reads` names: None, or a list of names, of dicts with the fields of `Read`, or of these.
    Raises ValueError naming what does not fit."""
    if reads is None:
        return None
    if isinstance(reads, str) or not isinstance(reads, (list, tuple)):
        raise ValueError(f"agent {reader!r}: reads: expected a list of agents' names or None, got {reads!r}")
    edges = []
    for read in reads:
        try:
            edge = read if isinstance(read, Read) else Read(**read) if isinstance(read, dict) else Read(read)
        except TypeError:
            edge = Read(None)
        if not (isinstance(edge.agent, str) and edge.agent):
            what = "a name, or a dict of agent, positions, select and round"
            raise ValueError(f"agent {reader!r}: reads: expected {what}, got {read!r}")
        if edge.positions is not None and edge.positions not in JOINS:
            raise ValueError(f"agent {reader!r}: reads: expected positions of {JOINS}, got {edge.positions!r}")
        if edge.round not in (None, "same"):
            raise ValueError(f"agent {reader!r}: reads: {edge.agent}: round: expected 'same' or None, got {edge.round!r}")
        where = f"agent {reader!r}: reads: {edge.agent}: select"
        edges.append(replace(edge, select=select_of(where, edge.select)))
    return tuple(edges)


class Edge(NamedTuple):
    """A `Read` in a team: the number of the agent that is read, where the reader has its rows, and which of them."""

    agent: int
    positions: str
    select: Select | None


@dataclass(frozen=True)
class Graph:
    """A team's shape. reads: by agent, its edges to the agents that it reads, in order. chain: whether each reads all that was
    written before it, on one trace, since nobody says otherwise. levels: of all agents but the last, those that do not wait for
    each other. fuses: by agent whose rows are fused with those of one of another model, the number of that one."""

    reads: list[list[Edge]]
    chain: bool
    levels: list[list[int]] = field(default_factory=list)
    fuses: dict[int, int] = field(default_factory=dict)

    @classmethod
    def of(cls, agents, positions: str = "shift", beside: dict[str, str] | None = None) -> "Graph":
        """positions: of edges that do not say theirs. beside: of other models by name, the `reading` of an `Other`.

        Raises ValueError for a name that is no agent's before the reader, for one that is there twice, for an agent of another
        model that reads one not of its model, and for two that are fused with one.
        """
        number, models = {agent.name: i for i, agent in enumerate(agents)}, [home(agent, beside) for agent in agents]
        fusing = {name for name, reading in (beside or {}).items() if reading == "fused"}
        in_line = all(agent.reads is None for agent in agents) and not any(models)
        # Nobody reads the last one.
        rewritten = any(agent.quantized is not None or agent.low_rank for agent in agents[:-1])
        chain = in_line and not rewritten and all(agent.max_rows is None for agent in agents)
        if in_line and positions == "shift":  # what is not read by one of them stays where it is for the others
            positions = "keep"
        reads: list[list[Edge]] = []
        fuses: dict[int, int] = {}
        for i, agent in enumerate(agents):
            if agent.reads is None:
                edges = [Read(agents[j].name) for j in range(i) if _readable(models[j], models[i], fusing)]
            else:
                edges = agent.reads
            names = [edge.agent for edge in edges]
            for n, name in enumerate(names):
                if number.get(name, i) < i and name not in names[:n]:
                    continue
                known = [other.name for other in agents[:i]]
                why = "a second time" if name in names[:n] else "no agent" if name not in number else NOT_BEFORE
                raise ValueError(f"agent {agent.name!r}: reads: expected some of {known}, each once, got {name!r}, {why}")
            for edge in edges:
                j = number[edge.agent]
                if models[i] is None and models[j] in fusing:
                    if i in fuses:
                        raise ValueError(
                            f"agent {agent.name!r}: reads: expected one agent at most whose rows are fused with its own, got "
                            f"{agents[fuses[i]].name!r} and {edge.agent!r}"
                        )
                    if edge.positions or edge.select:
                        where = f"agent {agent.name!r}: reads: {edge.agent}"
                        raise ValueError(f"{where}: expected neither positions nor select of rows that are fused with its own")
                    fuses[i] = j
                elif not _readable(models[j], models[i], fusing):
                    raise ValueError(
                        f"agent {agent.name!r}: reads: expected agents of its own model {models[i]!r}, got {edge.agent!r} of "
                        f"{models[j]!r}"
                    )
            edges = [edge for edge in edges if fuses.get(i) != number[edge.agent]]
            reads.append([Edge(number[edge.agent], edge.positions or positions, edge.select) for edge in edges])
        depth: list[int] = []
        for i, edges in enumerate(reads):
            before = [edge.agent for edge in edges] + ([fuses[i]] if i in fuses else [])
            depth.append(1 + max((depth[j] for j in before), default=-1))
        thinkers = range(len(agents) - 1)
        levels = [[i for i in thinkers if depth[i] == d] for d in range(max(depth[:-1], default=-1) + 1)]
        return cls(reads, chain, levels, fuses)

    def measures(self, i: int) -> set[str]:
        """By what agent i chooses rows of each agent that it reads, that has to be measured first."""
        return {edge.select.by for edge in self.reads[i] if edge.select is not None} & {*MEASURED}

    def learned(self, i: int) -> dict[int, Select]:
        """Of which agents agent i has learned to choose rows."""
        chosen = [(edge.agent, edge.select) for edge in self.reads[i] if edge.select is not None]
        return {j: select for j, select in chosen if select.by == LEARNED}


def _readable(writer: str | None, reader: str | None, fusing) -> bool:
    """Whether an agent's rows are put before another's, by their models."""
    return writer == reader or (reader is None and writer not in fusing)


def home(agent, beside: dict[str, str] | None) -> str | None:
    """The model that writes an agent's rows: None, the system's, also where another one has encoded its prompt."""
    return None if (beside or {}).get(agent.model) == "embeddings" else agent.model


def check_graph(
    agents, trace_content: str, sinks: int, layers: float, heads: float, beside: dict[str, str] | None = None
) -> None:  # fmt: skip
    """Raises ValueError as `Graph.of`, for an agent that nobody reads, and for a selection of rows, layers or heads that are
    never there. layers, heads: of the model, K/V heads. beside: as in `Graph.of`."""
    graph = Graph.of(agents, beside=beside)
    reads = graph.reads
    for i, agent in enumerate(agents):
        small = next((agents[edge.agent].name for edge in reads[i] if agents[edge.agent].quantized is not None), None)
        if small is not None and "attention" in {agent.max_rows_by} | graph.measures(i):
            raise ValueError(
                f"agent {agent.name!r}: expected another choice of rows than by attention, which nobody sums for quantised "
                f"ones, with those of {small!r}"
            )
        if (j := next((j for j in graph.learned(i) if agents[j].quantized is not None), None)) is not None:
            where = f"agent {agent.name!r}: reads: {agents[j].name}: select: by"
            raise ValueError(f"{where}: expected another choice than learned of quantised rows, got {LEARNED!r}")
        for edge in (edge for edge in reads[i] if agents[edge.agent].low_rank and edge.select is not None):
            if edge.select.heads is not None or edge.select.by == LEARNED:
                where = f"agent {agent.name!r}: reads: {agents[edge.agent].name}: select"
                raise ValueError(
                    f"{where}: expected no heads, and no learned choice, of low-rank rows, got {edge.select.described()}"
                )
        coded = next((agents[edge.agent].name for edge in reads[i] if agents[edge.agent].low_rank), None)
        measured = ({agent.max_rows_by} | graph.measures(i)) & {*MEASURED}
        if coded is not None and measured:
            raise ValueError(
                f"agent {agent.name!r}: expected another choice of rows than by {min(measured)}, which nobody measures of "
                f"low-rank ones, with those of {coded!r}"
            )
        if agent.max_rows is not None and agent.max_rows <= sinks:
            raise ValueError(f"agent {agent.name!r}: max_rows: expected more than the {sinks} sinks, got {agent.max_rows}")
    for reader, edges in zip(agents, reads):
        for edge in edges:
            kind, agent = edge.select and edge.select.kind, agents[edge.agent]
            for what, count in (("layers", layers), ("heads", heads)) if edge.select is not None else ():
                if (most := edge.select.highest(what)) >= count:
                    where = f"agent {reader.name!r}: reads: {agent.name}: select: {what}"
                    raise ValueError(f"{where}: expected some of the model's, 0 to {count - 1}, got {most}")
            why, encoded = None, agent.model != home(agent, beside)
            if kind == "prompt" and encoded:
                why = "whose prompt another model encodes, to latent rows"
            elif kind == "prompt" and trace_content == "latent_only":
                why = "whose prompt nobody gets with trace_content='latent_only'"
            elif kind == "latent" and agent.latent_steps == 0 and not encoded:
                why = "which takes no latent steps"
            elif kind == "text" and agent.max_message_tokens is None:
                why = "which writes no message"
            if why is not None:
                where = f"agent {reader.name!r}: reads: {agent.name}: select: kind"
                raise ValueError(f"{where}: expected one that leaves rows, got {kind!r} of an agent {why}")
    read = {edge.agent for edges in reads for edge in edges} | {*graph.fuses.values()}
    if unread := [agent.name for i, agent in enumerate(agents[:-1]) if i not in read]:
        why = "; neighbours with as many rounds take them together, unless an agent stands between" if "@" in unread[0] else ""
        raise ValueError(f"agents: expected somebody who reads {unread[0]!r}, got nobody; it would think in vain{why}")


# ---- rows, of one sequence -------------------------------------------------------------------------------------------


def handed_on(row: Row, read: int, base: Row, agent: str, kind: tuple[str, ...] | None, sinks: int) -> Row:
    """What whoever reads an agent gets: what all see (`base`), the first tokens that the agent saw, as attention sinks, and its
    own rows, of all kinds or some. row: what it saw and wrote; read: how many rows it saw. Nothing of it where it has written
    nothing."""
    if length_of(row) == read:
        return list(base)
    own = without_first(row, read)
    return [*base, *without_rows(_first(row, read, sinks), base), *only(own, kind, agent, max(sinks - read, 0))]


def _first(row: Row, read: int, sinks: int) -> Row:
    """The first `sinks` rows, of those that were read."""
    first, left = [], min(sinks, read)
    for s in row:
        if left > 0:
            first.append(s._replace(length=min(s.length, left)))
            left -= s.length
    return first


def branches_of(base: Row, units: list[Row], edges: list[Edge], sinks: int, scores: dict[str | int, Score]) -> list[Row]:
    """What a reader joins: `base`, and what it has of what each agent hands on (`handed_on`), without rows that stand before it
    already, such as sinks that several of them hand on. scores: as `selected` takes them, and by an agent's number those of its
    rows that are learned."""
    branches, seen = [list(base)], list(base)
    for unit, edge in zip(units, edges):
        known = scores if edge.agent not in scores else {**scores, LEARNED: scores[edge.agent]}
        own = without_rows(selected(unit, max(length_of(base), sinks), edge.select, known), seen)
        seen += own
        branches.append([*base, *own])
    return branches
