"""What patch_model refuses."""

import pytest
import torch
from models import assert_close, body, tiny
from test_patch import NEW, PROMPT, plain, state, through_trace

import diffmas

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
