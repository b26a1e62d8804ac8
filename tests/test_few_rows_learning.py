"""The layers of a latent step with gradients as one node of autograd: the numbers of their parts one by one, to the bit."""

import weakref

import pytest
import torch
from linear_systems import (
    ANSWERS,
    QUESTIONS,
    Other,
    T,
    assert_close,
    base,
    doubled,
    gradients,
    hooked,
    learning_at_once,
    lora,
    system,
    unfused,
)

from diffmas import patch_model
from diffmas.models import few_rows
from diffmas.ops import extension
from diffmas.training.collecting import no_collections

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")
LAYERS, STEPS = 3, T + T - 1
FAMILIES = ["llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"]


def calls(made):
    """Of how many layers the nodes of a training step were, and its gradients."""
    with learning_at_once() as layers:
        found = gradients(made)
    return layers, found


def one_by_one(made, monkeypatch):
    with monkeypatch.context() as m:
        m.setattr(few_rows, "learning_layers", lambda *_: None)
        none, found = calls(made)
    assert none == []
    return found


ALL = [LAYERS] * STEPS


def alone(layers):
    """What is counted where these go alone, since another one is its own."""
    return [1] * layers * STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "v_proj"]}, {"target_modules": ["down_proj"]}], ids=str)
def test_to_the_bit(options, dtype, monkeypatch):
    made = system(lora(base("llama", dtype=dtype), **options))
    layers, got = calls(made)
    assert layers == ALL
    want = one_by_one(made, monkeypatch)
    assert got.keys() == want.keys() and len(want) > 2
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_gradients(family):
    made = system(lora(base(family)))
    layers, got = calls(made)
    if family == "ministral3":  # scales the queries of later steps
        assert layers and layers == ALL[: len(layers)]
    else:
        assert layers == ALL
    assert_close(got, gradients(unfused(made)), 1e-4)


def test_no_more_is_kept_than_one_by_one(monkeypatch):
    def kept(model):
        made, seen = system(model), {}
        weights = {p.untyped_storage().data_ptr() for p in made.parameters()}

        def pack(x):
            if x.untyped_storage().data_ptr() not in weights:
                seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes(), x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            loss = made(QUESTIONS, ANSWERS).loss
        return sum(size for size, _ in seen.values()), loss

    for targets in ("all-linear", ["q_proj"]):
        model = lora(base(dtype=torch.bfloat16), target_modules=targets)
        ours, _ = kept(model)
        with monkeypatch.context() as m:
            m.setattr(few_rows, "learning_layers", lambda *_: None)
            assert ours <= kept(model)[0]


def seen_in_backward(module):
    module.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0], *dx[1:]))


NAMES = ["input_layernorm", "post_attention_layernorm", "mlp", "mlp.act_fn", "mlp.gate_proj", "self_attn.o_proj"]


@pytest.mark.parametrize("change", [doubled, hooked, seen_in_backward])
@pytest.mark.parametrize("name", NAMES)
def test_what_somebody_else_does_to_a_part(name, change, monkeypatch):
    made = system(lora(base(), target_modules=["q_proj"]))
    layer = made.model.base_model.model.model.layers[1]
    change(layer.get_submodule(name))
    layers, got = calls(made)
    assert layers == alone(LAYERS - 1)
    want = one_by_one(made, monkeypatch)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_backward_hook_on_attention():
    made = system(lora(base()))
    seen = []
    made.model.base_model.model.model.layers[0].self_attn.register_full_backward_hook(lambda *_: seen.append(1))
    assert calls(made)[0] == alone(LAYERS - 1) and seen


def trained_norms(made):
    for name, p in made.model.named_parameters():
        p.requires_grad_("lora" in name or "post_attention_layernorm" in name)


def trained_weights(made):
    for name, p in made.model.named_parameters():
        p.requires_grad_("lora" in name or "up_proj" in name)


def checkpointed(made):
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


@pytest.mark.parametrize("change", [trained_norms, trained_weights, checkpointed])
def test_what_the_layers_do_themselves(change):
    made = system(lora(base()))
    change(made)
    layers, got = calls(made)
    assert layers == []
    assert_close(got, gradients(unfused(made)), 1e-4)


def test_passes_that_a_report_tells_apart_are_the_layers_own():
    made = system(lora(base()))
    with learning_at_once() as layers:
        assert made.gradient_report(QUESTIONS, ANSWERS).norm > 0
    assert not layers


def test_twice_through_one_graph():
    made = system(lora(base()))
    want = gradients(made)

    def twice(loss):
        loss.backward(retain_graph=True)
        made.zero_grad(set_to_none=True)
        loss.backward()

    got = gradients(made, twice)
    assert all(torch.equal(got[name], want[name]) for name in want)


def test_weights_that_change_before_backward():
    made = system(lora(base()))
    loss = made(QUESTIONS, ANSWERS).loss
    with torch.no_grad():
        next(p for name, p in made.named_parameters() if "down_proj.lora_A" in name).add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_second_order_is_refused():
    made = system(lora(base()))
    weights = [p for p in made.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate"):
        sum(g.sum() for g in torch.autograd.grad(made(QUESTIONS, ANSWERS).loss, weights, create_graph=True)).backward()


def test_another_layer_in_its_place():
    made = system(lora(base()))
    body = made.model.base_model.model.model
    patch_model(made.model)
    assert calls(made)[0] == ALL
    body.layers[1].mlp = Other(body.layers[1].mlp)
    assert calls(made)[0] == alone(LAYERS - 1)


def test_nothing_of_the_graph_stays(monkeypatch):
    """When its backward is over and it is dropped, also without the cycle collector."""
    made, seen, learning_layers = system(lora(base())), [], few_rows.learning_layers

    def watched(*args):
        y = learning_layers(*args)
        seen.extend([weakref.ref(y)] if y is not None else [])
        return y

    monkeypatch.setattr(few_rows, "learning_layers", watched)
    with no_collections():
        gradients(made)
        assert seen and not any(ref() is not None for ref in seen)
