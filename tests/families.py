"""Every family of transformers' causal language models, tiny: the defaults of its config, with everything that is large made
small. And what diffmas does with it: exact, or refused. `python tests/families.py` writes that to docs/families.md."""

import re
from collections import Counter
from pathlib import Path

import torch
import transformers
from models import VOCAB, assert_close, gradients, loss_of, pad, randomize, tokens
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

import diffmas
from diffmas.models.parts import body_of, causal_lm_of
from diffmas.trace.cache import cache_argument

FAMILIES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LONGEST = 256


def _named(value, names: str) -> dict:
    return dict.fromkeys(names.split(), value)


# What configs call it, by the value that it gets.
SMALL = {
    **_named(VOCAB, "vocab_size vocab_size_per_layer_input decoder_vocab_size unpadded_vocab_size pronunciation_vocab_size "
             "shape_vocab_size encoder_hash_byte_group_vocab"),
    **_named(LONGEST, "max_position_embeddings n_positions n_ctx max_seq_len model_max_length max_target_positions "
             "context_length"),
    **_named(32, "hidden_size d_model n_embd embedding_dim emb_dim word_embed_proj_dim embedding_size input_embedding_size "
             "output_embedding_size lru_width out_hidden_size pronunciation_embed_dim shape_embed_dim adapter_out_dim "
             "hidden_size_global"),
    **_named(3, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_decoder_layers "
             "num_encoder_layers num_blocks depth"),
    **_named(4, "num_attention_heads n_head n_heads num_heads attention_heads decoder_attention_heads encoder_attention_heads "
             "num_decoder_attention_heads num_encoder_attention_heads swa_num_attention_heads linear_num_key_heads "
             "linear_num_value_heads linear_num_heads index_n_heads"),
    **_named(2, "num_key_value_heads num_kv_heads swa_num_key_value_heads"),
    **_named(48, "intermediate_size ffn_dim decoder_ffn_dim encoder_ffn_dim ffn_hidden_size dim_ff dff d_inner "
             "feed_forward_size d_ff shared_intermediate_size intermediate_size_mlp dense_intermediate_size"),
    **_named(16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size kv_lora_rank q_lora_rank "
             "shared_experts_intermediate_size hidden_size_per_layer_input mamba_d_state state_size ssm_state_size "
             "router_hidden_size"),
    **_named(8, "head_dim v_head_dim dim_head d_head attention_head_size swa_head_dim d_kv kv_channels attention_head_dim "
             "qk_nope_head_dim linear_key_head_dim linear_value_head_dim linear_head_dim index_head_dim mamba_n_heads "
             "mamba_d_head mamba_num_heads mamba_head_dim"),
    **_named(4, "qk_rope_head_dim rotary_dim num_experts n_routed_experts num_local_experts moe_num_experts zero_expert_num"),
    **_named(2, "num_experts_per_tok num_experts_per_token moe_topk moe_k"),
    **_named(1, "bos_token_id pad_token_id cls_token_id decoder_start_token_id sep_token_id n_group num_expert_group "
             "topk_group"),
    **_named(VOCAB - 1, "eos_token_id"),
    **_named(0, "image_token_id image_token_index video_token_id audio_token_id boi_token_id eoi_token_id boa_token_id "
             "eoa_token_id boi_token_index eoi_token_index eoa_token_index vision_start_token_id vision_end_token_id"),
    **_named(0, "attention_dropout attn_pdrop attention_probs_dropout_prob attn_dropout"),
}  # fmt: skip
# How much of the context layers see, whatever it is called.
WINDOWS = (
    "sliding_window sliding_window_size window_size attention_window_size attention_chunk_size keep_window_size "
    "local_attention local_attention_window_len index_topk mem_len swa_window_size local_attn_chunk_length "
    "lsh_attn_chunk_length"
).split()
LATENT_ATTENTION = dict(num_key_value_heads=4, head_dim=4)  # rotated dimensions
SLIDING_LATENT = dict(
    swa_num_attention_heads=4, swa_num_key_value_heads=4, swa_q_lora_rank=16, swa_kv_lora_rank=16, swa_head_dim=12,
    swa_qk_nope_head_dim=8, swa_v_head_dim=8,
)  # fmt: skip
QSA = dict(indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=8, indexer_compress_ratio=2)
# What a family needs beyond that, by its config's own names.
CHANGES = {
    "cohere_compass_text": dict(
        rope_parameters=dict(full_attention=dict(rope_type="default", rope_theta=1e4, mrope_section=[2, 1, 1]))
    ),
    "dbrx": dict(attn_config=dict(rope_theta=1e4, kv_n_heads=2, clip_qkv=8.0)),
    "deepseek_v2": dict(num_experts_per_tok=2),
    "deepseek_v4": dict(o_lora_rank=16),
    "dots1": dict(n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1),
    "dots3_note": dict(
        text_config=SLIDING_LATENT,
        vision_config=dict(pyramid_num_routed=[0, 0, 4], adapter_in_dim=32),
        audio_config=dict(adapter_input_size=32),
    ),
    "dots3_note_text": SLIDING_LATENT,
    "falcon_h1": dict(mamba_d_ssm=64),
    "gemma3n_text": dict(num_kv_shared_layers=0, intermediate_size=48),
    "gpt_neo": dict(attention_types=[[["global", "local"], 1], [["global"], 1]]),
    "hunyuan_v1_dense": dict(head_dim=8),
    "hunyuan_v1_moe": dict(head_dim=8),
    "lfm2_moe": dict(layer_types=["full_attention"] * 3),
    "llama4": dict(text_config=dict(no_rope_layers=[1, 0, 1])),
    "llama4_text": dict(no_rope_layers=[1, 0, 1]),
    "mamba2": dict(num_heads=8, head_dim=8),
    "ministral": dict(head_dim=8),
    "nemotron": dict(head_dim=8, num_key_value_heads=2),
    "qwen4_exp": dict(text_config=QSA),
    "qwen4_exp_text": QSA,
    "reformer": dict(axial_pos_embds_dim=[16, 16], axial_pos_shape=[16, 16]),
    "smollm3": dict(no_rope_layers=[1, 0, 1]),
    "xmod": dict(default_language="en_XX"),
    "zamba": dict(layers_block_type=["linear_attention", "hybrid", "hybrid"]),
    "zamba2": dict(layers_block_type=["linear_attention", "hybrid", "hybrid"]),
    "zaya": dict(num_experts_per_tok=1),
}


def small(config: PretrainedConfig, window: int) -> dict:
    """Options that make a config small. window: of the layers that see a part of the context only."""
    options = {}
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            options[name] = {"model_type": value.model_type, **small(value, window)}
        elif isinstance(value, (int, float)) and not isinstance(value, bool):
            if name in SMALL:
                options[name] = type(value)(SMALL[name])
            elif name in WINDOWS:
                options[name] = window
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:  # each of the kinds there are
            kinds = list(dict.fromkeys(value))
            options[name] = (kinds + kinds[-1:] * 3)[:3]
    if "kv_lora_rank" in options:
        options |= LATENT_ATTENTION
    if hasattr(config, "is_decoder"):
        options["is_decoder"] = True
    return options


def merged(options: dict, changes: dict) -> dict:
    parts = {name: merged(options[name], x) for name, x in changes.items() if isinstance(x, dict) and name in options}
    return {**options, **changes, **parts}


def tiny_config(family: str, window: int) -> PretrainedConfig:
    kind, changes = CONFIG_MAPPING[family], CHANGES.get(family, {})
    return kind(**merged(small(kind(), window), changes))


def build(family: str, window: int):
    """A tiny random model in float64, or in float32 if that alone runs. Raises whatever transformers does."""
    model = randomize(AutoModelForCausalLM.from_config(tiny_config(family, window))).eval()
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped one knows no float64
    return model.double() if runs(model.double()) else model.float()


@torch.no_grad()
def runs(model) -> bool:
    try:
        model(input_ids=torch.arange(2, 8)[None], use_cache=False)
    except Exception:  # whatever transformers raises
        return False
    return True


def with_lora_in_attention(model):
    """LoRA on all projections of the attention layers; everything gets a gradient."""
    attentions = {x for attention, _ in model.diffmas_patch.pairs() for x in attention.modules()}
    names = [name for name, x in model.named_modules() if isinstance(x, (nn.Linear, Conv1D)) and x in attentions]
    # PEFT takes a gate_proj for half of a fused projection of experts
    model = get_peft_model(model, LoraConfig(r=2, target_modules=[name for name in names if not name.endswith("gate_proj")]))
    generator, dtype = torch.Generator().manual_seed(3), model.get_base_model().dtype
    for name, p in model.named_parameters():
        p.requires_grad_()
        if "lora_" in name:
            p.data = (0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64)).to(dtype)
    return model.eval()


def state(model) -> dict:
    """Everything of a model that a patch could leave something in."""
    modules = {
        name: ({key: id(x) for key, x in vars(m).items()}, [*m._forward_hooks], [*m._forward_pre_hooks])
        for name, m in model.named_modules()
    }
    values = {name: x.detach().clone() for name, x in (*model.named_parameters(), *model.named_buffers())}
    return dict(modules=modules, config=model.config.to_dict(), rng=torch.get_rng_state(), **values)


def changed(before: dict, after: dict) -> list[str]:
    """The names of what is not the same."""
    equal = lambda a, b: torch.equal(a.nan_to_num(), b.nan_to_num()) if isinstance(a, torch.Tensor) else a == b  # noqa: E731
    return sorted(name for name in before.keys() | after.keys() if not equal(before.get(name), after.get(name)))


FIRST, SECOND, STEPS, LAST = (20, 12), (12, 20), 2, (2, 4)  # tokens of both sequences: longer than the narrow windows


def episode(model, feed) -> list[torch.Tensor]:
    """Logits of two sequences of unequal lengths on a trace: two chunks, latent steps, another chunk."""
    body, rows = body_of(model), tokens(*(a + b + c for a, b, c in zip(FIRST, SECOND, LAST)))
    trace, out, done = diffmas.Trace(model, batch_size=2), [], (0, 0)
    on = {cache_argument(causal_lm_of(model)): trace}
    for lengths in (FIRST, SECOND, LAST):
        ids, mask = pad([row[at : at + n] for row, at, n in zip(rows, done, lengths)])
        done = [at + n for at, n in zip(done, lengths)]
        if lengths is SECOND:
            h = body(input_ids=ids, attention_mask=mask, **on).last_hidden_state[:, -1:]
            for _ in range(STEPS):
                h = body(inputs_embeds=h @ feed, **on).last_hidden_state
        else:
            logits = model(input_ids=ids, attention_mask=mask, **on).logits
            out.append([x[m.bool()] for x, m in zip(logits, mask)])
    return [torch.cat(parts) for parts in zip(*out)]


def recomputed(model, feed) -> list[torch.Tensor]:
    """The same, one sequence at a time and without a cache."""
    body, out = body_of(model), []
    rows = tokens(*(a + b + c for a, b, c in zip(FIRST, SECOND, LAST)))
    for row, first, second in zip(rows, FIRST, SECOND):
        x = model.get_input_embeddings()(row)
        x, last = x[: first + second], x[first + second :]
        for _ in range(STEPS):
            x = torch.cat((x, body(inputs_embeds=x[None].clone(), use_cache=False).last_hidden_state[0, -1:] @ feed))
        logits = model(inputs_embeds=torch.cat((x, last))[None], use_cache=False).logits[0]
        out.append(torch.cat((logits[:first], logits[-len(last) :])))
    return out


def verdict(family: str, window: int) -> tuple[str, str]:
    """exact | refused | not built, and why. Raises AssertionError for anything else."""
    try:
        model = build(family, window)
    except Exception as error:  # whatever transformers raises
        return "not built", f"{type(error).__name__}: {error}"
    plain = runs(model) and model(input_ids=torch.arange(2, 8)[None], use_cache=False).logits
    before = state(model)  # now: some keep what they have seen
    try:
        diffmas.patch_model(model)
    except diffmas.Unsupported as error:
        assert not changed(before, state(model))
        return "refused", str(error)
    assert runs(model)
    assert torch.equal(model(input_ids=torch.arange(2, 8)[None], use_cache=False).logits, plain)
    diffmas.unpatch_model(model)
    assert not changed(before, state(model))
    _compare(with_lora_in_attention(diffmas.patch_model(model)))
    return "exact", ""


def _compare(model) -> None:
    """Logits and gradients on a trace are those without."""
    with torch.no_grad():
        hidden = body_of(model)(input_ids=torch.arange(2, 4)[None], use_cache=False).last_hidden_state.shape[-1]
        width = model.get_input_embeddings()(torch.tensor([2])).shape[-1]
    generator = torch.Generator().manual_seed(0)
    dtype = model.get_base_model().dtype
    feed = (torch.randn(hidden, width, generator=generator, dtype=torch.float64) / hidden**0.5).to(dtype)
    limit = 2e-5 if dtype == torch.float64 else 2e-3
    want = recomputed(model, feed)
    loss_of(torch.cat(want)).backward()
    grads = gradients(model)
    got = episode(model, feed)
    loss_of(torch.cat(got)).backward()
    for a, b in zip(got, want):
        assert_close(a, b, limit)
    assert_close(gradients(model), grads, limit)


# ---- docs/families.md ------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "families.md"
WIDE, NARROW = LONGEST, 24
INTRO = """# Model families

Every family of transformers' `AutoModelForCausalLM`, from a tiny config: what `patch_model` does with it. *Exact*: logits and
the gradients of all parameters, LoRA on attention among them, over a ragged batch of token chunks and latent steps on a trace
are those of the model's own forward without a cache. *Within its window*: exact as long as a trace is no longer than the
layers' window (`patch_model(max_length=...)`), and refused beyond. Everything else is refused by `diffmas.Unsupported`, and the
model left as it was. *Not built*: transformers itself does not build it from its default config. Encoders are asked to be
decoders (`is_decoder`).

`make families` writes this page; `tests/test_families.py` holds every line of it.

"""


def line(family: str) -> tuple[str, str]:
    """What the page says of a family: verdict and reason."""
    wide, why = verdict(family, WIDE)
    if wide == "exact" and tiny_config(family, WIDE).to_dict() != tiny_config(family, NARROW).to_dict():
        narrow, why = verdict(family, NARROW)
        wide = wide if narrow == "exact" else "exact within its window"
    return wide, _short(why)


def _short(why: str) -> str:
    """An error in a cell of a table, without what differs between machines."""
    why = re.sub(r"^diffmas cannot patch |\. Supported: .*| by \S+ of its largest value", "", " ".join(why.split()))
    return (why if len(why) <= 160 else why[:157] + "...").replace("|", "\\|")


def page(lines: dict[str, tuple[str, str]], version: str = transformers.__version__) -> str:
    counts = Counter(found for found, _ in lines.values())
    summary = ", ".join(f"{counts[name]} {name}" for name in ("exact", "exact within its window", "refused", "not built"))
    table = [f"| {family} | {found} | {why} |" for family, (found, why) in lines.items()]
    head = f"transformers {version}, {len(lines)} families: {summary}.\n\n| family | | |\n|---|---|---|\n"
    return INTRO + head + "\n".join(table) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    PAGE.write_text(page({family: line(family) for family in FAMILIES}), encoding="utf-8")
