"""Agents' prompts and answers as token ids, and whether they fit."""

from typing import NamedTuple

from diffmas.agents.agent import Agent
from diffmas.agents.alignment import partners
from diffmas.agents.chat import chat_text
from diffmas.agents.graph import branches_of, handed_on
from diffmas.agents.selection import PLANNED, within
from diffmas.trace.views import SAID, Segment, joined, length_of

__all__ = ["TooLong", "Turn", "answer_ids", "fields_of", "prompt_ids", "tokenize", "turn_of"]


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
