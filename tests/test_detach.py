"""Traces that are detached."""

import pytest
import torch
from models import assert_close, gradients, loss_of, masked, prefill, read, tiny, tokens
from transformers import DynamicCache

import diffmas


def test_detach_stops_gradients_upstream_only():
    model = tiny("qwen3")
    a, b, c = tokens(4, 3, 2)
    trace = diffmas.Trace(model)
    x = model.get_input_embeddings()(a).detach().requires_grad_()
    y = model.get_input_embeddings()(b).detach().requires_grad_()
    model(inputs_embeds=x[None], past_key_values=trace)
    cut = trace.detach()
    model(inputs_embeds=y[None], past_key_values=cut)
    loss_of(read(model, cut, c)[0]).backward()
    got = gradients(model)
    assert x.grad is None

    want_y = y.grad
    y.grad = None
    frozen = diffmas.Trace(model)
    with torch.no_grad():
        model(a[None], past_key_values=frozen)
    model(inputs_embeds=y[None], past_key_values=frozen)
    loss_of(read(model, frozen, c)[0]).backward()
    assert_close(want_y, y.grad)
    assert_close(got, gradients(model))


def frozen_branch(model, ids):
    """Gradients of the loss of `ids[-1]` over a context whose rows are constants."""
    trace = diffmas.Trace(model)
    with torch.no_grad():
        model(torch.cat(ids[:-1])[None], past_key_values=trace)
    loss_of(read(model, trace, ids[-1])[0]).backward()
    return gradients(model)


def test_a_detached_and_a_plain_reader_in_one_backward():
    """What the detached reader adds to a row's gradient must not reach the row's writer by way of the other reader."""
    model = tiny("qwen3")
    a, b, c = tokens(4, 3, 2)
    frozen = frozen_branch(model, [a, b])
    trace = prefill(model, a)
    loss_of(read(model, trace, c)[0]).backward()
    plain = gradients(model)
    trace = prefill(model, a)
    (loss_of(read(model, trace.detach(), b)[0]) + loss_of(read(model, trace, c)[0])).backward()
    assert_close(gradients(model), {n: frozen[n] + plain[n] for n in plain})


@pytest.mark.parametrize("order", [1, -1])
def test_join_of_a_detached_and_a_learning_branch(order):
    model = tiny("qwen3")
    a, b, c, d = tokens(4, 3, 5, 2)
    trace = prefill(model, a)
    left, right = trace.fork(2)
    prefill(model, b, trace=left)
    prefill(model, c, trace=right)
    joined = diffmas.Trace.join([left.detach(), right][::order], "keep")
    # Another reader keeps the detached branch's writers in the graph.
    (loss_of(read(model, joined, d)[0]) + loss_of(read(model, left, d)[0])).backward()
    got = gradients(model)

    trace = prefill(model, a)
    loss_of(masked(model, (a, b, d), list(range(9)), [])[7:]).backward()
    alone = gradients(model)
    past = DynamicCache()
    with torch.no_grad():
        model(torch.cat((a, b))[None], past_key_values=past, use_cache=True)
    rows = [(layer.keys[:, :, 4:], layer.values[:, :, 4:]) for layer in past.layers]
    past = DynamicCache()
    model(torch.cat((a, c))[None], past_key_values=past, use_cache=True)
    for layer, (k, v) in zip(past.layers, rows):
        layer.keys, layer.values = torch.cat((layer.keys, k), 2), torch.cat((layer.values, v), 2)
    mask = torch.ones(1, 14, dtype=torch.long)
    out = model(d[None], attention_mask=mask, position_ids=torch.tensor([[9, 10]]), past_key_values=past, use_cache=True)
    loss_of(out.logits[0]).backward()
    joint = gradients(model)
    assert_close(got, {n: alone[n] + joint[n] for n in joint})


def test_joins_of_joins_count_a_gradient_once():
    """A view that sees what the plain trace sees, however it was put together, gives the plain trace's gradient."""
    model = tiny("qwen3")
    a, b = tokens(4, 2)
    join = lambda *traces: diffmas.Trace.join(list(traces), "keep")  # noqa: E731
    half = lambda t: join(t.detach(), t)  # noqa: E731
    got = []
    for view in (
        lambda t: t, half, lambda t: join(t.detach(), half(t)), lambda t: join(half(t), t), lambda t: join(half(t), half(t))
    ):  # fmt: skip
        loss_of(read(model, view(prefill(model, a)), b)[0]).backward()
        got.append(gradients(model))
        assert_close(got[-1], got[0])
