"""diffmas serve."""

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from diffmas.cli.terminal import Device, device_of, errors

__all__ = ["serve"]


def serve(
    team: Annotated[list[str], typer.Argument(help="directories of trained systems, or NAME=DIRECTORY", show_default=False)],
    model: Annotated[
        str | None, typer.Option(help="base model (directory, GGUF file or hub name), if it is not where it was")
    ] = None,
    host: Annotated[str, typer.Option(help="where to listen; another than loopback needs a token")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    token: Annotated[
        str | None, typer.Option(envvar="DIFFMAS_TOKEN", help="what clients have to bring as their API key", show_default=False)
    ] = None,
    max_batch: Annotated[int, typer.Option(help="answers that are decoded side by side", min=1)] = 16,
    max_waiting: Annotated[int, typer.Option(help="requests that may wait; the next ones get 429", min=1)] = 128,
    timeout: Annotated[float, typer.Option(help="seconds for a request, from arrival to its last token", min=0.001)] = 300.0,
    max_tokens: Annotated[int, typer.Option(help="of an answer at most", min=1)] = 4096,
    dtype: Annotated[str, typer.Option(help="of the base model's weights")] = "auto",
    device: Device = None,
):
    """Serve trained systems as the models of an OpenAI-compatible server, /v1/chat/completions and /v1/models. The message of a
    request is the field {question} of the prompts; it may also have fields, latent_steps, agent_output and top_k."""
    if missing := [name for name in ("fastapi", "uvicorn") if find_spec(name) is None]:
        raise ValueError(f"serve: expected {' and '.join(missing)}, found none; pip install diffmas[serve]")
    from diffmas.serving.batcher import Batcher
    from diffmas.serving.protocol import Limits
    from diffmas.serving.server import check_host
    from diffmas.serving.server import serve as listen
    from diffmas.serving.team import Team

    check_host(host, token)
    teams = []
    for given in team:
        name, equals, path = given.partition("=")
        directory = Path(path if equals else given)
        errors.print(f"{given} ...", highlight=False, markup=False)
        teams.append(Team.load(directory, name if equals else None, model, dtype=dtype, device=device_of(device)))
    names = ", ".join(t.name for t in teams)
    errors.print(f"{names}: http://{host}:{port}/v1", highlight=False, markup=False)
    with Batcher(max_batch, max_waiting) as batcher:
        listen(teams, batcher, Limits(max_tokens=max_tokens, seconds=timeout), host, port, token)
