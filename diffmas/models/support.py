"""The static check: features of a model that the ops lack, as far as attributes reveal them.

The numeric probe (diffmas.models.probe) finds the others.
"""

from torch import nn

__all__ = ["Unsupported", "dropout_in_training", "dropout_of", "refuse", "unsupported", "window_of"]


class Unsupported(ValueError):
    """The model needs a feature that diffmas lacks; the message names layer and feature."""


def refuse(attention: nn.Module, features: list[str]) -> Unsupported:
    """The error for an attention layer with these features, to be raised."""
    return Unsupported(
        f"diffmas cannot patch {type(attention).__name__} (layer {attention.layer_idx}): {'; '.join(features)}. "
        "Supported: causal softmax attention over all K/V rows, multi-head or grouped, with RoPE that does not depend on "
        "the sequence length"
    )


def dropout_of(attention: nn.Module) -> float:
    """The attention dropout of a layer in training mode, by the names that transformers' layers have for it."""
    for name in ("attention_dropout", "attn_dropout"):  # a number or a module; each forward asks each layer, so not by getattr
        dropout = attention.__dict__.get(name) or attention._modules.get(name)
        dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        if isinstance(dropout, float) and dropout > 0:
            return dropout
    return 0.0


def dropout_in_training(attention: nn.Module, dropout: float) -> Unsupported:
    """The error for a forward of this layer in training mode, to be raised: in eval mode it has none."""
    return Unsupported(
        f"{type(attention).__name__} (layer {attention.layer_idx}): expected attention dropout 0 in training mode, got "
        f"{dropout}; model.eval() runs without it, and to train, load the model with attention_dropout=0 (GPT-2: "
        "attn_pdrop=0), or put that into its config.json"
    )


def window_of(attention: nn.Module, config) -> int | None:
    """The sliding window of a layer, or the length of the chunks that it cuts a text into, in tokens; None if it sees all."""
    window = getattr(attention, "sliding_window", None)
    types_ = getattr(config, "layer_types", None)
    if types_ and types_[attention.layer_idx] == "chunked_attention":
        return config.attention_chunk_size
    slides = types_[attention.layer_idx] == "sliding_attention" if types_ else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if window is None and slides else window


def unsupported(attention: nn.Module, config, max_length: int | None) -> list[str]:
    """Features of one layer that the ops lack, as text. max_length: as in `patch_model`."""
    if getattr(attention, "config", None) is None:
        return ["attention of its own, not through transformers' attention interface [config]"]
    found = []
    types_ = getattr(config, "layer_types", None)
    if types_ and types_[attention.layer_idx] not in ("full_attention", "sliding_attention", "chunked_attention"):
        found.append(f"layer type {types_[attention.layer_idx]!r} [layer_types]")
    window = window_of(attention, config)
    longest = max_length or getattr(config, "max_position_embeddings", None)
    if window is not None and (longest is None or window < longest):
        found.append(
            f"sliding window {window} shorter than the trace can get, {longest} tokens [sliding_window] "
            "(patch_model(max_length=...) limits the trace)"
        )
    for name in ("attn_logit_softcapping", "attn_logit_softcap"):
        softcap = getattr(attention, name, None) or getattr(config, name, None)
        if softcap:
            found.append(f"logit softcapping {softcap} [{name}]")
    if getattr(config, "clip_qkv", None):
        found.append(f"clipped projections {config.clip_qkv} [clip_qkv]")
    if getattr(attention, "is_causal", True) is False:
        found.append("non-causal attention [is_causal]")
    if getattr(attention, "is_kv_shared_layer", False):
        found.append("K/V shared between layers [is_kv_shared_layer]")
    names = [name for name, _ in attention.named_parameters(recurse=False)]
    if names:
        found.append(f"attention parameters (such as sinks) [{', '.join(names)}]")
    if any("kv_a_proj" in name or "kv_b_proj" in name for name, _ in attention.named_children()):
        found.append("multi-head latent attention [kv_a_proj]")
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    for entry in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        kind = entry.get("rope_type", entry.get("type"))
        if kind in ("dynamic", "longrope", "su"):
            found.append(f"frequencies that depend on the longest position seen [rope_type={kind!r}]")
    if getattr(config, "alibi", False) or getattr(config, "position_embedding_type", None) == "alibi":
        found.append("ALiBi [alibi]")
    return found
