"""patch_model: what it touches, what it leaves alone, what survives it, and what it refuses."""

import contextlib
import logging
import threading
import types

import pytest
import torch
from models import FUSED, GENERIC, SOME, assert_close, body, build, error, make_config, pad, tiny, tokens
from torch import nn

import diffmas
from diffmas.models import patch

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


def _shifted(model):
    """Each token of a chunk mixes with the one before it, in the last layer's MLP."""
    mlp = body(model).layers[-1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own((x + torch.cat((x[:, :1], x[:, :-1]), 1)) / 2)


def _slightly_shifted(model):
    """By less than rounding to bfloat16 changes in some models of this size."""
    mlp = body(model).layers[-1].mlp
    own = mlp.forward
    mlp.forward = lambda x: own(0.7 * x + 0.3 * torch.cat((x[:, :1], x[:, :-1]), 1))


def _counted_by_itself(model):
    """As RoBERTa does: from where there is padding, unless it is told."""
    layer, forward = body(model), body(model).forward
    count = lambda x: torch.arange(2, 2 + x.shape[1])[None]  # noqa: E731
    layer.forward = lambda input_ids=None, inputs_embeds=None, position_ids=None, **more: forward(
        input_ids=input_ids, inputs_embeds=inputs_embeds, **more,
        position_ids=count(inputs_embeds if input_ids is None else input_ids) if position_ids is None else position_ids,
    )  # fmt: skip


def _ids_needed(model):
    """As Gemma 3n does: an embedding of its own for every layer, which a latent step has no id for."""
    layer, forward = body(model).layers[1], body(model).layers[1].forward
    extra, seen = torch.randn(64, 32), []
    body(model).register_forward_pre_hook(lambda *_: seen.append(None))
    body(model).embed_tokens.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    layer.forward = lambda x, **kwargs: forward(x if seen[-1] is None else x + extra[seen[-1]].to(x), **kwargs)


def _stateful(model):
    """What one call saw changes the next, plain ones too: nothing that rounding explains."""
    layer, forward, seen = body(model).layers[1], body(model).layers[1].forward, []
    layer.forward = lambda x, **kwargs: (seen.append(x.mean((0, 1), keepdim=True)), forward(x + sum(seen[-2:-1]), **kwargs))[1]


def _noncausal(model):
    """A mean over the chunk, the later tokens included."""
    layer, forward = body(model).layers[1], body(model).layers[1].forward
    layer.forward = lambda x, **kwargs: forward(x + x.mean(1, keepdim=True), **kwargs)


OUTSIDE_OF_ATTENTION = [_shifted, _slightly_shifted, _counted_by_itself, _ids_needed, _stateful, _noncausal]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("spoil", OUTSIDE_OF_ATTENTION)
def test_what_no_attention_layer_shows_is_refused(spoil, dtype):
    model = tiny("gpt2" if spoil is _counted_by_itself else "llama", dtype, patch=False)
    spoil(model)
    marks, rng = state(model), torch.get_rng_state()
    with pytest.raises(diffmas.Unsupported, match="what enters layer|the output"):
        diffmas.patch_model(model)
    assert state(model) == marks and torch.equal(torch.get_rng_state(), rng)


def _without_config(model):
    del body(model).layers[1].self_attn.config


def _raises(error):
    def spoil(model):
        def fail(*args, **kwargs):
            raise error

        body(model).layers[1].mlp.forward = fail

    return spoil


def _raises_on_a_trace(model):
    def fail(module, args, kwargs):
        if kwargs.get("diffmas_trace") is not None:
            raise IndexError("not like this")

    body(model).layers[1].register_forward_pre_hook(fail, with_kwargs=True)


def _cannot_be_copied(model):
    body(model).layers[1].self_attn.lock = threading.Lock()


def _layer_types_too_short(model):
    model.config.layer_types = ["full_attention"]


def _takes_no_attribute(model):
    """The patch fails half-way through."""
    attention = body(model).layers[1].self_attn

    class Closed(type(attention)):
        def __setattr__(self, name, value):
            if name == "diffmas_layer" and self is attention:  # not in the probe's copy of it
                raise AttributeError(f"no {name}")
            super().__setattr__(name, value)

    Closed.__name__ = type(attention).__name__
    attention.__class__ = Closed


RAW = {
    "no config": (_without_config, "attention interface"),
    "a forward that fails": (_raises(KeyError("half")), "KeyError: 'half'"),
    "a forward that fails on a trace": (_raises_on_a_trace, "IndexError: not like this"),
    "what cannot be copied": (_cannot_be_copied, "TypeError: cannot pickle"),
    "a config that does not fit": (_layer_types_too_short, "IndexError"),
    "a patch that fails half-way": (_takes_no_attribute, "AttributeError: no diffmas_layer"),
}  # fmt: skip


# A first patch that succeeds needs what these two lack.
AGAIN = [name for name in RAW if name not in ("no config", "a patch that fails half-way")]


@pytest.mark.parametrize("name, again", [*((name, False) for name in RAW), *((name, True) for name in AGAIN)])
def test_every_failure_is_unsupported_and_leaves_no_mark(name, again):
    spoil, words = RAW[name]
    model = tiny("llama", patch=False)
    if again:
        diffmas.patch_model(model, max_length=99)
    body(model).layers[0].train()
    spoil(model)
    marks, rng = state(model), torch.get_rng_state()
    with pytest.raises(diffmas.Unsupported, match="diffmas cannot patch|LlamaForCausalLM could not be patched: ") as raised:
        diffmas.patch_model(model)
    assert words in str(raised.value)
    if "Error: " in words:
        cause = raised.value.__cause__
        assert f"{type(cause).__name__}: {cause}".startswith(words)
    assert torch.equal(torch.get_rng_state(), rng)
    if not again:  # the hooks that are put back have other numbers
        assert state(model) == marks
    else:
        assert model.diffmas_spec.max_length == 99 and [m.training for m in model.modules()] == [x[2] for x in marks[0]]


@pytest.mark.parametrize("kind", [AssertionError, NameError])
def test_a_fault_of_ours_is_not_the_models(kind, monkeypatch):
    def fail(*args):
        raise kind("a fault")

    model = tiny("llama", patch=False)
    marks = state(model)
    monkeypatch.setattr(patch, "rehearse", types.FunctionType(fail.__code__, vars(patch), closure=fail.__closure__))
    with pytest.raises(kind, match="^a fault$"):
        diffmas.patch_model(model)
    assert state(model) == marks
    monkeypatch.setattr(patch, "rehearse", fail)  # of a module that is not this code
    with pytest.raises(diffmas.Unsupported, match=f"could not be patched: {kind.__name__}: a fault$") as raised:
        diffmas.patch_model(model)
    assert isinstance(raised.value.__cause__, kind) and state(model) == marks


def test_a_lack_of_memory_is_not_the_models_fault():
    model = tiny("llama", patch=False)
    _raises(torch.OutOfMemoryError("full"))(model)
    marks = state(model)
    with pytest.raises(torch.OutOfMemoryError):
        diffmas.patch_model(model)
    assert state(model) == marks


def test_a_model_that_draws_random_numbers_can_be_patched():
    """And what it drew while it was tried is drawn again."""
    model = tiny("llama", patch=False)
    drawn = []
    body(model).register_forward_pre_hook(lambda *_: drawn.append(torch.rand(3)))
    before = torch.get_rng_state()
    diffmas.patch_model(model)
    forwards = 9 if model.diffmas_patch.spec.fused else 7
    assert torch.equal(torch.get_rng_state(), before) and len(drawn) == forwards


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("inference", [False, True])
def test_values_that_a_forward_changes_in_place_are_put_back(inference, refused):
    """A counter among the buffers, and a tensor that is none."""
    model = tiny("llama", patch=False)
    layer = body(model).layers[1]
    with torch.inference_mode(inference):
        layer.register_buffer("calls", torch.zeros(()))
        layer.kept = torch.zeros(2)
    layer.gone = torch.zeros(2)

    def count(module, args):
        with torch.inference_mode(inference):
            for x in (layer.calls, layer.kept, layer.gone):
                x += 1
        layer.gone = torch.ones(3)

    layer.register_forward_pre_hook(count)
    if refused:
        _shifted(model)
    gone = layer.gone
    with pytest.raises(diffmas.Unsupported) if refused else contextlib.nullcontext():
        diffmas.patch_model(model)
    assert layer.gone is gone and not any(x.any() for x in (layer.calls, layer.kept, gone))
    plain(model)
    assert layer.calls == 1


def test_a_mask_that_a_layer_makes_for_itself_is_refused():
    """Sparse attention picks rows that way; a trace shows them all."""
    model = tiny("cohere", patch=False)
    attention = body(model).layers[1].self_attn
    forward = type(attention).forward

    def sparse(self, hidden_states, *args, attention_mask=None, **kwargs):
        n = hidden_states.shape[1]
        mask = torch.zeros(1, 1, n, n).to(hidden_states).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
        return forward(self, hidden_states, *args, attention_mask=mask, **kwargs)

    attention.__class__ = type("CohereAttention", (type(attention),), {"forward": sparse})
    with pytest.raises(diffmas.Unsupported, match=r"layer 1.*a mask that the layer makes for itself \[attention_mask\]"):
        diffmas.patch_model(model)


def test_models_in_16_bits_are_not_refused_for_their_rounding():
    """Many layers, with peaked attention and experts: what rounding does grows from layer to layer."""
    for family in ("llama", "mixtral"):
        for dtype in (torch.bfloat16, torch.float16):
            tiny(family, dtype, num_hidden_layers=16)


@pytest.mark.parametrize("family", ["opt", "llama4_text"])
def test_bodies_that_are_not_under_their_usual_name(family):
    """OPT calls its decoder past what is around it; Llama 4's text model is not where its prefix says."""
    more = dict(
        opt=dict(ffn_dim=48, word_embed_proj_dim=32, do_layer_norm_before=True),
        llama4_text=dict(layer_types=["full_attention"] * 3, no_rope_layers=[1, 0, 1], num_local_experts=2,
                         num_experts_per_tok=1, intermediate_size_mlp=48, attention_chunk_size=512),
    )[family]  # fmt: skip
    model = tiny(family, torch.float32 if family == "llama4_text" else torch.float64, **more)
    assert_close(through_trace(model), plain(model), 2e-4 if family == "llama4_text" else 2e-5)


@pytest.mark.parametrize("family", ["llama", "cohere", "gpt2"])  # fused, generic, generic with a Dropout of its own
def test_dropout_of_attention_is_refused_in_training_alone(family):
    """As published configs of GPT-2 have it; in evaluation mode there is none. Also where it is set after the patch."""
    with_it = dict(attn_pdrop=0.5, resid_pdrop=0.1, embd_pdrop=0.1) if family == "gpt2" else dict(attention_dropout=0.5)
    model, later = tiny(family, **with_it), tiny(family)
    assert_close(through_trace(model), plain(model))
    if family == "gpt2":
        body(later).h[1].attn.attn_dropout.p = 0.5
    else:
        body(later).layers[1].self_attn.attention_dropout = 0.5
    for each, layer in ((model, 0), (later, 1)):
        want = rf"\(layer {layer}\): expected attention dropout 0 in training mode, got 0.5; model.eval\(\) .*attn_pdrop=0"
        through_trace(each)
        each.train()
        for mode in (torch.enable_grad, torch.no_grad):
            with pytest.raises(diffmas.Unsupported, match=want), mode():
                through_trace(each)


def test_token_types_of_a_padded_batch():
    model = tiny("gpt2")
    rows = tokens(5, 3)
    ids, mask = pad(rows)
    types = (ids % 5).masked_fill(mask == 0, 0)
    trace = diffmas.Trace(model, 2)
    got = model(input_ids=ids, attention_mask=mask, token_type_ids=types, past_key_values=trace).logits
    for row, logits in zip(rows, got):
        want = model(input_ids=row[None], token_type_ids=row[None] % 5, use_cache=False).logits[0]
        assert_close(logits[-len(row) :], want)
    assert error(got[0], model(input_ids=rows[0][None], use_cache=False).logits[0]) > 1e-3
    with pytest.raises(ValueError, match=r"token_type_ids: expected \[2, 5\].*got \[2, 9\]"):
        model(input_ids=ids, token_type_ids=torch.ones(2, 9, dtype=torch.long), past_key_values=trace)
    assert trace.lengths == [5, 3]


def test_the_experts_loss_of_a_padded_batch():
    model = tiny("mixtral", torch.float32)
    ids, mask = pad(tokens(5, 3))
    ask = dict(input_ids=ids, attention_mask=mask, output_router_logits=True)
    trace = diffmas.Trace(model, 2)
    got, want = model(**ask, past_key_values=trace), model(**ask, use_cache=False)
    assert_close(got.aux_loss, want.aux_loss, 1e-5)
    for a, b in zip(got.router_logits, want.router_logits):
        assert_close(a[mask.flatten().bool()], b[mask.flatten().bool()], 1e-4)
    with pytest.raises(ValueError, match="output_router_logits: expected a mask of the new tokens alone"):
        model(**{**ask, "attention_mask": torch.cat((mask, mask), 1)}, past_key_values=trace)


def test_weights_on_the_meta_device_are_refused():
    for place in ("model", "lm_head"):
        model = tiny("llama", torch.float32, patch=False)
        (model if place == "model" else model.lm_head).to("meta")
        with pytest.raises(diffmas.Unsupported, match="meta"):
            diffmas.patch_model(model)


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
