"""Latent steps that repeat on the device, and views that several sequences share: the same results as the plain way."""

import contextlib
import threading
import types
import warnings

import pytest
import torch
from models import assert_close, body, gradients, latent_steps, loss_of, prefill, read, tiny, tokens
from systems import QUESTIONS, system
from threads import together

import diffmas
from diffmas import Agent, Trace
from diffmas.agents import latent
from diffmas.models import capture
from diffmas.models.capture import captured
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import attention_parts, layer_backward, layer_work, views
from diffmas.trace.views import KVRange, share

# ---- steps without the host ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("T", [4, 5, 12])
@pytest.mark.parametrize("options", [{}, dict(trace_content="latent_only"), dict(realign="soft_token")], ids=str)
def test_steps_that_repeat(options, T, repeating, monkeypatch):
    agents = [Agent("a", "w5 {question}", T), Agent("b", "w7 w8 {question}", T), Agent("c", "w9 {question}")]
    s = system(agents=agents, **options)
    with torch.no_grad():
        got = s(QUESTIONS)
        assert len(repeating) == (2 if T > 4 else 0)
        monkeypatch.undo()
        want = s(QUESTIONS)
    assert_close(got.logits, want.logits, 1e-12)
    assert got.trace.segments == want.trace.segments and got.trace.next_positions == want.trace.next_positions


def test_steps_that_repeat_beyond_the_room_of_a_segment(repeating):
    """Without room for all of them in one run of rows, steps go one by one, until the rest has room; storage that must grow
    does so in a step of its own."""
    s = system()
    for reserved, T in ((0, 104), (1, 12), (12, 12), (0, 5)):
        results = []
        for plain in (False, True):
            trace = Trace(s.model, batch_size=2)
            prompts = tokens(3, 2)
            plan = trace.plan([3, 2], "prompt", reserve=reserved)
            forward(patch_of(s.model), trace, plan, input_ids=torch.cat(prompts)[None])
            repeating.clear()
            with torch.no_grad():
                h = torch.linspace(-1, 1, 2 * s.model.config.hidden_size, dtype=torch.float64).view(2, -1)
                step = _one_by_one if plain else latent.latent_steps
                results.append((step(patch_of(s.model), s.realign, trace, h, [T, T]), trace))
            assert len(repeating) == (0 if plain else 1)
        assert trace.lengths == [3 + T, 2 + T]
        (got, trace), (want, plain_trace) = results
        assert_close(got, want, 1e-12)
        assert trace.segments == plain_trace.segments
        for layer in range(len(trace)):
            for sequence in range(2):
                for x, y in zip(trace.keys_values(layer, sequence), plain_trace.keys_values(layer, sequence)):
                    assert_close(x, y, 1e-12)


def _one_by_one(patch, realign, trace, h, T):
    for left in reversed(range(T[0])):
        h = latent._step(patch, realign, trace, trace.plan([1] * trace.batch_size, "latent", reserve=left), h)
    return h


class Stream:
    def __init__(self, device):
        self.device = device


class Device:
    """torch.cuda without a GPU. As torch's, a capture that fails leaves the allocator in its pool and generators counting."""

    def __init__(self):
        self.entered, self.pools, self.open, self.counting = [], 0, set(), False

    def names(self) -> dict:
        return dict(
            device=self.entering, stream=self.entering, graph=self.graph, CUDAGraph=types.SimpleNamespace, Stream=Stream,
            current_device=lambda: 0, current_stream=lambda: "current stream", graph_pool_handle=self.handle,
        )  # fmt: skip

    def handle(self):
        self.pools += 1
        return 0, self.pools

    @contextlib.contextmanager
    def entering(self, *what):
        self.entered.append(what)
        try:
            yield
        finally:
            self.entered.pop()

    @contextlib.contextmanager
    def graph(self, *what, capture_error_mode):
        assert not self.open, "no other capture begins while the allocator is in a pool"
        pool, self.counting = what[1], True
        self.open.add(pool)
        try:
            with self.entering(*what, capture_error_mode):
                yield
        except torch.OutOfMemoryError:  # the capture itself is all right
            self.open.remove(pool)
            self.counting = False
            raise
        self.open.remove(pool)
        self.counting = False

    def leave(self, device, pool):
        if pool not in self.open:
            raise RuntimeError(f"not recording to {pool}")
        self.open.remove(pool)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    for name, fake in device.names().items():
        monkeypatch.setattr(torch.cuda, name, fake)
    released = lambda _, pool: pool not in device.open or pytest.fail("a pool that is in use is released")
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", device.leave, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", released, raising=False)
    monkeypatch.setattr(capture, "_capture_stream", capture._capture_stream.__wrapped__)
    return device


def patch(**tries):
    return types.SimpleNamespace(graphs=True, tries={"work": tries["work"]} if tries else {})


def on(device):
    return types.SimpleNamespace(device=torch.device(device), zero_=lambda: None)


def test_the_models_device_is_captured(device):
    """Whichever is current, on a stream of its own."""
    second, entered = torch.device("cuda:1"), []
    graph = capture.attempt(patch(), "work", lambda: entered.extend(device.entered), on(second))
    (*outer, (entered_graph, pool, stream, mode)) = entered
    assert outer == [(second,), ("current stream",)] and entered_graph is graph
    assert (pool, stream.device, mode) == ((0, 1), second, "thread_local")


CANNOT_BE_CAPTURED = [(RuntimeError("it waits"), 1), (torch.OutOfMemoryError("it is full"), 3)]


@pytest.mark.parametrize("error, tries", CANNOT_BE_CAPTURED)
def test_a_model_that_cannot_be_captured(error, tries, device, monkeypatch):
    """The steps run one by one, with one warning. Nothing that other threads see is changed meanwhile, and captures after it
    are possible; memory that was short is asked for again, but not without end."""
    s = system(agents=[Agent("a", "w5 {question}", 6), Agent("b", "w7 {question}", 6), Agent("c", "w9 {question}")])
    tried, h, step = [], torch.zeros(2), latent._step

    def failing(*args, commit=True):
        if not commit:
            tried.append(device.counting)
            raise error
        return step(*args)

    monkeypatch.setattr(capture, "_on_one_gpu", lambda *_: True)
    monkeypatch.setattr(latent, "_step", failing)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda mode: pytest.fail("of the whole process"))
    with torch.no_grad():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):  # two runs of latent steps each
                got = s(QUESTIONS)
        assert [str(error) in str(w.message) for w in caught if "CUDA graph" in str(w.message)] == [True]
        assert tried == [True] * tries and patch_of(s.model).tries == {"latent steps": 0}
        assert not device.open and not device.counting and not device.entered
        assert captured(lambda: h.add_(1), "stream", h) and h.tolist() == [1, 1]
        monkeypatch.undo()
        want = s(QUESTIONS)
    assert_close(got.logits, want.logits, 1e-12)
    assert got.trace.segments == want.trace.segments
    assert not patch_of(diffmas.patch_model(diffmas.unpatch_model(s.model))).tries, "the next patch tries anew"


def test_a_capture_that_succeeds_forgets_that_memory_was_short(device):
    once = patch(work=1)
    assert capture.attempt(once, "work", lambda: None, on("cuda:0")) and once.tries == {"work": 3}
    never = patch(work=0)
    assert capture.attempt(never, "work", lambda: pytest.fail("it was in vain"), on("cuda:0")) is None


def test_captures_take_turns(device):
    """They share a stream, and what is put there is part of the graph that is being made."""
    wait = lambda: threading.Event().wait(0.05)
    together(*[lambda: capture.attempt(patch(), "work", wait, on("cuda:0"))] * 3)


def test_a_capture_that_fails_otherwise_leaves_nothing_behind(device):
    moved, forgotten = [], []
    planned = types.SimpleNamespace(
        can_move=lambda device: None, move=lambda device, n: moved.append(n), forget=lambda: forgotten.append(True)
    )
    with pytest.raises(KeyError, match="no such"):
        capture.capture_pass(patch(), "work", planned, lambda: {}["no such"], on("cuda:0"))
    assert forgotten and sum(moved[:1] + moved[2:]) == 0 and not device.open, "a recorded move has not run"


def test_no_graphs_where_they_are_not_wanted(repeating):
    s = system(agents=[Agent("a", "w5 {question}", 6), Agent("c", "w9 {question}")])
    for graphs in (True, False):
        diffmas.patch_model(s.model, graphs=graphs)
        with torch.no_grad():
            s(QUESTIONS)
        assert len(repeating) == 1


@pytest.mark.parametrize("family", ["qwen3", "phi3", "cohere"])
def test_a_backend_is_chosen_by_the_size_of_a_head(family, monkeypatch):
    """Also where q comes as the projection left it, with all heads in a row: most backends serve no head as long as that."""
    model, sizes, call = tiny(family), [], layer_work.call
    told = lambda op, lead, *args, **kw: sizes.append(lead.shape[-1]) or call(op, lead, *args, **kw)
    for module in (layer_backward, layer_work):
        monkeypatch.setattr(module, "call", told)
    trace = prefill(model, *tokens(5))
    h = body(model)(input_ids=tokens(3)[0][None], past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, 2)
    read(model, trace, *tokens(2))[0].sum().backward()
    assert len(sizes) > 3 * 5 and set(sizes) == {8}


# ---- shared rows -----------------------------------------------------------------------------------------------------


def test_what_is_shared(monkeypatch):
    monkeypatch.setattr(views, "SAVED_ROWS", 8)
    a, b, moved = KVRange(0, 10, 0), KVRange(20, 5, 0), KVRange(20, 5, 3)
    assert share([[a, b, KVRange(40, 1, 0)], [a, b, KVRange(41, 1, 0)]]) == (
        [2],
        [[a, b]],
        [[KVRange(40, 1, 0)], [KVRange(41, 1, 0)]],
    )
    # Another offset is another key; a run may be shared in part; a sequence may share nothing.
    assert share([[b, KVRange(40, 1, 0)], [a, b], [KVRange(0, 12, 0)], [a, moved]]) == (
        [1, 3], [[], [a]], [[b, KVRange(40, 1, 0)], [b], [KVRange(10, 2, 0)], [moved]],
    )  # fmt: skip
    # A short common beginning does not break up a group that saves more.
    assert share([[a, b], [a, b, b], [KVRange(0, 2, 0)]])[0] == [2, 1]
    assert share([[a], [b], [a]]) is None
    monkeypatch.setattr(views, "SAVED_ROWS", 16)
    assert share([[a, b], [a, b]]) is None


@pytest.mark.parametrize("positions", ["shift", "keep"])
def test_shared_rows_are_read_once(positions, monkeypatch):
    model = tiny("qwen3")
    trace = prefill(model, *tokens(9, 14, 3))
    left, right = trace.fork(2)
    prefill(model, *tokens(4, 4, 4, seed=1), trace=left)
    prefill(model, *tokens(2, 6, 3, seed=2), trace=right)
    joined = Trace.join([left, right], positions=positions)
    owners, new = [0, 0, 0, 2, 1, 1], tokens(1, 2, 1, 1, 3, 1, seed=3)

    def learn():
        out = torch.cat(read(model, joined.select(owners), *new))
        loss_of(out).backward(retain_graph=True)
        return out, gradients(model)

    want, want_gradients = learn()
    monkeypatch.setattr(views, "SAVED_ROWS", 8)
    called = []
    call = layer_work.call
    for module in (attention_parts, layer_backward, layer_work):
        monkeypatch.setattr(module, "call", lambda name, *args, **kw: called.append(name) or call(name, *args, **kw))
    with torch.no_grad():
        assert_close(torch.cat(read(model, joined.select(owners), *new)), want, 1e-10)
    assert "merge_states" in called
    got, got_gradients = learn()
    assert_close(got, want, 1e-10)
    assert_close(got_gradients, want_gradients, 1e-9)
    assert called.count("cross_attention_backward") == 2 * len(joined)


def test_samples_share_their_prompt(monkeypatch):
    """Greedy samples of one question are that question's answer, latent steps on shared rows included."""
    s = system()
    want = s.generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0)
    monkeypatch.setattr(views, "SAVED_ROWS", 1)
    got = s.generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0, samples=3)
    assert got == [[row[0]] * 3 for row in want]
    model = tiny("qwen3")
    with torch.no_grad():
        trace = prefill(model, *tokens(7, 5)).select([0, 0, 1])
        h = torch.randn(3, 1, model.config.hidden_size, dtype=torch.float64)
        shared = latent_steps(model, trace.fork(1)[0], h, 3)
        monkeypatch.undo()
        assert_close(shared, latent_steps(model, trace, h, 3), 1e-10)


SEG_LEN = {"inject_attend": 15, "cross_attention": 6, "inject_attend_backward": 18, "cross_attention_backward": 10}


def learned(how: str, monkeypatch, saved: int):
    """Four answers whose agents read one reader's rows. -> loss, gradients, how many rows attention's calls read."""
    agents = [Agent("reader", " ".join(["w5 w6 w7"] * 8), 2), Agent("a", "w5 {question}", "T"), Agent("b", "w9 {question}")]
    s = system(agents=agents, no_latents="prompt", lora=how != "all weights")
    rows = [{"question": q, "T": T} for q, T in zip([*QUESTIONS, "w16"], (3, 0, 5, 5))]
    read, call = 0, layer_work.call

    def counting(name, like, *args, **options):
        nonlocal read
        read += int(args[SEG_LEN[name]].sum()) if name in SEG_LEN else 0
        return call(name, like, *args, **options)

    with monkeypatch.context() as m:
        m.setattr(views, "SAVED_ROWS", saved)
        for module in (attention_parts, layer_backward, layer_work):
            m.setattr(module, "call", counting)
        trace = s.think(agents[0], s.fields_of([rows[0]]), Trace(s.model))
        trace = (trace.detach() if how == "detached" else trace).select([0] * 4)
        trace = s.think(agents[1], s.fields_of(rows), trace)
        loss = s(rows, ["w3 w4", "w8", "w9 w2", "w7"], trace=trace).loss
        loss.backward()
    return loss.detach(), gradients(s), read


@pytest.mark.parametrize("how", ["", "all weights", "detached"])
def test_rows_of_several_readers_are_read_once_in_backward(how, monkeypatch):
    """By the tokens of all branches, and by all steps of a run when the rows get their gradient; each row learns from all."""
    want_loss, want, one_by_one = learned(how, monkeypatch, 1 << 30)
    loss, got, read = learned(how, monkeypatch, 1)
    assert_close(loss, want_loss, 1e-12)
    assert_close(got, want, 1e-9)
    assert 2 * read < one_by_one
