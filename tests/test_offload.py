"""Rows on the host: the same values as on the device, few of them brought, and those of the next layer before it asks.

On a CPU the device is a copy. So what is shown is what goes where and when; no stream of a GPU has run.
"""

import weakref

import pytest
import tiny_systems as tiny
import torch
from models import assert_close, episode, gradients, loss_of, prefill, read, tokens
from models import tiny as tiny_model

import diffmas
from diffmas import Trace
from diffmas.trace.offload import Home, OffloadedPool, runs_of, span_of
from diffmas.trace.views import KVRange

QUESTIONS = ["where is the key", "where is the lamp question", "where is the book"]
ANSWERS = ["in the garden", "the attic", "in the kitchen"]
LAYERS = 4


def team(offload=None, **options):
    base = diffmas.patch_model(tiny.model(num_hidden_layers=LAYERS), offload=offload)
    return tiny.system(base=base, **options)


def learned(system, **options):
    output = system(QUESTIONS, ANSWERS, **options)
    output.loss.backward()
    return output, {name: p.grad.clone() for name, p in system.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "options",
    [
        {"latent_steps": 0},
        {"latent_steps": 4},
        {"latent_steps": 4, "trace_content": "latent_only", "positions": "reindex", "sinks": 1},
        {"latent_steps": 3, "grad_scope": "last_k", "last_k": 2},
        {"latent_steps": 3, "adapter_scope": "per_role", "latent_grad_clip": 0.2},
    ],
    ids=lambda o: " ".join(f"{k}={v}" for k, v in o.items()),
)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_are_the_same_bits(options, checkpointing):
    plain, away = team(**options), team("cpu", **options)
    for system in (plain, away) if checkpointing else ():
        system.model.gradient_checkpointing_enable({"use_reentrant": False})
        system.train()
    (first, want), (second, got) = learned(plain), learned(away)
    assert all(isinstance(p, OffloadedPool) for p in second.trace._store.pools)
    assert torch.equal(first.loss, second.loss) and want.keys() == got.keys() and any(g.any() for g in want.values())
    for name in want:
        assert torch.equal(want[name], got[name]), name
    assert second.trace.memory() == LAYERS * second.trace._store.pools[0].rows * 2 * 8 * 4
    for one, other in zip(first.trace.keys_values(1, 2), second.trace.keys_values(1, 2)):
        assert torch.equal(one, other)


@pytest.mark.parametrize("samples", [1, 4])
def test_answers_are_the_same(samples):
    options = dict(max_new_tokens=6, temperature=0.8, seed=3, samples=samples)
    assert team().generate(QUESTIONS, **options) == team("cpu").generate(QUESTIONS, **options)


def branches(model, trace):
    """Two agents apart, one of which a reader of both cannot teach; their join, its copy in one piece, and what reads it."""
    left, right = trace.fork(2)
    episode(model, tokens(5, 3, seed=1), tokens(2, 4, seed=4), trace=left)
    prefill(model, *tokens(4, 6, seed=2), trace=right)
    joined = Trace.join([left, right.detach()], positions="shift")
    return torch.cat(read(model, joined.repack(), *tokens(3, 2, seed=3)))


@pytest.mark.parametrize("family", ["qwen3", "cohere"])
def test_joins_detached_branches_and_copies(family):
    found = []
    for where in (None, "cpu"):
        model = tiny_model(family)
        loss_of(branches(model, Trace(model, 2, offload=where))).backward()
        found.append(gradients(model))
    assert found[0].keys() == found[1].keys()
    for name, want in found[0].items():
        assert torch.equal(want, found[1][name]), name


def test_growing_loading_and_one_that_is_adopted(tmp_path):
    model = tiny_model("qwen3", torch.float32)
    with torch.no_grad():
        plain, away = Trace(model, 2), Trace(model, 2, offload="cpu")
        for n in range(6):
            for trace in (plain, away):
                prefill(model, *tokens(7, 40, seed=n), trace=trace)
        away.save(tmp_path / "rows")
        loaded = Trace.load(tmp_path / "rows", model, offload="cpu")
        assert isinstance(loaded._store.pools[0], OffloadedPool) and not isinstance(plain._store.pools[0], OffloadedPool)
        outside = Trace.join([plain, loaded.detach()])
        want, *got = (torch.cat(read(model, trace, *tokens(2, 2))) for trace in (plain, away, loaded))
        assert torch.equal(want, got[0])
        assert_close(got[1], want)  # its segments are cut elsewhere
        for one, other in zip(outside.keys_values(0, 1), away.keys_values(0, 1)):
            assert torch.equal(one[240:], other)


def test_two_layers_at_most_are_on_the_device_and_the_next_is_on_its_way(monkeypatch):
    """Of rows, what is alive beside each kernel; of journeys, that only the first layer of a pass has to wait."""
    system, alive, most, brought, bring = team("cpu", latent_steps=3), [], [0], [], Home.bring

    def counted(home, span, rows):
        pair = bring(home, span, rows)
        alive.extend(map(weakref.ref, pair))
        brought.append((span[1] - span[0]) * pair[0][0].numel() * 2 * pair[0].element_size())
        most[0] = max(most[0], sum(x.numel() * x.element_size() for x in (ref() for ref in alive) if x is not None))
        return pair

    monkeypatch.setattr(Home, "bring", counted)
    loss = system(QUESTIONS, ANSWERS)
    store, passes = loss.trace._store, 3 + 2 * 3
    courier, layer = store._courier, store.top * 2 * 8 * 4  # K and V of a layer; its gradient is as much again
    # The first pass makes the pools, so nobody could send for them.
    assert courier.waited == passes + LAYERS - 1 and 0 < most[0] <= 2 * layer
    courier.waited, most[0], brought[:] = 0, 0, []
    loss.loss.backward()
    # K, V, dK and dV wait in the top layer of each pass; those of a run's older rows once more, as its flush.
    flushes = 2
    assert 0 < courier.waited <= 2 * (passes + flushes) and 0 < most[0] <= 4 * layer
    whole = LAYERS * (passes + flushes) * layer
    assert sum(brought) < 1.5 * whole, "a latent step's backward brings the gradient of its run's rows alone"


def test_nothing_is_captured_and_what_is_refused():
    system = team("cpu")
    trace = system(QUESTIONS, ANSWERS).trace
    assert not trace.plan([1, 1, 1], "text", reserve=8).repeatable(1)
    with pytest.raises(ValueError, match="offload: expected None or 'cpu', got 'disk'"):
        Trace(system.model, 1, offload="disk")
    with pytest.raises(ValueError, match="offload: expected None or 'cpu', got 'cuda'"):
        diffmas.patch_model(system.model, offload="cuda")
    diffmas.patch_model(system.model)
    assert not isinstance(system(QUESTIONS, ANSWERS).trace._store.pools[0], OffloadedPool)


def test_spans_and_runs():
    views = [[KVRange(4, 3, 0), KVRange(20, 2, 5)], [KVRange(9, 1, 0)], []]
    assert span_of(views) == (4, 22) and span_of(views, [2, 30]) == (2, 31)
    assert span_of(views, newest=[3, 0, 0]) == (6, 22) and span_of(views, newest=[0, 1, 4]) == (9, 10)
    assert span_of([], ()) == (0, 0)
    rows = torch.tensor([3, 4, 5, 9, 7, 8]).numpy()
    assert runs_of(rows) == [(3, 6), (9, 10), (7, 9)] and runs_of(rows[:0]) == []
