"""Latent steps that are not captured."""

import contextlib
import warnings

import pytest
import torch
from models import body
from systems import ANSWERS, QUESTIONS, system
from test_graphed_steps import TWO, assert_equal, episode, gradients, two

from diffmas.agents import learning
from diffmas.agents.gradients import GradientWatch
from diffmas.models import capture
from diffmas.models.patch import patch_of
from diffmas.trace.layer_work import LayerWork


@contextlib.contextmanager
def hooked(s):
    handle = body(s.model).layers[1].mlp.register_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_parameter(s):
    handle = next(p for p in s.parameters() if p.requires_grad).register_hook(lambda g: 2 * g)
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_everywhere(s):
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    yield
    handle.remove()


@contextlib.contextmanager
def checkpointed(s):
    s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if hasattr(s.model.get_base_model(), "_require_grads_hook"):  # a hook that transformers 5 sets with it
        s.model.get_base_model().disable_input_require_grads()
    s.train()
    yield


@contextlib.contextmanager
def dropping(s):
    body(s.model).layers[1].mlp.act_fn = torch.nn.Sequential(torch.nn.SiLU(), torch.nn.Dropout(0.5))
    torch.manual_seed(3)
    s.train()
    yield


@contextlib.contextmanager
def compiled(s):
    layer = body(s.model).layers[1].mlp
    layer.compile(backend="eager")
    yield
    layer._compiled_call_impl = None


OBSERVED = {
    "a hook": hooked,
    "a parameter's hook": hooked_parameter,
    "a hook on all modules": hooked_everywhere,
    "a gradient watch": GradientWatch,
    "saved tensors elsewhere": lambda s: torch.autograd.graph.save_on_cpu(),
    "checkpoints": checkpointed,
    "dropout": dropping,
    "a compiled layer": compiled,
}


@pytest.mark.parametrize("context", OBSERVED.values(), ids=OBSERVED)
def test_what_a_replay_would_not_do(context, repeating):
    """Then steps run one by one, and those that follow are captured again."""
    s, found = system(agents=TWO) if context in (checkpointed, dropping) else two(), []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        with context(s):
            s(QUESTIONS, ANSWERS).loss.backward()
        found.append(gradients(s))
        assert not repeating
    assert_equal(*found)
    if context not in (checkpointed, dropping):
        patch_of(s.model).graphs = True
        s(QUESTIONS, ANSWERS).loss.backward()
        gradients(s)
        assert len(repeating) == 2


def test_a_report_sees_every_step(repeating):
    report = two().gradient_report(QUESTIONS, ANSWERS)
    assert not repeating and sum(p.kind == "latent" for p in report.passes) == 8


def failing(monkeypatch, where, error, times=99):
    """Captures of work `where` fail in the middle of the second layer."""
    attempt, left = capture.attempt, [times]

    def attempted(patch, what, work, spare):
        if what != where or not left[0]:
            return attempt(patch, what, work, spare)
        left[0] -= 1
        name = "attend" if where == learning.WHAT else "attend_backward"
        seen, original = [], getattr(LayerWork, name)

        def stop(*args):
            seen.append(1)
            if len(seen) == 2:
                raise type(error)(*error.args)  # one whose traceback holds no work of a forward pass
            return original(*args)

        setattr(LayerWork, name, stop)
        try:
            return attempt(patch, what, work, spare)
        finally:
            setattr(LayerWork, name, original)

    monkeypatch.setattr(capture, "attempt", attempted)
    monkeypatch.setattr(learning, "attempt", attempted)


@pytest.mark.parametrize("where, graphs", [(learning.WHAT, 0), (learning.BACKWARD, 1)])
def test_a_capture_that_fails(where, graphs, repeating, monkeypatch):
    """One warning; a forward whose backward cannot be captured has the right gradient."""
    s = system(agents=TWO)
    want, _ = episode(s, graphs=False)
    failing(monkeypatch, where, RuntimeError("it waits"))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            got, _ = episode(s)
            assert_equal(got, want)
    caught = [str(w.message) for w in caught if "CUDA graph" in str(w.message)]
    assert len(caught) == 1 and caught[0].startswith(f"{where} run without") and "it waits" in caught[0]
    assert len(repeating) == 2 * graphs and patch_of(s.model).tries[where] == 0


@pytest.mark.parametrize("where", [learning.WHAT, learning.BACKWARD])
def test_memory_that_is_short_once(where, repeating, monkeypatch):
    s = two()
    want, _ = episode(s, graphs=False)
    failing(monkeypatch, where, torch.OutOfMemoryError("full"), 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(2):
            assert_equal(episode(s)[0], want)
    assert len(repeating) == {learning.WHAT: 2, learning.BACKWARD: 4}[where] and patch_of(s.model).tries[where] == 3


@pytest.mark.parametrize("where", [learning.WHAT, learning.BACKWARD])
def test_an_interrupted_capture_leaves_nothing_behind(where, repeating, monkeypatch):
    s = two()
    want, _ = episode(s, graphs=False)
    patch_of(s.model).graphs = True
    failing(monkeypatch, where, KeyboardInterrupt(), 1)
    with pytest.raises(KeyboardInterrupt):
        s(QUESTIONS, ANSWERS).loss.backward()
    gradients(s)
    assert_equal(episode(s)[0], want)
