"""The gradient of a run of latent steps to the rows before it: added once for the whole run, equal to plain autograd."""

import contextlib
import types
from collections import Counter

import pytest
import torch
from models import assert_close, body, episode, gradients, latent_steps, loss_of, prefill, read, tiny, tokens, unroll
from transformers import DynamicCache

import diffmas
from diffmas.ops import reference
from diffmas.trace import autograd, layer_work, pool


@pytest.fixture
def calls(monkeypatch):
    """(queries, grad_tail, want_dq) of every cross_attention_backward; float64 runs on the reference."""
    seen, run = [], reference.cross_attention_backward

    def spy(do, *args):
        grad_tail, want_dq = (*args[17:], *(None, True)[len(args) - 17 :])  # defaults at the end are left out
        seen.append((do.shape[0], None if grad_tail is None else grad_tail.tolist(), want_dq))
        return run(do, *args)

    monkeypatch.setattr(reference, "cross_attention_backward", spy)
    return seen


def unrolled(model, *episodes):
    """Gradients of the summed losses of the last parts, by recomputing everything at every step."""
    for parts in episodes:
        loss_of(unroll(model, parts)[-len(parts[-1]) :]).backward()
    return gradients(model)


def run_of_steps(model, ids, steps):
    """A trace with a prompt and `steps` latent steps, and the hidden state to go on from."""
    trace = diffmas.Trace(model)
    h = body(model)(input_ids=ids[None], past_key_values=trace).last_hidden_state[:, -1:]
    return trace, latent_steps(model, trace, h, steps)


def test_older_rows_are_added_once_for_all_steps(calls):
    model = tiny("qwen3")  # 3 layers
    first, second = tokens(4, 2), tokens(3, 1, seed=2)
    out, mask, _ = episode(model, first, second, steps=5)
    sum(loss_of(logits[m.bool()]) for logits, m in zip(out.logits, mask)).backward()
    got = gradients(model)
    # In the last layer nobody uses what the last step returns.
    assert [c[1][0] for c in calls if c[0] == 2 and c[1]] == [5] * 2 + [4] * 3 + [3] * 3 + [2] * 3 + [1] * 3
    assert sorted(c for c in calls if not c[2]) == [(8, None, False)] + [(10, None, False)] * 2
    assert_close(got, unrolled(model, *([a, 5, b] for a, b in zip(first, second))))


def test_nodes_of_order_tokens_run_where_their_forward_did(monkeypatch):
    """On a GPU: on that stream; order tokens, all that they give, do not tell autograd. Here streams are names."""
    now, seen = types.SimpleNamespace(stream="main", node=None), []

    @contextlib.contextmanager
    def stream(name):
        before, now.stream = now.stream, name
        yield
        now.stream = before

    def watched(node, backward):
        def run(ctx, *grads):
            now.node = node
            try:
                return backward(ctx, *grads)
            finally:
                now.node = None

        return staticmethod(run)

    grads = pool.Pool.grads
    spy = lambda self: (now.node and seen.append((now.node, now.stream))) or grads(self)
    monkeypatch.setattr(pool.Pool, "grads", spy)
    for module in (autograd, layer_work):
        monkeypatch.setattr(module, "stream_of", lambda x: now.stream)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    for node in (autograd.Begin, autograd.Reposition, autograd.Inherit):
        monkeypatch.setattr(node, "backward", watched(node.__name__, node.backward))
    model = tiny("qwen3")  # 3 layers
    a, b, c, d = tokens(4, 3, 5, 2)
    left, right = prefill(model, a).fork(2)
    prefill(model, b, trace=left)
    prefill(model, c, trace=right)
    with stream("join"):
        joined = diffmas.Trace.join([left.detach(), right], "shift")  # a new lineage
    with stream("move"):
        joined = joined.repack()
    h = body(model)(input_ids=d[None], past_key_values=joined).last_hidden_state[:, -1:]
    with stream("run"):
        latent_steps(model, joined, h, 3)
    loss = loss_of(read(model, joined, d)[0])
    with stream("another"):
        loss.backward()
    assert Counter(seen) == {("Begin", "run"): 3, ("Inherit", "join"): 3, ("Reposition", "move"): 3}


def test_a_long_run_is_flushed_in_parts(calls, monkeypatch):
    monkeypatch.setattr(pool.DeferredKVGrad, "LONGEST", 2)
    model = tiny("qwen3")
    a, b = tokens(4, 2)
    trace, _ = run_of_steps(model, a, 5)
    loss_of(read(model, trace, b)[0]).backward()
    got = gradients(model)
    assert [c[0] for c in calls if not c[2]] == [1] * 2 + [2] * 6
    assert_close(got, unrolled(model, [a, 5, b]))


def test_a_prompt_ends_a_run(calls):
    model = tiny("qwen3")
    a, b, c = tokens(4, 2, 3)
    trace, _ = run_of_steps(model, a, 2)
    h = body(model)(input_ids=b[None], past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, 3)
    loss_of(read(model, trace, c)[0]).backward()
    got = gradients(model)
    assert sorted(c[0] for c in calls if not c[2]) == [1, 2, 2, 2, 3, 3]
    assert_close(got, unrolled(model, [a, 2, b, 3, c]))


def test_a_fork_in_the_middle_of_a_run():
    model = tiny("qwen3")
    a, b = tokens(4, 2)
    trace, h = run_of_steps(model, a, 2)
    left = trace.fork(1)[0]
    h_left = latent_steps(model, left, h, 1)
    latent_steps(model, trace, h, 2)
    latent_steps(model, left, h_left, 2)
    (loss_of(read(model, left, b)[0]) + loss_of(read(model, trace, b)[0])).backward()
    assert_close(gradients(model), unrolled(model, [a, 5, b], [a, 4, b]))


def test_a_run_on_a_view_at_position_offsets():
    """Queries that read moved rows: the same as reading copies that were moved."""
    model = tiny("qwen3")
    a, b, c, d = tokens(4, 3, 5, 2)
    results = []
    for repack in (False, True):
        left, right = prefill(model, a).fork(2)
        prefill(model, b, trace=left)
        prefill(model, c, trace=right)
        joined = diffmas.Trace.join([left, right], "shift")
        joined = joined.repack() if repack else joined
        h = body(model)(input_ids=d[None], past_key_values=joined).last_hidden_state[:, -1:]
        latent_steps(model, joined, h, 4)
        loss_of(read(model, joined, d)[0]).backward()
        results.append(gradients(model))
    assert_close(*results)


def test_a_partial_backward_leaves_no_steps_behind():
    model = tiny("qwen3")
    a, b = tokens(4, 2)
    trace, h = run_of_steps(model, a, 2)
    latent_steps(model, trace, h, 3)
    loss = loss_of(read(model, trace, b)[0])
    torch.autograd.grad(loss, h, retain_graph=True)  # stops in the middle of the run
    assert not any(p._grads for p in trace._store.pools)
    loss.backward()
    assert_close(gradients(model), unrolled(model, [a, 5, b]))


@pytest.mark.parametrize("constant", ["prompt", "first step", "prompt and first step"])
def test_a_run_that_begins_without_gradients(calls, constant):
    model = tiny("qwen3")
    a, b = tokens(4, 2)

    def run(cache):
        with torch.set_grad_enabled("prompt" not in constant):
            h = body(model)(input_ids=a[None], past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        if isinstance(cache, DynamicCache):  # torch.cat without gradients cuts off the prompt as well
            before = [(layer.keys, layer.values) for layer in cache.layers]
        with torch.set_grad_enabled("first step" not in constant):
            h = latent_steps(model, cache, h, 1, use_cache=True)
        if isinstance(cache, DynamicCache):
            for layer, (k, v) in zip(cache.layers, before):
                layer.keys, layer.values = torch.cat((k, layer.keys[:, :, 4:]), 2), torch.cat((v, layer.values[:, :, 4:]), 2)
        latent_steps(model, cache, h, 3, use_cache=True)
        loss_of(model(b[None], past_key_values=cache, use_cache=True).logits).backward()
        return gradients(model)

    got = run(diffmas.Trace(model))
    if constant == "prompt":  # nobody adds to rows that are constants
        assert all(want_dq for _, _, want_dq in calls)
        assert all(grad_tail is not None for n, grad_tail, _ in calls if n == 1)
    assert_close(got, run(DynamicCache()))


def test_constant_rows_before_a_prompt_get_no_gradient(calls):
    model = tiny("qwen3")
    a, b, c = tokens(4, 3, 2)
    trace = prefill(model, a).detach()
    model(b[None], past_key_values=trace)
    model(c[None], past_key_values=trace)
    loss_of(read(model, trace, c)[0]).backward()
    # The last layer's output is used for the tokens of the loss only.
    assert [x[:2] for x in calls] == [(2, None)] * 5 + [(3, [3])] * 2
