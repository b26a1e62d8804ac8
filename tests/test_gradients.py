"""Gradients through a trace against plain autograd, and the memory that they take."""

import pytest
import tiny_systems
import torch
from models import (
    SOME,
    assert_close,
    body,
    embed,
    episode,
    error,
    gradients,
    latent_steps,
    loss_of,
    monolithic,
    pad,
    prefill,
    tiny,
    tokens,
    whole,
)  # fmt: skip
from torch.autograd.graph import saved_tensors_hooks
from transformers import DynamicCache

import diffmas
from diffmas.models.patch import patch_of

T = 3


@pytest.fixture
def setting():
    """A model, rows of two prompts, and the gradients of the episode by plain autograd."""
    model = tiny("qwen3")
    first, second = tokens(4, 2), tokens(3, 1, seed=2)
    sum(loss_of(w) for w in monolithic(model, first, second)).backward()
    return model, first, second, gradients(model)


def total_loss(out, mask):
    return sum(loss_of(logits[m.bool()]) for logits, m in zip(out.logits, mask))


def test_a_layer_that_records_later_than_a_checkpointed_pass():
    """Only an MLP has a gradient, so the first layer's first passes record nothing; its latent steps do. Recomputing the first
    passes is not taken for re-entrant checkpointing."""
    results = []
    for checkpointing in (False, True):
        model = tiny("qwen3")
        for name, p in model.named_parameters():
            p.requires_grad_("layers.0.mlp" in name)
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train()
            if hasattr(model, "_require_grads_hook"):  # what transformers 5 enables with it would hide the case
                model.disable_input_require_grads()
        a, b, c = tokens(5, 4, 3)
        trace = prefill(model, a)
        h = body(model)(input_ids=b[None], past_key_values=trace).last_hidden_state[:, -1:]
        latent_steps(model, trace, h, 2)
        loss_of(model(input_ids=c[None], past_key_values=trace).logits[0]).backward()
        results.append(gradients(model))
    assert_close(*results)


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
    model(a[None], past_key_values=trace)  # reaches the loss through the trace alone
    with getattr(torch, mode)():
        model(b[None], past_key_values=trace)
    loss_of(model(c[None], past_key_values=trace).logits).backward()
    got = gradients(model)

    cache = DynamicCache()
    model(a[None], past_key_values=cache, use_cache=True)
    before = [layer.keys.shape[2] for layer in cache.layers]
    model(b[None], past_key_values=cache, use_cache=True)
    for layer, n in zip(cache.layers, before):
        layer.keys = torch.cat((layer.keys[:, :, :n], layer.keys[:, :, n:].detach()), 2)
        layer.values = torch.cat((layer.values[:, :, :n], layer.values[:, :, n:].detach()), 2)
    loss_of(model(c[None], past_key_values=cache, use_cache=True).logits).backward()
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


def test_reentrant_checkpointing_by_hand_is_refused():
    """What no flag of the model tells: its first run writes the rows without a gradient."""
    model = tiny("qwen3").train()
    layer = body(model).layers[1]
    forward = layer.forward
    layer.forward = lambda x, **kwargs: torch.utils.checkpoint.checkpoint(lambda x: forward(x, **kwargs), x, use_reentrant=True)
    loss = loss_of(model(tokens(3)[0][None], past_key_values=diffmas.Trace(model)).logits)
    with pytest.raises(RuntimeError, match="layer 1 is recomputed.*re-entrant"):
        loss.backward()


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


def test_an_anchor_gives_a_gradient_of_zeros_to_what_nobody_used():
    """Of a planner without latent steps nobody reads the last hidden state, and so what the last layer makes of its rows."""
    found = {}
    for anchored in (False, True):
        system = tiny_systems.system(0, adapter_scope="per_role")
        patch_of(system.model).spec.anchored = anchored
        system(["where is the key"], ["in the garden"]).loss.backward()
        found[anchored] = {name: p.grad for name, p in system.named_parameters() if p.requires_grad}
    unused = {name for name, grad in found[False].items() if grad is None}
    assert unused and all("layers.1." in name and ".solver." not in name for name in unused)
    for name, grad in found[True].items():
        want = torch.zeros_like(grad) if name in unused else found[False][name]
        assert torch.equal(grad, want), name
