"""Requests and answers of /v1/chat/completions, in OpenAI's form, with extensions of our own."""

from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError

from diffmas.serving.batcher import Job
from diffmas.serving.team import Settings

__all__ = ["ChatRequest", "Limits", "Refused", "answer", "chunk", "error_body", "read_request"]

# What OpenAI's clients may send along, and what changes no answer.
IGNORED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "service_tier",
    "store", "user",
}  # fmt: skip
# Values that ask for what is done anyway.
NEUTRAL = {
    "response_format": [{"type": "text"}], "tool_choice": ["none", "auto"], "modalities": [["text"]], "frequency_penalty": [0],
    "presence_penalty": [0],
}  # fmt: skip


@dataclass(frozen=True)
class Limits:
    """What one request may take. body: bytes. max_tokens: of an answer. latent_steps: T of an agent that a request asks for.
    samples: n. seconds: from its arrival to its last token."""

    body: int = 1 << 20
    max_tokens: int = 4096
    latent_steps: int = 512
    samples: int = 8
    seconds: float = 300.0


class Refused(Exception):
    """status: of HTTP. kind, param, code: OpenAI's type, param and code."""

    def __init__(
        self, status: int, message: str, code: str | None = None, param: str | None = None, kind="invalid_request_error"
    ):  # fmt: skip
        super().__init__(message)
        self.status, self.code, self.param, self.kind = status, code, param, kind


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


# ---- requests --------------------------------------------------------------------------------------------------------


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """Of the one role that a team is asked by."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["user"]
    content: str | list[TextPart]
    name: str | None = None

    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class StreamOptions(BaseModel):
    include_usage: bool = False
    include_obfuscation: bool = False


Steps = Annotated[StrictInt, Field(ge=0)]
Count = Annotated[StrictInt, Field(ge=1)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]


class ChatRequest(BaseModel):
    """model: the team. messages: one, of the user: the field "question" of the agents' prompts. Beyond OpenAI's: latent_steps,
    T of all agents but the last, or of some by name; fields: others of the prompts; agent_output: what each agent did, and what
    it would have written; top_k."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)
    model: str
    messages: list[Message]
    max_tokens: Count | None = None
    max_completion_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Steps | None = None
    seed: StrictInt | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = None
    n: Count | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    latent_steps: Steps | dict[str, Steps] | None = None
    fields: dict[str, str | StrictInt | float] | None = None
    agent_output: bool | None = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def settings(self) -> Settings:
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Settings(self.temperature, self.top_p, self.top_k, stop, self.n or 1, bool(self.agent_output))

    def prompt_fields(self) -> dict:
        return {"question": self.messages[0].text(), **(self.fields or {})}


def read_request(body: bytes, limits: Limits) -> ChatRequest:
    """Raises Refused for what is no JSON, no chat request, asks for what is not there, or for too much."""
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _explained(error) from None
    for name, value in (request.model_extra or {}).items():
        if name not in IGNORED and value and value not in NEUTRAL.get(name, ()):
            raise Refused(
                400, f"{name}: expected a request without it, which a team does not do", "unsupported_parameter", name
            )
    if len(request.messages) != 1:
        raise Refused(
            400, f"messages: expected one message of the user: a team's agents have prompts of their own and remember no "
            f"earlier turns, got {len(request.messages)}; put what they have to know into it, or into `fields`",
            param="messages",
        )  # fmt: skip
    if "question" in (request.fields or {}):
        raise Refused(400, "fields: expected no 'question', which the message is", param="fields")
    steps = request.latent_steps
    most = max(steps.values(), default=0) if isinstance(steps, dict) else steps
    for name, value, most_of_it in (
        ("max_tokens", request.most_tokens, limits.max_tokens), ("n", request.n, limits.samples),
        ("latent_steps", most, limits.latent_steps),
    ):  # fmt: skip
        if value is not None and value > most_of_it:
            raise Refused(400, f"{name}: expected at most {most_of_it}, got {value}", param=name)
    return request


def _explained(error: ValidationError) -> Refused:
    """The first thing that is wrong, by its place in the request."""
    first = error.errors(include_url=False, include_context=False)[0]
    if first["type"] == "json_invalid":
        return Refused(400, f"body: expected JSON, got something else ({first['msg']})")
    if not first["loc"]:
        return Refused(400, f"body: expected an object ({first['msg']})")
    where = ".".join(map(str, first["loc"]))
    if first["loc"][0] == "messages" and first["loc"][-1] == "role":
        role = str(first["input"])[:40]
        return Refused(
            400, f"{where}: expected 'user': a team's agents have prompts of their own and remember no earlier turns, got "
            f"{role!r}; put what they have to know into one message, or into `fields`", param="messages",
        )  # fmt: skip
    return Refused(400, f"{where}: {first['msg']}, got {str(first['input'])[:80]!r}", param=str(first["loc"][0]))


# ---- answers ---------------------------------------------------------------------------------------------------------


def _usage(job: Job) -> dict:
    """OpenAI's counts, of all agents' prompts and of the answer; latent_steps and, of their messages, message_tokens, of all
    agents."""
    prompt, answered = job.question.prompt_tokens, sum(map(len, job.tokens))
    return {
        "prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered,
        "latent_steps": sum(agent.latent_steps for agent in job.agents),
        "message_tokens": sum(agent.message_tokens for agent in job.agents),
    }  # fmt: skip


def _agents(job: Job) -> dict:
    return {"agents": [asdict(agent) for agent in job.agents]} if job.question.settings.agent_output else {}


def answer(head: dict, job: Job) -> dict:
    """A chat.completion, of a job that is done. head: id, created and model."""
    question = job.question
    choices = [
        {
            "index": i, "finish_reason": end, "logprobs": None,
            "message": {"role": "assistant", "content": question.team.text_of(tokens, question.settings.stop), "refusal": None},
        }
        for i, (tokens, end) in enumerate(zip(job.tokens, job.ends))
    ]  # fmt: skip
    return {**head, "object": "chat.completion", "choices": choices, "usage": _usage(job), **_agents(job)}


def chunk(head: dict, job: Job, index: int | None, delta: dict, end: str | None = None) -> dict:
    """A chat.completion.chunk of a sample; without an index, the last one, with the counts."""
    head = {**head, "object": "chat.completion.chunk"}
    if index is None:
        return {**head, "choices": [], "usage": _usage(job), **_agents(job)}
    choice: dict[str, Any] = {"index": index, "delta": delta, "finish_reason": end, "logprobs": None}
    return {**head, "choices": [choice]}
