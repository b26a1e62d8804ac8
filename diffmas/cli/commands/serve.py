"""diffmas serve."""

import json
import os
import socket
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.terminal import Device, device_of, errors

__all__ = ["serve"]


class Choice(StrEnum):
    auto, vllm, own = "auto", "vllm", "own"


def serve(
    team: Annotated[list[str], typer.Argument(help="directories of trained systems, or NAME=DIRECTORY", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="base model (directory, GGUF file or hub name), if it is not where it was")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen at; another than loopback needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="where to listen", min=1, max=65535)] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="DIFFMAS_TOKEN", help="what clients have to bring as their API key", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(help="answers that are decoded side by side", min=1)] = 16,
    max_waiting: Annotated[int, typer.Option(help="requests that may wait; the next ones get 429", min=1)] = 128,
    timeout: Annotated[float, typer.Option(help="seconds for a request, from arrival to its last token", min=0.001)] = 300.0,
    max_tokens: Annotated[int, typer.Option(help="of an answer at most", min=1)] = 4096,
    dtype: Annotated[str, typer.Option(help="of the base model's weights")] = "auto",
    device: Device = None,
    engine: Annotated[
        Choice, typer.Option(help="what runs the teams: vLLM, diffmas's own loop, or auto: vLLM where it is installed")
    ] = Choice.auto,
    vllm_options: Annotated[
        str | None, typer.Option(help="of vLLM's engine, as a JSON object: '{\"max_model_len\": 4096}'", show_default=False)
    ] = None,
):
    """Serve trained systems as the models of an OpenAI-compatible server.

    It has /v1/chat/completions and /v1/models. The message of a request is
    the field {question} of the prompts; a request may also have fields,
    latent_steps, agent_output and top_k.
    """
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ValueError(f"serve: expected {' and '.join(missing)}, found none; pip install diffmas[serve]")
    from diffmas.agents.file import read_agents

    _check_port(host, port)
    directories = {}
    for given in team:
        name, equals, path = given.partition("=")
        directory = Path(path if equals else given)
        name = name if equals else directory.resolve().name
        if name in directories:
            raise ValueError(f"team: expected distinct names, got {name!r} twice")
        read_agents(directory)
        directories[name] = directory
    # Torch is not waited for before.
    from diffmas.serving.protocol import Limits
    from diffmas.serving.server import check_host

    check_host(host, token)
    in_vllm = engine is Choice.vllm or engine is Choice.auto and find_spec("vllm") is not None
    if vllm_options is not None and not in_vllm:
        raise ValueError("vllm_options: expected none without vLLM")
    errors.print(f"{', '.join(directories)}: {'vLLM' if in_vllm else 'own loop'} ...", highlight=False, markup=False)
    options = {"dtype": dtype, **(_object(vllm_options) if in_vllm else {"device": device_of(device)})}
    limits = Limits(max_tokens=max_tokens, seconds=timeout)
    (_vllm if in_vllm else _own)(directories, model, options, limits, (host, port, token), (max_batch, max_waiting))
    # By Ctrl-C, which the server takes for itself.
    errors.print("stopped; a server keeps nothing: the same command starts it again", highlight=False)


def _check_port(host: str, port: int) -> None:
    """Before models are loaded. Raises ValueError where another server listens, or the address is none of this machine's."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as error:
        raise ValueError(f"--port: expected a free one at {host}, got {port} ({error})") from error


def _own(directories: dict[str, Path], model: str | None, options: dict, limits, place: tuple, room: tuple):
    from diffmas.serving.batcher import Batcher
    from diffmas.serving.server import serve as listen
    from diffmas.serving.team import Team

    teams = [Team.load(directory, name, model, **options) for name, directory in directories.items()]
    _tell(directories, place)
    with Batcher(*room) as batcher:
        listen(teams, batcher, limits, *place)


def _vllm(directories: dict[str, Path], model: str | None, options: dict, limits, place: tuple, room: tuple):
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # before vLLM is imported
    from diffmas.serving.vllm.server import serve as listen
    from diffmas.serving.vllm.teams import Teams

    try:
        teams = Teams(directories, model)
        _tell(directories, place)
        listen(teams, limits, *place, *room, options)
    except ValueError as error:
        raise ValueError(f"{error} (--engine own does without vLLM)") from error


def _tell(directories: dict[str, Path], place: tuple) -> None:
    errors.print(f"{', '.join(directories)}: http://{place[0]}:{place[1]}/v1", highlight=False, markup=False)


def _object(text: str | None) -> dict:
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"vllm_options: expected a JSON object, got {text!r}")
    return found
