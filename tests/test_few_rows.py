"""Decoder layers of few rows as one op: the layers' own numbers, and their own forwards where anything is not common."""

import copy
import functools
import itertools
from collections import OrderedDict

import pytest
import torch
from linear_systems import Other, base, calm, counted, doubled, hooked, lora, system, unfused
from models import make_config
from systems import QUESTIONS
from torch import nn
from transformers import AutoModelForCausalLM

from diffmas import Trace, Unsupported, patch_model, unpatch_model
from diffmas.models import few_rows, linears
from diffmas.models.linear_parts import is_lora
from diffmas.models.patch import patch_of
from diffmas.ops import extension
from diffmas.trace import few_rows as of_trace

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")
FAMILIES = ["llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3"]
LAYERS = 3


def of_family(family, dtype=torch.float32):
    config = make_config(family, hidden_size=64, intermediate_size=96, head_dim=16)
    return calm(AutoModelForCausalLM.from_config(config)).to(dtype).eval()


@torch.no_grad()
def run(model, n=7):
    """Hidden states of n tokens and of a token each of two sequences after them, and how many layers a call of the op had."""
    body = patch_of(model).body
    trace = Trace(model, batch_size=2)
    generator = torch.Generator().manual_seed(n)
    with counted(few_rows, "few_rows_layers") as calls:
        inputs = torch.randint(3, 50, (2, n), generator=generator), torch.randint(3, 50, (2, 1), generator=generator)
        found = [body(input_ids=ids, past_key_values=trace).last_hidden_state for ids in inputs]
    return torch.cat([x.flatten(0, 1) for x in found]), [len(layers) for _, layers, *_ in calls]


def states(model, n=7, fuse=True):
    """The same after patching, but how many layers went through the op."""
    found, calls = run(patch_model(model, fuse=fuse), n)
    return found, sum(calls)


def unfused_run(model):
    """The same without the op, as the model is now: nothing is patched anew."""
    few, linears.few_rows = linears.few_rows, lambda *_: None
    try:
        return run(model)[0]
    finally:
        linears.few_rows = few


def assert_same(got, want, dtype=torch.float32):
    assert float((got - want).norm() / want.norm()) < {torch.float32: 2e-6, torch.bfloat16: 0.02}[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_familys_own_numbers(family, dtype):
    model = of_family(family, dtype)
    got, calls = states(model)
    want, none = states(model, fuse=False)
    assert (calls, none) == (2 * LAYERS, 0)
    assert_same(got, want, dtype)


@pytest.mark.parametrize("adapted", [False, True])
def test_bfloat16_rounds_where_the_layer_does(adapted, monkeypatch):
    """Nearly all numbers are those of the layer with its linears one by one, which a rounding more or less would undo."""
    model = of_family("llama", torch.bfloat16) if not adapted else lora(base(dtype=torch.bfloat16)).eval()
    got, calls = states(model)
    monkeypatch.setattr(linears, "few_rows", lambda *_: None)
    want, none = states(model)
    assert (calls, none) == (2 * LAYERS, 0)
    assert (got == want).double().mean() > 0.98


def test_many_rows_are_the_layers_own():
    model = of_family("llama")
    got, calls = states(model, n=17)
    assert calls == LAYERS  # of the two tokens after them
    assert_same(got, states(model, n=17, fuse=False)[0])


@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "down_proj"], "r": 5}], ids=["all", "two"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_an_adapter(options, dtype):
    model = lora(base(dtype=dtype), **options).eval()
    got, calls = states(model)
    assert calls == 2 * LAYERS
    assert_same(got, states(model, fuse=False)[0], dtype)
    with model.disable_adapter():
        without, calls = states(model)
        assert calls == 2 * LAYERS
        assert_same(without, states(model, fuse=False)[0], dtype)
    assert not torch.allclose(got, without, rtol=1e-2)


def test_weights_that_would_be_trained():
    model = of_family("qwen2").requires_grad_(True)
    assert states(model)[1] == 2 * LAYERS
    patch_model(model)
    with counted(few_rows, "few_rows_layers") as calls:  # with gradients the layers are their own
        model(input_ids=torch.tensor([[3, 4, 5]]), past_key_values=Trace(model, batch_size=1))
    assert not calls


def seen_before(module):
    module.register_forward_pre_hook(lambda module, args: (1 + args[0],))


def replace(layer, name):
    parent, _, child = name.rpartition(".")
    setattr(layer.get_submodule(parent), child, Other(layer.get_submodule(name)))


NAMES = [
    "input_layernorm",
    "post_attention_layernorm",
    "mlp",
    "mlp.act_fn",
    "mlp.gate_proj",
    "self_attn.k_proj",
    "self_attn.o_proj",
]


CHANGES = [(name, change) for name in NAMES for change in (doubled, hooked, seen_before)]
# Attention's own parts are what the patch knows it by.
CHANGES += [(name, "replaced") for name in NAMES if not name.startswith("self_attn")]


@pytest.mark.parametrize(("name", "change"), CHANGES)
def test_what_somebody_else_does_to_a_part(name, change):
    """Before it is patched and after."""
    model = of_family("llama")
    plain = states(model)[0]
    layer = model.model.layers[1]
    if change == "replaced":
        replace(layer, name)
    else:
        change(layer.get_submodule(name))
    got, calls = states(model)
    assert calls == 2 * (LAYERS - 1)
    assert_same(got, states(model, fuse=False)[0])
    assert not torch.allclose(got, plain, rtol=1e-2)


def test_a_body_goes_at_once():
    model = of_family("llama")
    patch_model(model)
    for _ in range(2):
        got, calls = run(model)
        assert calls == [LAYERS, LAYERS]
    assert torch.equal(got, run(copy.deepcopy(model))[0])
    seen = []
    model.model.layers[1].register_forward_hook(lambda module, args, y: seen.append(y))
    again, calls = run(model)
    assert torch.equal(again, got) and calls == [1] * 2 * LAYERS and len(seen) == 2


@torch.no_grad()
def test_pools_are_gathered_together_when_they_are_new(monkeypatch):
    model, gathered = patch_model(of_family("llama")), []
    monkeypatch.setattr(of_trace, "gather_in_huge_pages", lambda tensors: gathered.append(len([*tensors])))
    trace, ids = Trace(model, batch_size=1), torch.tensor([[3]])
    for _ in range(3):
        model(input_ids=ids, past_key_values=trace)
    model(input_ids=ids.expand(1, 400), past_key_values=trace)  # they grow
    for _ in range(2):
        model(input_ids=ids, past_key_values=trace)
    assert [x for x in gathered if x] == [2 * LAYERS, 2 * LAYERS]


def new_weight(model):
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(2 * linear.weight, requires_grad=False)


def moved_weight(model):
    weight = model.model.layers[1].self_attn.v_proj.weight
    weight.data = 2 * weight.data


def other_eps(model):
    model.model.layers[1].input_layernorm.variance_epsilon = 10.0


def turned_weight(model):
    weight = model.model.layers[1].self_attn.o_proj.weight
    weight.data = weight.data.t()  # in the same memory


def new_bias(model):
    linear = model.model.layers[1].mlp.down_proj
    linear.bias = nn.Parameter(torch.full_like(linear.weight[:, 0], 0.5), requires_grad=False)


def fewer_layers(model):
    model.config.num_hidden_layers = LAYERS - 1


def deleted_layer(model):
    del model.model.layers[1]


def other_order(model):
    layers = model.model.layers
    layers[0], layers[1] = layers[1], layers[0]


def new_list(model):
    model.model.layers = nn.ModuleList([*model.model.layers][::2])


def new_hooks(model):
    layer = model.model.layers[1]
    layer._forward_hooks = OrderedDict()
    hooked(layer)


AFTER = {x.__name__: x for x in (new_weight, moved_weight, turned_weight, new_bias, other_eps, new_hooks, other_order)}
AFTER |= {f"{change.__name__} {name}": lambda model, name=name, change=change: change(model.model.layers[1].get_submodule(name))
          for name, change in CHANGES if not isinstance(change, str)}  # fmt: skip
AFTER |= {f"replaced {name}": lambda model, name=name: replace(model.model.layers[1], name)
          for name, change in CHANGES if change == "replaced"}  # fmt: skip


@pytest.mark.parametrize("name", AFTER)
def test_what_changes_after_it_was_looked_at(name):
    model = patch_model(of_family("llama"))
    plain, calls = run(model)
    assert calls == [LAYERS, LAYERS]
    AFTER[name](model)
    got = run(model)[0]
    assert_same(got, unfused_run(model))
    assert not torch.allclose(got, plain, rtol=1e-2)


def test_adapters_that_change_after_they_were_looked_at():
    model = lora(base()).eval()
    patch_model(model)
    layers = [m for m in model.modules() if is_lora(m)]

    def scaled():
        for m in layers:
            m.scaling["default"] *= 3

    def trained():
        layers[0].lora_B["default"].weight.data.mul_(2)

    found = [run(model)]
    for change in (scaled, trained, model.disable_adapter_layers, model.enable_adapter_layers, model.merge_adapter):
        change()
        found.append(run(model))
        assert_same(found[-1][0], unfused_run(model))
    assert [calls for _, calls in found] == [[LAYERS, LAYERS]] * 5 + [[]]
    for (one, _), (other, _) in itertools.pairwise(found[:-1]):
        assert not torch.allclose(one, other, rtol=1e-2)


@pytest.mark.parametrize("change", [fewer_layers, deleted_layer, new_list])
def test_layers_that_are_gone_are_not_run(change):
    """A trace of this model wants their rows, until it is patched again."""
    model = patch_model(of_family("llama"))
    run(model)
    change(model)
    with pytest.raises(RuntimeError, match="did not write to the trace"):
        run(model)


@pytest.mark.parametrize("name, value", [("merged_adapters", ["default"]), ("use_dora", {"default": True})])
def test_what_stands_in_the_place_of_an_adapters_own(name, value):
    model = patch_model(lora(base()).eval())
    assert run(model)[1] == [LAYERS, LAYERS]
    adapted = next(m for m in model.modules() if is_lora(m))
    setattr(adapted, name, value)
    assert run(model)[1] == [1] * 2 * (LAYERS - 1)


def test_an_adapter_that_another_thread_switches_meanwhile(monkeypatch):
    """Between looking at the first layer and at the last."""
    model, look = lora(base()).eval(), few_rows.plain_layer
    model.add_adapter("other", model.peft_config["default"])
    generator = torch.Generator().manual_seed(3)
    for n, p in model.named_parameters():
        if ".other." in n:
            p.data = 0.1 * torch.randn(p.shape, generator=generator)
    patch_model(model)

    def switching(layer, dtype):
        found = look(layer, dtype)
        monkeypatch.setattr(few_rows, "plain_layer", look)
        model.set_adapter("other")
        return found

    monkeypatch.setattr(few_rows, "plain_layer", switching)
    run(model)
    assert_same(run(model)[0], unfused_run(model))


def test_layers_of_another_number_of_heads():
    """Of K and V, as pruning leaves them: each is an op."""
    model = of_family("llama")
    attention = model.model.layers[1].self_attn
    for name in ("k_proj", "v_proj"):
        linear = getattr(attention, name)
        linear.weight = nn.Parameter(linear.weight[:32].clone(), requires_grad=False)
    attention.num_key_value_groups *= model.config.num_key_value_heads * 16 // 32
    got, calls = states(model)
    assert calls == 2 * LAYERS
    assert_same(got, states(model, fuse=False)[0])


def test_a_hook_on_attention_is_called():
    model, seen = patch_model(of_family("llama")), []
    model.model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append(1))
    assert states(model)[1] == 2 * (LAYERS - 1) and len(seen) == 2


@pytest.mark.parametrize("family", ["phi3", "mixtral", "olmo2"])
def test_other_layers_are_their_own(family):
    assert states(of_family(family))[1] == 0


def test_the_head_in_decoding():
    made = system(lora(base())).eval()
    with counted(linears, "run") as calls, torch.no_grad():
        tokens = made.generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0)
    assert {call[1].weight.shape[0] for call in calls} == {made.model.config.vocab_size}
    assert tokens == unfused(made).generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0)
    unpatch_model(made.model)
    assert "forward" not in vars(made.model.get_output_embeddings())


def test_decoding_under_autocast_is_autocasts_own():
    """Agents write their rows in bfloat16 then, and the answer's have to be of that kind."""
    made, found = system(lora(base())).eval(), []
    with torch.autocast("cpu", torch.bfloat16):
        for fuse in (True, False):
            patch_model(made.model, fuse=fuse)
            with counted(linears, "run") as calls:
                found.append(made.generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0))
            assert not calls
    assert found[0] == found[1]


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("part", ["", "mlp", "input_layernorm", "mlp.act_fn"])
def test_what_somebody_else_does_to_a_class(part, wrapped, monkeypatch):
    model = of_family("llama")
    plain, _ = states(model)
    replaced = type(model.model.layers[0].get_submodule(part))
    forward = replaced.forward

    def other(self, *args, **kwargs):
        return 2 * forward(self, *args, **kwargs)

    monkeypatch.setattr(replaced, "forward", functools.wraps(forward)(other) if wrapped else other)
    got, calls = states(model)
    assert calls == 0
    assert_same(got, states(model, fuse=False)[0])
    assert not torch.allclose(got, plain, rtol=1e-2)


def test_a_hook_on_an_adapters_dropout():
    model = lora(base()).eval()
    plain, _ = states(model)
    for name, module in model.named_modules():
        if name.endswith("q_proj.lora_dropout.default"):
            module.register_forward_hook(lambda module, args, y: 3 * y)
    got, calls = states(model)
    assert calls == 0
    assert_same(got, states(model, fuse=False)[0])
    assert not torch.allclose(got, plain, rtol=1e-2)


def test_hidden_states_that_were_asked_for_once():
    """transformers leaves hooks behind in all layers."""
    model, ids = patch_model(of_family("llama")), torch.tensor([[3, 4, 5]])
    want = states(model)[0]
    with torch.no_grad():
        model(input_ids=ids, output_hidden_states=True)
        traced = model(input_ids=ids, past_key_values=Trace(model, batch_size=1), output_hidden_states=True).hidden_states
    assert len(traced) == LAYERS + 1
    got, calls = states(model)
    assert calls == 2 * LAYERS
    assert torch.equal(got, want)


def test_layers_that_are_not_their_op_are_found_when_they_are_patched(monkeypatch):
    few = linears.few_rows
    monkeypatch.setattr(linears, "few_rows", lambda *args: y if (y := few(*args)) is None else y.roll(1, -1))
    model = of_family("llama")
    with pytest.raises(Unsupported, match="fuse=False"):
        patch_model(model)
    patch_model(model, fuse=False)
