"""Backward passes through latent steps that are captured."""

import gc
import weakref

import pytest
import torch
from models import body, loss_of, tiny, tokens, with_lora
from systems import ANSWERS, QUESTIONS, system
from test_graphed_steps import TWO, assert_equal, episode, gradients, steps, two
from threads import together

from diffmas import Trace, patch_model
from diffmas.agents import learning
from diffmas.models import capture
from diffmas.models.patch import patch_of


def test_several_backward_passes(repeating):
    """Each has its own gradient pools, and a graph of its own; what was let go of is not differentiated again."""
    s = two()
    want, _ = episode(s, graphs=False)
    want = {n: x for n, x in want.items() if n in dict(s.named_parameters())}
    patch_of(s.model).graphs = True
    loss = s(QUESTIONS, ANSWERS).loss
    for again in (True, True, False):
        loss.backward(retain_graph=again)
        assert_equal(gradients(s), want)
    assert len(repeating) == 1 + 3
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_part_of_the_graph(repeating):
    s, found = two(), []
    parameter = next(p for n, p in s.named_parameters() if "layers.1" in n and "lora_A" in n)
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        loss = s(QUESTIONS, ANSWERS).loss
        found.append({"part": torch.autograd.grad(loss, parameter, retain_graph=True)[0]})
        loss.backward()
        found.append(gradients(s))
    assert_equal(found[0], found[2])
    assert_equal(found[1], found[3])


def test_hidden_states_that_are_read(repeating):
    """A loss on the last hidden states: the last step has a gradient of its own."""
    found = []
    for graphs in (True, False):
        model = with_lora(tiny("qwen3"))
        patch_of(model).graphs = graphs
        trace = Trace(model, batch_size=2)
        start = body(model)(input_ids=torch.stack(tokens(4, 4)), past_key_values=trace).last_hidden_state
        h = steps(model, trace, start, 7)
        (of_start,) = torch.autograd.grad(loss_of(h), [start], retain_graph=True)
        loss_of(h).backward()
        found.append({"h": h.detach(), "start": of_start, **gradients(model)})
    assert_equal(*found)
    assert [g.replays for g in repeating] == [3 * 6, 5, 5]


def test_two_threads_go_backward_over_one_episode(repeating):
    s = two()
    patch_of(s.model).graphs = False
    want = gradients_of(s(QUESTIONS, ANSWERS).loss, s)
    patch_of(s.model).graphs = True
    loss = s(QUESTIONS, ANSWERS).loss
    for got in together(*[lambda: gradients_of(loss, s)] * 2):
        assert all(map(torch.equal, got, want))
    assert len(repeating) == 3


def gradients_of(loss, s):
    return torch.autograd.grad(loss, [p for p in s.parameters() if p.requires_grad], retain_graph=True)


def test_two_threads_train_one_model(repeating):
    s = two()
    patch_of(s.model).graphs = False
    want = [gradients_of(s(q, a).loss, s) for q, a in zip((QUESTIONS, QUESTIONS[:1]), (ANSWERS, ANSWERS[:1]))]
    patch_of(s.model).graphs = True
    jobs = [lambda n=n: gradients_of(s(QUESTIONS[:n], ANSWERS[:n]).loss, s) for n in (3, 1)]
    for got, wanted in zip(together(*jobs), want):
        assert all(map(torch.equal, got, wanted))
    assert len(repeating) == 4


def test_twice_is_refused(repeating):
    s = two()
    patch_of(s.model).graphs = True
    grads = torch.autograd.grad(s(QUESTIONS, ANSWERS).loss, [p for p in s.parameters() if p.requires_grad], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(g.sum() for g in grads).backward()
    assert repeating


def test_weights_that_have_changed(repeating):
    """Also those that are not trained: their steps would not be what they were."""
    s = system(agents=TWO)
    for name in ("lora_A", "mlp.up_proj"):
        loss = s(QUESTIONS, ANSWERS).loss
        with torch.no_grad():
            next(p for n, p in s.named_parameters() if name in n and "layers.1" in n).mul_(1.01)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
    assert len(repeating) == 2


def test_weights_that_no_backward_needs_have_changed(repeating):
    """Steps one by one do not notice a bias, which autograd does not save; a replay computes with it."""
    s = system("qwen2", agents=TWO, realign="norm")
    loss = s(QUESTIONS, ANSWERS).loss
    with torch.no_grad():
        next(p for n, p in s.named_parameters() if n.endswith("v_proj.base_layer.bias") or n.endswith("v_proj.bias")).add_(0.3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_training_is_captured_where_it_was_asked_for(repeating):
    s = system(agents=TWO)
    patch_model(s.model, training_graphs=False)
    s(QUESTIONS, ANSWERS).loss.backward()
    assert not repeating
    with torch.no_grad():
        s(QUESTIONS, ANSWERS)
    assert repeating


@pytest.mark.parametrize("current", ["captures", "mine"])
def test_a_backward_on_the_stream_of_captures_waits_for_the_current_one(current, monkeypatch):
    waited = []

    class Stream(str):
        def wait_stream(self, other):
            waited.append((self, other))

    monkeypatch.setattr(capture, "_capture_stream", lambda device: Stream("captures"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(current))
    with capture.on_capture_stream(torch.device("cuda", 0)):
        assert waited == ([] if current == "captures" else [("captures", "mine")])


def test_pools_that_grow_before_backward(repeating):
    """The graph writes where the rows were."""
    s, found = two(), []
    for graphs in (True, False):
        patch_of(s.model).graphs = graphs
        trace = s.communicate(s.fields_of(QUESTIONS))
        before = trace.memory()
        out = s(QUESTIONS, [" ".join(["w20"] * 90)] * 3, trace=trace)
        assert trace.memory() > before
        out.loss.backward()
        found.append({"logits": out.logits.detach(), **gradients(s)})
    assert_equal(*found)


def test_what_a_run_leaves(monkeypatch, repeating):
    """Nothing, once its backward has run or its graph is dropped, and without the garbage collector's help."""
    runs, take = [], learning.LearningSteps.take
    monkeypatch.setattr(learning.LearningSteps, "take", lambda run, *args: runs.append(weakref.ref(run)) or take(run, *args))
    s = two()
    patch_of(s.model).graphs = True
    gc.collect()
    gc.disable()
    try:
        out = s(QUESTIONS, ANSWERS)
        out.loss.backward()
        rows = out.trace.rows
        assert len(runs) == 1 and runs[0]() is None
        out = s(QUESTIONS, ANSWERS)
        assert runs[1]() and out.trace.rows == rows
        del out
        assert not any(run() for run in runs)
    finally:
        gc.enable()


def test_a_run_keeps_its_hidden_states_alone(repeating):
    model = with_lora(tiny("qwen3"))
    trace = Trace(model, batch_size=2)
    h = body(model)(input_ids=torch.stack(tokens(4, 4)), past_key_values=trace).last_hidden_state
    node, saved = steps(model, trace, h, 8).grad_fn.next_functions[0][0], []  # that of the selection is not of the run
    while "Step" in node.name():
        saved.append([tuple(x.shape) for x in node.saved_tensors])
        node = node.next_functions[0][0]
    assert saved == [[(2, 32), (0,)]] * 7
