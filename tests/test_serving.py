"""The server: what OpenAI's own client gets, many requests at once, and what goes wrong."""

import ast
import asyncio
import contextlib
import functools
import gc
import json
import random
import select
import socket
import threading
import time
import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import httpx
import openai
import pytest
import tiny_systems as tiny
import torch
import uvicorn
from threads import wait
from transformers import BertConfig, BertModel
from typer.testing import CliRunner
from uvicorn.protocols.http.flow_control import FlowControl

from diffmas import Agent, MultiAgentSystem, patch_model
from diffmas.agents import Encoder, Other, Projector
from diffmas.cli import main as cli
from diffmas.serving.batcher import Batcher, Closed, Job, Overloaded
from diffmas.serving.connections import Connection
from diffmas.serving.pieces import Pieces
from diffmas.serving.protocol import ChatRequest, Limits, Refused
from diffmas.serving.server import check_host, create_app, question_of
from diffmas.serving.team import Settings, Team
from diffmas.trace.store import Store

PATIENCE = 300  # seconds
LIMITS = Limits(body=4000, max_tokens=100, latent_steps=20, samples=4, seconds=PATIENCE)


def team(name="facts", **options):
    return Team(name, tiny.system(**options))


@contextlib.contextmanager
def listening(teams, limits=LIMITS, token=None, **of_batcher):
    """A server; -> its address and its batcher."""
    torch.set_num_threads(1)
    with Batcher(**of_batcher) as batcher, socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # so that who does not read is felt
        app, options = create_app(teams, batcher, limits, token), dict(log_level="error", timeout_graceful_shutdown=1)
        config = uvicorn.Config(app, http=Connection, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1", batcher
        finally:
            server.should_exit = True
            thread.join(PATIENCE)


def client(address, kind=openai.OpenAI, key="none"):
    return kind(base_url=address, api_key=key, max_retries=0, timeout=PATIENCE)


@pytest.fixture(scope="module")
def server():
    with listening([team(), team("latents", seed=3, trace_content="latent_only")], max_waiting=1000) as (address, batcher):
        yield address, batcher


@pytest.fixture
def ask(server):
    with client(server[0]) as connected:
        yield lambda text, model="facts", n=6, **options: connected.chat.completions.create(
            model=model, messages=[{"role": "user", "content": text}], max_tokens=n, **{"temperature": 0, **options}
        )


@functools.cache
def reference():
    return tiny.system()


def alone(question, n=6, T=None, **options):
    """What a system of its own says."""
    system = reference()
    system.agents = tiny.agents() if T is None else tiny.agents(T)
    return system.generate([question], n, **{"temperature": 0, **options})[0]


# ---- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_is_that_of_generate(ask):
    got = ask("where is the key")
    assert got.choices[0].message.content == alone("where is the key")[0] and got.object == "chat.completion"
    prompts = sum(len(a.prompt.replace("{question}", "where is the key").split()) for a in tiny.agents())
    assert got.usage.prompt_tokens == prompts and got.usage.latent_steps == 4 and got.model == "facts"
    assert got.choices[0].finish_reason == "length" and got.usage.completion_tokens == 6
    parts = [{"type": "text", "text": "where is "}, {"type": "text", "text": "the key"}]
    assert ask(parts).choices[0].message.content == got.choices[0].message.content
    assert ask("where is the key", "latents").choices[0].message.content != got.choices[0].message.content


def test_options_of_a_request(ask):
    sampled = ask("where is the key", temperature=1.5, seed=5, n=9, top_p=0.9, extra_body={"n": 2, "top_k": 9})
    want = alone("where is the key", 9, temperature=1.5, seed=5, top_p=0.9, top_k=9, samples=2)
    assert [c.message.content for c in sampled.choices] == want and want[0] != want[1]
    words = alone("where is the key", 9)[0].split()
    stopped = ask("where is the key", n=9, stop=[words[3]])
    assert stopped.choices[0].message.content.split() == words[: words.index(words[3])]
    assert stopped.choices[0].finish_reason == "stop"


def test_latent_steps_and_fields_of_a_request(ask):
    got = {T: ask("where is the key", extra_body={"latent_steps": T}) for T in (0, 5)}
    for T, completion in got.items():
        assert completion.usage.latent_steps == 2 * T
        assert completion.choices[0].message.content == alone("where is the key", T=T)[0]
    assert ask("where is the key", extra_body={"latent_steps": {"critic": 7}}).usage.latent_steps == 2 + 7
    crew = [replace(tiny.agents()[0], prompt="plan : {question} {place}", latent_steps="steps"), *tiny.agents()[1:]]
    system = tiny.system()
    system.agents = crew
    fields = {"place": "garden", "steps": 3}
    want = system.generate([{"question": "where is the key", **fields}], 6, temperature=0)[0][0]
    with listening([Team("fields", system)]) as (address, _), client(address) as connected:
        create, text = connected.chat.completions.create, [{"role": "user", "content": "where is the key"}]
        got = create(model="fields", messages=text, max_tokens=6, temperature=0, extra_body={"fields": fields})
        assert got.choices[0].message.content == want and got.usage.latent_steps == 3 + 2
        with pytest.raises(openai.BadRequestError, match="agent 'planner': its prompt needs the field {place}"):
            create(model="fields", messages=text, extra_body={"fields": {"steps": 3}})
        with pytest.raises(openai.BadRequestError, match="fields: expected at most 20 latent steps, got 21"):
            create(model="fields", messages=text, extra_body={"fields": {**fields, "steps": 21}}, max_tokens=6)


@pytest.mark.parametrize("scope", ["shared", "per_role", "final_only"])
def test_output_of_each_agent(scope):
    system = tiny.system(adapter_scope=scope)
    with listening([Team("roles", system)]) as (address, _), client(address) as connected:
        text = [{"role": "user", "content": "where is the key"}]
        got = connected.chat.completions.create(
            model="roles", messages=text, max_tokens=5, temperature=0, extra_body={"agent_output": True}
        )
    planner, critic = got.agents
    assert [planner["name"], critic["name"], critic["latent_steps"]] == ["planner", "critic", 2]
    assert planner["prompt_tokens"] == 6
    fresh = tiny.system(adapter_scope=scope)
    assert got.choices[0].message.content == fresh.generate(["where is the key"], 5, temperature=0)[0][0]
    if scope == "final_only":  # agents but the last one have no adapter
        fresh = tiny.system(lora=False)
    for said in (critic, planner):
        fresh.agents = fresh.agents[:-1]
        assert said["text"] == fresh.generate(["where is the key"], 5, temperature=0)[0][0]


def test_agents_that_read_some_of_the_others():
    """And what each of them would have written."""
    crew = tiny.agents(parallel=True)
    crew = [*crew[:2], Agent("clerk", "key : {question}", 1, reads=["critic"]), replace(crew[2], reads=["planner", "clerk"])]
    system, fresh = tiny.system(trace_content="latent_only"), tiny.system(trace_content="latent_only")
    system.agents = fresh.agents = crew
    with listening([Team("tree", system)]) as (address, _), client(address) as connected:
        text = [{"role": "user", "content": "where is the key"}]
        got = connected.chat.completions.create(
            model="tree", messages=text, max_tokens=5, temperature=0, extra_body={"agent_output": True}
        )
    assert [(said["name"], said["latent_steps"]) for said in got.agents] == [("planner", 2), ("critic", 2), ("clerk", 1)]
    assert got.choices[0].message.content == fresh.generate(["where is the key"], 5, temperature=0)[0][0]
    for said in reversed(got.agents):
        fresh.agents = fresh.agents[:-1]
        assert said["text"] == fresh.generate(["where is the key"], 5, temperature=0)[0][0]


def test_agents_that_write_messages():
    """These are their output; a question's are the same whoever is answered beside it, sampled ones by its seed."""
    planner, critic, solver = tiny.agents()
    crew = [replace(planner, max_message_tokens=4, message_temperature=2.0), replace(critic, max_message_tokens=3), solver]
    system, fresh = tiny.system(), tiny.system()
    system.agents = fresh.agents = crew
    with listening([Team("writers", system)]) as (address, _), client(address) as connected:
        text = [{"role": "user", "content": "where is the key"}]
        ask = functools.partial(connected.chat.completions.create, model="writers", messages=text, max_tokens=5, temperature=0)
        got, plain, other = ask(extra_body={"agent_output": True}, seed=3), ask(seed=3), ask(seed=4)
    counts = [said["message_tokens"] for said in got.agents]
    assert got.usage.message_tokens == plain.usage.message_tokens == sum(counts) and 1 <= counts[0] <= 4 and counts[1] <= 3
    want = fresh.generate(["where is the key"], 5, temperature=0, seed=[3])
    assert got.choices[0].message.content == plain.choices[0].message.content == want[0][0]
    with torch.no_grad():
        trace = fresh.communicate([{"question": "where is the key"}], seeds=[3 * 1_000_003])
    rows = [(s.agent, s.kind) for s in trace.segments for _ in range(s.length)]
    for said in got.agents:
        ids = [t for t, row in zip(trace.token_ids(0).tolist(), rows) if row == (said["name"], "text")]
        assert said["text"] == fresh.text_of(ids) and said["message_tokens"] == len(ids)
    assert other.usage.latent_steps == 4


def test_latent_steps_of_an_agent_that_takes_rounds():
    crew = [replace(a, rounds=3) if a.name == "critic" else a for a in tiny.agents()]
    team = Team("rounds", MultiAgentSystem(tiny.model(), tiny.tokenizer(), crew))
    asked = lambda T: [t.steps for t in team.question({"question": "where"}, Settings(), 4, 0, T).turns]
    assert asked({"critic": 5}) == [2, 5, 5, 5, 0]
    assert asked({"critic@2": 4, "critic": 5}) == asked({"critic": 5, "critic@2": 4}) == [2, 5, 4, 5, 0]
    known = r"\['planner', 'critic', 'critic@1', 'critic@2', 'critic@3'\]"
    with pytest.raises(ValueError, match=f"latent_steps: expected names of agents that take some, {known}, got 'critic@4'"):
        asked({"critic@4": 5})


def test_errors_name_an_agent_and_its_round():
    """Not the turn of both, which its user has not written."""
    crew = [replace(a, rounds=2, later_prompt="{notes}") if a.name == "critic" else a for a in tiny.agents()]
    team = Team("rounds", MultiAgentSystem(tiny.model(), tiny.tokenizer(), crew))

    def said(text, **fields):
        with pytest.raises(Refused) as error:
            question_of(team, ChatRequest(model="rounds", messages=[{"role": "user", "content": text}], fields=fields), LIMITS)
        return str(error.value)

    assert said("key").startswith("agent 'critic', round 2: its prompt needs the field {notes}")
    assert said("key", notes="key " * 200).startswith("agent 'critic', round 2: expected its prompt and 2 latent steps to fit")
    assert said("key " * 200, notes="key").startswith("agent 'planner': expected")


def test_output_of_agents_of_other_models():
    """They write no text here; what an encoder has read is its prompt, and no latent step."""
    torch.manual_seed(0)
    sizes = dict(num_hidden_layers=1, hidden_size=20, num_attention_heads=2, intermediate_size=24, max_position_embeddings=64)
    model, small, bert = tiny.model(), tiny.model(seed=4), BertModel(BertConfig(vocab_size=len(tiny.VOCAB), **sizes))
    patch_model(model), patch_model(small)
    others = {
        "bert": Encoder(bert, tiny.tokenizer(), model), "small": Other(small, tiny.tokenizer(), Projector(small, model)),
    }  # fmt: skip
    planner, critic, solver = tiny.agents()
    crew = [Agent("reader", "{question}", 1, model="bert"), replace(planner, model="small"), critic, solver]
    system = MultiAgentSystem(model, tiny.tokenizer(), crew, others=others).eval()
    with listening([Team("mixed", system)]) as (address, _), client(address) as connected:
        text = [{"role": "user", "content": "where is the key"}]
        ask = functools.partial(connected.chat.completions.create, model="mixed", messages=text, max_tokens=5, temperature=0)
        got, plain = ask(extra_body={"agent_output": True}), ask()
    assert [(said["name"], said["prompt_tokens"], said["latent_steps"]) for said in got.agents] == [
        ("reader", 4, 1), ("planner", 6, 2), ("critic", 6, 2),
    ]  # fmt: skip
    assert got.usage.latent_steps == plain.usage.latent_steps == 5
    assert got.choices[0].message.content == plain.choices[0].message.content
    system.agents = crew[:-1]
    want = system.generate(["where is the key"], 5, temperature=0)[0][0]
    assert [said["text"] for said in got.agents] == [None, None, want] and want


def test_models(server):
    with client(server[0]) as connected:
        assert [m.id for m in connected.models.list()] == ["facts", "latents"]
        assert connected.models.retrieve("latents").agents == ["planner", "critic", "solver"]
        with pytest.raises(openai.NotFoundError, match="expected one of"):
            connected.models.retrieve("other")


# ---- streams ---------------------------------------------------------------------------------------------------------


def test_a_stream_adds_up_to_the_answer(ask):
    options = dict(temperature=1.5, seed=5, n=9, extra_body={"n": 2})
    want = ask("where is the key", **options)
    text, ends, usage = ["", ""], [None, None], None
    for piece in ask("where is the key", stream=True, stream_options={"include_usage": True}, **options):
        usage = piece.usage or usage
        for choice in piece.choices:
            assert ends[choice.index] is None
            text[choice.index] += choice.delta.content or ""
            ends[choice.index] = choice.finish_reason
    assert text == [c.message.content for c in want.choices] and ends == [c.finish_reason for c in want.choices]
    assert usage == want.usage


def test_pieces_come_while_others_are_decoded(ask, server, monkeypatch):
    """The second token waits until the client has the first."""
    got, batcher = threading.Event(), server[1]
    take = batcher._take

    def slow(jobs, b, sample, token, last):
        if len(jobs[b].tokens[sample]) == 3:
            wait(got)
        return take(jobs, b, sample, token, last)

    monkeypatch.setattr(batcher, "_take", slow)
    text = ""
    for piece in ask("where is the key", stream=True):
        text += piece.choices[0].delta.content or ""
        if text:
            got.set()
    assert text == alone("where is the key")[0]


def test_the_end_of_a_stream_may_be_told_after_its_last_token(ask, server, monkeypatch):
    """The event loop comes by between the two."""
    submit, jobs, why = server[1].submit, [], Team.why_ended
    monkeypatch.setattr(server[1], "submit", lambda job: (jobs.append(job), submit(job)))

    def late(*args):
        jobs[0].tell()
        time.sleep(0.5)
        return why(*args)

    monkeypatch.setattr(Team, "why_ended", late)
    pieces = list(ask("where is the key", stream=True))
    assert "".join(p.choices[0].delta.content or "" for p in pieces) == alone("where is the key")[0]
    assert pieces[-1].choices[0].finish_reason == "length"
    assert len({(p.id, p.created, p.object) for p in pieces}) == 1


def byte_level():
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    core.train_from_iterator(["plain words only"], vocab_size=270, special_tokens=["<end>"])
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, eos_token="<end>")


@pytest.mark.parametrize("stop", [[], ["汉字"], [" \U0001f511x", "ende"], ["<end>de ."], ["naïve"]])
def test_pieces_of_characters_and_stop_strings(stop):
    from diffmas.agents.decoding import text_before

    coder = byte_level()
    ids = coder("A naïve \U0001f511 , \U0001f511x 汉字 end")["input_ids"] + [coder.eos_token_id] + coder("de .")["input_ids"]
    text_of = lambda tokens: text_before(coder, tokens, stop)  # noqa: E731
    first = next((n for n in range(1, len(ids)) if any(s in coder.decode(ids[:n]) for s in stop)), len(ids))
    ids = ids[:first]  # decoding ends with a stop string
    pieces = Pieces(text_of, stop, coder.all_special_tokens)
    sent = [pieces(ids[: n + 1], last=n + 1 == len(ids)) for n in range(len(ids))]
    assert "".join(sent) == text_of(ids) and not any("\ufffd" in x for x in sent)
    assert sum(map(bool, sent)) > 5 or len(ids) < 10


# ---- many at once ----------------------------------------------------------------------------------------------------


def resident() -> float:
    """MB of this process."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


BAD = (
    dict(model="other"), dict(messages=[]), dict(messages=[{"role": "system", "content": "x"}]), dict(temperature=-1),
    dict(max_tokens=10**6), dict(messages=[{"role": "user", "content": "key " * 200}]), dict(extra_body={"latent_steps": -1}),
)  # fmt: skip


class Fails:
    def __del__(self):
        raise ValueError("a finalizer failed")


@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_500_requests_a_fifth_cancelled_a_tenth_bad(server, monkeypatch):
    address, batcher = server
    chance = random.Random(0)
    asked = []
    for _ in range(30):
        words = " ".join(chance.choices(tiny.WORDS, k=chance.randint(1, 9)))
        asked.append((words, chance.randint(0, 3), chance.randint(1, 8)))
    wanted = {case: alone(case[0], case[2], case[1])[0] for case in asked}
    assert len(set(wanted.values())) > 20
    run, sizes, strange = MultiAgentSystem.generate_tokens, [], []

    def watched(self, questions, *args, trace, **options):
        """Every sequence that the last agent reads has the prompts of its own question, and no other row."""
        sizes.append(len(questions))
        if len(sizes) == 3:
            Fails()  # what an error in a finalizer shows of this thread is not kept
        for b, fields in enumerate(questions):
            own = [t for a in self.agents[:-1] for t in [*self.prompt_ids(a, fields), *[-1] * a.steps(fields)]]
            if trace.token_ids(b).tolist() != own:
                strange.append(fields)
        return run(self, questions, *args, trace=trace, **options)

    monkeypatch.setattr(MultiAgentSystem, "generate_tokens", watched)
    kinds = ["good"] * 350 + ["cancelled"] * 100 + ["bad"] * 50
    chance.shuffle(kinds)
    wrong, seen = [], {kind: 0 for kind in kinds}

    async def one(connected, kind, i):
        case = asked[i % len(asked)]
        ask = dict(model="facts", messages=[{"role": "user", "content": case[0]}], max_tokens=case[2], temperature=0)
        ask |= {"extra_body": {"latent_steps": case[1]}}
        create = connected.chat.completions.create
        if kind == "bad":
            with pytest.raises(openai.APIStatusError) as error:
                await create(**{**ask, **BAD[i % len(BAD)]})
            assert error.value.status_code in (400, 404) and error.value.body["message"], error.value
        elif kind == "cancelled":
            if i % 2:
                stream = await create(**{**ask, "max_tokens": 60}, stream=True)
                async for _ in stream:
                    break
                await stream.close()
            else:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(create(**{**ask, "max_tokens": 60}), 0.01)
        else:
            if i % 3:
                text = (await create(**ask)).choices[0].message.content
            else:
                text = ""
                async for piece in await create(**ask, stream=True):
                    text += piece.choices[0].delta.content or ""
            if text != wanted[case]:
                wrong.append((case, text, wanted[case]))
        seen[kind] += 1

    async def all_of_them(kinds):
        limit = asyncio.Semaphore(48)

        async def in_turn(connected, kind, i):
            async with limit:
                await one(connected, kind, i)

        async with client(address, openai.AsyncOpenAI) as connected:
            await asyncio.gather(*(in_turn(connected, kind, i) for i, kind in enumerate(kinds)))

    def left():
        gc.collect()
        return sum(type(x) in (Store, Job) for x in gc.get_objects())

    before = left()
    asyncio.run(all_of_them(kinds[:100]))  # what is allocated once
    wait_for(lambda: left() <= before)
    memory = resident()
    asyncio.run(all_of_them(kinds[100:]))
    assert not wrong and not strange and seen == {"good": 350, "cancelled": 100, "bad": 50}
    assert max(sizes) > 4 and max(sizes) <= batcher.max_batch
    wait_for(lambda: left() <= before)  # jobs, and the rows of their traces
    assert not batcher._waiting
    assert resident() - memory < 20


def test_who_leaves_is_out_of_the_batch(server, monkeypatch):
    """A client that closes its stream ends its answer with the next token, and nobody else's."""
    address, batcher = server
    jobs, take = [], batcher._take

    def watched(some, b, sample, token, last):
        job = some[b]
        if job not in jobs:
            jobs.append(job)
        if len(job.tokens[sample]) == 2 and job.question.max_new_tokens == 90:
            wait_for(lambda: job.cancelled)
        return take(some, b, sample, token, last)

    monkeypatch.setattr(batcher, "_take", watched)
    with client(address) as connected:
        stream = connected.chat.completions.create(
            model="facts", messages=[{"role": "user", "content": "key"}], max_tokens=90, temperature=0, stream=True
        )
        next(stream)
        stream.close()
        got = connected.chat.completions.create(
            model="facts", messages=[{"role": "user", "content": "where is the key"}], max_tokens=6, temperature=0
        )
    assert got.choices[0].message.content == alone("where is the key")[0]
    left = next(job for job in jobs if job.question.max_new_tokens == 90)
    assert left.cancelled and 1 <= len(left.tokens[0]) <= 2 and left.ends == [None]


def test_a_slow_client_stops_nobody(server, ask, monkeypatch):
    """Whoever reads nothing of its stream keeps neither the worker nor the event loop; when it leaves, nothing of it stays."""
    address, batcher = server
    submit, begin, jobs = batcher.submit, FlowControl.__init__, []
    monkeypatch.setattr(batcher, "submit", lambda job: (jobs.append(weakref.ref(job)), submit(job)))

    def soon_full(self, transport):
        transport.set_write_buffer_limits(high=500)
        begin(self, transport)

    monkeypatch.setattr(FlowControl, "__init__", soon_full)
    asked = {"model": "facts", "messages": USER, "max_tokens": 90, "n": 4, "stream": True, "seed": 1}
    body = json.dumps(asked).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\n\r\n"
    with contextlib.ExitStack() as stack:
        for _ in range(4):
            slow = stack.enter_context(socket.socket())
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1024)
            slow.connect(("127.0.0.1", int(address.split(":")[2].split("/")[0])))
            slow.sendall(head.encode() + body)
        wait_for(lambda: len(jobs) == 4)
        for _ in range(3):
            assert ask("where is the key").choices[0].message.content == alone("where is the key")[0]
        wait_for(lambda: all(job() is None or job().done for job in jobs))
        assert sum(job() is not None for job in jobs[:4]) == 4  # all is decoded, and not yet sent
    wait_for(lambda: gc.collect() >= 0 and not any(job() for job in jobs))


# ---- what goes wrong -------------------------------------------------------------------------------------------------


def post(address, body, **headers):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", **headers}
    return httpx.post(f"{address}/chat/completions", content=content, headers=headers, timeout=PATIENCE)


USER = [{"role": "user", "content": "key"}]
WRONG = {
    "no JSON": (b"{", 400, None, None, "expected JSON"),
    "half a character": (b'{"model": "\xff"}', 400, None, None, "expected JSON"),
    "no object": (b"[1]", 400, None, None, "expected an object"),
    "deep": (b"[" * 3000, 400, None, None, "expected JSON"),
    "too large": (b'"' + b"x" * 5000, 413, "request_too_large", None, "at most 4000 bytes"),
    "no model": ({"messages": USER}, 400, None, "model", "model: Field required"),
    "unknown model": ({"model": "x", "messages": USER}, 404, "model_not_found", "model", "expected one of"),
    "a conversation": ({"model": "facts", "messages": USER * 2}, 400, None, "messages", "remember no earlier turns"),
    "a system message": ({"model": "facts", "messages": [{"role": "system", "content": "x"}, *USER]}, 400, None, "messages",
                         "prompts of their own"),
    "an image": ({"model": "facts", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, None, "messages",
                 "Input should be"),
    "too long": ({"model": "facts", "messages": [{"role": "user", "content": "key " * 60}]}, 400, "context_length_exceeded",
                 "messages", "to fit in the context of 128"),
    "too many tokens": ({"model": "facts", "messages": USER, "max_tokens": 101}, 400, None, "max_tokens", "at most 100"),
    "too many samples": ({"model": "facts", "messages": USER, "n": 5}, 400, None, "n", "at most 4"),
    "too many steps": ({"model": "facts", "messages": USER, "latent_steps": {"critic": 21}}, 400, None, "latent_steps",
                       "at most 20"),
    "steps of nobody": ({"model": "facts", "messages": USER, "latent_steps": {"solver": 2}}, 400, None, None,
                        "names of agents that take some"),
    "tools": ({"model": "facts", "messages": USER, "tools": [{"type": "function"}]}, 400, "unsupported_parameter", "tools",
              "without it"),
    "a temperature": ({"model": "facts", "messages": USER, "temperature": "NaN"}, 400, None, "temperature", "finite"),
    "question twice": ({"model": "facts", "messages": USER, "fields": {"question": "x"}}, 400, None, "fields", "the message"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(WRONG))
def test_a_wrong_request_says_what_is_wrong(server, name):
    body, status, code, param, says = WRONG[name]
    got = post(server[0], body)
    error = got.json()["error"]
    assert got.status_code == status and says in error["message"], error
    assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")


def test_no_web_page_may_ask(server):
    """A browser asks first whether a page of another origin may send JSON, and sends other texts without asking."""
    ask = {"model": "facts", "messages": USER, "max_tokens": 2}
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        got = post(server[0], ask, **{"Content-Type": kind, "Origin": "http://evil.example"})
        assert got.status_code == 415 and "expected application/json" in got.json()["error"]["message"]
    allowed = httpx.options(f"{server[0]}/chat/completions", headers={"Origin": "http://evil.example"})
    assert allowed.status_code == 405 and "access-control-allow-origin" not in allowed.headers
    assert post(server[0], ask, **{"Content-Type": "application/json; charset=utf-8"}).status_code == 200


def test_what_asks_for_nothing_is_taken(server):
    extra = {"user": "me", "tools": [], "logprobs": False, "response_format": {"type": "text"}, "frequency_penalty": 0.0}
    assert post(server[0], {"model": "facts", "messages": USER, "max_tokens": 2, **extra}).status_code == 200


def test_routes_and_hosts(server):
    got = httpx.get(f"{server[0]}/nothing")
    assert got.status_code == 404 and got.json()["error"]["type"] == "invalid_request_error"
    assert httpx.get(f"{server[0]}/chat/completions").status_code == 405
    assert httpx.get(f"{server[0]}/models", headers={"Host": "evil.example"}).status_code == 400


def test_a_token():
    with listening([team()], token="s3cret") as (address, _):
        for key in ("none", "s3cre"):
            with client(address, key=key) as connected:
                with pytest.raises(openai.AuthenticationError, match="expected the server's token"):
                    connected.models.list()
                with pytest.raises(openai.AuthenticationError):
                    connected.chat.completions.create(model="facts", messages=USER)
        with client(address, key="s3cret") as connected:
            assert connected.models.list().data and connected.chat.completions.create(
                model="facts", messages=USER, max_tokens=2
            )
    for host in ("0.0.0.0", "::", "example.org"):
        with pytest.raises(ValueError, match="host: expected 127.0.0.1 or localhost without a token"):
            check_host(host, None)
        check_host(host, "s3cret")


@contextlib.contextmanager
def held(batcher, of):
    """Inside, the worker is busy with a question of its own until somebody sets what this gives."""
    go = threading.Event()
    question = of.question({"question": "key"}, Settings(), 1)
    batcher.submit(Job(question, time.monotonic() + PATIENCE, lambda: wait(go)))
    wait_for(lambda: not batcher._waiting)
    try:
        yield go
    finally:
        go.set()


def wait_for(happened) -> None:
    until = time.monotonic() + PATIENCE
    while not happened():
        assert time.monotonic() < until, "what was waited for did not happen"
        time.sleep(0.01)


def at_once(address, batcher, texts, go):
    """Asks all of them, and lets the worker go on when all wait. -> answers or errors"""

    async def all_of_them():
        async with client(address, openai.AsyncOpenAI) as connected:
            ask = lambda text: connected.chat.completions.create(  # noqa: E731
                model="facts", messages=[{"role": "user", "content": text}], max_tokens=6, temperature=0
            )
            asked = [asyncio.create_task(ask(text)) for text in texts]
            await asyncio.to_thread(wait_for, lambda: len(batcher._waiting) == len(texts))
            go.set()
            return await asyncio.gather(*asked, return_exceptions=True)

    return asyncio.run(all_of_them())


@pytest.mark.parametrize("stream", [False, True])
def test_overload(stream):
    """One runs, two wait, the others are told to come back."""
    crew = team()
    with listening([crew], max_waiting=2) as (address, batcher):

        async def all_of_them():
            async with client(address, openai.AsyncOpenAI) as connected:
                ask = lambda: connected.chat.completions.create(model="facts", messages=USER, max_tokens=3, stream=stream)  # noqa: E731
                asked = [asyncio.create_task(ask()) for _ in range(6)]
                await asyncio.to_thread(wait_for, lambda: sum(task.done() for task in asked) >= 4)
                go.set()
                return await asyncio.gather(*asked, return_exceptions=True)

        with held(batcher, crew) as go:
            got = asyncio.run(all_of_them())
    full = [error for error in got if isinstance(error, openai.RateLimitError)]
    assert len(full) == 4 and not [x for x in got if x not in full and isinstance(x, Exception)]
    assert full[0].code == "rate_limit_exceeded" and full[0].response.headers["Retry-After"] == "1"


@pytest.mark.parametrize("stream", [False, True])
def test_who_leaves_waits_no_more(stream):
    crew = team()
    with listening([crew]) as (address, batcher), held(batcher, crew):
        with client(address).with_options(timeout=0.3) as connected, pytest.raises(openai.APITimeoutError):
            connected.chat.completions.create(model="facts", messages=USER, stream=stream)
        wait_for(lambda: not batcher._waiting)


@pytest.mark.parametrize("stream", [False, True])
def test_time_is_up_while_it_waits(stream):
    crew = team()
    with listening([crew], replace(LIMITS, seconds=0.5)) as (address, batcher), client(address) as connected:
        with held(batcher, crew):
            with pytest.raises(openai.InternalServerError, match="more than 0.5 seconds") as error:
                connected.chat.completions.create(model="facts", messages=USER, stream=stream)
            assert error.value.status_code == 504 and error.value.code == "timeout"
            wait_for(lambda: not batcher._waiting)


def test_time_is_up_in_a_stream(server, ask, monkeypatch):
    """After the third token."""
    jobs, take = [], server[1]._take

    def timed(some, b, sample, token, last):
        jobs.append(some[b])
        if len(some[b].tokens[sample]) == 3:
            some[b].deadline = 0.0
        return take(some, b, sample, token, last)

    monkeypatch.setattr(server[1], "_take", timed)
    with pytest.raises(openai.APIError, match="the answer took more than"):
        list(ask("key", n=50, stream=True))
    wait_for(lambda: jobs[0].done)  # the client may hear of it before
    assert len(jobs[0].tokens[0]) == 3


def test_who_asks_nothing_is_let_go(monkeypatch):
    """A connection without a request, or with its first bytes, however they come; not one whose answer takes longer."""
    monkeypatch.setattr(Connection, "patience", 0.15)
    request, crew = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n", team()
    with listening([crew]) as (address, batcher):
        for sent, then in ((b"", b""), (request[:20], b""), (request[:20], b"x"), (request, request[:20]), (request, b"x")):
            port = int(address.split(":")[2].split("/")[0])
            with socket.create_connection(("127.0.0.1", port), PATIENCE) as connected:
                connected.sendall(sent)
                got = b""
                while sent == request and not got.endswith(b"]}"):
                    got += connected.recv(4096)
                while then and not select.select([connected], [], [], 0.05)[0]:
                    connected.sendall(then[:1])
                    then = then[1:] or then
                with contextlib.suppress(ConnectionError):  # of bytes that were under way
                    while part := connected.recv(4096):
                        got += part
                assert got.count(b"HTTP/1.1 200") == (sent == request), got
        with held(batcher, crew) as go, client(address) as asking:
            threading.Timer(0.4, go.set).start()
            asking.chat.completions.create(model="facts", messages=USER, max_tokens=2)


def test_a_question_that_fails_takes_nobody_along(monkeypatch):
    """The others of its batch are answered; what its error says of the machine stays on it."""
    think, sizes, crew = MultiAgentSystem.think, [], team()

    def broken(self, agent, questions, *args):
        sizes.append(len(questions))
        if any("coin" in q["question"] for q in questions):
            raise RuntimeError("out of /secret/memory")
        return think(self, agent, questions, *args)

    monkeypatch.setattr(MultiAgentSystem, "think", broken)
    with listening([crew]) as (address, batcher), held(batcher, crew) as go:
        texts = [f"where is the {thing}" for thing in tiny.THINGS]
        got = dict(zip(texts, at_once(address, batcher, texts, go)))
    error = got.pop("where is the coin")
    assert error.status_code == 500 and "secret" not in str(error) and max(sizes) == len(texts)
    monkeypatch.undo()
    for text, completion in got.items():
        assert completion.choices[0].message.content == alone(text)[0]


# ---- the queue -------------------------------------------------------------------------------------------------------


def test_a_batch_is_of_one_team_and_settings(monkeypatch):
    one, other, greedy = team(), team("other"), Settings(temperature=0.0)
    with Batcher(max_batch=3) as batcher:
        batches = []
        monkeypatch.setattr(batcher, "_run", lambda jobs: batches.append([job.question.fields["question"] for job in jobs]))
        with batcher._changed:  # all of them wait
            for text, of, settings in (
                ("a", one, greedy), ("b", other, greedy), ("c", one, greedy), ("d", one, greedy._replace(samples=2)),
                ("e", one, greedy), ("f", one, greedy), ("g", one, greedy._replace(stop=("x",))),
            ):  # fmt: skip
                batcher.submit(Job(of.question({"question": text}, settings, 3), time.monotonic() + 9, lambda: None))
        wait_for(lambda: sum(map(len, batches)) == 7)
    assert batches == [["a", "c", "e"], ["b"], ["d"], ["f"], ["g"]]


def test_a_short_answer_does_not_wait_for_a_long_one():
    crew, go, until = team(), threading.Event(), time.monotonic() + PATIENCE
    with Batcher() as batcher:
        with held(batcher, crew):
            questions = [crew.question({"question": "key"}, Settings(0.0), n) for n in (2, 9)]
            short = Job(questions[0], until, lambda: None)
            long = Job(questions[1], until, lambda: len(long.tokens[0]) == 4 and wait(go))
            batcher.submit(short)
            batcher.submit(long)
        wait_for(lambda: len(long.tokens[0]) == 4)
        assert short.done and short.ends == ["length"] and short.tokens[0] == long.tokens[0][:2] and not long.done
        go.set()
        wait_for(lambda: long.done)
    assert long.ends == ["length"] and len(long.tokens[0]) == 9


def test_close_fails_who_waits_and_ends_who_runs(monkeypatch):
    crew = team()
    batcher = Batcher(max_waiting=1)
    runs, second = (Job(crew.question({"question": "key"}, Settings(0.0), 90), time.monotonic() + PATIENCE, x) for x in (
        lambda: wait(go), lambda: None))  # fmt: skip
    go = threading.Event()
    batcher.submit(runs)
    wait_for(lambda: any(runs.tokens))  # it is told of its first token now
    batcher.submit(second)
    with pytest.raises(Overloaded):
        batcher.submit(second)
    closing = threading.Thread(target=batcher.close)
    closing.start()
    wait_for(lambda: second.done)
    go.set()
    closing.join(PATIENCE)
    assert isinstance(runs.error, Closed) and isinstance(second.error, Closed) and len(runs.tokens[0]) == 1
    with pytest.raises(Closed):
        batcher.submit(second)


# ---- the command -----------------------------------------------------------------------------------------------------


def call(*arguments):
    return CliRunner().invoke(cli.app, ["serve", *map(str, arguments)])


def test_the_command_serves_directories(tmp_path, monkeypatch):
    base = tiny.save_base(tmp_path / "base")
    system = tiny.system()
    system.model.get_base_model().config._name_or_path = str(base)
    system.save_pretrained(tmp_path / "facts")
    served = {}
    monkeypatch.setattr("diffmas.serving.server.uvicorn.run", lambda app, **options: served.update(options, teams=names(app)))

    def names(app):
        async def get():
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as connected:
                return [m["id"] for m in (await connected.get("/v1/models")).json()["data"]]

        return asyncio.run(get())

    result = call(tmp_path / "facts", f"again={tmp_path / 'facts'}", "--device", "cpu", "--port", 8123)
    assert result.exit_code == 0, (result.output, result.exception)
    assert served["http"] is Connection and served["teams"] == ["facts", "again"]
    assert (served["host"], served["port"]) == ("127.0.0.1", 8123)
    for arguments, says in (
        ([tmp_path / "facts", "--host", "0.0.0.0"], "without a token"),
        ([tmp_path / "facts", tmp_path / "facts", "--device", "cpu"], "expected distinct names"),
        ([tmp_path / "base", "--device", "cpu"], "agents.json"),
    ):
        result = call(*arguments)
        assert result.exit_code == 1 and says in result.output, result.output


WEB = {"anyio", "fastapi", "pydantic", "starlette", "uvicorn"}
OF_THE_SERVER = {f"diffmas.serving.{name}" for name in ("connections", "protocol", "server", "vllm.chat", "vllm.server")}


def test_only_the_server_needs_fastapi(tmp_path, monkeypatch):
    """Nobody else imports it, or those who do, when it is imported itself; the command says what to install."""
    root = Path(cli.__file__).parents[2]
    for file in (root / "diffmas").rglob("*.py"):
        name = ".".join(file.relative_to(root).with_suffix("").parts)
        tree = ast.parse(file.read_text())
        found = {m for node in ast.walk(tree) for m in modules_of(node) if m.split(".")[0] in WEB}
        found |= {m for node in tree.body for m in modules_of(node) if m in OF_THE_SERVER}
        assert not found or name in OF_THE_SERVER, (name, found)
    monkeypatch.setattr("diffmas.cli.commands.serve.find_spec", lambda name: None)
    result = call(tmp_path)
    assert result.exit_code == 1 and "pip install diffmas[serve]" in result.output


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_the_command_says_that_vllm_is_missing(tmp_path):
    tiny.system().save_pretrained(tmp_path / "team")
    result = call(tmp_path / "team", "--engine", "vllm")
    assert result.exit_code == 1 and "pip install vllm" in result.output


def modules_of(node) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [node.module] if isinstance(node, ast.ImportFrom) else []
