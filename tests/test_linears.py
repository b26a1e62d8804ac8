"""Linears and their LoRA adapters as one op: the numbers of PEFT's own, whatever is adapted."""

import copy

import pytest
import torch
from linear_systems import (
    LINEARS,
    T,
    assert_close,
    base,
    calm,
    counted,
    gradients,
    learning_at_once,
    lora,
    system,
    unfused,
    with_and_without,
    with_b,
)  # fmt: skip
from models import make_config
from systems import ANSWERS, QUESTIONS
from torch import nn
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM

from diffmas import Trace, patch_model, unpatch_model
from diffmas.agents.adapters import switched_off, switched_to
from diffmas.models import linears
from diffmas.models.patch import patch_of
from diffmas.ops import extension

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")

# ---- what is fused, and what is PEFT's own ---------------------------------------------------------------------------


def two_active(model):
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    return with_b(model)


def merged(model):
    model.merge_adapter()
    return model


def hooked(model):
    for module in model.modules():
        if type(module) is nn.Linear:
            module.register_forward_hook(lambda *_: None)
    return model


KINDS = {
    "lora": (True, {}, None),
    "rank 5, scaled by rsLoRA": (True, {"r": 5, "use_rslora": True}, None),
    "dropout in training": (False, {"lora_dropout": 0.2}, None),
    "dora": (False, {"use_dora": True}, None),
    "a bias of the adapter": (False, {"lora_bias": True}, None),
    "two at once": (False, {}, two_active),
    "merged": (False, {}, merged),
    "hooked": (False, {}, hooked),
    "another length": (False, {}, None),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_the_gradients_of_pefts_own(kind):
    fused, options, change = KINDS[kind]
    model = base()
    if kind == "another length":
        config = make_config("qwen2", hidden_size=24, intermediate_size=40, num_attention_heads=3, num_key_value_heads=3)
        model = calm(AutoModelForCausalLM.from_config(config))
    model = lora(model, **options)
    if change:
        model = change(model)
    if kind == "merged":  # nothing of it trains
        made = system(model)
        made.model.requires_grad_(False)
        made.model.get_input_embeddings().weight.requires_grad_(True)
    else:
        made = system(model)
    assert bool(with_and_without(made)) == fused


def test_dropout_is_none_in_evaluation():
    made = system(lora(base(), lora_dropout=0.2)).eval()
    assert with_and_without(made)


@pytest.mark.parametrize("scope", ["shared", "per_role", "final_only"])
def test_every_scope(scope):
    made = system(lora(base(), scope), adapter_scope=scope)
    passes = 2 + T + T - 1 + 1
    assert with_and_without(made) == passes * LINEARS


def test_bfloat16_is_as_near_as_pefts_own():
    made = system(lora(base(dtype=torch.bfloat16), b=0.02))
    x = made.model.get_input_embeddings().weight[3:40].detach()[None]

    def run(fuse, model):
        patch_model(model, fuse=fuse)
        given = x.to(model.dtype).clone().requires_grad_()
        with counted(linears, "run") as calls:
            h = model.base_model.model.model(inputs_embeds=given, past_key_values=Trace(model, 1)).last_hidden_state
        assert bool(calls) == fuse
        h.backward(torch.ones_like(h))
        grads = {n: p.grad.double() for n, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        return {"h": h.detach().double(), "x": given.grad.double()} | grads

    exact = run(False, copy.deepcopy(unpatch_model(made.model)).float())
    error = lambda got: sum(float((got[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact)
    assert error(run(True, made.model)) <= 1.1 * error(run(False, made.model))


def test_a_trained_base_is_its_own():
    made = system(base())
    assert not with_and_without(made)


def test_plain_linears_without_an_adapter_and_without_gradients(monkeypatch):
    monkeypatch.setattr(linears, "few_rows", lambda *_: None)
    made = system(base())
    with torch.no_grad(), counted(linears, "run") as calls:
        fused = made(QUESTIONS, ANSWERS).loss
        assert len(calls) == (2 + T + T - 1 + 1) * LINEARS + 1  # and the head
        assert torch.allclose(fused, unfused(made)(QUESTIONS, ANSWERS).loss, rtol=1e-5)
        assert len(calls) == (2 + T + T - 1 + 1) * LINEARS + 1


def test_soft_tokens_read_the_embeddings_once():
    made = system(realign="soft_token", temperature=0.5)
    want = gradients(unfused(made))
    patch_model(made.model)
    with counted(linears.Product, "apply") as calls:
        assert_close(gradients(made), want)
    assert len(calls) == 2 * (T + T - 1)


def test_switched_adapters(monkeypatch):
    monkeypatch.setattr(linears, "few_rows", lambda *_: None)
    made = system(lora(base(), "per_role"), adapter_scope="per_role")
    ids = torch.tensor([[3, 4, 5]])
    run = lambda: made.model(input_ids=ids, past_key_values=Trace(made.model, 1)).logits
    with torch.no_grad():
        for switch in (lambda: switched_off(made.model), lambda: switched_to(made.model, "critic")):
            with switch():
                patch_model(made.model)
                with counted(linears, "run") as calls:
                    fused = run()
                assert len(calls) == LINEARS
                patch_model(made.model, fuse=False)
                assert torch.allclose(fused, run(), rtol=1e-4, atol=1e-5)


def test_a_forward_without_a_trace_is_the_models_own():
    model, ids = lora(base()), torch.tensor([[3, 4, 5]])
    want = model(input_ids=ids).logits
    assert torch.equal(patch_model(model)(input_ids=ids).logits, want)


def test_unpatch_takes_everything_out_and_fuse_false_too():
    model = patch_model(lora(base()))
    own = lambda: [m for m in model.modules() if "forward" in vars(m)]
    fused = 1 + 3 + 3 + 3 * 3 + LINEARS + 1  # the body, attention, layers, their two norms and MLP, linears, the head
    assert len(own()) == fused
    patch_model(model, fuse=False)
    assert len(own()) == 3 and not patch_of(model).spec.fused
    patch_model(model)
    assert len(own()) == fused
    unpatch_model(model)
    assert not own()


def test_adapters_added_later_are_fused_when_it_is_patched_again():
    model = lora(patch_model(base()))
    made = system(model)
    assert with_and_without(made)


def test_somebody_elses_forward_stays():
    model = base()
    linear = model.model.layers[0].mlp.up_proj
    linear.forward = lambda x: 0 * nn.Linear.forward(linear, x)
    theirs = linear.forward
    patch_model(model)
    assert linear.forward is theirs
    unpatch_model(model)
    assert linear.forward is theirs


# ---- what others do with the layers ----------------------------------------------------------------------------------


def test_the_gradient_of_a_sum():
    """Of a layer's hidden states, whose strides are 0."""
    made, found = system(), []
    for fuse in (False, True):
        patch_model(made.model, fuse=fuse)
        trace, h = Trace(made.model, batch_size=1), []
        hook = patch_of(made.model).body.layers[-1].register_forward_hook(lambda *args, h=h: h.append(args[-1]))
        made.model(input_ids=torch.tensor([[5, 6, 7, 8, 9]]), past_key_values=trace)
        hook.remove()
        (h[0][0] if isinstance(h[0], tuple) else h[0]).sum().backward()
        found.append({n: p.grad for n, p in made.named_parameters() if p.grad is not None})
        made.zero_grad(set_to_none=True)
    assert_close(found[1], found[0])


@pytest.mark.parametrize("adapted", [[], ["q_proj", "v_proj"], "all-linear"], ids=["none", "two", "all"])
def test_no_more_is_kept_for_backward(adapted):
    """Than without: the input of a linear only where an adapter is trained."""
    model = lora(base(), target_modules=adapted) if adapted else base()
    if not adapted:
        model.requires_grad_(False)
        model.get_input_embeddings().weight.requires_grad_()
    kept = []
    for fuse in (False, True):
        patch_model(model, fuse=fuse)
        seen, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(x, seen=seen, weights=weights):
            if x.untyped_storage().data_ptr() not in weights:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = model(input_ids=torch.arange(5, 35)[None], past_key_values=Trace(model, batch_size=1))
        kept.append(sum(size for size, _ in seen.values()))
        del out
    assert kept[1] <= kept[0], kept


def parametrized(linear):
    nn.utils.parametrize.register_parametrization(linear, "weight", nn.Identity())


def pruned(linear):
    prune.l1_unstructured(linear, "weight", 0.2)


@pytest.mark.parametrize("change", [parametrized, pruned, nn.utils.weight_norm], ids=["parametrized", "pruned", "weight norm"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weights_that_somebody_else_makes(change):
    model = patch_model(base().requires_grad_(False)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    change(model.model.layers[0].mlp.up_proj)
    with counted(linears, "run") as calls, learning_at_once() as layers:
        got = model(input_ids=ids, past_key_values=Trace(model, batch_size=1)).logits
    want = patch_model(model, fuse=False)(input_ids=ids, past_key_values=Trace(model, batch_size=1)).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(calls) + 7 * sum(layers) == LINEARS - 1


def test_another_scale_within_a_run():
    """Each step's gradients have its own."""
    made, found = system(), []
    layers = [m for m in made.model.modules() if type(m).__name__ == "Linear" and hasattr(m, "scaling")]
    realign = made.realign.forward

    def scaled(h, *args, **options):
        for layer in layers:
            layer.scaling["default"] *= 1.25
        return realign(h, *args, **options)

    for fuse in (False, True):
        patch_model(made.model, fuse=fuse)
        for layer in layers:
            layer.scaling["default"] = 1.0
        made.realign.forward = scaled
        found.append(gradients(made))
        del made.realign.forward
    assert_close(found[1], found[0], 1e-4)
