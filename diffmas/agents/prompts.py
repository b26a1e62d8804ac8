"""Agents, and their prompts and answers as token ids."""

import math
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass
from string import Formatter
from typing import NamedTuple

from diffmas.agents.alignment import partners
from diffmas.agents.chat import chat_text
from diffmas.agents.graph import branches_of, handed_on, reads_of
from diffmas.agents.selection import PLANNED, check_by, check_count, within
from diffmas.trace.views import SAID, Segment, joined, length_of

__all__ = ["Agent", "TooLong", "Turn", "answer_ids", "fields_of", "prompt_ids", "tokenize", "turn_of"]


@dataclass(frozen=True)
class Agent:
    """A role in a system.

    name: unique in the system. prompt: a format string with fields of the question, such as "{question}". latent_steps: T,
    how many latent steps follow the prompt; the last agent decodes text instead. An integer, or for each question its own: the
    name of the question's field that has it, or a function of the question's fields (which cannot be saved). system: a system
    message. stop_change: ends a question's latent steps before T, after the first step that changes its last hidden state by
    less than this, |h_t - h_(t-1)| / |h_(t-1)|; None takes all T. Waits for the device at each step. role: with adapter_scope
    "per_role" the agents of a role have one adapter, of its name; None is a role of the agent's own, named as it is. passes: J,
    how many forwards over all latent tokens at once stand for the T steps (`diffmas.agents.jacobi`); None, or J >= T: one by
    one. grad_passes: gradients go through the last so many of them; None: through all. reads: the names of the agents whose
    rows it reads, out of those before it, in this order; or {"agent": name, "positions": ..., "select": ...} for where it has
    them, and which of them (`diffmas.agents.graph.Read`). None: all before it; []: nobody. max_rows: it reads at most so many
    rows, `sinks` included; where there are more, the best ones, max_rows_by: last (the default), similarity or attention
    (`diffmas.agents.selection`). model: the name of another model that takes the turn (`MultiAgentSystem`'s others), and whose
    rows are read through its projector; None is the system's own. max_message_tokens: behind its latent steps it writes a text
    of at most so many tokens, whose rows are read like the others (`diffmas.agents.messages`); with latent_steps 0 it says that
    alone; None: no text. message_temperature: None or 0 takes the likeliest tokens.

    Raises ValueError for T < 0, stop_change <= 0, passes < 1, grad_passes that are not 1 to passes, passes together with
    stop_change, reads that are no list of agents, max_rows < 1, an unknown max_rows_by, max_message_tokens < 1, a negative
    message_temperature, or one without messages, an empty name, role or model, or a prompt that is no string.

        >>> Agent("planner", "Plan how to answer: {question}", latent_steps=10).render({"question": "2 + 2?"})
        'Plan how to answer: 2 + 2?'
        >>> Agent("planner", "Plan: {question}", latent_steps="steps").steps({"question": "2 + 2?", "steps": 3})
        3
    """

    name: str
    prompt: str
    latent_steps: int | str | Callable = 0
    system: str | None = None
    stop_change: float | None = None
    role: str | None = None
    passes: int | None = None
    grad_passes: int | None = None
    reads: list | None = None  # then a tuple of `Read`
    max_rows: int | None = None
    max_rows_by: str | None = None
    model: str | None = None
    max_message_tokens: int | None = None
    message_temperature: float | None = None

    def __post_init__(self):
        T = self.latent_steps
        if isinstance(T, bool) or not (isinstance(T, int) and T >= 0 or isinstance(T, str) and T or callable(T)):
            raise ValueError(
                f"agent {self.name!r}: latent_steps: expected an integer >= 0, the name of a field or a function, got {T!r}"
            )
        if self.stop_change is not None and not 0 < self.stop_change < math.inf:
            raise ValueError(f"agent {self.name!r}: stop_change: expected a number > 0 or None, got {self.stop_change!r}")
        J, k = self.passes, self.grad_passes
        if J is not None and (isinstance(J, bool) or not isinstance(J, int) or J < 1):
            raise ValueError(f"agent {self.name!r}: passes: expected an integer >= 1 or None, got {J!r}")
        if J is not None and self.stop_change is not None:
            raise ValueError(f"agent {self.name!r}: stop_change: expected None with passes, got {self.stop_change!r}")
        if k is not None and (isinstance(k, bool) or not isinstance(k, int) or J is None or not 1 <= k <= J):
            most = "None without passes" if J is None else f"1 to {J} passes or None"
            raise ValueError(f"agent {self.name!r}: grad_passes: expected {most}, got {k!r}")
        if not self.name:
            raise ValueError("name: expected a name for every agent, got an empty one")
        if self.role is not None and not (isinstance(self.role, str) and self.role):
            raise ValueError(f"agent {self.name!r}: role: expected a name or None, got {self.role!r}")
        if self.model is not None and not (isinstance(self.model, str) and self.model):
            raise ValueError(f"agent {self.name!r}: model: expected the name of another model or None, got {self.model!r}")
        if not isinstance(self.prompt, str):
            raise ValueError(f"agent {self.name!r}: prompt: expected a format string, got {type(self.prompt).__name__}")
        object.__setattr__(self, "reads", reads_of(self.name, self.reads))
        check_count(f"agent {self.name!r}: max_rows", self.max_rows)
        check_by(f"agent {self.name!r}: max_rows_by", self.max_rows_by, "max_rows", self.max_rows)
        check_message(self.name, self.max_message_tokens, self.message_temperature)

    def described(self) -> dict:
        """As plain data, which `Agent(**data)` takes."""
        reads = None if self.reads is None else [read.described() for read in self.reads]
        return {**asdict(self), "reads": reads}

    @property
    def adapter(self) -> str:
        """The name of its adapter, where each role has its own."""
        return self.role or self.name

    def render(self, fields: dict) -> str:
        """The prompt with the question's fields filled in; raises ValueError naming a field that is not there."""
        for _, name, _, _ in Formatter().parse(self.prompt):
            if name is not None and (not name or name.split(".")[0].split("[")[0] not in fields):
                raise ValueError(
                    f"agent {self.name!r}: its prompt needs the field {{{name}}}, the question has {sorted(fields)}"
                )
        return self.prompt.format_map(fields)

    def steps(self, fields: dict) -> int:
        """T for a question; raises ValueError for a field that is not there, or a value that is no integer >= 0."""
        T = self.latent_steps
        if isinstance(T, int):
            return T
        if callable(T):
            given, T = "from its function", T(fields)
        elif T not in fields:
            raise ValueError(f"agent {self.name!r}: latent_steps: expected a field {T!r}, the question has {sorted(fields)}")
        else:
            given, T = f"in the field {T!r}", fields[T]
            T = int(T) if isinstance(T, str) and T.isdecimal() else T  # as a command line has it
        try:
            if not isinstance(T, bool) and operator.index(T) >= 0:
                return operator.index(T)
        except TypeError:
            pass
        raise ValueError(f"agent {self.name!r}: latent_steps: expected an integer >= 0 {given}, got {T!r}")

    def check(self, fields: dict) -> None:
        """Raises ValueError naming a field of the prompt or of the latent steps that a question lacks, or that does not fit."""
        self.render(fields)
        self.steps(fields)


def check_message(name: str, tokens: int | None, temperature: float | None) -> None:
    """Raises ValueError naming what does not fit of the message that an agent of this name writes."""
    check_count(f"agent {name!r}: max_message_tokens", tokens)
    where = f"agent {name!r}: message_temperature"
    if temperature is not None and tokens is None:
        raise ValueError(f"{where}: expected None without max_message_tokens, got {temperature!r}")
    number = isinstance(temperature, (int, float)) and not isinstance(temperature, bool)
    if temperature is not None and not (number and 0 <= temperature < math.inf):
        raise ValueError(f"{where}: expected a number >= 0 or None, got {temperature!r}")


class TooLong(ValueError):
    """What does not fit in the model's context."""


class Turn(NamedTuple):
    """An agent's turn on one question. ids: of its prompt's tokens, none where it has no turn. steps: T, 0 for the last one.
    message: tokens of its message, at most."""

    ids: list[int]
    steps: int
    message: int = 0

    @property
    def most(self) -> int:
        """Tokens of all kinds, at most."""
        return len(self.ids) + self.steps + self.message


def fields_of(questions) -> list[dict]:
    """Questions as dicts of prompt fields; a string becomes the field "question". Raises ValueError for other kinds."""
    if isinstance(questions, (str, dict)):
        raise ValueError(f"questions: expected a list, got one {type(questions).__name__}")
    if not len(questions):
        raise ValueError("questions: expected at least one question, got an empty list")
    for q in questions:
        if not isinstance(q, (str, dict)):
            raise ValueError(f"questions: expected strings or dicts of prompt fields, got {type(q).__name__}")
    return [dict(q) if isinstance(q, dict) else {"question": q} for q in questions]


def prompt_ids(tokenizer, agent: Agent, fields: dict, chat_template: bool, chat_options: dict | None = None) -> list[int]:
    """The token ids of an agent's prompt, chat template included."""
    text = agent.render(fields)
    if chat_template:
        text = chat_text(tokenizer, agent, text, chat_options or {})
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    else:
        text = f"{agent.system}\n\n{text}" if agent.system else text
        ids = _not_closed(tokenizer, text)
    if not ids:
        raise ValueError(f"agent {agent.name!r}: expected a prompt of at least one token, got {text!r}")
    return list(ids)


def _not_closed(tokenizer, text: str) -> list[int]:
    """The token ids of a text that goes on: without the end-of-sequence token that some tokenizers put behind every text."""
    ids, end = list(tokenizer(text)["input_ids"]), tokenizer.eos_token_id
    if ids[-1:] == [end]:
        own = tokenizer(text, add_special_tokens=False)["input_ids"]
        if own and ids[-len(own) - 1 : -1] == own:
            ids.pop()
    return ids


def answer_ids(tokenizer, answer: str | list[int]) -> list[int]:
    """The token ids of an answer, closed by one end-of-sequence token, be it written in the answer or not. An answer that is
    token ids, as they were decoded, stays as it is."""
    if isinstance(answer, list) and answer and all(type(token) is int for token in answer):
        return answer
    if not isinstance(answer, str):
        found = "a list of something else, or of nothing" if isinstance(answer, list) else type(answer).__name__
        raise ValueError(f"answers: expected strings or lists of token ids, got {found}")
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
        ids.append(tokenizer.eos_token_id)
    if not ids:
        raise ValueError(f"answers: expected at least one token, got {answer!r}")
    return ids


def prompt_that_fits(system, agent: Agent, b: int, fields: dict, at: int, room: int, what: str) -> list[int]:
    """The prompt ids of question b. Raises ValueError unless they and `room` more tokens fit between position `at` and the
    end of the model's context; what: names them in the error."""
    try:
        ids = system.prompt_ids(agent, fields)
    except ValueError as error:
        raise ValueError(f"questions[{b}], {error}") from error
    config, n = system.writer(agent).model.config.get_text_config(), len(ids) + room
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and at + n > limit:
        raise TooLong(
            f"questions[{b}], agent {agent.name!r}: expected {what} to fit in the context of {limit} positions, "
            f"got {at} before it and {n} of its own"
        )
    if encodes(system, agent):
        limit = getattr(system.member(agent).model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None and len(ids) > limit:
            raise TooLong(
                f"questions[{b}], agent {agent.name!r}: expected its prompt to fit in the {limit} positions of "
                f"{agent.model!r}, got {len(ids)} tokens"
            )
    return ids


def encodes(system, agent: Agent) -> bool:
    """Whether another model encodes the agent's prompt, whose rows are then latent ones."""
    return system.member(agent) is not system.writer(agent)


def turn_of(system, agent: Agent, b: int, fields: dict, at: int) -> Turn:
    """The turn of an agent that is not the last on question b, from position `at` on; raises as `MultiAgentSystem.tokenize`."""
    try:
        T = agent.steps(fields)
    except ValueError as error:
        raise ValueError(f"questions[{b}], {error}") from error
    if T == 0 and is_skipped(system, agent):
        return Turn([], 0)
    most = agent.max_message_tokens or 0
    what = f"its prompt and {T} latent steps" + (f" and a message of {most} tokens" if most else "")
    return Turn(prompt_that_fits(system, agent, b, fields, at, T + most, what), T, most)


def is_skipped(system, agent: Agent) -> bool:
    """Whether an agent that is not the last has no turn where it takes no latent steps."""
    return system.no_latents == "skip" and agent.max_message_tokens is None and not encodes(system, agent)


def tokenize(system, questions: list[dict], room: list[int], what: str, starts: list[int] | None = None) -> list[list[Turn]]:
    """See `MultiAgentSystem.tokenize`. starts: the positions that the last agent begins at, if the others had their turns."""
    if starts is not None:
        last = system.agents[-1]
        rows = enumerate(zip(questions, starts, room))
        return [[Turn(prompt_that_fits(system, last, b, fields, at, n, what), 0) for b, (fields, at, n) in rows]]
    if not system.graph.chain:
        rows = (_turns_in_graph(system, b, fields, room[b], what) for b, fields in enumerate(questions))
        return [list(row) for row in zip(*rows)]
    turns: list[list[Turn]] = [[] for _ in system.agents]
    for b, fields in enumerate(questions):
        at = handed = 0  # the next agent's first position, and the rows that latent_only hands on to it
        for agent, row in zip(system.agents[:-1], turns):
            turn = turn_of(system, agent, b, fields, at)
            row.append(turn)
            at += turn.most
            n = len(turn.ids)
            handed += (n if encodes(system, agent) else min(n, max(system.sinks - handed, 0))) + turn.steps + turn.message
            if system.trace_content == "latent_only" and system.positions == "reindex":
                at = handed
        turns[-1].append(Turn(prompt_that_fits(system, system.agents[-1], b, fields, at, room[b], what), 0))
    return turns


def _turns_in_graph(system, b: int, fields: dict, room: int, what: str) -> list[Turn]:
    """The turns of all agents on question b, each at the position where `diffmas.agents.board` will have it, or, behind rows
    that are chosen by what is in them, or are a message's, at the last one where it may."""
    graph, kind = system.graph, SAID if system.trace_content == "latent_only" else None
    turns: list[Turn] = []
    handed: list[list[Segment]] = []
    ends: list[int] = []
    rows = 0  # as if all were written one after the other
    for i, agent in enumerate(system.agents):
        edges = graph.reads[i]
        branches = branches_of([], [handed[edge.agent] for edge in edges], edges, system.sinks, PLANNED)
        positions, nexts = zip(("keep", 0), *((edge.positions, ends[edge.agent]) for edge in edges))
        row, at = joined(branches, positions, nexts)
        row = within(row, system.sinks, agent.max_rows, agent.max_rows_by, PLANNED)
        if i == len(system.agents) - 1:
            return [*turns, Turn(prompt_that_fits(system, agent, b, fields, at, room, what), 0)]
        turns.append(turn := turn_of(system, agent, b, fields, at))
        if i in graph.fuses:
            try:
                partners(system, agent, system.agents[graph.fuses[i]], fields)
            except ValueError as error:
                raise ValueError(f"questions[{b}], {error}") from error
        read, n = length_of(row), len(turn.ids)
        written = (("latent" if encodes(system, agent) else "prompt", n), ("latent", turn.steps), ("text", turn.message))
        for kind_of, length in written:
            row = [*row, Segment(b, agent.name, kind_of, rows, length, at)] if length else row
            rows, at = rows + length, at + length
        handed.append(handed_on(row, read, [], agent.name, kind, system.sinks))
        ends.append(at)
