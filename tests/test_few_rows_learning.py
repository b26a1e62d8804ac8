"""The layers of a latent step with gradients as one node of autograd: the numbers of their parts one by one, to the bit."""

import gc
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
from models import gradients as parameter_gradients
from models import latent_steps, prefill, read, tokens
from peft import LoraConfig
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from diffmas import Trace, patch_model
from diffmas.models import few_rows
from diffmas.ops import extension
from diffmas.trace import views
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


def at_offsets(model, trace):
    left, right = trace.fork(2)
    prefill(model, *tokens(4, 4, seed=1), trace=left)
    prefill(model, *tokens(2, 6, seed=2), trace=right)
    return Trace.join([left, right], positions="shift")


CONTEXTS = {
    "of one sequence": lambda _, trace: trace.select([1]),
    "that branches share": lambda _, trace: trace.select([0, 0, 1]),
    "at offsets": at_offsets,
    "quantised": lambda _, trace: trace.detach().quantize("int8"),
    "quantised and shared": lambda model, trace: at_offsets(model, trace.detach().quantize("fp8")).select([0, 0, 1, 1]),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", CONTEXTS)
def test_rows(rows, dtype, monkeypatch):
    """Steps that read rows of any kind: hidden states and gradients are those of layers one by one."""
    monkeypatch.setattr(views, "SAVED_ROWS", 1)
    model = patch_model(lora(base("qwen3", dtype)))

    def learned():
        trace = CONTEXTS[rows](model, prefill(model, *tokens(9, 14)))
        x = torch.randn(trace.batch_size, 1, 64, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        with learning_at_once() as layers:
            h = latent_steps(model, trace, x, 3)
        sum(y.float().pow(2).sum() for y in read(model, trace, *tokens(*[3] * trace.batch_size, seed=5))).backward()
        return layers, {"x": x.grad, "h": h.detach()} | parameter_gradients(model)

    layers, got = learned()
    assert layers == [LAYERS] * 3
    monkeypatch.setattr(few_rows, "learning_layers", lambda *_: None)
    none, want = learned()
    assert none == [] and got.keys() == want.keys() and len(want) > 40
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


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
@pytest.mark.parametrize("looked_at", [False, True])
def test_what_somebody_else_does_to_a_part(looked_at, name, change, monkeypatch):
    """Before the layers were looked at, and after."""
    made = system(lora(base(), target_modules=["q_proj"]))
    layer = made.model.base_model.model.model.layers[1]
    if looked_at:
        assert calls(made)[0] == ALL
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


def wrapped(made):
    """Checkpointed by torch: the wrapper's layers, which go one by one, are asked again in backward."""
    layers = made.model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)


def test_layers_that_are_recomputed():
    made = system(lora(base()))
    want = gradients(made)
    wrapped(made)
    layers, got = calls(made)
    assert layers and set(layers) == {1} and len(layers) % LAYERS == 0
    assert_close({name.replace("_checkpoint_wrapped_module.", ""): x for name, x in got.items()}, want, 1e-6)


def test_a_backward_under_autocast():
    """Of one row in float32 torch's product is the gradient's, which autocast would make a shorter one."""
    model = patch_model(base("llama").requires_grad_(False))

    def gradient(autocast: bool):
        trace, x = (
            prefill(model, *tokens(9)),
            torch.randn(1, 1, 64, generator=torch.Generator().manual_seed(0)).requires_grad_(),
        )
        with learning_at_once() as layers:
            loss = latent_steps(model, trace, x, 3).float().square().sum()
        assert layers == [LAYERS] * 3
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss.backward()
        return x.grad

    assert torch.equal(gradient(True), gradient(False))


def test_a_deleted_adapter_is_nobodys():
    made, few = system(lora(base())), lambda trace: latent_steps(model, trace, torch.randn(1, 1, 64), 2)
    model = made.model
    with torch.no_grad():
        few(prefill(model, *tokens(9)))
    gradients(made)
    (name,), weights = model.peft_config, [weakref.ref(p) for n, p in model.named_parameters() if "lora" in n]
    model.add_adapter("another", LoraConfig(r=4, target_modules="all-linear"))
    model.set_adapter("another")
    model.delete_adapter(name)
    with torch.no_grad():
        few(prefill(model, *tokens(9)))
    gc.collect()
    assert weights and not any(p() is not None for p in weights)


@pytest.mark.parametrize("change", [trained_norms, trained_weights, checkpointed])
def test_what_the_layers_do_themselves(change):
    made = system(lora(base()))
    assert calls(made)[0] == ALL
    change(made)
    layers, got = calls(made)
    assert layers == []
    assert_close(got, gradients(unfused(made)), 1e-4)


def test_hooks_that_are_gone_again():
    made = system(lora(base()))
    handle = made.model.base_model.model.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert calls(made)[0] == alone(LAYERS - 1)
    handle.remove()
    assert calls(made)[0] == ALL


def test_adapters_that_are_frozen():
    """The rows' gradients go through them, to the embeddings."""
    made = system(lora(base()).requires_grad_(False))
    made.model.get_input_embeddings().requires_grad_(True)
    layers, got = calls(made)
    assert [n for n in layers if n > 1] == ALL  # a short prompt's go one by one
    assert_close(got, gradients(unfused(made)), 1e-4)


def test_a_part_of_an_adapter_that_is_frozen():
    made = system(lora(base()))
    made.model.base_model.model.model.layers[1].mlp.up_proj.lora_A.requires_grad_(False)
    layers, got = calls(made)
    assert layers == alone(LAYERS - 1)
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
