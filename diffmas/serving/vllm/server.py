"""vLLM's own OpenAI server with teams as its models: what is added is an endpoint plugin (`vllm.endpoint_plugins`), which gives
vLLM's chat handler the teams, and a gate before all routes."""

import asyncio
import os
import time
from argparse import Namespace
from importlib.metadata import entry_points
from typing import NamedTuple

from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request

from diffmas.models.load import load_tokenizer
from diffmas.serving.protocol import Limits, Refused
from diffmas.serving.server import LOOPBACK, check_host, check_token, models_router, read_body, refused, too_late
from diffmas.serving.vllm.course import KEY
from diffmas.serving.vllm.plugin import TRIED
from diffmas.serving.vllm.teams import Teams

__all__ = ["Endpoint", "Gate", "Served", "arguments", "serve"]

# All others of vLLM's routes are shut: some take tensors, move adapters, or stop the engine.
OPEN = ("/v1/chat/completions", "/v1/models", "/health", "/metrics", "/version")


class Served(NamedTuple):
    """What vLLM's arguments carry to the plugin, as their attribute `diffmas`."""

    teams: Teams
    limits: Limits
    token: str | None


class Endpoint:
    """vLLM's `EndpointPlugin`. A server that `diffmas serve` did not start is left as it is."""

    name, required_tasks = "diffmas", ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if (served := getattr(app.state.args, KEY, None)) is None:
            return
        app.exception_handler(Refused)(refused)
        app.router.routes[:0] = models_router(list(served.teams.teams.values())).routes  # before vLLM's own list of models
        app.add_middleware(Gate, limits=served.limits, token=served.token)
        if not served.token:  # no web page reaches it by a name of its own
            app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(LOOPBACK))

    async def init_state(self, engine_client, state, args: Namespace) -> None:
        from diffmas.serving.vllm.chat import TeamChat

        if (served := getattr(args, KEY, None)) is not None:
            state.openai_serving_chat = TeamChat(state.openai_serving_chat, served.teams, served.limits)


class Gate:
    """Before vLLM's routes (ASGI): what is open to whom, and how large and how slow a request may be, none of which vLLM
    limits."""

    def __init__(self, app, limits: Limits, token: str | None):
        self.app, self.limits, self.token = app, limits, token

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            try:
                replay = await self._read(scope, receive)
            except ClientDisconnect:
                return
            except Refused as error:
                await (await refused(None, error))(scope, receive, send)
            else:
                await self.app(scope, replay, send)

    async def _read(self, scope, receive):
        """What gives the body of a request that may come in, and then what else its client says. Raises Refused."""
        request, path = Request(scope, receive), scope["path"]
        if path not in OPEN and not path.startswith("/v1/models/"):
            raise Refused(404, "Not Found")
        if path != "/health":
            check_token(request, self.token)
        scope.setdefault("state", {})["deadline"] = time.monotonic() + self.limits.seconds
        try:
            async with asyncio.timeout(self.limits.seconds):
                body = await read_body(request, self.limits.body)
        except TimeoutError:
            raise too_late(self.limits) from None
        left = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay():
            return left.pop() if left else await receive()

        return replay


def arguments(teams: Teams, host: str, port: int, max_batch: int, max_waiting: int, options: dict) -> Namespace:
    """vLLM's own, by its own names. options: others of them. Raises ValueError for names that it does not have."""
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    vocabulary = load_tokenizer(teams.base).get_vocab()  # vLLM has one tokenizer
    for name, team in teams.teams.items():
        if team.system.tokenizer.get_vocab() != vocabulary:
            raise ValueError(f"team {name!r}: expected the vocabulary of {teams.base} in vLLM's server, got another")
    given = {
        "host": host, "port": port, "served_model_name": list(teams.teams), "max_num_seqs": max_batch,
        "max_num_queued_reqs": max_batch + max_waiting, "allowed_origins": [],
        "uvicorn_log_level": "warning", "disable_uvicorn_access_log": True, "disable_fastapi_docs": True,
        **teams.engine_options(), **options,
    }  # fmt: skip
    if own := sorted(options.keys() & {"host", "port", "uds", "served_model_name"}):
        raise ValueError(f"vllm_options: expected none that `diffmas serve` sets itself, got {own[0]!r}")
    args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
    if unknown := sorted(given.keys() - vars(args).keys()):
        raise ValueError(f"vllm_options: expected names of vLLM's arguments, got {unknown[0]!r}")
    for name, value in given.items():
        setattr(args, name, value)
    validate_parsed_serve_args(args)
    return args


def serve(
    teams: Teams, limits: Limits, host: str = "127.0.0.1", port: int = 8000, token: str | None = None, max_batch: int = 16,
    max_waiting: int = 128, options: dict | None = None,
) -> None:  # fmt: skip
    """Serves until it is interrupted. max_batch: answers at once. max_waiting: questions beside as many as that. options: of
    vLLM's server and engine. Raises ValueError as `check_host`, and for options that do not go with teams."""
    check_host(host, token)
    _allow_plugin()
    args = arguments(teams, host, port, max_batch, max_waiting, options or {})
    args.diffmas = Served(teams, limits, token)
    from vllm.entrypoints.launchers.api_server.entry import run_server

    asyncio.run(run_server(args))


def _allow_plugin() -> None:
    """vLLM loads no endpoint plugin that VLLM_PLUGINS does not name, and of the others all, if it names none at all. Raises
    ValueError if it would start without ours: its server would answer with the base model, and no gate."""
    if "VLLM_PLUGINS" not in os.environ:
        groups = entry_points()
        others = [g for g in groups.groups if g.startswith("vllm.") and g != "vllm.endpoint_plugins"]
        names = {plugin.name for group in others for plugin in groups.select(group=group)}
        os.environ["VLLM_PLUGINS"] = ",".join(sorted({*names, "diffmas"}))
    try:
        from vllm.plugins import load_endpoint_plugins
    except ImportError as error:
        raise ValueError(f"vllm: expected a version like {TRIED}, got another ({error})") from error
    if not any(isinstance(plugin, Endpoint) for plugin in load_endpoint_plugins(Endpoint.required_tasks)):
        raise ValueError("vllm.endpoint_plugins: expected the plugin 'diffmas', found none; install diffmas again")
