"""A trace against whole contexts that are recomputed without any cache: outputs, gradients, memory, failures."""

import pytest
import torch
from models import (
    SOME, assert_close, body, embed, error, gradients, last_hidden, latent_steps, pad, tiny, tokens, unroll, whole,
)  # fmt: skip
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

import diffmas

T = 3


def episode(model, first, second, side="left", trace=None):
    """A prompt, T latent steps, a second prompt. first, second: lists of rows of ids -> output of the second prompt."""
    trace = diffmas.Trace(model, batch_size=len(first)) if trace is None else trace
    ids, mask = pad(first, "left")
    h = body(model)(input_ids=ids, attention_mask=mask, past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, T)
    ids, mask = pad(second, side)
    return model(input_ids=ids, attention_mask=mask, past_key_values=trace, output_hidden_states=True), mask, trace


def loss_of(logits):
    """A loss in which every logit counts differently."""
    weights = torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)
    return (logits.log_softmax(-1) * weights).sum()


def monolithic(model, first, second):
    """The same episode, one sequence at a time and without a cache -> logits of each second prompt."""
    return [unroll(model, [a, T, b])[len(a) + T :] for a, b in zip(first, second)]


# ---- outputs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
def test_handoff_equals_one_context(family):
    model = tiny(family)
    ids = tokens(13)[0]
    trace = diffmas.Trace(model, capacity=4)  # and grows
    cuts = [0, 5, 6, 12, 13]
    outs = [model(input_ids=ids[None, a:b], past_key_values=trace).logits[0] for a, b in zip(cuts, cuts[1:])]
    assert_close(torch.cat(outs), whole(model, ids).logits[0])
    assert trace.lengths == [13]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("family", SOME)
def test_ragged_batch_equals_single_runs(family, side):
    model = tiny(family)
    first, second = tokens(7, 1, 4), tokens(2, 5, 1, seed=2)
    out, mask, trace = episode(model, first, second, side)
    assert trace.lengths == [7 + T + 2, 1 + T + 5, 4 + T + 1]
    want = monolithic(model, first, second)
    for b in range(3):
        assert_close(out.logits[b][mask[b].bool()], want[b])
    sum(loss_of(out.logits[b][mask[b].bool()]) for b in range(3)).backward()
    got = gradients(model)
    sum(loss_of(w) for w in want).backward()
    assert_close(got, gradients(model))


def test_hidden_states_of_a_ragged_batch():
    model = tiny("qwen3")
    first, second = tokens(3, 6), tokens(4, 2, seed=2)
    trace = diffmas.Trace(model, batch_size=2)
    model(*pad(first), past_key_values=trace)
    ids, mask = pad(second, "right")
    out = model(ids, mask, past_key_values=trace, output_hidden_states=True)
    assert out.past_key_values is trace and len(out.hidden_states) == 4
    for b in range(2):
        want = whole(model, torch.cat((first[b], second[b])))
        for got, expected in zip(out.hidden_states, want.hidden_states):
            assert_close(got[b][mask[b].bool()], expected[0, len(first[b]) :])
            assert not got[b][~mask[b].bool()].any()


def test_rows_without_new_tokens():
    model = tiny("llama")
    first, second, third = tokens(3, 0, 2), tokens(0, 4, 0, seed=2), tokens(1, 1, 1, seed=3)
    trace = diffmas.Trace(model, batch_size=3)
    for rows in (first, second):
        model(*pad(rows), past_key_values=trace)
    assert trace.lengths == [3, 4, 2]
    logits = model(*pad(third), past_key_values=trace).logits
    for b in range(3):
        assert_close(logits[b], whole(model, torch.cat((first[b], second[b], third[b]))).logits[0, -1:])


@pytest.mark.parametrize(
    "options", [dict(use_cache=False), dict(use_cache=True), dict(logits_to_keep=1), dict(return_dict=False)], ids=str
)
def test_forward_options(options):
    model = tiny("qwen3")
    ids = tokens(9)[0]
    trace = diffmas.Trace(model)
    model(ids[None, :5], past_key_values=trace, **options)
    out = model(ids[None, 5:], past_key_values=trace, **options)
    logits = out.logits if options.get("return_dict", True) else out[0]
    want = whole(model, ids).logits[:, 5:]
    assert_close(logits, want[:, -1:] if "logits_to_keep" in options else want)


def test_labels_give_the_loss_of_the_new_tokens():
    model = tiny("llama")
    first, second = tokens(3, 6), tokens(5, 2, seed=2)
    trace = diffmas.Trace(model, batch_size=2)
    model(*pad(first), past_key_values=trace)
    ids, mask = pad(second, "right")
    loss = model(ids, mask, labels=ids.masked_fill(mask == 0, -100), past_key_values=trace).loss
    logits = [whole(model, torch.cat(rows)).logits[0, -len(rows[1]) :] for rows in zip(first, second)]
    want = sum(torch.nn.functional.cross_entropy(x[:-1], y[1:], reduction="sum") for x, y in zip(logits, second))
    assert_close(loss, want / sum(len(y) - 1 for y in second))


def test_explicit_positions():
    model = tiny("qwen3")
    ids, positions = tokens(8)[0], [0, 1, 2, 9, 10, 30, 31, 40]
    trace = diffmas.Trace(model)
    model(ids[None, :5], position_ids=torch.tensor(positions[:5])[None], past_key_values=trace)
    assert trace.next_positions == [11] and trace.positions(0).tolist() == positions[:5]
    logits = model(ids[None, 5:], position_ids=torch.tensor(positions[5:])[None], past_key_values=trace).logits
    assert_close(logits, whole(model, ids, positions).logits[:, 5:])


def test_the_body_takes_positional_arguments():
    model = tiny("llama")
    rows = tokens(2, 5)
    ids, mask = pad(rows)
    trace = diffmas.Trace(model, batch_size=2)
    hidden = body(model)(ids, mask, None, trace).last_hidden_state
    assert trace.lengths == [2, 5]
    assert_close(hidden[0, -1], last_hidden(model, embed(model, rows[0]))[-1])


def test_segments_record_agent_kind_and_positions():
    model = tiny("qwen3")
    trace = diffmas.Trace(model, batch_size=2)
    trace.agent = "planner"
    trace.reserve(2)
    h = body(model)(*pad(tokens(3, 1)), past_key_values=trace).last_hidden_state[:, -1:]
    latent_steps(model, trace, h, 2)
    rows = [(s.sequence, s.agent, s.kind, s.length, s.position) for s in trace.segments]
    assert rows == [
        (0, "planner", "prompt", 3, 0), (0, "planner", "latent", 2, 3),
        (1, "planner", "prompt", 1, 0), (1, "planner", "latent", 2, 1),
    ]  # fmt: skip


# ---- gradients -------------------------------------------------------------------------------------------------------


@pytest.fixture
def setting():
    """A model, rows of two prompts, and the gradients of the episode by plain autograd."""
    model = tiny("qwen3")
    first, second = tokens(4, 2), tokens(3, 1, seed=2)
    sum(loss_of(w) for w in monolithic(model, first, second)).backward()
    return model, first, second, gradients(model)


def total_loss(out, mask):
    return sum(loss_of(logits[m.bool()]) for logits, m in zip(out.logits, mask))


def test_gradients_equal_those_through_a_dynamic_cache():
    model = tiny("mistral")
    ids = tokens(9)[0]
    for cache in (diffmas.Trace(model), DynamicCache()):
        h = body(model)(input_ids=ids[None, :5], past_key_values=cache, use_cache=True).last_hidden_state[:, -1:]
        latent_steps(model, cache, h, T, use_cache=True)
        loss_of(model(input_ids=ids[None, 5:], past_key_values=cache, use_cache=True).logits).backward()
        if isinstance(cache, diffmas.Trace):
            got = gradients(model)
    assert_close(got, gradients(model))


def test_second_backward_equals_the_first(setting):
    model, first, second, want = setting
    out, mask, _ = episode(model, first, second)
    loss = total_loss(out, mask)
    for _ in range(2):
        loss.backward(retain_graph=True)
        assert_close(gradients(model), want)


def test_partial_backward_leaves_nothing_behind(setting):
    model, first, second, want = setting
    out, mask, _ = episode(model, first, second)
    loss = total_loss(out, mask)
    name, weight = next((n, p) for n, p in model.named_parameters() if "layers.1." in n and "k_proj" in n)
    (got,) = torch.autograd.grad(loss, weight, retain_graph=True)
    assert_close(got, want[name])
    loss.backward()
    assert_close(gradients(model), want)


def test_backward_that_fails_leaves_nothing_behind(setting):
    model, first, second, want = setting
    fail = []
    embedding = model.get_input_embeddings()
    handle = embedding.register_forward_hook(
        lambda m, i, o: o.register_hook(lambda g: (_ for _ in ()).throw(KeyError("stop")) if fail else None) and None
    )
    out, mask, _ = episode(model, first, second)
    handle.remove()
    loss = total_loss(out, mask)
    fail.append(True)
    with pytest.raises(KeyError):
        loss.backward(retain_graph=True)
    fail.clear()
    gradients(model)
    loss.backward()
    assert_close(gradients(model), want)


def test_losses_of_two_passes_over_one_trace(setting):
    """Two answers read one prefix; each backward alone gives its own part of the gradient."""
    model, first, second, _ = setting
    trace = diffmas.Trace(model, batch_size=2)
    model(*pad(first), past_key_values=trace)
    a, b = trace.fork(2)
    ids, mask = pad(second)
    losses = [total_loss(model(x, mask, past_key_values=t), mask) for x, t in ((ids, a), (ids.flip(0) * mask, b))]
    losses[0].backward(retain_graph=True)
    one = gradients(model)
    losses[1].backward(retain_graph=True)
    two = gradients(model)
    sum(losses).backward()
    assert_close(gradients(model), {n: one[n] + two[n] for n in one})


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_part_without_gradient(mode):
    """Rows written without gradients are constants; what was written before and after them learns."""
    model = tiny("qwen3")
    a, b, c = tokens(4, 3, 2)
    trace = diffmas.Trace(model)
    loss = loss_of(model(a[None], past_key_values=trace).logits)
    with getattr(torch, mode)():
        model(b[None], past_key_values=trace)
    loss = loss + loss_of(model(c[None], past_key_values=trace).logits)
    loss.backward()
    got = gradients(model)

    cache = DynamicCache()
    loss = loss_of(model(a[None], past_key_values=cache, use_cache=True).logits)
    before = [layer.keys.shape[2] for layer in cache.layers]
    model(b[None], past_key_values=cache, use_cache=True)
    for layer, n in zip(cache.layers, before):
        layer.keys = torch.cat((layer.keys[:, :, :n], layer.keys[:, :, n:].detach()), 2)
        layer.values = torch.cat((layer.values[:, :, :n], layer.values[:, :, n:].detach()), 2)
    loss = loss + loss_of(model(c[None], past_key_values=cache, use_cache=True).logits)
    loss.backward()
    assert_close(got, gradients(model))


@pytest.mark.parametrize("mode", ["no_grad", "inference_mode"])
def test_a_trace_made_without_gradients_is_a_constant(mode):
    model = tiny("llama")
    a, b = tokens(4, 3)
    with getattr(torch, mode)():
        trace = diffmas.Trace(model)
        model(a[None], past_key_values=trace)
    loss_of(model(b[None], past_key_values=trace).logits).backward()
    got = gradients(model)
    cache = DynamicCache()
    with torch.no_grad():
        model(a[None], past_key_values=cache, use_cache=True)
    loss_of(model(b[None], past_key_values=cache, use_cache=True).logits).backward()
    assert_close(got, gradients(model))


def test_only_one_projection_learns(setting):
    """Layers whose K and V have no gradient must not disturb the order of the others."""
    model, first, second, want = setting
    learning = {n for n, _ in model.named_parameters() if "layers.1." in n and ("q_proj" in n or "v_proj" in n)}
    for name, p in model.named_parameters():
        p.requires_grad_(name in learning)
    out, mask, _ = episode(model, first, second)
    total_loss(out, mask).backward()
    assert_close(gradients(model), {n: want[n] for n in learning})


def test_double_backward_is_refused(setting):
    model, first, second, _ = setting
    out, mask, _ = episode(model, first, second)
    weight = model.get_input_embeddings().weight
    (g,) = torch.autograd.grad(total_loss(out, mask), weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


def test_the_pool_grows_in_mid_graph(setting):
    model, first, second, want = setting
    out, mask, trace = episode(model, first, second, trace=diffmas.Trace(model, 2, capacity=1))
    assert trace._store.pools[0].rows > 2
    total_loss(out, mask).backward()
    assert_close(gradients(model), want)


@pytest.mark.parametrize("family", SOME)
def test_checkpointing_gives_equal_gradients(family):
    model = tiny(family)
    first, second = tokens(4, 2), tokens(3, 1, seed=2)
    model.train()
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        out, mask, _ = episode(model, first, second)
        total_loss(out, mask).backward()
        results.append((out.logits, gradients(model)))
    assert_close(results[1][0], results[0][0], 1e-12)
    assert_close(results[1][1], results[0][1], 1e-12)


def test_checkpointing_with_a_fork_and_growth_after_it():
    """Recomputation reads the plan of its own call, while the pool has grown and holds other branches."""
    model = tiny("qwen3").train()
    a, b, c = tokens(4, 3, 2)
    results = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        trace = diffmas.Trace(model, capacity=1)
        model(a[None], past_key_values=trace)
        left, right = trace.fork(2)
        loss = sum(loss_of(model(x[None], past_key_values=t).logits) for x, t in ((b, left), (c, right)))
        joined = diffmas.Trace.join([left, right], positions="shift").repack()
        (loss + loss_of(model(c[None], past_key_values=joined).logits)).backward()
        results.append(gradients(model))
    assert_close(results[1], results[0], 1e-12)


def test_reentrant_checkpointing_is_refused():
    model = tiny("qwen3").train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    trace = diffmas.Trace(model)
    with pytest.raises(RuntimeError, match="re-entrant"):
        model(tokens(3)[0][None], past_key_values=trace)
    model.eval()(tokens(3)[0][None], past_key_values=trace)  # nothing is recomputed then
    assert trace.lengths == [3]


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_around_the_model_is_refused(reentrant):
    model = tiny("qwen3")
    trace = diffmas.Trace(model)
    x = embed(model, tokens(3)[0])[None]
    run = lambda x: model(inputs_embeds=x, past_key_values=trace).logits  # noqa: E731
    out = torch.utils.checkpoint.checkpoint(run, x, use_reentrant=reentrant)
    with pytest.raises(RuntimeError, match="checkpoint"):
        out.sum().backward()


@pytest.mark.parametrize("family", SOME)
def test_autocast(family):
    """bfloat16 through a trace is as far from float32 as bfloat16 through a DynamicCache."""
    model = tiny(family, torch.float32)
    a, b = tokens(6, 4)
    with torch.no_grad():
        exact = whole(model, torch.cat((a, b))).logits[0, 6:]
    gaps, grads = [], []
    for cache in (diffmas.Trace(model), DynamicCache()):
        with torch.autocast("cpu", torch.bfloat16):
            model(a[None], past_key_values=cache, use_cache=True)
            logits = model(b[None], past_key_values=cache, use_cache=True).logits[0]
        gaps.append(error(logits.detach().float(), exact))
        loss_of(logits.float()).backward()
        grads.append(torch.cat([g.flatten() for g in gradients(model).values()]))
    assert gaps[0] < 2 * gaps[1]
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.98


# ---- memory ----------------------------------------------------------------------------------------------------------


def saved_bytes(run) -> int:
    """Bytes that autograd keeps for the backward of `run`, each storage once."""
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = (x.untyped_storage().nbytes(), x)
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(n for n, _ in storages.values())


def test_a_latent_step_saves_only_what_it_wrote():
    model = tiny("qwen3", torch.float32)
    for p in model.parameters():
        p.requires_grad_(False)  # weights would be counted as saved at every step

    def growth(make_cache, past):
        cache = make_cache()
        with torch.no_grad():
            model(tokens(past)[0][None], past_key_values=cache, use_cache=True)
        h = torch.ones(1, 1, 32, requires_grad=True)
        return saved_bytes(lambda: latent_steps(model, cache, h, 8, use_cache=True))

    short, long = (growth(lambda: diffmas.Trace(model), n) for n in (16, 256))
    row = 3 * 2 * 2 * 8 * 4  # layers x (K and V) x heads x head_dim x bytes
    assert long - short < 8 * row, "a step saves K and V of the past"
    plain_short, plain_long = (growth(DynamicCache, n) for n in (16, 256))
    assert plain_long - plain_short >= 8 * 240 * row, "the measurement does not see the copies that it should see"


def test_gradient_pools_are_dropped_after_backward(setting):
    model, first, second, _ = setting
    out, mask, trace = episode(model, first, second)
    total_loss(out, mask).backward()
    assert all(not p._grads for p in trace._store.pools)


# ---- failures --------------------------------------------------------------------------------------------------------

THREE = torch.ones(1, 3, dtype=torch.long)


def test_a_failing_forward_leaves_the_trace_usable():
    model = tiny("qwen3")
    a, b = tokens(4, 3)
    trace = diffmas.Trace(model)
    model(a[None], past_key_values=trace)
    layer = body(model).layers[1]
    handle = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(KeyError("stop")))
    with pytest.raises(KeyError):
        model(b[None], past_key_values=trace)
    handle.remove()
    assert trace.lengths == [4] and trace.next_positions == [4]
    logits = model(b[None], past_key_values=trace).logits
    assert_close(logits, whole(model, torch.cat((a, b))).logits[:, 4:])
    loss_of(logits).backward()
    got = gradients(model)
    loss_of(whole(model, torch.cat((a, b))).logits[:, 4:]).backward()
    assert_close(got, gradients(model))


def test_a_layer_that_does_not_write_is_noticed():
    model = tiny("llama")
    layer = body(model).layers[1]
    layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)
    with pytest.raises(RuntimeError, match=r"layers \[1\] did not write"):
        model(tokens(3)[0][None], past_key_values=diffmas.Trace(model))


@pytest.mark.parametrize(
    "call, message",
    [
        (dict(input_ids=torch.ones(2, 3, dtype=torch.long)), "batch of 1"),
        (dict(input_ids=torch.ones(1, 0, dtype=torch.long)), "at least one token"),
        (dict(input_ids=THREE, attention_mask=torch.ones(1, 2)), "attention_mask"),
        (dict(input_ids=THREE, attention_mask=torch.zeros(1, 3)), "at least one token"),
        (dict(input_ids=THREE, attention_mask=torch.ones(1, 1, 3, 3)), "attention_mask"),
        (dict(input_ids=THREE, position_ids=torch.tensor([[-1, 0, 1]])), "position_ids"),
        (dict(input_ids=THREE, position_ids=torch.tensor([[0, 1]])), "position_ids"),
        (dict(input_ids=THREE, output_attentions=True), "output_attentions"),
    ],
)
def test_bad_calls_are_refused_by_name(call, message):
    model = tiny("qwen3")
    trace = diffmas.Trace(model)
    with pytest.raises(ValueError, match=message):
        model(**call, past_key_values=trace)
    assert trace.lengths == [0]


@pytest.mark.parametrize("options", [dict(batch_size=0), dict(capacity=0)], ids=str)
def test_bad_traces_are_refused(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        diffmas.Trace(tiny("qwen3"), **options)


def test_another_dtype_is_refused():
    model = tiny("qwen3")
    trace = diffmas.Trace(model)
    model(tokens(3)[0][None], past_key_values=trace)
    with pytest.raises(ValueError, match="float64.*float32"):
        model.float()(tokens(3)[0][None], past_key_values=trace)
    model.double()(tokens(3)[0][None], past_key_values=trace)
    assert trace.lengths == [6]
