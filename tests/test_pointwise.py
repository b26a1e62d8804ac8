"""Norms and gates of a patched model as one op each: the layer's own numbers and gradients, and less that is kept."""

import pytest
import torch
from linear_systems import Other, assert_close, base, counted, doubled, gradients, hooked, lora, system
from models import make_config
from systems import ANSWERS, QUESTIONS
from transformers import AutoModelForCausalLM

from diffmas import Trace, patch_model, unpatch_model
from diffmas.models import pointwise
from diffmas.models.patch import patch_of
from diffmas.ops import extension

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")
FAMILIES = ["llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"]
LAYERS = 3


def calls(made):
    """How many norms and gates a training step runs as ours, and its gradients."""
    with counted(pointwise.Norm, "apply") as norms, counted(pointwise.Gate, "apply") as gates:
        found = gradients(made)
    return len(norms), len(gates), found


def switched_off(monkeypatch):
    monkeypatch.setattr(pointwise, "_kernels", lambda x: None)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_gradients(family, monkeypatch):
    made = system(lora(base(family)))
    norms, gates, got = calls(made)
    assert norms == 2 * gates and gates % LAYERS == 0 and gates > 2 * LAYERS
    switched_off(monkeypatch)
    none, _, want = calls(made)
    assert none == 0
    assert_close(got, want, 1e-4)  # latent steps amplify the rounding of 3 layers, most with norms of q and k


def test_bfloat16_rounds_where_the_layer_does(monkeypatch):
    """A layer's output and gradient are its own nearly bit for bit."""
    model = lora(base(dtype=torch.bfloat16))
    patch_model(model)
    body = patch_of(model).body

    def found():
        x = torch.randn(1, 60, 64, generator=torch.Generator().manual_seed(3)).bfloat16().requires_grad_()
        y = body(inputs_embeds=x, past_key_values=Trace(model, batch_size=1)).last_hidden_state
        return y.detach(), *torch.autograd.grad(y.float().pow(2).sum(), x)

    got = found()
    switched_off(monkeypatch)
    for ours, own in zip(got, found()):
        assert (ours == own).double().mean() > 0.5  # of three layers' numbers; a rounding more or less leaves few
        assert (ours - own).float().norm() < 0.01 * own.float().norm()


def test_only_inputs_are_kept(monkeypatch):
    """Bytes that autograd keeps of a forward over 64 rows."""

    def kept():
        model = lora(base(dtype=torch.bfloat16))
        patch_model(model)
        x = torch.randn(1, 64, 64).bfloat16().requires_grad_()
        storages = {}
        keep = lambda t: storages.setdefault(t.untyped_storage().data_ptr(), t) is None or t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            patch_of(model).body(inputs_embeds=x, past_key_values=Trace(model, batch_size=1))
        return sum(t.untyped_storage().nbytes() for t in storages.values())

    ours = kept()
    switched_off(monkeypatch)
    # A norm keeps its input as it is, not as float32, and no 1 / rms; a gate no silu(gate).
    assert kept() - ours == LAYERS * 64 * (2 * (64 * (4 - 2) + 4) + 96 * 2)


def test_norms_that_are_trained_are_torchs_own():
    model = lora(base())
    for name, p in model.named_parameters():
        p.requires_grad_("lora" in name or "input_layernorm" in name)
    norms, gates, found = calls(system(model))
    assert norms == gates > 0
    assert sum("input_layernorm" in name for name in found) == LAYERS


def test_second_derivatives_are_refused():
    made = system()
    loss = made(QUESTIONS, ANSWERS).loss
    weight = next(p for p in made.parameters() if p.requires_grad)
    (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiate"):
        grad.sum().backward()


def in_place(module):
    module.register_forward_hook(lambda module, args, y: y.mul_(2))


def seen_in_backward(module):
    module.register_full_backward_hook(lambda module, dx, dy: (2 * dx[0],))


@pytest.mark.parametrize("name", ["input_layernorm", "post_attention_layernorm", "mlp", "mlp.act_fn", "mlp.gate_proj"])
@pytest.mark.parametrize("change", [doubled, hooked, in_place, seen_in_backward, Other])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_what_somebody_else_does_to_a_part(name, change, first, monkeypatch):
    """It is done, whether the model is patched before or after."""

    def found():
        model = AutoModelForCausalLM.from_config(make_config("llama", hidden_size=64, intermediate_size=96, head_dim=16))
        torch.manual_seed(0)
        for p in model.parameters():
            p.data = 0.3 * torch.randn(p.shape)
        model.requires_grad_(False)
        if not first:
            patch_model(model)
        layer = model.model.layers[1]
        if change is Other:
            parent, _, last = name.rpartition(".")
            setattr(layer.get_submodule(parent), last, Other(layer.get_submodule(name)))
        else:
            change(layer.get_submodule(name))
        patch_model(model)
        x = torch.ones(1, 40, 64, requires_grad=True)
        y = patch_of(model).body(inputs_embeds=x, past_key_values=Trace(model, batch_size=1)).last_hidden_state
        return {"y": y.detach(), "dx": torch.autograd.grad(y.pow(2).sum(), x)[0]}

    got = found()
    switched_off(monkeypatch)
    assert_close(got, found())


def test_unpatched():
    model = base()
    patch_model(model)
    layer = model.model.layers[0]
    assert "forward" in layer.mlp.__dict__ and "forward" in layer.input_layernorm.__dict__
    patch_model(model, fuse=False)
    assert "forward" not in layer.mlp.__dict__ and "forward" not in layer.input_layernorm.__dict__
    patch_model(model)
    unpatch_model(model)
    assert not any("forward" in m.__dict__ for m in model.modules())
