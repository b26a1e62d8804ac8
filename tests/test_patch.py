"""patch_model: what it touches, what it leaves alone, what survives it, and what it refuses."""

import copy
import io
import logging
import pickle

import pytest
import torch
from models import (
    FUSED,
    GENERIC,
    SOME,
    assert_close,
    body,
    build,
    error,
    gradients,
    make_config,
    tiny,
    tokens,
    with_lora,
)  # fmt: skip
from torch import nn

import diffmas

PROMPT, NEW = tokens(6, 4)


def plain(model):
    return model(input_ids=torch.cat((PROMPT, NEW))[None], use_cache=False).logits


def through_trace(model):
    trace = diffmas.Trace(model)
    first = model(input_ids=PROMPT[None], past_key_values=trace).logits
    return torch.cat((first, model(input_ids=NEW[None], past_key_values=trace).logits), 1)


def state(model):
    """Everything of a model that a patch could leave something in."""
    modules = [
        (name, sorted(m.__dict__), m.training, [*m._forward_hooks], [*m._forward_pre_hooks], id(getattr(m, "config", 0)))
        for name, m in model.named_modules()
    ]
    return modules, model.config.to_dict(), model.config._attn_implementation


# ---- what it computes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FUSED + GENERIC)
def test_families(family, caplog):
    moe = family in ("qwen3_moe", "mixtral")  # recent transformers groups experts in an op that knows no float64
    model = tiny(family, torch.float32 if moe else torch.float64, patch=False)
    before = plain(model)
    with caplog.at_level(logging.INFO, "diffmas"):
        diffmas.patch_model(model)
    assert f"Attention {'fused' if family in FUSED else 'generic'})" in caplog.text
    assert torch.equal(plain(model), before)
    assert_close(through_trace(model), before, 2e-4 if moe else 2e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("family", SOME)
def test_patch_and_unpatch_leave_no_mark(family, implementation):
    model = tiny(family, patch=False)
    model.set_attn_implementation(implementation)
    ids = torch.cat((PROMPT, NEW))[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    run = lambda: model(ids, mask, use_cache=False).logits  # noqa: E731
    before, marks = run(), state(model)
    diffmas.patch_model(model)
    assert torch.equal(run(), before)
    diffmas.unpatch_model(model)
    assert torch.equal(run(), before) and state(model) == marks


@pytest.mark.parametrize("family", SOME)
def test_the_attention_implementation_can_change_after_the_patch(family):
    model = tiny(family)
    want = plain(model)
    model.set_attn_implementation("eager")
    assert_close(plain(model), want)
    ids = torch.cat((PROMPT, NEW))[None].repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[0, -3:] = 0
    assert_close(model(ids, mask, use_cache=False).logits[0, :-3], want[0, :-3])
    assert_close(through_trace(model), want)


@pytest.mark.parametrize("family", SOME)
def test_a_second_model_of_the_same_config_is_not_touched(family):
    config = make_config(family)
    model, other = build(config), build(config)
    marks = state(other)
    diffmas.patch_model(model)
    assert state(other) == marks
    with pytest.raises(ValueError, match="not patched"):
        other(input_ids=NEW[None], past_key_values=diffmas.Trace(model), use_cache=True)
    assert torch.equal(plain(other), plain(model))


def test_train_and_eval_modes_are_kept():
    model = tiny("qwen3", patch=False).train()
    body(model).layers[1].eval()
    marks = state(model)[0]
    diffmas.unpatch_model(diffmas.patch_model(model))
    assert state(model)[0] == marks


def test_patching_does_not_touch_the_random_state():
    model = tiny("qwen3", patch=False)
    before = torch.get_rng_state()
    diffmas.patch_model(model)
    assert torch.equal(torch.get_rng_state(), before)


def test_patching_twice_is_patching_once():
    model = tiny("qwen3")
    trace = diffmas.Trace(model)
    marks = state(model)
    assert diffmas.patch_model(model) is model and state(model) == marks
    model(input_ids=PROMPT[None], past_key_values=trace)
    diffmas.patch_model(model, max_length=8)
    with pytest.raises(ValueError, match="patched again"):
        model(input_ids=NEW[None], past_key_values=trace)
    with pytest.raises(ValueError, match="at most 8 tokens"):
        through_trace(model)
    diffmas.unpatch_model(model)
    with pytest.raises(ValueError, match="call diffmas.patch_model"):
        diffmas.unpatch_model(model)
    with pytest.raises(ValueError, match="call diffmas.patch_model"):
        diffmas.Trace(model)
    with pytest.raises(ValueError, match="not patched"):
        model(input_ids=NEW[None], past_key_values=trace, use_cache=True)


def test_a_second_patch_that_is_refused_leaves_the_first():
    model = tiny("mistral", sliding_window=100, max_length=50)
    trace = diffmas.Trace(model)
    with pytest.raises(diffmas.Unsupported, match="sliding window 100"):
        diffmas.patch_model(model)
    model(input_ids=NEW[None], past_key_values=trace)
    assert trace.lengths == [4]


def test_bad_arguments_are_refused_by_name():
    model = tiny("qwen3", patch=False)
    for options in (dict(backend="abacus"), dict(max_length=0)):
        with pytest.raises(ValueError, match=next(iter(options))):
            diffmas.patch_model(model, **options)
    with pytest.raises(diffmas.Unsupported, match="Linear"):
        diffmas.patch_model(nn.Linear(2, 2))


def test_a_trace_of_another_model_is_refused():
    trace = diffmas.Trace(tiny("qwen3"))
    with pytest.raises(ValueError, match="another model"):
        tiny("qwen3", seed=1)(input_ids=NEW[None], past_key_values=trace)


def test_the_body_alone_can_be_patched():
    model = body(tiny("qwen3", patch=False))
    ids = torch.cat((PROMPT, NEW))[None]
    want = model(input_ids=ids, use_cache=False).last_hidden_state
    trace = diffmas.Trace(diffmas.patch_model(model))
    model(input_ids=PROMPT[None], past_key_values=trace)
    assert_close(model(input_ids=NEW[None], past_key_values=trace).last_hidden_state, want[:, 6:])


@pytest.mark.parametrize("family", ["cohere", "olmo2", "qwen3"])
def test_rotation_is_recognised_with_long_contexts(family):
    """Float32 angles at far positions are inexact; they must not hide what kind of rotation it is."""
    shape = dict(hidden_size=256, num_attention_heads=2, num_key_value_heads=1, head_dim=128)
    model = tiny(family, max_position_embeddings=131072, **shape)
    layers = model.diffmas_patch.layers
    assert {layer.rope for layer in layers} == {"interleaved" if family == "cohere" else "half"}


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["patch first", "PEFT first", "wrapped"])
@pytest.mark.parametrize("family", SOME)
def test_lora(family, order):
    base = plain(tiny(family, patch=False))
    model = tiny(family, patch=False)
    if order == "patch first":
        model = with_lora(diffmas.patch_model(model))
    else:
        model = with_lora(model)
        diffmas.patch_model(model if order == "wrapped" else model.get_base_model())
    want = plain(model)
    assert error(want, base) > 1e-2
    got = through_trace(model)
    assert_close(got, want)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    (got * weights).sum().backward()
    grads = gradients(model)
    (want * weights).sum().backward()
    assert_close(grads, gradients(model))
    with model.disable_adapter():
        assert_close(through_trace(model), base)
    model.merge_adapter()
    assert_close(through_trace(model), want)
    model.unmerge_adapter()
    assert_close(through_trace(model), want)
    merged = model.merge_and_unload()
    assert_close(through_trace(merged), want)
    diffmas.unpatch_model(merged)
    assert_close(plain(merged), want)


# ---- copies and files ------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.parametrize("family", SOME)
def test_copies_work_on_their_own_weights(family, duplicate):
    model = tiny(family)
    want = plain(model)
    copied = duplicate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(through_trace(copied), want)
    assert torch.equal(plain(copied), want)
    ids = copied.generate(input_ids=PROMPT[None], past_key_values=diffmas.Trace(copied), max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 9)
    diffmas.unpatch_model(copied)
    assert torch.equal(plain(copied), want)
    assert not any("diffmas_layer" in m.__dict__ or "forward" in m.__dict__ for m in copied.modules())


@pytest.mark.parametrize("family", SOME)
def test_save_pretrained(family, tmp_path):
    model = tiny(family, torch.float32)
    model.save_pretrained(tmp_path)
    assert "diffmas" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert_close(plain(again), plain(model), 1e-6)


def _replace(module, double):
    module.forward = lambda x: double(nn.Linear.forward(module, x))


INTERVENTIONS = {
    "hook": lambda m, double: m.register_forward_hook(lambda m, args, y: double(y)),
    "pre-hook": lambda m, double: m.register_forward_pre_hook(lambda m, args: tuple(map(double, args))),
    "hook of the backward": lambda m, double: m.register_full_backward_hook(lambda m, dx, dy: tuple(map(double, dx))),
    "pre-hook of the backward": lambda m, double: m.register_full_backward_pre_hook(lambda m, dy: tuple(map(double, dy))),
    "replaced": _replace,
}


def test_who_hooks_into_all_modules_is_called():
    """As counters of flops and profilers do."""
    model, called = tiny("llama"), []
    names = {module: name for name, module in body(model).layers[0].self_attn.named_children()}
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(names.get(module)))
    try:
        model(input_ids=PROMPT[None], past_key_values=diffmas.Trace(model))
    finally:
        hook.remove()
    assert [called.count(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_who_hooks_into_a_projection_is_called(intervention, name):
    model, calls = tiny("llama"), []
    module = body(model).layers[0].self_attn.get_submodule(name)
    INTERVENTIONS[intervention](module, lambda x: (calls.append(1), 2 * x)[1])
    x = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    out = body(model)(inputs_embeds=x, past_key_values=diffmas.Trace(model)).last_hidden_state
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    assert len(calls) == 1
    diffmas.unpatch_model(model)
    want = body(model)(inputs_embeds=x).last_hidden_state
    assert_close(out, want)
    assert_close(dx, torch.autograd.grad(want.square().sum(), x)[0])


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_accelerate_hooks(family, first):
    from accelerate import dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    def hook(model):
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
        for layer in body(model).layers:
            add_hook_to_module(layer.self_attn, counting, append=True)

    model, counting = tiny(family, patch=False), Counting()
    want = plain(model)
    for step in (hook, diffmas.patch_model) if first == "hooks" else (diffmas.patch_model, hook):
        step(model)
    counting.calls = 0
    assert_close(through_trace(model), want)
    assert counting.calls == 6
    remove_hook_from_module(model, recurse=True)
    assert_close(through_trace(model), want)
    diffmas.unpatch_model(model)
    assert torch.equal(plain(model), want)
    diffmas.patch_model(model)  # accelerate leaves each module's own forward on the instance
    assert_close(through_trace(model), want)


def test_unpatching_under_accelerate_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny("qwen3")
    want = plain(model)
    for layer in body(model).layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    diffmas.unpatch_model(model)
    assert torch.equal(plain(model), want)
    assert_close(through_trace(diffmas.patch_model(model)), want)


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model = tiny("qwen3", patch=False)
    cpu_offload(model)
    with pytest.raises(diffmas.Unsupported, match="layer 0.*device=meta"):
        diffmas.patch_model(model)
    model = tiny("qwen3")
    cpu_offload(model)
    with pytest.raises(RuntimeError, match="offloaded"):
        through_trace(model)
    model, want = tiny("llama"), plain(tiny("llama"))
    cpu_offload(model)
    assert_close(through_trace(model), want)  # it has no weights but those of its projections


# ---- what is refused -------------------------------------------------------------------------------------------------

SMALL_MLA = dict(
    q_lora_rank=None, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8, n_routed_experts=4,
    num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=16, first_k_dense_replace=3, n_shared_experts=1,
    num_key_value_heads=4,
)  # fmt: skip
YARN = dict(rope_type="yarn", factor=2.0, original_max_position_embeddings=256, rope_theta=1e4)
LONGROPE = dict(type="longrope", short_factor=[1.0] * 4, long_factor=[2.0] * 4)
REFUSED = {
    "gemma2": (dict(sliding_window=16, query_pre_attn_scalar=8), ["layer 0", "softcapping 50.0", "sliding window 16"]),
    "gemma3_text": (dict(sliding_window=16, query_pre_attn_scalar=8), ["layer 0", "sliding window 16"]),
    "mistral": (dict(sliding_window=100), ["MistralAttention (layer 0)", "sliding window 100", "max_length"]),
    "qwen2": (dict(use_sliding_window=True, sliding_window=8, max_window_layers=1), ["layer 1", "sliding window 8"]),
    "gpt_oss": (dict(sliding_window=16, num_local_experts=4, num_experts_per_tok=2), ["layer 0", "sinks"]),
    "deepseek_v3": (SMALL_MLA, ["layer 0", "latent attention"]),
    "bloom": (dict(n_head=4, n_layer=3), ["Bloom"]),
    "mpt": (dict(d_model=32, n_heads=4, n_layers=3), ["Mpt"]),
    "stablelm": ({}, ["StableLm"]),
    "nemotron": ({}, ["Nemotron"]),
    "mamba": (dict(state_size=4), ["found none in layers [0, 1, 2]"]),
    "diffllama": ({}, ["layer 0"]),
    "llama": (dict(attention_dropout=0.1), ["layer 0", "attention dropout 0.1"]),
    "gpt2": (dict(attn_pdrop=0.1), ["layer 0", "attention dropout 0.1"]),
    "olmo": (dict(clip_qkv=1.0), ["layer 0", "clipped projections 1.0"]),
    "qwen3": (dict(rope_scaling=dict(rope_type="dynamic", factor=2.0, rope_theta=1e4)), ["layer 0", "rope_type='dynamic'"]),
    "phi3": (
        dict(rope_scaling=LONGROPE, original_max_position_embeddings=256),
        ["layer 0", "rope_type='longrope'"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", list(REFUSED))
def test_refusals_name_layer_and_feature_and_leave_no_mark(family):
    changes, words = REFUSED[family]
    model = tiny(family, torch.float32, patch=False, **changes)
    marks = state(model)
    with pytest.raises(diffmas.Unsupported) as raised:
        diffmas.patch_model(model)
    for word in ("diffmas cannot patch", *words):
        assert word in str(raised.value), str(raised.value)
    assert state(model) == marks


@pytest.mark.parametrize("family, changes", [("mistral", {}), ("qwen2", dict(use_sliding_window=True, max_window_layers=1))])
def test_a_window_that_a_trace_cannot_exceed_is_accepted(family, changes):
    model = tiny(family, sliding_window=10, max_length=10, **changes)
    assert_close(through_trace(model), plain(model))
    trace = diffmas.Trace(model)
    model(input_ids=PROMPT[None], past_key_values=trace)
    with pytest.raises(ValueError, match="at most 10 tokens"):
        model(input_ids=torch.cat((NEW, NEW))[None], past_key_values=trace)
    assert trace.lengths == [6]


def test_a_window_as_long_as_the_context_limits_the_trace():
    model = tiny("mistral", sliding_window=10, max_position_embeddings=10)
    assert_close(through_trace(model), plain(model))
    for options in ({}, dict(max_length=10), dict(max_length=9)):
        diffmas.patch_model(model, **options)
        limit = r"9 tokens a sequence \(patch_model" if options.get("max_length") == 9 else "10 tokens a sequence"
        with pytest.raises(ValueError, match=limit):
            model(input_ids=torch.cat((PROMPT, PROMPT))[None], past_key_values=diffmas.Trace(model))
    diffmas.patch_model(model)
    with pytest.raises(ValueError, match="sliding window"):
        model(input_ids=torch.cat((PROMPT, PROMPT))[None], past_key_values=diffmas.Trace(model))


def test_yarn_is_accepted():
    model = tiny("qwen3", rope_scaling=YARN)
    assert_close(through_trace(model), plain(model))


def test_a_forward_replaced_by_someone_else_is_refused():
    model = tiny("qwen3", patch=False)
    body(model).layers[1].self_attn.forward = lambda *_, **__: None
    with pytest.raises(diffmas.Unsupported, match="layer 1.*forward was replaced"):
        diffmas.patch_model(model)
