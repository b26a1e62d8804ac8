"""`diffmas serve` where vLLM is installed: vLLM's own server in a process of its own. What OpenAI's own client gets is what our
own loop says."""

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import httpx
import openai
import psutil
from crews import ANSWER, CREWS, MIXED, QUESTIONS, STEPS, Ours, save_base, save_crew
from typer.testing import CliRunner

from diffmas.cli import main as cli
from diffmas.serving.batcher import Batcher, Job
from diffmas.serving.export import export
from diffmas.serving.team import Settings

PATIENCE = 1200  # seconds
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "max_num_batched_tokens": 512}
OPTIONS["num_gpu_blocks_override"] = 200  # so that all of them are soon in use: memory that was never written is not there yet


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("crews")
    base = save_base(root / "base")
    trained = {name: save_crew(root / name, base, *CREWS[name]) for name in ("bare", "roles")}
    return {"bare": trained["bare"], "roles": export(trained["roles"], root / "given")}


@pytest.fixture(scope="module")
def ours(directories):
    return Ours(directories)


class Server:
    """address: of its API. process: of psutil's, whose child is the engine."""

    def __init__(self, port: int, pid: int, key: str | None):
        self.root, self.process = f"http://127.0.0.1:{port}", psutil.Process(pid)
        self.key, self.headers = key or "none", {"Authorization": f"Bearer {key}"} if key else {}

    def client(self, kind=openai.OpenAI):
        return kind(base_url=f"{self.root}/v1", api_key=self.key, max_retries=0, timeout=PATIENCE)

    @property
    def engine(self) -> psutil.Process:
        (engine,) = [child for child in self.process.children() if "EngineCore" in child.name() + " ".join(child.cmdline())]
        return engine

    def gauge(self, name: str) -> float:
        lines = httpx.get(f"{self.root}/metrics", headers=self.headers, timeout=PATIENCE).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

    def idle(self) -> bool:
        """Whether the engine has no request any more, and all blocks of its cache are free."""
        return not any(self.gauge(name) for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"))

    def memory(self) -> float:
        """MB of both processes."""
        return sum(process.memory_info().rss for process in (self.process, self.engine)) / 1e6


@contextlib.contextmanager
def serving(directories, log: Path, *arguments, token=None, options=OPTIONS):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    teams = [f"{name}={path}" for name, path in directories.items()]
    command = [sys.executable, "-m", "diffmas", "serve", *teams, "--port", str(port), "--vllm-options", json.dumps(options)]
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2]), "PYTHONUNBUFFERED": "1"}
    environment["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = (
        "0"  # or up to 1024 shapes of products stay, which is most of what a server keeps
    )
    environment |= {"DIFFMAS_TOKEN": token} if token else {}
    with open(log, "w") as file, subprocess.Popen([*command, *arguments], env=environment, stdout=file, stderr=file) as process:
        try:
            server = Server(port, process.pid, token)
            wait_for(lambda: process.poll() is not None or healthy(server))
            assert process.poll() is None, log.read_text()[-3000:]
            yield server
        finally:
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()


def healthy(server: Server) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{server.root}/health").status_code == 200
    return False


def wait_for(happened) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, "what was waited for did not happen"
        time.sleep(0.1)


@pytest.fixture(scope="module")
def server(directories, tmp_path_factory):
    with serving(directories, tmp_path_factory.mktemp("server") / "log", "--max-waiting", "1000") as server:
        yield server


@pytest.fixture
def connected(server):
    with server.client() as connected:
        yield connected


def asking(name: str, text: str, T, **options) -> dict:
    messages, extra = [{"role": "user", "content": text}], {"latent_steps": T, **options.pop("extra_body", {})}
    return {"model": name, "messages": messages, "temperature": 0, "max_tokens": ANSWER, "extra_body": extra, **options}


def text_of(ours, *one) -> str:
    return ours.teams[one[0]].text_of(ours(*one))


def said(choice) -> str:
    """vLLM writes on behind a prompt, which may take a space; our own loop begins a text."""
    return choice.message.content.strip()


def test_an_answer_whole_and_in_pieces(connected, ours):
    for one in [(name, *MIXED[5]) for name in ours.teams]:
        want, tokens = text_of(ours, *one), ours(*one)
        got = connected.chat.completions.create(**asking(*one))
        pieces = list(connected.chat.completions.create(**asking(*one), stream=True, stream_options={"include_usage": True}))
        assert said(got.choices[0]) == want
        assert "".join(c.delta.content or "" for p in pieces for c in p.choices).strip() == want
        ends = "stop" if tokens[-1] == 2 else "length"
        assert got.choices[0].finish_reason == pieces[-2].choices[0].finish_reason == ends
        assert got.usage.completion_tokens == len(tokens) and got.usage.latent_steps == 4
        assert got.usage.message_tokens == 0
        prompts = sum(len(turn.ids) for turn in ours.teams[one[0]].question({"question": one[1]}, Settings()).turns)
        assert got.usage.prompt_tokens == prompts
        assert got.usage.model_dump(exclude_none=True) == pieces[-1].usage.model_dump(exclude_none=True)
        assert got.model == one[0] and {p.model for p in pieces} == {one[0]}
    assert [m.id for m in connected.models.list()] == ["bare", "roles"]
    assert [(m.owned_by, m.agents) for m in connected.models.list()] == [("diffmas", ["planner", "critic", "solver"])] * 2
    assert connected.models.retrieve("roles").agents == ["planner", "critic", "solver"]


def test_stop_strings_samples_and_output_of_agents(connected, ours):
    one = ("roles", QUESTIONS[0], STEPS[0])
    words = text_of(ours, *one).split()
    create = connected.chat.completions.create
    stopped = create(**asking(*one, stop=[words[3]]))
    several = create(**{**asking(*one, n=2, seed=1), "temperature": 1.0})
    told = create(**asking(*one, extra_body={"agent_output": True}))
    pieces = list(create(**asking(*one, extra_body={"agent_output": True}), stream=True))
    assert said(stopped.choices[0]).split() == words[: words.index(words[3])]
    assert stopped.choices[0].finish_reason == "stop"
    assert len(several.choices) == 2 and all(choice.message.content for choice in several.choices)
    again = create(**{**asking(*one, n=2, seed=1), "temperature": 1.0})
    assert [c.message.content for c in again.choices] == [c.message.content for c in several.choices]
    done = threading.Event()
    with Batcher() as batcher:  # our own loop
        fields, settings = {"question": QUESTIONS[0]}, Settings(temperature=0, agent_output=True)
        job = Job(ours.teams["roles"].question(fields, settings, ANSWER, 0, STEPS[0]), time.monotonic() + PATIENCE, done.set)
        batcher.submit(job)
        while not job.done:
            assert done.wait(PATIENCE)
            done.clear()
    for agents in (told.agents, pieces[-1].agents):
        assert [{**agent, "text": agent["text"].strip()} for agent in agents] == [asdict(agent) for agent in job.agents]
    assert any(agent.text for agent in job.agents)


USER = [{"role": "user", "content": "key"}]
WRONG = {
    "no JSON": (b"{", 400, None, "JSON"), "no object": (b"[1]", 400, None, "valid dictionary"),
    "too large": (b'"' + b"x" * (1 << 21), 413, "request_too_large", "at most 1048576 bytes"),
    "unknown model": ({"model": "x", "messages": USER}, 404, "model_not_found", "expected one of"),
    "a conversation": ({"model": "bare", "messages": USER * 2}, 400, None, "remember no earlier turns"),
    "too long": ({"model": "bare", "messages": [{"role": "user", "content": "key " * 60}]}, 400, "context_length_exceeded",
                 "to fit in the engine's context of 256"),
    "much too long": ({"model": "bare", "messages": [{"role": "user", "content": "key " * 300}]}, 400,
                      "context_length_exceeded", "to fit in the context of 512"),
    "steps of nobody": ({"model": "bare", "messages": USER, "latent_steps": {"solver": 2}}, 400, None,
                        "names of agents that take some"),
    "too many samples": ({"model": "bare", "messages": USER, "n": 9}, 400, None, "at most 8"),
    "log probabilities": ({"model": "bare", "messages": USER, "logprobs": True}, 400, "unsupported_parameter", "without it"),
    "a special token": ({"model": "bare", "messages": USER, "stop": "<end>"}, 400, None, "special tokens"),
    "of vLLM's alone": ({"model": "bare", "messages": USER, "vllm_xargs": {"diffmas": "roles"}}, 400, "unsupported_parameter",
                        "without it"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_request_says_what_is_wrong(server, name):
    body, status, code, says = WRONG[name]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    got = httpx.post(f"{server.root}/v1/chat/completions", content=content, headers=headers, timeout=PATIENCE)
    error = got.json()["error"]
    assert got.status_code == status and says in error["message"], error
    assert code in (None, error["code"]) and error["type"]


def test_routes_hosts_and_pages(server):
    """Of vLLM's other routes none is open, and no web page may ask."""
    post = lambda path: httpx.post(f"{server.root}{path}", json={}, timeout=PATIENCE)
    for path in (
        "/v1/completions",
        "/tokenize",
        "/v1/load_lora_adapter",
        "/scale_elastic_ep",
        "/invocations",
        "/v1/embeddings",
    ):
        assert post(path).status_code == 404 and post(path).json()["error"]["type"] == "invalid_request_error", path
    assert httpx.get(f"{server.root}/v1/models", headers={"Host": "evil.example"}).status_code == 400
    asks = {"Origin": "http://evil.example", "Access-Control-Request-Method": "POST"}
    asked = httpx.options(
        f"{server.root}/v1/chat/completions", headers={**asks, "Access-Control-Request-Headers": "content-type"}
    )
    assert "access-control-allow-origin" not in asked.headers
    as_text = {"Content-Type": "text/plain"}  # which a page may send without being allowed to
    body = json.dumps({"model": "bare", "messages": USER})
    assert httpx.post(f"{server.root}/v1/chat/completions", content=body, headers=as_text).status_code == 400


def test_500_requests_a_fifth_cancelled_a_tenth_bad(server, ours):
    chance = random.Random(0)
    cases = [(chance.choice(list(ours.teams)), *chance.choice(MIXED), chance.randint(1, ANSWER)) for _ in range(30)]
    wanted = {str(case): ours.teams[case[0]].text_of(ours(*case)) for case in cases}
    assert len(set(wanted.values())) > 15
    kinds = ["good"] * 350 + ["cancelled"] * 100 + ["bad"] * 50
    chance.shuffle(kinds)
    bad = [{"model": "other"}, {"messages": []}, {"temperature": -1}, {"max_tokens": 10**6}]
    bad += [{"extra_body": {"latent_steps": T}} for T in (-1, {"nobody": 3})]
    bad += [{"messages": [{"role": "user", "content": "key " * 300}]}]
    wrong, seen = [], dict.fromkeys(kinds, 0)

    async def one(connected, kind, i):
        case = cases[i % len(cases)]
        ask, create = {**asking(*case[:3]), "max_tokens": case[3]}, connected.chat.completions.create
        if kind == "bad":
            with pytest.raises(openai.APIStatusError) as error:
                await create(**{**ask, **bad[i % len(bad)]}, stream=bool(i % 2))
            assert error.value.status_code in (400, 404) and error.value.body["message"], error.value
        elif kind == "cancelled":
            long = {**ask, "max_tokens": 100}
            if i % 2:
                stream = await create(**long, stream=True)
                async for _ in stream:
                    break
                await stream.close()
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(create(**long), chance.uniform(0.01, 0.5))
        else:
            same = {"extra_headers": {"X-Request-Id": "mine"}} if i % 4 == 0 else {}  # many at once say that they are the same
            if i % 3:
                text = (await create(**ask, **same)).choices[0].message.content
            else:
                text = ""
                async for piece in await create(**ask, **same, stream=True):
                    text += "".join(choice.delta.content or "" for choice in piece.choices)
            if text.strip() != wanted[str(case)]:
                wrong.append((case, text, wanted[str(case)]))
        seen[kind] += 1

    async def all_of_them(kinds):
        limit = asyncio.Semaphore(48)

        async def in_turn(connected, kind, i):
            async with limit:
                await one(connected, kind, i)

        async with server.client(openai.AsyncOpenAI) as connected:
            await asyncio.gather(*(in_turn(connected, kind, i) for i, kind in enumerate(kinds)))

    def back(connected) -> bool:
        connected.chat.completions.create(**asking("bare", "key", 0))  # a step of the engine's tells its numbers
        return server.idle()

    with server.client() as connected:
        asyncio.run(all_of_them(kinds[:100]))  # what is allocated once
        wait_for(lambda: back(connected))
        memory = server.memory()
        asyncio.run(all_of_them(kinds[100:]))
        wait_for(lambda: back(connected))
    assert not wrong and seen == {"good": 350, "cancelled": 100, "bad": 50}
    assert server.memory() - memory < 10  # measured: 2


def test_a_slow_client_stops_nobody(server, connected, ours):
    """Whoever reads nothing of its stream keeps nobody; when it leaves, nothing of it stays."""
    body = json.dumps({"model": "bare", "messages": USER, "max_tokens": 200, "n": 8, "stream": True, "seed": 1}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect(("127.0.0.1", int(server.root.split(":")[2])))
            slow.sendall(head.encode() + f"Content-Length: {len(body)}\r\n\r\n".encode() + body)
        for one in [("roles", *MIXED[i]) for i in range(4)]:
            assert said(connected.chat.completions.create(**asking(*one)).choices[0]) == text_of(ours, *one)
    wait_for(lambda: connected.chat.completions.create(**asking("bare", "key", 0)) and server.idle())


def test_a_token_overload_and_time_that_is_up(directories, ours, tmp_path):
    """The engine is stopped in between: then who waits, waits."""
    arguments = ("--max-batch", "1", "--max-waiting", "1", "--timeout", "20")
    with serving({"bare": directories["bare"]}, tmp_path / "log", *arguments, token="s3cret") as server:
        one = ("bare", *MIXED[5])
        with pytest.raises(openai.AuthenticationError, match="expected the server's token"):
            openai.OpenAI(base_url=f"{server.root}/v1", api_key="s3cre", max_retries=0).models.list()
        for path in ("/v1/models", "/metrics", "/version"):
            assert httpx.get(f"{server.root}{path}").status_code == 401
        with server.client() as connected:
            assert said(connected.chat.completions.create(**asking(*one)).choices[0]) == text_of(ours, *one)

            async def all_of_them():
                async with server.client(openai.AsyncOpenAI) as connected:
                    ask = lambda i: connected.chat.completions.create(**asking(*one), stream=i % 2 == 0)
                    return await asyncio.gather(*map(ask, range(6)), return_exceptions=True)

            server.engine.suspend()
            try:
                got = asyncio.run(all_of_them())
            finally:
                server.engine.resume()
            full = [error for error in got if isinstance(error, openai.RateLimitError)]
            late = [error for error in got if isinstance(error, openai.InternalServerError)]
            assert (len(full), len(late)) == (4, 2), got
            assert full[0].code == "rate_limit_exceeded" and full[0].response.headers["Retry-After"] == "1"
            assert {error.status_code for error in late} == {504} and late[0].code == "timeout"
            assert "more than 20 seconds" in str(late[0])
            wait_for(lambda: server.idle())
            assert said(connected.chat.completions.create(**asking(*one)).choices[0]) == text_of(ours, *one)
            long = next(one for one in [("bare", *mixed) for mixed in MIXED] if len(ours(*one, 150)) == 150)
            stream = connected.chat.completions.create(**{**asking(*long), "max_tokens": 150}, stream=True)
            next(stream)
            server.engine.suspend()  # in the middle of a stream
            try:
                with pytest.raises(openai.APIError, match="more than 20 seconds"):
                    list(stream)
            finally:
                server.engine.resume()


def test_what_is_refused_before_the_engine_starts(directories, monkeypatch):
    base = ["serve", str(directories["bare"])]
    for arguments, says in (
        (["--vllm-options", "3"], "vllm_options: expected a JSON object"),
        (["--vllm-options", '{"host": "0.0.0.0"}'], "expected none that `diffmas serve` sets itself, got 'host'"),
        (["--vllm-options", '{"max_length": 3}'], "expected names of vLLM's arguments, got 'max_length'"),
        (["--vllm-options", '{"enable_prompt_embeds": false}'], "enable_prompt_embeds: expected True"),
        (["--engine", "own", "--vllm-options", "{}"], "vllm_options: expected none without vLLM"),
        (["--host", "0.0.0.0"], "expected 127.0.0.1 or localhost without a token"),
    ):
        result = CliRunner().invoke(cli.app, [*base, *arguments])
        assert result.exit_code == 1 and says in result.output.replace("\n", " "), (result.output, result.exception)
    monkeypatch.setattr("vllm.plugins.load_endpoint_plugins", lambda tasks: [])
    result = CliRunner().invoke(cli.app, base)
    assert result.exit_code == 1 and "vllm.endpoint_plugins: expected the plugin 'diffmas'" in result.output.replace("\n", " ")
