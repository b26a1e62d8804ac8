"""Agents, and their prompts and answers as token ids."""

from dataclasses import dataclass
from string import Formatter

from diffmas.agents.chat import chat_text

__all__ = ["Agent", "answer_ids", "fields_of", "prompt_ids", "tokenize"]


@dataclass(frozen=True)
class Agent:
    """A role in a system.

    name: unique in the system. prompt: a format string with fields of the question, such as "{question}". latent_steps: T,
    how many latent steps follow the prompt; the last agent decodes text instead. system: a system message. Raises ValueError
    for T < 0, an empty name or a prompt that is no string.

        >>> Agent("planner", "Plan how to answer: {question}", latent_steps=10).render({"question": "2 + 2?"})
        'Plan how to answer: 2 + 2?'
    """

    name: str
    prompt: str
    latent_steps: int = 0
    system: str | None = None

    def __post_init__(self):
        if not isinstance(self.latent_steps, int) or self.latent_steps < 0:
            raise ValueError(f"agent {self.name!r}: latent_steps: expected an integer >= 0, got {self.latent_steps!r}")
        if not self.name:
            raise ValueError("name: expected a name for every agent, got an empty one")
        if not isinstance(self.prompt, str):
            raise ValueError(f"agent {self.name!r}: prompt: expected a format string, got {type(self.prompt).__name__}")

    def render(self, fields: dict) -> str:
        """The prompt with the question's fields filled in; raises ValueError naming a field that is not there."""
        for _, name, _, _ in Formatter().parse(self.prompt):
            if name is not None and (not name or name.split(".")[0].split("[")[0] not in fields):
                raise ValueError(
                    f"agent {self.name!r}: its prompt needs the field {{{name}}}, the question has {sorted(fields)}"
                )
        return self.prompt.format_map(fields)


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
        ids = tokenizer(f"{agent.system}\n\n{text}" if agent.system else text)["input_ids"]
    if not ids:
        raise ValueError(f"agent {agent.name!r}: expected a prompt of at least one token, got {text!r}")
    return list(ids)


def answer_ids(tokenizer, answer: str) -> list[int]:
    """The token ids of an answer, closed by the end-of-sequence token."""
    if not isinstance(answer, str):
        raise ValueError(f"answers: expected strings, got {type(answer).__name__}")
    ids = list(tokenizer(answer, add_special_tokens=False)["input_ids"])
    if tokenizer.eos_token_id is not None:
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
    limit, n = getattr(system.model.config.get_text_config(), "max_position_embeddings", None), len(ids) + room
    if limit is not None and at + n > limit:
        raise ValueError(
            f"questions[{b}], agent {agent.name!r}: expected {what} to fit in the context of {limit} positions, "
            f"got {at} before it and {n} of its own"
        )
    return ids


def tokenize(system, questions: list[dict], room: list[int], what: str) -> list[list[list[int]]]:
    """See `MultiAgentSystem.tokenize`."""
    prompts: list[list[list[int]]] = [[] for _ in system.agents]
    for b, fields in enumerate(questions):
        at = latents = 0  # the next agent's first position, and the latent steps before it
        for i, agent in enumerate(system.agents[:-1]):
            if system.skips(agent):
                prompts[i].append([])
                continue
            T = agent.latent_steps
            prompts[i].append(prompt_that_fits(system, agent, b, fields, at, T, f"its prompt and {T} latent steps"))
            at, latents = at + len(prompts[i][b]) + T, latents + T
            if system.trace_content == "latent_only" and system.positions == "reindex":
                at = latents
        prompts[-1].append(prompt_that_fits(system, system.agents[-1], b, fields, at, room[b], what))
    return prompts
