"""OpenAI's /v1/chat/completions and /v1/models over a `Batcher`, by FastAPI.

The event loop reads, checks and sends; it never waits for a model. What a client does not read stays in its own connection's
buffers and job.
"""

import asyncio
import contextlib
import hmac
import json
import re
import time
import uuid
from collections.abc import AsyncIterator, Mapping

import anyio
import uvicorn
from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect

from diffmas.agents.prompts import TooLong
from diffmas.serving.batcher import Batcher, Closed, Job, Overloaded
from diffmas.serving.connections import Connection
from diffmas.serving.pieces import Pieces
from diffmas.serving.protocol import ChatRequest, Limits, Refused, answer, chunk, error_body, read_request
from diffmas.serving.team import Question, Team

__all__ = [
    "LOOPBACK", "check_host", "check_token", "create_app", "models_router", "question_of", "read_body", "refused", "serve",
    "team_of", "too_late",
]  # fmt: skip

LOOPBACK = ("127.0.0.1", "localhost")


def create_app(teams: list[Team], batcher: Batcher, limits: Limits, token: str | None = None) -> FastAPI:
    """The application. token: what requests have to bring as `Authorization: Bearer`; without one it answers to loopback's
    names alone, so that no web page reaches it by a name of its own. Raises ValueError for two teams of one name."""
    by_name = {team.name: team for team in teams}
    if len(by_name) != len(teams):
        raise ValueError(f"teams: expected distinct names, got {[team.name for team in teams]}")
    app = FastAPI(title="diffmas", openapi_url=None)
    if not token:
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))
    app.exception_handler(Refused)(refused)

    @app.exception_handler(HTTPException)
    async def no_such_route(_, error: HTTPException):
        return JSONResponse(error_body(str(error.detail), "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def unexpected(_, error: Exception):
        return JSONResponse(error_body("the server failed", "server_error"), 500)

    def checked(request: Request) -> None:
        check_token(request, token)

    app.include_router(models_router(teams), dependencies=[Depends(checked)])

    @app.post("/v1/chat/completions")
    async def completions(request: Request):
        check_token(request, token)
        check_json(request)
        deadline = time.monotonic() + limits.seconds
        try:
            with anyio.fail_after(limits.seconds):
                asked = read_request(await read_body(request, limits.body), limits)
                team = team_of(asked.model, by_name)
                batcher.check_room()
                question = await run_in_threadpool(question_of, team, asked, limits)
            news = asyncio.Event()
            job = Job(question, deadline, _teller(asyncio.get_running_loop(), news))
            batcher.submit(job)
        except TimeoutError:
            raise too_late(limits) from None
        except ClientDisconnect:
            raise Refused(499, "the client has left") from None
        except Overloaded as error:
            raise Refused(429, str(error), "rate_limit_exceeded", kind="requests") from None
        except Closed as error:
            raise Refused(503, str(error), kind="server_error") from None
        answering = Answering(request, batcher, job, news, limits)
        try:  # an error until the first token has a status of its own, in a stream too
            await answering.until(lambda: job.done or asked.stream and any(job.tokens))
        except BaseException:
            answering.stop()
            raise
        if asked.stream:
            events = answering.events(bool(asked.stream_options and asked.stream_options.include_usage))
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        answering.stop()
        return JSONResponse(answer(answering.head, job))

    return app


async def refused(_, error: Refused) -> JSONResponse:
    """A handler of exceptions."""
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(error.status)
    return JSONResponse(error_body(str(error), error.kind, error.param, error.code), error.status, headers)


def check_token(request: Request, token: str | None) -> None:
    """Raises Refused for a request that does not bring the token, if there is one."""
    given = request.headers.get("authorization", "").encode("latin-1")
    if token and not hmac.compare_digest(given, f"Bearer {token}".encode()):
        raise Refused(401, "expected the server's token as `Authorization: Bearer TOKEN`", "invalid_api_key")


def check_json(request: Request) -> None:
    """Raises Refused for a body that does not say that it is JSON: others a browser sends for any web page, without asking."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refused(415, f"content-type: expected application/json, got {kind[:80]!r}")


def team_of(name: str, teams: Mapping[str, Team]) -> Team:
    """Raises Refused."""
    if name not in teams:
        raise Refused(404, f"model: expected one of {sorted(teams)}, got {name[:80]!r}", "model_not_found", "model")
    return teams[name]


def models_router(teams: list[Team]) -> APIRouter:
    """/v1/models."""
    router, born = APIRouter(), int(time.time())

    def described(team: Team) -> dict:
        agents = [agent.name for agent in team.agents]
        return {"id": team.name, "object": "model", "created": born, "owned_by": "diffmas", "agents": agents}

    @router.get("/v1/models")
    async def models():
        return JSONResponse({"object": "list", "data": [described(team) for team in teams]})

    @router.get("/v1/models/{name:path}")
    async def model(name: str):
        return JSONResponse(described(team_of(name, {team.name: team for team in teams})))

    return router


async def read_body(request: Request, limit: int) -> bytes:
    """Raises Refused for more than `limit` bytes."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise Refused(413, f"body: expected at most {limit} bytes", "request_too_large")
    return bytes(body)


def question_of(team: Team, asked: ChatRequest, limits: Limits) -> Question:
    """What a request asks a team. Raises Refused."""
    most = asked.most_tokens or min(team.max_new_tokens, limits.max_tokens)
    try:
        question = team.question(asked.prompt_fields(), asked.settings(), most, asked.seed, asked.latent_steps)
    except TooLong as error:
        raise Refused(400, _of_one(error), "context_length_exceeded", "messages") from None
    except ValueError as error:
        raise Refused(400, _of_one(error)) from None
    for agent, turn in zip(team.agents, question.turns):
        if turn.steps > limits.latent_steps and not isinstance(agent.latent_steps, int):  # T is a field of the question
            raise Refused(400, f"fields: expected at most {limits.latent_steps} latent steps, got {turn.steps}", param="fields")
    return question


def _of_one(error: ValueError) -> str:
    """What an error says, where there is only one question, of an agent that may have rounds."""
    return re.sub(r"\bagent '([^']+)@(\d+)'", r"agent '\1', round \2", str(error).removeprefix("questions[0], "))


def _teller(loop: asyncio.AbstractEventLoop, news: asyncio.Event):
    def tell() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
            loop.call_soon_threadsafe(news.set)

    return tell


def too_late(limits: Limits) -> Refused:
    return Refused(504, f"the answer took more than {limits.seconds:g} seconds", "timeout", kind="server_error")


class Answering:
    """One request from when it waits to its last byte. Until `stop` it is seen when the client leaves; the job is cancelled
    then, unless it is done."""

    def __init__(self, request: Request, batcher: Batcher, job: Job, news: asyncio.Event, limits: Limits):
        self.request, self.batcher, self.job, self.news, self.limits = request, batcher, job, news, limits
        self.head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": job.question.team.name}
        self.left, self.watch = False, asyncio.create_task(self._leaves())

    def stop(self) -> None:
        self.watch.cancel()
        if not self.job.done:
            self.batcher.cancel(self.job)

    async def _leaves(self) -> None:
        while (await self.request.receive())["type"] != "http.disconnect":
            pass
        self.left = True
        self.batcher.cancel(self.job)
        self.news.set()

    async def until(self, happened) -> None:
        """Raises Refused if it does not happen: for an error, when time is up, and when nobody waits for it any more."""
        try:
            with anyio.fail_after(max(self.job.deadline - time.monotonic(), 0)):
                while not (happened() or self.left):
                    await self.news.wait()
                    self.news.clear()
        except TimeoutError:
            raise too_late(self.limits) from None
        if self.left:
            raise Refused(499, "the client has left")
        if isinstance(self.job.error, ValueError):
            raise Refused(400, _of_one(self.job.error))
        if isinstance(self.job.error, Closed):
            raise Refused(503, str(self.job.error), kind="server_error")
        if self.job.error is not None:
            raise Refused(500, "the model failed; the server's log says why", kind="server_error")
        if self.job.done and None in self.job.ends:
            raise too_late(self.limits)

    async def events(self, usage: bool) -> AsyncIterator[str]:
        """The answer as server-sent events: its pieces as they are decoded, then the counts if they are asked for."""
        job, team, stop = self.job, self.job.question.team, self.job.question.settings.stop
        special = team.system.tokenizer.all_special_tokens
        going = {i: Pieces(lambda ids: team.text_of(ids, stop), stop, special) for i in range(len(job.tokens))}
        seen = [0] * len(going)

        def news() -> bool:
            return job.done or any(len(job.tokens[i]) > seen[i] or job.ends[i] for i in going)

        try:
            for i in going:
                yield _event(chunk(self.head, job, i, {"role": "assistant", "content": ""}))
            while going:
                await self.until(news)
                for i, piece in list(going.items()):
                    end = job.ends[i]  # before the tokens: if it is there, they are all there
                    tokens = list(job.tokens[i])
                    seen[i] = len(tokens)
                    if text := piece(tokens, last=end is not None):
                        yield _event(chunk(self.head, job, i, {"content": text}))
                    if end is not None:
                        del going[i]
                        yield _event(chunk(self.head, job, i, {}, end))
            if usage or job.question.settings.agent_output:
                await self.until(lambda: job.done)
                yield _event(chunk(self.head, job, None, {}))
            yield "data: [DONE]\n\n"
        except Refused as error:
            if not self.left:
                yield _event(error_body(str(error), error.kind, error.param, error.code))
        finally:
            self.stop()


def _event(data: dict) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def check_host(host: str, token: str | None) -> None:
    """Raises ValueError for a host that others reach, without a token."""
    if not token and host not in LOOPBACK:
        raise ValueError(f"host: expected {' or '.join(LOOPBACK)} without a token, got {host!r}, which others may reach")


def serve(
    teams: list[Team], batcher: Batcher, limits: Limits, host: str = "127.0.0.1", port: int = 8000, token: str | None = None
) -> None:
    """Serves until it is interrupted. Raises ValueError as `check_host`."""
    check_host(host, token)
    app = create_app(teams, batcher, limits, token)
    uvicorn.run(app, host=host, port=port, http=Connection, log_level="warning", timeout_graceful_shutdown=5)
