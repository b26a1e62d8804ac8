"""What attention's programs work on is found once for all layers of a forward pass, and anew when its tables have moved."""

import numpy as np
import pytest
import torch

from diffmas import ops
from diffmas.ops import reference
from diffmas.trace import attention_work
from diffmas.trace.attention_work import AttentionWork
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Store
from diffmas.trace.tables import Tables
from diffmas.trace.views import KVRange

interpreted = pytest.mark.skipif(
    ops.available()["triton"] is not None or torch.cuda.is_available(), reason="runs in Triton's interpreter"
)
FLOAT = torch.float64
SHORT = [KVRange(5 * i, 3, 0) for i in range(9)]  # 27 rows in short segments, the last of which ends at row 43


def rand(*shape):
    return torch.randn(shape, dtype=FLOAT)


@interpreted
def test_once_for_all_layers(monkeypatch):
    """One search for the forward and one for the backward of three layers; their results are the reference's."""
    from diffmas.kernels import backend

    asked, find = [], backend.attention_work
    monkeypatch.setattr(backend, "attention_work", lambda kernel, *args: asked.append(kernel) or find(kernel, *args))
    layers = [LayerSpec(i, "half") for i in range(3)]
    data = [[rand(4, 2, 8), rand(4, 1, 8), rand(4, 1, 8)] for _ in layers]
    views, slots = [[*SHORT, KVRange(50, 4, 0)]], np.arange(50, 54)

    def run(name):
        store = Store(len(layers))
        store.allocate(64)
        spec = ModelSpec(layers, name, inv_freq=lambda device: torch.ones(4, dtype=FLOAT))
        forward_pass = ForwardPass(spec, store, [4], np.arange(27, 31), slots, views, torch.zeros(0))
        torch.manual_seed(0)
        leaves, total = [], 0.0
        for layer, tensors in zip(layers, data):
            q, k, v = (x.clone().requires_grad_() for x in tensors)
            for x in store.pool(layer.index, k.detach(), v.detach()).kv:
                x[:50] = rand(50, 1, 8)
            leaves += [q, k, v]
            total = total + forward_pass.attend(layer, q, k, v, 0.3).pow(2).sum()
        return total, *torch.autograd.grad(total, leaves)

    want, got = run("reference"), run("triton")
    assert asked == ["fwd", "dq"]
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b)


@interpreted
@pytest.mark.parametrize("views", [[SHORT], [[KVRange(3, 37, 0)]]], ids=["short", "long"])
def test_anew_when_the_tables_have_moved(views):
    from diffmas.kernels import backend

    end = views[0][-1].start + views[0][-1].length
    tables = Tables(torch.device("cpu"), [1], np.array([end - 1]), np.array([30]), [1], views, None)
    view, q, pools = tables.as_written["all"], rand(1, 2, 8), [rand(64, 1, 8) for _ in "kv"]

    def check(layer):
        found = tables.work.of("fwd", layer, 1, "all", q, view, True, k_pool=pools[0], scale=0.3, backend="triton")
        assert "work" in found
        o, _ = backend.cross_attention(q, *pools, *view, 0.3, True, False, **found)
        torch.testing.assert_close(o, reference.cross_attention(q, *pools, *view, 0.3, True, False)[0])

    check(0)
    tables.can_move(False, 4)
    for _ in range(4):
        tables.move(1)
        check(0)
        check(1)


def test_a_way_through_the_layers(monkeypatch):
    """Of tables that may move: down in the forward, up in the backward; both begin anew with the first layer of a way."""
    asked = []
    find = lambda kernel, q, *args: asked.append((kernel, args[-1])) or torch.zeros(0)
    monkeypatch.setattr(attention_work, "implementation", lambda op, lead, backend: find)
    work, q, pool = AttentionWork({"all": 7}), rand(1, 2, 8), rand(64, 1, 8)
    more = dict(k_pool=pool, scale=0.3, backend="auto")
    go = lambda kernel, *layers: [work.of(kernel, i, 1, "all", q, 6 * (None,), True, **more) for i in layers]
    go("fwd", 0, 1, 2, 0, 1, 2)
    go("dq", 2, 1, 0, 2, 1, 0)
    assert asked == [("fwd", 7), ("dq", 7)]
    asked.clear()
    work.can_move(3)
    go("fwd", 0, 1, 2, 0, 2)
    go("dq", 2, 1, 0, 2, 0)
    go("fwd", 0)
    assert asked == 2 * [("fwd", 10)] + 2 * [("dq", 10)] + [("fwd", 10)]


def test_only_for_backends_that_have_it():
    work, more = AttentionWork({"all": 7}), dict(k_pool=rand(64, 1, 8), scale=0.3, backend="auto")
    for q in (rand(1, 2, 8), torch.nn.Parameter(rand(1, 2, 8))):
        assert work.of("fwd", 0, 1, "all", q, 6 * (None,), True, **more) == {}
