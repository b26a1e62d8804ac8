"""vLLM's own handler of /v1/chat/completions, where the model is a team: what is its own is the prompt, and what a request may
have beyond OpenAI's."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import asdict

from pydantic import PrivateAttr
from starlette.concurrency import run_in_threadpool
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.serve.engine.protocol import ErrorResponse
from vllm.exceptions import QueueOverflowError
from vllm.inputs import tokens_input
from vllm.sampling_params import RequestOutputKind, SamplingParams

from diffmas.agents.prompts import Turn
from diffmas.serving.batcher import AgentOutput
from diffmas.serving.protocol import ChatRequest, Limits, Refused, error_body, read_request
from diffmas.serving.server import question_of, team_of, too_late
from diffmas.serving.team import Question
from diffmas.serving.vllm.course import prompt_of
from diffmas.serving.vllm.teams import Teams

__all__ = ["TeamChat"]


class TeamRequest(ChatCompletionRequest):
    """What vLLM's handler reads of a request to a team."""

    _question: Question = PrivateAttr()
    _params: SamplingParams = PrivateAttr()

    @classmethod
    def of(cls, asked: ChatRequest, question: Question, params: SamplingParams) -> "TeamRequest":
        streams = bool(asked.stream)
        counts = streams and (
            question.settings.agent_output or bool(asked.stream_options and asked.stream_options.include_usage)
        )
        made = cls(
            model=asked.model, messages=[], n=question.settings.samples, stream=streams,
            stream_options={"include_usage": True} if counts else None,
        )  # fmt: skip
        params.output_kind = RequestOutputKind.DELTA if streams else RequestOutputKind.FINAL_ONLY
        made._question, made._params = question, params
        return made

    def to_sampling_params(self, max_tokens, default_sampling_params) -> SamplingParams:
        return self._params


class TeamChat(OpenAIServingChat):
    """chat: vLLM's own, ready. It answers for teams alone."""

    def __init__(self, chat: OpenAIServingChat, teams: Teams, limits: Limits):
        self.__dict__ |= chat.__dict__
        self.teams, self.limits = teams, limits

    async def create_chat_completion(self, request, raw_request=None):
        deadline = raw_request.state.deadline
        try:
            async with asyncio.timeout(deadline - time.monotonic()) as limit:
                asked = read_request(await raw_request.body(), self.limits)
                question = await run_in_threadpool(question_of, team_of(asked.model, self.teams.teams), asked, self.limits)
                request = TeamRequest.of(asked, question, self._params(question))
                agents = await self._agents(question)
                answer = await super().create_chat_completion(request, raw_request)
                if request.stream:  # an error before the first token has a status of its own
                    first = await anext(answer)
        except TimeoutError:
            raise too_late(self.limits) from None
        except QueueOverflowError as error:
            raise Refused(429, error.message, "rate_limit_exceeded", kind="requests") from None
        if limit.expired():  # vLLM takes its own cancelling for the client's
            raise too_late(self.limits)
        if isinstance(answer, ErrorResponse):
            return answer
        more = {"agents": [asdict(agent) for agent in agents]} if question.settings.agent_output else {}
        if request.stream:
            return self._events(first, answer, deadline, _counts(question), more)
        for name, count in _counts(question).items():
            setattr(answer.usage, name, count)
        for name, value in more.items():
            setattr(answer, name, value)
        return answer

    def _params(self, question: Question) -> SamplingParams:
        """Raises Refused for what this engine does not do."""
        special = question.team.system.tokenizer.all_special_tokens
        if any(token in stop for stop in question.settings.stop for token in special):
            raise Refused(400, "stop: expected strings without special tokens, which vLLM does not look for", param="stop")
        prompt, params = self.teams.request(question)
        room = self.model_config.max_model_len
        if (needed := len(prompt["prompt_token_ids"]) + question.max_new_tokens) > room:
            what = f"expected prompts, latent steps and answer to fit in the engine's context of {room}, got {needed}"
            raise Refused(400, f"messages: {what}", "context_length_exceeded", "messages")
        return params

    # ---- what vLLM's handler calls -----------------------------------------------------------------------------------

    async def render_chat_request(self, request: TeamRequest):
        self._preflight(request.n)
        return [], [tokens_input(prompt_of(request._question.turns))]

    def chat_completion_stream_generator(self, request, result_generator, request_id, model_name, *args, **kwargs):
        results = _without_stand_ins(result_generator, request._question)
        return super().chat_completion_stream_generator(request, results, request_id, request.model, *args, **kwargs)

    async def chat_completion_full_generator(self, request, result_generator, request_id, model_name, *args, **kwargs):
        results = _without_stand_ins(result_generator, request._question)
        return await super().chat_completion_full_generator(request, results, request_id, request.model, *args, **kwargs)

    # ---- beyond OpenAI's ---------------------------------------------------------------------------------------------

    async def _events(self, event: str, events, deadline: float, counts: dict, more: dict) -> AsyncIterator[str]:
        """The events of a stream from its first one on, until time is up."""
        try:
            while event is not None:
                yield _with_counts(event, counts, more)
                async with asyncio.timeout(deadline - time.monotonic()):
                    event = await anext(events, None)
        except TimeoutError:
            error = too_late(self.limits)
            yield f"data: {json.dumps(error_body(str(error), error.kind, error.param, error.code))}\n\n"
        finally:  # who has left is aborted
            await events.aclose()

    async def _agents(self, question: Question) -> list[AgentOutput]:
        """What each agent but the last does and would write, where that is asked; each text is a request of its own."""
        if not question.settings.agent_output:
            return []
        thinkers = list(zip(question.team.agents, question.turns))[:-1]
        texts = await asyncio.gather(*(self._text(question, n) for n in range(len(thinkers))))
        return [AgentOutput(agent.name, len(turn.ids), turn.steps, text) for (agent, turn), text in zip(thinkers, texts)]

    async def _text(self, question: Question, n: int) -> str | None:
        if not question.turns[n].ids:
            return None
        turns, settings = [*question.turns[:n], Turn(question.turns[n].ids, 0)], question.settings._replace(samples=1)
        shorter = Question(question.team, question.fields, turns, question.max_new_tokens, question.seed, settings)
        prompt, params = self.teams.request(shorter)
        params.output_kind = RequestOutputKind.FINAL_ONLY
        async for output in self.engine_client.generate(prompt, params, f"agent-{uuid.uuid4().hex}"):
            text = output.outputs[0].text
        return text


def _counts(question: Question) -> dict[str, int]:
    """What vLLM does not count. Teams whose agents write messages are refused."""
    return {"latent_steps": sum(turn.steps for turn in question.turns), "message_tokens": 0}


async def _without_stand_ins(results, question: Question):
    """vLLM counts the tokens of a prompt; stand-ins of latent steps are none."""
    real = [token for turn in question.turns for token in turn.ids]
    try:
        async for result in results:
            result.prompt_token_ids = real
            yield result
    finally:
        await results.aclose()


def _with_counts(event: str, counts: dict, more: dict) -> str:
    """The last event with data of a stream, if counts are asked for, with those that vLLM does not know."""
    if '"usage":{' not in event:
        return event
    data = json.loads(event.removeprefix("data: "))
    if data["choices"]:
        return event
    data["usage"] |= counts
    return f"data: {json.dumps(data | more, ensure_ascii=False)}\n\n"
