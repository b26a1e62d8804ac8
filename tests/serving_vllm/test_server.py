"""`diffmas serve` with vLLM behind it: what OpenAI's own client gets is what our own loop says."""

import asyncio
import random
import socket
import threading
import time
from dataclasses import asdict

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (make test-vllm)")

import openai
import uvicorn
from crews import ANSWER, CREWS, MIXED, QUESTIONS, STEPS, Ours, question, save_base, save_crew
from typer.testing import CliRunner

from diffmas.cli import main as cli
from diffmas.serving.batcher import Batcher, Closed, Job, Overloaded
from diffmas.serving.protocol import Limits
from diffmas.serving.server import create_app
from diffmas.serving.team import Settings
from diffmas.serving.vllm.engine import Engine
from diffmas.serving.vllm.teams import Teams

PATIENCE = 300  # seconds
OPTIONS = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32}


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    root = tmp_path_factory.mktemp("crews")
    base = save_base(root / "base")
    return {name: save_crew(root / name, base, *CREWS[name]) for name in ("bare", "roles")}


@pytest.fixture(scope="module")
def ours(directories):
    return Ours(directories)


@pytest.fixture(scope="module")
def engine(directories):
    with Engine(Teams(directories), max_batch=8, max_waiting=1000, **OPTIONS) as engine:
        yield engine


@pytest.fixture(scope="module")
def address(engine):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        app = create_app(list(engine.teams.teams.values()), engine, Limits(seconds=PATIENCE))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join(PATIENCE)


def client(address, kind=openai.OpenAI):
    return kind(base_url=address, api_key="none", max_retries=0, timeout=PATIENCE)


def asking(name: str, text: str, T, **options) -> dict:
    messages, extra = [{"role": "user", "content": text}], {"latent_steps": T, **options.pop("extra_body", {})}
    return {"model": name, "messages": messages, "temperature": 0, "max_tokens": ANSWER, "extra_body": extra, **options}


def text_of(ours, *one) -> str:
    return ours.teams[one[0]].text_of(ours(*one))


def idle(engine) -> bool:
    deadline = time.monotonic() + PATIENCE
    while engine._jobs and time.monotonic() < deadline:
        time.sleep(0.05)
    return not engine._jobs


def test_an_answer_whole_and_in_pieces(address, ours):
    for one in [(name, *MIXED[5]) for name in ours.teams]:
        want, tokens = text_of(ours, *one), ours(*one)
        with client(address) as connected:
            got = connected.chat.completions.create(**asking(*one))
            pieces = list(connected.chat.completions.create(**asking(*one), stream=True))
        assert got.choices[0].message.content == want
        assert "".join(p.choices[0].delta.content or "" for p in pieces) == want
        ends = "stop" if tokens[-1] == 2 else "length"
        assert got.choices[0].finish_reason == pieces[-1].choices[0].finish_reason == ends
        assert got.usage.completion_tokens == len(tokens)


def test_stop_strings_samples_and_output_of_agents(address, ours):
    one = ("roles", QUESTIONS[0], STEPS[0])
    words = text_of(ours, *one).split()
    with client(address) as connected:
        stopped = connected.chat.completions.create(**asking(*one, stop=[words[3]]))
        several = connected.chat.completions.create(**{**asking(*one, n=2, seed=1), "temperature": 1.0})
        told = connected.chat.completions.create(**asking(*one, extra_body={"agent_output": True}))
    assert stopped.choices[0].message.content.split() == words[: words.index(words[3])]
    assert stopped.choices[0].finish_reason == "stop"
    assert len(several.choices) == 2 and all(choice.message.content for choice in several.choices)
    done = threading.Event()
    with Batcher() as batcher:  # our own loop behind the same server
        fields, settings = {"question": QUESTIONS[0]}, Settings(temperature=0, agent_output=True)
        job = Job(ours.teams["roles"].question(fields, settings, ANSWER, 0, STEPS[0]), time.monotonic() + PATIENCE, done.set)
        batcher.submit(job)
        while not job.done:
            assert done.wait(PATIENCE)
            done.clear()
    assert told.agents == [asdict(agent) for agent in job.agents] and all(agent["text"] for agent in told.agents)


def test_requests_that_come_leave_and_fail(address, engine, ours):
    """A fifth leaves, a tenth is bad; every answer is the one that the question gets alone."""
    rng, kinds = random.Random(0), []
    asked = [(rng.choice(list(ours.teams)), *rng.choice(MIXED)) for _ in range(100)]

    async def one(i, connected):
        await asyncio.sleep(rng.random())
        if i % 10 == 7:
            with pytest.raises(openai.BadRequestError):
                await connected.chat.completions.create(**asking(*asked[i][:2], {"nobody": 3}))
            kinds.append("bad")
        elif i % 5 == 1:
            stream = await connected.chat.completions.create(**asking(*asked[i]), stream=True)
            async for _ in stream:
                break
            await stream.close()
            kinds.append("left")
        else:
            got = await connected.chat.completions.create(**asking(*asked[i]))
            assert got.choices[0].message.content == text_of(ours, *asked[i]), asked[i]
            kinds.append("answered")

    async def everybody():
        async with client(address, openai.AsyncOpenAI) as connected:
            await asyncio.gather(*(one(i, connected) for i in range(len(asked))))

    asyncio.run(everybody())
    assert (kinds.count("bad"), kinds.count("left"), len(kinds)) == (10, 20, 100)
    assert idle(engine)


def test_overload_and_closing(directories, ours):
    team, told = ours.teams["bare"], []
    with Engine(Teams({"bare": directories["bare"]}), max_batch=1, max_waiting=1, **OPTIONS) as small:
        ask = lambda: Job(question(team, QUESTIONS[0], 100, 100), time.monotonic() + PATIENCE, lambda: told.append(1))
        jobs = [ask(), ask()]
        for job in jobs:
            small.submit(job)
        with pytest.raises(Overloaded, match="at most 2 requests at once"):
            small.submit(ask())
        small.cancel(jobs[0])
        small.cancel(jobs[1])
        assert idle(small)
        last = ask()
        small.submit(last)
    assert last.done and isinstance(last.error, Closed)
    with pytest.raises(Closed):
        small.submit(ask())


def test_the_command(directories, monkeypatch):
    served = {}
    monkeypatch.setattr("diffmas.serving.server.uvicorn.run", lambda app, **options: served.update(options))
    options = ["--port", "8123", "--vllm-options", '{"dtype": "float32", "max_model_len": 64, "enforce_eager": true}']
    result = CliRunner().invoke(cli.app, ["serve", str(directories["bare"]), *options])
    assert result.exit_code == 0, (result.output, result.exception)
    assert served["port"] == 8123 and "bare: vLLM" in result.output
    for arguments, says in (
        (["--vllm-options", "3"], "vllm_options: expected a JSON object"),
        (["--engine", "own", "--vllm-options", "{}"], "vllm_options: expected none without vLLM"),
        (["--vllm-options", '{"enable_prompt_embeds": false}'], "enable_prompt_embeds: expected True"),
    ):
        result = CliRunner().invoke(cli.app, ["serve", str(directories["bare"]), *arguments])
        assert result.exit_code == 1 and says in result.output, result.output
