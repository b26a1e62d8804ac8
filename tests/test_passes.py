"""Backward passes that overlap, nest and fail, on the forks of one trace: each gives the gradient that it gives alone.

Where a fault needs an interleaving, hooks make it: they stand in the middle of a pass, at every layer of every forward, and two
passes that go from hook to hook together share each layer's pool all the way.
"""

import contextlib
import gc
import os
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path

import pytest
import torch
from models import SOME, assert_close, body, gradients, latent_steps, loss_of, masked, prefill, read, tiny, tokens, unroll
from threads import Meeting, together

import diffmas
from diffmas.trace import pool
from diffmas.trace.pool import GradPools

STEPS = 3
FAKE_DEVICE = str(Path(__file__).parent / "fake_device.py")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(diffmas.__file__).parents[1])}


class Stop(Exception):
    pass


class Hooks:
    """What happens in the middle of the backward of forwards that were made inside of `on`: `act()` at every layer."""

    def __init__(self):
        self.act, self.calls = None, 0

    @contextlib.contextmanager
    def on(self, model):
        handles = [layer.register_forward_hook(self._watch) for layer in body(model).layers]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _watch(self, layer, args, output):
        output = output if isinstance(output, torch.Tensor) else output[0]
        if output.requires_grad:
            output.register_hook(self._hook)

    def _hook(self, grad):
        self.calls += 1
        if self.act is not None:
            self.act()

    def once(self, act, call: int = 4) -> None:
        """`act` at that hook of the next pass; 4: a layer of the first forward that the pass undoes has not been undone yet,
        others have, and latent steps are still to come."""
        self.calls = 0

        def at_that_call():
            if self.calls == call:
                act()

        self.act = at_that_call


class Setting:
    """Two losses on forks of one trace, which share a prompt and go on with latent steps, and the gradients of each."""

    def __init__(self, model, checkpointing: bool = False):
        self.model, (a, b, c) = model, tokens(4, 3, 3)
        self.named = dict(model.named_parameters())
        self.want = []
        for x in (b, c):
            loss_of(unroll(model, [a, STEPS, x])[-len(x) :]).backward()
            self.want.append(gradients(model))
        if checkpointing:
            model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.hooks = Hooks()
        self.trace = diffmas.Trace(model)
        with self.hooks.on(model):
            h = body(model)(input_ids=a[None], past_key_values=self.trace).last_hidden_state[:, -1:]
            forks = self.trace.fork(2)
            for fork in forks:
                latent_steps(model, fork, h, STEPS)
            self.losses = [loss_of(read(model, fork, x)[0]) for fork, x in zip(forks, (b, c))]

    def grad(self, i: int) -> dict:
        """The gradients of loss i in a pass of its own, which leaves the graph as it is."""
        return named_grad(self.losses[i], self.named)

    def check(self, i: int, got: dict) -> None:
        assert_close(got, self.want[i])


def named_grad(loss, named) -> dict:
    grads = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: g for n, g in zip(named, grads) if g is not None}


@pytest.fixture
def setting():
    return Setting(tiny("qwen3"))


MADE = weakref.WeakSet()  # all gradient pools that are alive


@pytest.fixture(autouse=True)
def watched(monkeypatch):
    make = GradPools.__init__
    monkeypatch.setattr(GradPools, "__init__", lambda self, *args: MADE.add(self) or make(self, *args))


def live_pools() -> int:
    gc.collect()
    return len(MADE)


# ---- passes that overlap ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_two_threads_from_hook_to_hook(family):
    s, meeting = Setting(tiny(family)), Meeting()
    s.hooks.act = meeting.wait
    got = together(lambda: s.grad(0), lambda: s.grad(1), meeting=meeting)
    for i in range(2):
        s.check(i, got[i])
    assert s.hooks.calls == 2 * 3 * (2 + STEPS) - 2 * 0 or s.hooks.calls > 20


def test_two_threads_that_add_to_the_same_parameters(setting):
    s, meeting = setting, Meeting()
    s.hooks.act = meeting.wait
    together(*(lambda i=i: s.losses[i].backward(retain_graph=True) for i in range(2)), meeting=meeting)
    assert_close(gradients(s.model), {n: s.want[0][n] + s.want[1][n] for n in s.want[0]})


def test_two_threads_twice_over_one_graph(setting):
    """The same loss in both threads, twice in each: nothing of a pass is left for the next."""
    s, meeting = setting, Meeting()
    s.hooks.act = meeting.wait
    twice = lambda: [s.grad(0), s.grad(0)]
    for got in together(twice, twice, meeting=meeting):
        for grads in got:
            s.check(0, grads)


def test_two_threads_that_recompute():
    s, meeting = Setting(tiny("qwen3"), checkpointing=True), Meeting()
    s.hooks.act = meeting.wait
    got = together(lambda: s.grad(0), lambda: s.grad(1), meeting=meeting)
    for i in range(2):
        s.check(i, got[i])


@pytest.mark.parametrize("positions", ["keep", "shift"])
def test_two_threads_through_a_join(positions):
    """Branches that are joined, one of them a constant to one reader, and copied into fresh rows: all the nodes of a trace."""
    model, hooks, meeting = tiny("qwen3"), Hooks(), Meeting()
    a, b, c, d, e = tokens(4, 3, 5, 2, 2)
    named = dict(model.named_parameters())
    with hooks.on(model):
        left, right = prefill(model, a).fork(2)
        prefill(model, b, trace=left)
        prefill(model, c, trace=right)
        joined, half = (diffmas.Trace.join([left, t], positions) for t in (right, right.detach()))
        losses = [loss_of(read(model, t, x)[0]) for t, x in ((joined, d), (joined.repack(), e), (half.repack(), e))]
    want = [named_grad(x, named) for x in losses]
    if positions == "keep":
        for i, x in enumerate((d, e)):
            at = [*range(7), *range(4, 9), 9, 10]
            loss_of(masked(model, (a, b, c, x), at, [(slice(7, 12), slice(4, 7))])[12:]).backward()
            assert_close(want[i], gradients(model))
    hooks.act = meeting.wait
    for pair in ((0, 1), (1, 1), (2, 2), (1, 0)):
        got = together(*(lambda i=i: named_grad(losses[i], named) for i in pair), meeting=meeting)
        for i, grads in zip(pair, got):
            assert_close(grads, want[i], 1e-9)


def test_the_pool_grows_in_the_middle_of_two_passes(setting):
    """A third thread appends to a fork of its own, at every meeting; storages move, the passes go on in theirs."""
    s, meeting, third = setting, Meeting(3), setting.trace.fork(1)[0]
    s.hooks.act = meeting.wait
    before, over, left = third.memory(), threading.Event(), [2]

    def backward(i):
        try:
            return s.grad(i)
        finally:
            left[0] -= 1
            if not left[0]:
                over.set()
                meeting.abort()

    def grow():
        while not over.is_set():
            with torch.no_grad():
                prefill(s.model, *tokens(7), trace=third)
            try:
                meeting.wait()
            except threading.BrokenBarrierError:
                assert over.is_set()

    got = together(lambda: backward(0), lambda: backward(1), grow)
    assert third.memory() > before
    for i in range(2):
        s.check(i, got[i])


# ---- passes that nest ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [0, 1], ids=["same loss", "another fork"])
@pytest.mark.parametrize("call", [1, 4, 9, 13])
def test_a_pass_inside_a_hook(setting, inner, call):
    s, got = setting, []
    s.hooks.once(lambda: got.append(s.grad(inner)), call)
    outer = s.grad(0)
    assert len(got) == 1
    s.check(inner, got[0])
    s.check(0, outer)


def test_a_pass_inside_a_pass_inside_a_pass(setting):
    s, got = setting, []

    def innermost():
        s.hooks.act = None
        got.append((0, s.grad(0)))

    def inner():
        s.hooks.once(innermost, 6)
        got.append((1, s.grad(1)))

    s.hooks.once(inner)
    got.append((0, s.grad(0)))
    assert [i for i, _ in got] == [0, 1, 0]
    for i, grads in got:
        s.check(i, grads)


def test_passes_on_threads_of_autograd(setting):
    """Beyond 60 passes in each other autograd goes on in threads of its own."""
    s, seen = setting, []

    def nested(depth):
        if not depth:
            s.hooks.act = lambda: seen.append(threading.get_ident())
            return s.grad(0)
        got = []
        with torch.enable_grad():
            y = torch.zeros((), requires_grad=True) * 1
        y.register_hook(lambda g: got.append(nested(depth - 1)))
        y.backward()
        return got[0]

    got = nested(65)
    s.check(0, got)
    assert set(seen) != {threading.get_ident()}


def test_two_threads_with_a_pass_inside_each(setting):
    s, meeting = setting, Meeting()
    started = threading.local()

    def act():
        meeting.wait()
        if not getattr(started, "yes", False):
            started.yes = True
            started.got = s.grad(started.inner)

    def work(i):
        started.inner = 1 - i
        outer = s.grad(i)
        return outer, started.got

    s.hooks.act = act
    got = together(lambda: work(0), lambda: work(1), meeting=meeting)
    for i in range(2):
        s.check(i, got[i][0])
        s.check(1 - i, got[i][1])


# ---- passes that fail, and passes that stop early --------------------------------------------------------------------


def fail():
    raise Stop


@pytest.mark.parametrize("call", [1, 4, 9])
def test_a_right_pass_after_one_that_failed(setting, call):
    s = setting
    s.hooks.once(fail, call)
    with pytest.raises(Stop):
        s.grad(0)
    s.hooks.act = None
    for i in range(2):
        s.check(i, s.grad(i))


def test_a_pass_that_fails_inside_a_hook(setting):
    s = setting

    def inner():
        s.hooks.once(fail, 4)
        with pytest.raises(Stop):
            s.grad(1)
        s.hooks.act = None

    s.hooks.once(inner)
    s.check(0, s.grad(0))
    s.check(1, s.grad(1))


def test_a_pass_that_fails_beside_another(setting):
    """One thread's pass fails in the middle of the other's, and begins again."""
    s, met, failed = setting, Meeting(), Meeting()
    at = threading.local()

    def act():
        at.calls = getattr(at, "calls", 0) + 1
        if at.calls == 4:
            met.wait()  # both are in the middle
            if at.fails:
                raise Stop
            failed.wait()  # the other's pass is over

    def work(fails):
        at.fails = fails
        if not fails:
            return s.grad(0)
        with pytest.raises(Stop):
            s.grad(1)
        failed.wait()
        return s.grad(1)

    s.hooks.act = act
    got = together(lambda: work(False), lambda: work(True), meeting=failed)
    for i in range(2):
        s.check(i, got[i])


@pytest.mark.parametrize("nested", [False, True])
def test_a_pass_for_a_few_inputs(setting, nested):
    """What it leaves out it must not leave behind, nor take from the pass that it stands in."""
    s, got = setting, []
    some = {n: p for n, p in s.named.items() if "layers.1." in n and ("k_proj" in n or "v_proj" in n)}
    assert some
    partial = lambda: got.append(named_grad(s.losses[0], some))
    if nested:
        s.hooks.once(partial)
    else:
        partial()
    s.check(0, s.grad(0))
    assert_close(got[0], {n: s.want[0][n] for n in some})


def test_a_pass_for_a_few_inputs_beside_a_full_one(setting):
    s, meeting = setting, Meeting()
    some = {n: p for n, p in s.named.items() if "layers.1." in n and "k_proj" in n}
    at = threading.local()

    def act():
        at.calls = getattr(at, "calls", 0) + 1
        if at.calls <= 6:
            meeting.wait()

    s.hooks.act = act
    got = together(lambda: named_grad(s.losses[1], some), lambda: s.grad(0), meeting=meeting)
    assert_close(got[0], {n: s.want[1][n] for n in some})
    s.check(0, got[1])


# ---- how long gradients live -----------------------------------------------------------------------------------------


def test_gradient_pools_live_as_long_as_their_pass(setting):
    s, during = setting, []
    count = lambda: during.append(live_pools())
    assert live_pools() == 0
    s.hooks.once(count, 9)
    s.grad(0)
    s.hooks.once(lambda: (count(), setattr(s.hooks, "act", None), s.grad(1), count()))
    s.grad(0)
    assert live_pools() == 0
    s.hooks.once(count, 4)
    torch.autograd.grad(s.losses[0], s.named[next(n for n in s.named if "layers.1." in n)], retain_graph=True)
    assert live_pools() == 0
    # layers whose pool a pass has been to: all; those of the last forward's first hooks, twice; the same
    assert during[0] == 3 and during[1] == during[2] > 0 and during[3] > 0, during


def test_gradient_pools_of_a_pass_that_failed_are_gone_with_its_error(setting):
    s = setting
    for call in (4, 9):
        s.hooks.once(fail, call)
        try:
            s.grad(0)
        except Stop:
            pass
        assert live_pools() == 0
    s.hooks.act = None
    s.losses[0].backward()
    assert live_pools() == 0


def test_gradient_pools_of_two_threads_are_gone(setting):
    s, meeting, during = setting, Meeting(), []
    main = threading.local()

    def act():
        meeting.wait()
        if main.first and len(during) < 9:
            during.append(live_pools())

    def work(i):
        main.first = i == 0
        s.grad(i)

    s.hooks.act = act
    together(lambda: work(0), lambda: work(1), meeting=meeting)
    assert max(during) == 6 and live_pools() == 0  # 3 layers, 2 passes


# ---- two threads in one pass -----------------------------------------------------------------------------------------


def test_two_threads_of_one_pass_ask_at_once():
    """How the second thread of a GPU is covered without a GPU.

    On a GPU, nodes that carry nothing but an order token run on the thread that called backward(), since the token lies on the
    CPU, beside the device's thread; both ask one pool for the gradients of one graph task. `fake_device.py` gives autograd a
    device written in Python, which has such a thread, and lets a node of each kind ask at the same time. It runs in a process
    of its own, since a device stays registered.
    """
    pytest.importorskip("torch.utils.backend_registration")
    if not hasattr(torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this torch takes no device that is written in Python")
    run = subprocess.run([sys.executable, FAKE_DEVICE], capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert run.returncode == 0 and "two threads, one gradient" in run.stdout, run.stdout + run.stderr


def test_two_threads_of_one_task_get_the_same_gradients(monkeypatch):
    """The same with nothing of autograd's but the id of the graph task, as a function's backward sees it: a thread that stands
    in for the second one is told that id."""
    asked = pool.Pool(16, 2, 8, torch.float64, torch.device("cpu"))
    seen, callbacks = [], []

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            task, meeting = torch._C._current_graph_task_id(), Meeting()
            assert task != -1
            with monkeypatch.context() as m:
                m.setattr(torch._C, "_current_graph_task_id", lambda: task)  # a thread that is not autograd's has -1
                engine = types.SimpleNamespace(queue_callback=callbacks.append)
                m.setattr(pool, "Variable", types.SimpleNamespace(_execution_engine=engine))

                def ask():
                    meeting.wait()
                    grads = asked.grads()
                    return grads, grads.of(0), grads.of(1)

                seen.append(together(ask, ask, meeting=meeting))
            return grad

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(50):
            x = torch.zeros(2, requires_grad=True)
            Node.apply(x).sum().backward()
    finally:
        sys.setswitchinterval(interval)
    for (one, *ones), (other, *others) in seen:
        assert one is other
        assert all(a is b for x, y in zip(ones, others) for a, b in zip(x, y)) and ones[0][0] is not ones[1][0]
    assert len({id(one) for (one, *_), _ in seen}) == 50 == len(callbacks)


def test_gradients_are_refused_outside_of_a_pass():
    asked = pool.Pool(16, 2, 8, torch.float64, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="outside of a backward pass"):
        asked.grads()
