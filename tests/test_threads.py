"""One model in several threads, and one call inside another: each does what it does alone.

Where a fault needs an interleaving, the threads meet at every forward, so that luck decides nothing. A lock that keeps them
apart is given a moment to do so: then nobody comes to the meeting.
"""

import contextlib
import copy
import sys
import threading

import pytest
import torch
import transformers
from models import assert_close, body, gradients, latent_steps, loss_of, pad, tiny, tokens, unroll
from systems import AGENTS, ANSWERS, QUESTIONS, roles_model, system, tokenizer, unrolled_loss
from threads import Meeting, together, wait
from torch.utils._python_dispatch import TorchDispatchMode

import diffmas
from diffmas import MultiAgentSystem
from diffmas.agents.adapters import AdapterLock
from diffmas.agents.eval_mode import evaluating
from diffmas.trace import pool

NEW = 9  # tokens


class Chance:
    """A meeting of two that a lock may forbid: who is alone goes on after a moment. met: how often it came about."""

    def __init__(self, moment: float = 0.05):
        self.moment, self.changed, self.waiting, self.met = moment, threading.Condition(), False, 0

    def wait(self) -> None:
        with self.changed:
            if self.waiting:
                self.waiting, self.met = False, self.met + 1
                self.changed.notify_all()
                return
            self.waiting, met = True, self.met
            if not self.changed.wait_for(lambda: self.met > met, self.moment):
                self.waiting = False


@contextlib.contextmanager
def before_forwards(model, act):
    """`act(new tokens)` before each forward of the body, before anything of diffmas."""
    hook = lambda module, args, kwargs: act((kwargs.get("input_ids", kwargs.get("inputs_embeds"))).shape[1])
    handle = body(model).register_forward_pre_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


class Choose:
    """A logits processor that leaves one token, drawn with its own generator; transformers draws from the global one."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, ids, scores):
        noise = torch.rand(scores.shape, generator=self.generator, dtype=torch.float64)
        token = (scores.double() - (-noise.log()).log()).argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter(1, token, 0.0)


def at_step(step, act):
    """A logits processor that calls `act` before it chooses token number `step`, from 0."""
    done = [0]

    def process(ids, scores):
        done[0] += 1
        if done[0] == step + 1:
            act()
        return scores

    return process


def written(trace, model):
    """All that can be known of a trace but where its rows lie: the kinds of its tokens, their positions, their rows."""
    table = [[s.kind for s in trace.segments if s.sequence == b for _ in range(s.length)] for b in range(trace.batch_size)]
    at = [trace.positions(b).tolist() for b in range(trace.batch_size)]
    return table, at, [x for b in range(trace.batch_size) for x in trace.keys_values(2, b)]


def assert_same(got, want):
    assert got[:2] == want[:2], (got[:2], want[:2])
    for x, y in zip(got[2], want[2]):
        assert_close(x, y, 1e-9)


def started(model, *lengths, seed=1, at=None):
    """A trace of prompts, at positions from `at` where a number is given."""
    trace = diffmas.Trace(model, len(lengths))
    ids, mask = pad(tokens(*lengths, seed=seed))
    positions = None if at is None else torch.arange(at, at + ids.shape[1]).expand(len(lengths), -1)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=trace)
    return trace


HOW = {
    "greedy": {},
    "sampled": dict(choose=True),
    "beams": dict(num_beams=3),
    "several samples": dict(choose=True, do_sample=True, num_return_sequences=2),
}


def job(model, i, how="greedy", n=NEW, processors=(), rows=2):
    """Generates on a trace of its own; -> tokens, what the trace holds."""
    options = dict(HOW[how])
    processors = [*processors, *([Choose(i)] if options.pop("choose", False) else [])]
    lengths, new = ((5, 2), (2, 4)) if i % 2 == 0 else ((3, 7), (6, 1))
    trace = started(model, *lengths[:rows], seed=10 + i, at=None if i % 2 == 0 else 40)
    ids, mask = pad(tokens(*new[:rows], seed=20 + i))

    def run():
        out = model.generate(
            input_ids=ids, attention_mask=mask, past_key_values=trace, max_new_tokens=n, logits_processor=processors,
            **{"do_sample": False, **options},
        )  # fmt: skip
        return out[:, ids.shape[1] :].tolist(), written(trace, model)

    return run


@pytest.fixture
def model():
    model = tiny("qwen3")
    model.generation_config.eos_token_id = None
    return model


def assert_jobs(got, want):
    for (text, trace), (text_alone, trace_alone) in zip(got, want):
        assert text == text_alone
        assert_same(trace, trace_alone)


# ---- generate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(NEW, NEW), (NEW, NEW - 4)], ids=["as long", "one ends first"])
@pytest.mark.parametrize("how", [("greedy", "greedy"), ("sampled", "sampled"), ("beams", "greedy"), ("beams", "beams"),
                                 ("several samples", "sampled")], ids="-".join)  # fmt: skip
def test_generate_in_two_threads(model, how, lengths):
    jobs = lambda: [job(model, i, how[i], lengths[i]) for i in range(2)]
    want = [run() for run in jobs()]
    assert want[0][0] != want[1][0]
    meeting, chance, steps = Meeting(), Chance(), threading.local()

    def meet(n):
        steps.done = getattr(steps, "done", 0) + 1
        meeting.wait() if steps.done <= min(lengths) else chance.wait()

    runs = jobs()
    with before_forwards(model, meet):
        got = together(*runs, meeting=meeting)
    assert_jobs(got, want)


@pytest.mark.skipif(
    transformers.__version__ < "5", reason="transformers 4.56 looks no prompt up without an EOS, and gives too many"
)
def test_prompt_lookup_in_two_threads(model):
    jobs = lambda: [job(model, i, rows=1) for i in range(2)]
    want = [run() for run in jobs()]
    chance, runs = Chance(), jobs()
    model.generation_config.prompt_lookup_num_tokens = 3
    with before_forwards(model, lambda n: chance.wait()):
        got = together(*runs)
    assert chance.met >= 1
    assert_jobs(got, want)


def test_assisted_decoding_in_two_threads(model):
    """Each has an assistant of its own: transformers keeps state on those."""
    want = [job(model, i, rows=1)()[0] for i in range(2)]
    chance, runs = Chance(), []
    for i in range(2):
        trace = started(model, (5, 3)[i], seed=10 + i, at=(None, 40)[i])
        ids, assistant = tokens((2, 6)[i], seed=20 + i)[0][None], tiny("qwen3", patch=False)
        assistant.generation_config.eos_token_id = None
        runs.append(
            lambda trace=trace, ids=ids, assistant=assistant: model.generate(
                input_ids=ids, past_key_values=trace, assistant_model=assistant, max_new_tokens=NEW, do_sample=False
            )[:, ids.shape[1] :].tolist()
        )
    with before_forwards(model, lambda n: chance.wait()):
        got = together(*runs)
    assert chance.met >= 1
    assert got == want


@pytest.mark.parametrize("thread", [False, True])
@pytest.mark.parametrize("step", [0, 3])
def test_a_forward_on_another_trace_while_generate_runs(model, step, thread):
    """From a logits processor, or from a thread: at its own positions, as its own kind."""
    (want,) = [job(model, 0)()]
    ids, at = tokens(5, seed=7)[0][None], torch.arange(100, 105)[None]
    other = diffmas.Trace(model)

    @torch.no_grad()
    def forward():
        model(ids, position_ids=at, past_key_values=other)
        h = model.get_input_embeddings()(ids[:, :1])
        body(model)(inputs_embeds=h, past_key_values=other)  # a latent step

    act = (lambda: together(forward)) if thread else forward
    got = job(model, 0, processors=[at_step(step, act)])()
    assert_jobs([got], [want])
    assert other.positions(0).tolist() == [100, 101, 102, 103, 104, 105]
    assert [(s.kind, s.length) for s in other.segments] == [("prompt", 5), ("latent", 1)]
    rows = other.keys_values(2, 0)
    other = diffmas.Trace(model)
    forward()
    assert all(torch.equal(x, y) for x, y in zip(rows, other.keys_values(2, 0)))


@pytest.mark.parametrize("how", ["greedy", "beams"])
@pytest.mark.parametrize("step", [0, 3])
def test_generate_inside_generate(model, step, how):
    want = [job(model, i, (how, "greedy")[i])() for i in range(2)]
    inner = []
    processors = [at_step(step, lambda: inner.append(job(model, 1, n=NEW)()))]
    got = job(model, 0, how, processors=processors)()
    assert_jobs([got, *inner], want)


@pytest.mark.parametrize("how", ["greedy", "beams"])
def test_generate_on_a_fork_inside_generate(model, how):
    """A fork, and a deep copy, which is one: of the trace as it is at that moment."""
    want = job(model, 0)()
    trace, inner = started(model, 5, 2, seed=10), []
    ids, mask = pad(tokens(2, 4, seed=20))

    def act():
        for fork in (trace.fork(1)[0], copy.deepcopy(trace)):
            lengths = list(fork.lengths)
            out = model.generate(
                input_ids=ids, past_key_values=fork, attention_mask=mask, max_new_tokens=3, do_sample=False,
                num_beams=3 if how == "beams" else 1,
            )  # fmt: skip
            grown = [a - b for a, b in zip(fork.lengths, lengths)]
            inner.append((out.tolist(), grown))

    out = model.generate(
        input_ids=ids, attention_mask=mask, past_key_values=trace, max_new_tokens=NEW, do_sample=False,
        logits_processor=[at_step(4, act)],
    )  # fmt: skip
    assert_jobs([(out[:, 4:].tolist(), written(trace, model))], [want])
    assert inner[0] == inner[1] and inner[0][1] == ([0, 0] if how == "beams" else [2 + 2, 4 + 2])


def test_a_deep_copy_of_a_trace_that_is_generated_on(model):
    """It is a trace as any other, then and afterwards."""
    trace, copies = started(model, 5), []
    ids, at = tokens(3, seed=2)[0][None], torch.arange(50, 53)[None]
    act = lambda: copies.append(copy.deepcopy(trace))
    model.generate(ids, past_key_values=trace, max_new_tokens=4, do_sample=False, logits_processor=[at_step(1, act)])
    (copied,) = copies
    with torch.no_grad():
        model(ids, position_ids=at, past_key_values=copied)
    assert copied.positions(0).tolist() == [*range(5), *range(5, 9), 50, 51, 52]
    assert [s.kind for s in copied.segments] == ["prompt", "text", "prompt"]
    model.generate(ids, past_key_values=copied, max_new_tokens=2, do_sample=False)


REFUSED = "no other generate runs on"


def test_a_second_generate_on_one_trace_is_refused(model):
    """Inside the first and from a thread, whatever it would do; the first goes on as if nothing had happened."""
    (want,) = [job(model, 0)()]
    trace, refused = started(model, 5, 2, seed=10), []
    ids, mask = pad(tokens(2, 4, seed=20))
    options = dict(input_ids=ids, attention_mask=mask, past_key_values=trace, max_new_tokens=NEW)

    def again():
        for more in ({}, dict(num_beams=2), dict(do_sample=True, num_return_sequences=2)):
            with pytest.raises(ValueError, match=REFUSED):
                model.generate(**{**options, "do_sample": False, **more})
            refused.append(more)

    def act():
        again()
        together(again)

    out = model.generate(**options, do_sample=False, logits_processor=[at_step(3, act)])
    assert len(refused) == 6
    assert_jobs([(out[:, 4:].tolist(), written(trace, model))], [want])
    model.generate(**{**options, "max_new_tokens": 2}, do_sample=False)


def test_of_two_generates_that_begin_at_once_one_is_refused(model):
    """Both look whether the trace is free before either begins: they meet while they read their arguments."""
    trace, ids = started(model, 5), tokens(3, seed=2)[0][None]
    chance = Chance(1.0)

    class Mask(torch.Tensor):
        def long(self):
            chance.wait()
            return self.as_subclass(torch.Tensor).long()

    def run():
        mask = torch.ones(1, 3, dtype=torch.long).as_subclass(Mask)
        try:
            return model.generate(ids, attention_mask=mask, past_key_values=trace, max_new_tokens=4, do_sample=False).tolist()
        except ValueError as error:
            return str(error)

    got = together(run, run)
    assert sum(REFUSED in x for x in got if isinstance(x, str)) == 1, got
    alone = started(model, 5)
    want = model.generate(ids, past_key_values=alone, max_new_tokens=4, do_sample=False).tolist()
    assert [x for x in got if not isinstance(x, str)] == [want]
    assert_same(written(trace, model), written(alone, model))


def test_beams_leave_the_trace_to_others(model):
    """Beams run on forks: the trace may be written, and generated on, in the meantime."""
    alone, trace = started(model, 5), started(model, 5)
    ids, more = tokens(3, seed=2)[0][None], tokens(4, seed=3)[0][None]
    options = dict(input_ids=ids, max_new_tokens=5, do_sample=False)
    want = model.generate(**options, past_key_values=alone, num_beams=3).tolist()
    with torch.no_grad():
        model(more, past_key_values=alone)
    want_text = model.generate(**options, past_key_values=alone).tolist()
    texts = []

    @torch.no_grad()
    def act():
        model(more, past_key_values=trace)
        texts.append(model.generate(**options, past_key_values=trace).tolist())

    got = model.generate(**options, past_key_values=trace, num_beams=3, logits_processor=[at_step(2, act)]).tolist()
    assert got == want and texts == [want_text]
    assert_same(written(trace, model), written(alone, model))


def test_a_generate_that_fails_leaves_the_trace_free(model):
    trace, ids = started(model, 5), tokens(3, seed=2)[0][None]

    def fail():
        raise KeyError("stop")

    for more in ({}, dict(num_beams=2)):
        with pytest.raises(KeyError):
            model.generate(ids, past_key_values=trace, max_new_tokens=4, logits_processor=[at_step(1, fail)], **more)
    fork = trace.fork(1)[0]
    for t in (trace, fork):
        with torch.no_grad():
            model(ids, position_ids=torch.arange(60, 63)[None], past_key_values=t)
        assert t.segments[-1].kind == "prompt" and t.next_positions == [63]
        model.generate(ids, past_key_values=t, max_new_tokens=2, do_sample=False)


def test_generate_beside_training(model):
    """Text in one thread, a loss and its gradients in another, from forward to forward together."""
    want = job(model, 0)()
    a, b = tokens(4, 3)
    loss_of(unroll(model, [a, 5, b])[-3:]).backward()
    want_grads = gradients(model)
    chance, run, grads = Chance(0.5), job(model, 0), []

    def train():
        trace = diffmas.Trace(model)
        h = body(model)(input_ids=a[None], past_key_values=trace).last_hidden_state[:, -1:]
        latent_steps(model, trace, h, 5)
        loss_of(model(b[None], past_key_values=trace).logits).backward()
        grads.append([(s.kind, s.length) for s in trace.segments])

    with before_forwards(model, lambda n: chance.wait()):
        got, _ = together(run, train)
    assert chance.met >= 5
    assert_jobs([got], [want])
    assert grads == [[("prompt", 4), ("latent", 5), ("prompt", 3)]]
    assert_close(gradients(model), want_grads)


@contextlib.contextmanager
def threads_that_switch_often():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        yield
    finally:
        sys.setswitchinterval(before)


def test_forks_are_made_while_another_thread_looks_who_holds_rows(model):
    trace = started(model, 5)
    others = trace.fork(400)
    with threads_that_switch_often():
        got, _ = together(lambda: [trace.rows for _ in range(100)], lambda: [trace.fork(2) for _ in range(2000)])
    assert len({*got, trace.rows}) == 1 and len(others) == 400


def test_forks_of_one_trace_in_many_threads(model):
    """Forks write to one store; its rows, and who holds them, are everybody's."""
    trace = started(model, 5, seed=10)
    ids = [tokens(3, seed=30 + i)[0][None] for i in range(4)]

    def run(i):
        done = []
        for _ in range(6):
            fork = trace.fork(1)[0]
            text = model.generate(ids[i], past_key_values=fork, max_new_tokens=4, do_sample=False)
            moved = diffmas.Trace.join([fork.detach(), trace], "keep").repack()
            done.append((text.tolist(), moved.keys_values(2, 0)[0].clone(), fork.positions(0).tolist()))
        return done

    want = [run(i) for i in range(4)]
    with threads_that_switch_often():
        got = together(*(lambda i=i: run(i) for i in range(4)))
    for one, other in zip(got, want):
        for (text, rows, at), (text_alone, rows_alone, at_alone) in zip(one, other):
            assert text == text_alone and at == at_alone
            assert_close(rows, rows_alone, 1e-9)


def test_a_pool_that_two_threads_make_room_in(model, monkeypatch):
    """One asks for less room than the other, and later, though it began earlier: the gradient has all rows."""
    trace, (x,), inside, over = started(model, 5), tokens(60, seed=2), threading.Event(), threading.Event()
    reserve, late = pool.Pool.reserve, threading.local()
    one, other, alone = trace.fork(3)
    loss_of(model(x[None], past_key_values=alone).logits).backward()
    want = gradients(model)
    del alone

    def slow(self, *args):
        if getattr(late, "yes", False) and not inside.is_set():
            inside.set()
            over.wait(0.5)  # a lock may keep the other thread from it
        return reserve(self, *args)

    def long():
        wait(inside)
        loss = loss_of(model(x[None], past_key_values=one).logits)
        over.set()
        return loss

    def short():
        late.yes = True
        with torch.no_grad():
            model(x[None, :2], past_key_values=other)

    monkeypatch.setattr(pool.Pool, "reserve", slow)
    loss, _ = together(long, short)
    loss.backward()
    assert_close(gradients(model), want)


# ---- adapters --------------------------------------------------------------------------------------------------------

MANY = [f"w{10 + i} w{40 - i}" for i in range(20)]


def roles():
    """A model whose roles differ so much that the wrong adapter gives another answer."""
    model = roles_model()
    for scale, role in enumerate(("planner", "critic", "solver")):
        for name, p in model.named_parameters():
            if f".{role}." in name and "lora_B" in name:
                p.data.mul_((-2.0, 1.0, 3.0)[scale])
    return model


def made(model, agents=AGENTS, scope="per_role"):
    s = MultiAgentSystem(model, tokenizer(), agents, adapter_scope=scope)
    s.realign.double()
    return s


def answers(s, questions=MANY):
    return [s.generate_tokens([q], max_new_tokens=5, temperature=0)[0][0] for q in questions]


def wrong(got, want) -> int:
    return sum(x != y for x, y in zip(got, want))


def two_systems(name):
    """-> two systems on one model, whose agents need another adapter at the same time."""
    model = roles()
    model.set_adapter("solver")
    if name.endswith("one system"):
        s = made(model, scope=name.split(",")[0])
        return s, s
    if name == "per_role":
        return made(model), made(model, [AGENTS[1], AGENTS[0], AGENTS[2]])
    if name == "final_only":
        return made(model, scope="final_only"), made(model, AGENTS[2:], scope="final_only")
    return made(model), made(model if name == "shared beside per_role" else model.get_base_model(), scope="shared")


SYSTEMS = [
    "per_role", "per_role, one system", "final_only", "final_only, one system", "shared beside per_role",
    "the base model beside per_role",
]  # fmt: skip


@pytest.mark.parametrize("name", SYSTEMS)
def test_systems_that_switch_adapters_in_two_threads(name):
    one, other = two_systems(name)
    want = answers(one), answers(other, MANY[::-1])
    chance, prompts_only = Chance(0.02), "one system" not in name
    # In the middle of a forward, for which the adapters must stay as they are.
    reach = lambda module, args: chance.wait() if args[0].shape[1] > 1 or not prompts_only else None
    handle = body(one.model).layers[1].register_forward_pre_hook(reach)
    try:
        got = together(lambda: answers(one), lambda: answers(other, MANY[::-1]))
    finally:
        handle.remove()
    assert [wrong(x, y) for x, y in zip(got, want)] == [0, 0]
    assert chance.met == 0  # the lock kept them apart


@pytest.mark.parametrize("scope", ["per_role", "final_only"])
def test_a_copied_system_has_a_lock_of_its_own(scope):
    s = made(roles(), scope=scope)
    copied = copy.deepcopy(s)
    want = answers(copied, MANY[:6])
    chance = Chance(0.02)
    handle = body(copied.model).layers[1].register_forward_pre_hook(lambda module, args: chance.wait())
    try:
        got = together(*(lambda: answers(copied, MANY[:6]),) * 2)
    finally:
        handle.remove()
    assert got == [want, want] and chance.met == 0


def test_autograds_threads_do_not_wait_for_whoever_waits_for_them(monkeypatch):
    """On a GPU, layers are recomputed in a thread of autograd's. This one stands for it: it comes while the thread that holds
    the adapters is in a long backward, and gets an error where it would wait for ever."""
    monkeypatch.setattr(AdapterLock, "PATIENCE", 0.001)
    lock, x = AdapterLock(), torch.randn(1500, 1500, requires_grad=True)
    loss, inside = (x @ x).sum(), threading.Event()

    def recompute():
        wait(inside)
        with lock:
            pass

    def backward():
        with lock:
            inside.set()
            for _ in range(5):
                loss.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match="backward: expected it outside of switched_to and switched_off"):
        together(backward, recompute)
    with lock:  # it is free again
        pass

    def called():  # who calls backward itself may wait
        with lock:
            pass

    y = torch.ones(1, requires_grad=True)
    y.register_hook(lambda grad: called())
    inside.clear()
    together(backward, lambda: wait(inside) or y.sum().backward())


@pytest.mark.parametrize("scope", ["per_role", "final_only"])
def test_a_backward_while_another_thread_has_switched_adapters(scope):
    """Autograd adds nothing to a parameter that is frozen at that moment."""
    s = made(roles(), scope=scope)
    loss = lambda: s(QUESTIONS, ANSWERS).loss
    loss().backward()
    want = gradients(s)
    inside, go_on = threading.Event(), threading.Event()

    def stop(module, args):
        if not inside.is_set():
            inside.set()
            wait(go_on)

    mine = loss()
    handle = body(s.model).layers[1].register_forward_pre_hook(stop)

    def backward():
        wait(inside)
        try:
            mine.backward()
        finally:
            go_on.set()

    try:
        together(lambda: answers(s, MANY[:1]), backward)
    finally:
        handle.remove()
    assert_close(gradients(s), want, 1e-9)


@pytest.mark.parametrize("scope", ["per_role", "final_only"])
def test_switching_adapters_leaves_the_model_as_it_was(scope):
    model = roles()
    model.set_adapter("critic")
    s = made(model, scope=scope)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 == 0)
    state = lambda: ([p.requires_grad for p in model.parameters()], model.active_adapter, str(model.get_model_status()))
    before = state()
    answers(s, MANY[:1])
    assert state() == before
    handle = body(model).layers[1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        answers(s, MANY[:1])
    handle.remove()
    assert state() == before


def test_the_bare_model_beside_an_adapter():
    """What is compared with a trained system runs without its adapter, which the system needs at the same time."""
    from diffmas.evaluation.baselines import Latent, latent_mas

    model = roles()
    model.set_adapter("solver")
    s = made(model, scope="shared")
    trained, bare = Latent(s), latent_mas(s)
    ask = lambda method: [method.answer([q], max_new_tokens=5, temperature=0).texts[0][0] for q in MANY[:8]]
    want = ask(trained), ask(bare)
    assert want[0] != want[1]
    chance = Chance(0.02)
    handle = body(model).layers[1].register_forward_pre_hook(lambda module, args: chance.wait())
    try:
        got = together(lambda: ask(trained), lambda: ask(bare))
    finally:
        handle.remove()
    assert [wrong(x, y) for x, y in zip(got, want)] == [0, 0] and chance.met == 0


# ---- modes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["nested", "first in first out"])
@pytest.mark.parametrize("shared", [False, True], ids=["one system", "two systems of one model"])
def test_evaluating_in_two_threads(order, shared):
    s = system().train()
    other = MultiAgentSystem(s.model, s.tokenizer, AGENTS) if shared else s
    body(s.model).layers[1].eval()
    modes = lambda: [[m.training for m in x.modules()] for x in (s, other)]
    before, during = modes(), []
    entered, inside, left = threading.Event(), threading.Event(), threading.Event()

    def first():
        with evaluating(s):
            entered.set()
            wait(inside)
            if order == "nested":
                wait(left)
        if order != "nested":
            during.append(modes())
            left.set()

    def second():
        wait(entered)
        with evaluating(other):
            inside.set()
            if order != "nested":
                wait(left)
        if order == "nested":
            during.append(modes())
            left.set()

    together(first, second)
    assert modes() == before
    # Whoever is not done yet is still in eval mode, all of it.
    assert not any(during[0][0 if order == "nested" else 1])


def test_generate_of_two_systems_of_one_model_restores_train_mode():
    s = system().train()
    other = MultiAgentSystem(s.model, s.tokenizer, AGENTS[1:])
    other.realign.double()
    want = [x.generate(QUESTIONS, max_new_tokens=n, temperature=0) for x, n in ((s, 4), (other, 8))]
    meeting, chance, first = Meeting(), Chance(), threading.local()

    def act(n):
        if not getattr(first, "done", False):
            first.done = True
            meeting.wait()  # both are in eval mode before either is done
        else:
            chance.wait()

    with before_forwards(s.model, act):
        got = together(
            lambda: s.generate(QUESTIONS, max_new_tokens=4, temperature=0),
            lambda: other.generate(QUESTIONS, max_new_tokens=8, temperature=0), meeting=meeting,
        )  # fmt: skip
    assert got == want
    assert all(m.training for m in s.modules()) and all(m.training for m in other.modules())


def test_two_threads_train_one_system():
    """Two losses of one system, forward and backward in two threads: their gradients add up."""
    s = system()
    want_losses = []
    for questions, given in ((QUESTIONS, ANSWERS), (QUESTIONS[::-1], ANSWERS[::-1])):
        loss = unrolled_loss(s, questions, given)
        loss.backward()
        want_losses.append(loss.item())
    want = gradients(s)
    chance = Chance(0.5)

    def train(questions, given):
        loss = s(questions, given).loss
        loss.backward()
        return loss.item()

    with before_forwards(s.model, lambda n: chance.wait()):
        got = together(lambda: train(QUESTIONS, ANSWERS), lambda: train(QUESTIONS[::-1], ANSWERS[::-1]))
    assert chance.met >= 5
    assert got == pytest.approx(want_losses, rel=1e-9)
    assert_close(gradients(s), want, 1e-9)


class OursOnThreads(TorchDispatchMode):
    """Our ops run on some threads, torch's own on one: in bfloat16 the latter round as they share a long sum among threads."""

    def __init__(self, threads: int):
        super().__init__()
        self.threads, self.seen = threads, set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        ours = op.namespace.startswith("diffmas")
        self.seen |= {op.overloadpacket.__name__} if ours else set()
        torch.set_num_threads(self.threads if ours else 1)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_do_not_depend_on_our_threads(dtype):
    """Of prompts, latent steps with their deferred gradient, and an answer: all weights, bit for bit."""
    results = []
    for threads in (1, 2, 3):
        s = system(dtype=dtype, lora=False)
        with OursOnThreads(threads) as mode:
            loss = s([" ".join([q] * 20) for q in QUESTIONS], ANSWERS).loss
            loss.backward()
        results.append((loss.detach(), gradients(s)))
        assert {"inject", "inject_backward", "cross_attention", "cross_attention_backward"} <= mode.seen
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(grads[name], x) for name, x in results[0][1].items())
