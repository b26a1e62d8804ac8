"""patch_model: the only door to transformers' internals.

Per instance and reversible: nothing global, no class and no shared config is touched. A patched model behaves as before
until a Trace is passed as `past_key_values` (`cache` since transformers 5.24). Then
  * a pre-hook on the body drops the padding, plans the forward and hands the plan down as `diffmas_trace=`,
  * every attention layer writes and reads the trace (`diffmas.models.attention`),
  * a hook on the body commits the plan and restores the padded shape.

What a model needs and diffmas does not do is refused here: by a static check (`_unsupported`) and by a numeric probe of
every layer against its own forward (`diffmas.models.probe`), since each alone misses cases.
"""

import functools
import inspect
import logging
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from diffmas import ops
from diffmas.models import probe
from diffmas.models.attention import Layer, Unsupported, install, refuse, uninstall
from diffmas.models.generate import generate
from diffmas.trace import Trace
from diffmas.trace.cache import cache_name
from diffmas.trace.plan import Plan

__all__ = ["patch_model", "patch_of", "run", "unpatch_model"]

logger = logging.getLogger("diffmas")


@dataclass
class Patch:
    """The record of a patched model."""

    body: nn.Module
    causal_lm: nn.Module
    layers: list[Layer]
    backend: str
    max_length: int | None
    window: int | None  # of the layer with the shortest sliding window: a trace must not outgrow it
    hook_ids: tuple[int, int] = (0, 0)
    generating: str | None = None  # inside generate: the kind of the tokens that its next forward writes
    input_lengths: tuple[int, int] = (0, 0)  # inside generate: of the past, and of the new tokens
    _inv_freq: dict = field(default_factory=dict)

    @property
    def limit(self) -> tuple[int | None, str]:
        """The most tokens that a trace may hold per sequence, and what sets that limit."""
        if self.window is None or (self.max_length is not None and self.max_length <= self.window):
            return self.max_length, "patch_model's max_length"
        return self.window, "the model's sliding window"

    def attention(self, index: int) -> nn.Module:
        """The attention module of a layer."""
        return attention_layers(self.body)[index]

    def pairs(self) -> list[tuple[nn.Module, Layer]]:
        return list(zip(attention_layers(self.body), self.layers))

    def inv_freq(self, device: torch.device) -> Tensor:
        """Rotary frequencies [Dr / 2], float32."""
        if device not in self._inv_freq:
            self._inv_freq[device] = self.body.rotary_emb.inv_freq.detach().to(device, torch.float32)
        return self._inv_freq[device]


# ---- finding the parts of a model ------------------------------------------------------------------------------------


def causal_lm_of(model: nn.Module) -> nn.Module:
    """The transformers model inside a PEFT model, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: nn.Module) -> nn.Module:
    """The stack of layers under the language-model head; raises Unsupported if it is not a transformers model."""
    causal_lm = causal_lm_of(model)
    if not isinstance(causal_lm, PreTrainedModel):
        raise Unsupported(f"diffmas cannot patch {type(model).__name__}: expected a transformers model, or PEFT around one")
    return causal_lm.base_model


def attention_layers(body: nn.Module) -> list[nn.Module]:
    """The attention modules by layer index; raises Unsupported unless there is exactly one for every layer."""
    found = {}
    for name, module in body.named_modules():
        if type(module).__name__.endswith("Attention") and isinstance(getattr(module, "layer_idx", None), int):
            if module.layer_idx in found:
                raise Unsupported(
                    f"diffmas cannot patch {type(body).__name__}: two attention modules are layer {module.layer_idx} ({name})"
                )
            found[module.layer_idx] = module
    layers = body.config.get_text_config().num_hidden_layers
    missing = [i for i in range(layers) if i not in found]
    if missing or len(found) != layers:
        raise Unsupported(
            f"diffmas cannot patch {type(body).__name__}: expected one self-attention in each of {layers} layers, "
            f"found none in layers {missing}; linear attention, convolution and state-space layers hold no K/V rows"
        )
    return [found[i] for i in range(layers)]


def patch_of(model: nn.Module) -> Patch:
    """The record of a patched model; raises ValueError for one that is not patched."""
    record = getattr(causal_lm_of(model), "_diffmas_patch", None)
    if record is None:
        raise ValueError(f"model: expected a patched model, got a plain {type(model).__name__}; call diffmas.patch_model first")
    return record


# ---- what is refused -------------------------------------------------------------------------------------------------


def _window(attention: nn.Module, config) -> int | None:
    """The sliding window of a layer, in tokens; None if it sees all of them."""
    window = getattr(attention, "sliding_window", None)
    types_ = getattr(config, "layer_types", None)
    slides = types_[attention.layer_idx] == "sliding_attention" if types_ else getattr(config, "use_sliding_window", True)
    return getattr(config, "sliding_window", None) if window is None and slides else window


def _unsupported(attention: nn.Module, config, max_length: int | None) -> list[str]:
    """Features of one layer that the ops do not have, as text; what no attribute reveals is left to the probe."""
    found = []
    types_ = getattr(config, "layer_types", None)
    if types_ and types_[attention.layer_idx] not in ("full_attention", "sliding_attention"):
        found.append(f"layer type {types_[attention.layer_idx]!r} [layer_types]")
    window = _window(attention, config)
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
    for name in ("attention_dropout", "attn_dropout"):
        dropout = getattr(attention, name, 0.0)
        dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
        if isinstance(dropout, float) and dropout > 0:
            found.append(f"attention dropout {dropout} [{name}]")
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


# ---- the body: padded batches in, packed tokens through the layers ---------------------------------------------------


def skip_mask(like: Tensor) -> Tensor:
    """A 4-D mask is passed on untouched by transformers' mask builders; ours is never read."""
    return like.new_empty((1, 1, 1, 1), dtype=torch.float32)


def run(module: nn.Module, plan: Plan, *, commit: bool = True, **inputs):
    """One forward of a patched body or causal LM over packed tokens (input_ids [1, n] or inputs_embeds [1, n, hidden])."""
    x = next(iter(inputs.values()))
    _check_forward(plan.trace._patch.body)
    output = module(
        **inputs, attention_mask=skip_mask(x), position_ids=plan.position_ids(x.device), use_cache=False, return_dict=True,
        diffmas_trace=plan,
    )  # fmt: skip
    if commit:
        plan.commit()
    return output


def _check_forward(body: nn.Module) -> None:
    """Refuses the ways of checkpointing that would give wrong gradients without a word."""
    if torch._C._current_graph_task_id() != -1:
        raise RuntimeError("a forward with a trace ran inside backward: checkpoint layers, not the whole model")
    if not (body.training and torch.is_grad_enabled()):
        return
    for module in body.modules():
        if getattr(module, "gradient_checkpointing", False):
            how = getattr(getattr(module, "_gradient_checkpointing_func", None), "keywords", {})
            if how.get("use_reentrant", False):
                raise RuntimeError(
                    "re-entrant activation checkpointing gives wrong gradients with a trace; call "
                    'model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})'
                )


def _new_token_mask(mask, B: int, S: int) -> Tensor | None:
    """The last S columns of a 2-D attention mask, as bool [B, S] on the CPU; None when nothing is padded."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < S:
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(f"attention_mask: expected a 2-D mask [{B}, at least {S}] with a trace, got {shape}")
    mask = mask[:, -S:].bool().cpu()
    return None if bool(mask.all()) else mask


def body_pre_hook(body, args, kwargs):
    if args:
        names = list(inspect.signature(type(body).forward).parameters)[1:]
        kwargs = {**dict(zip(names, args)), **kwargs}
    argument = cache_name(kwargs, Trace)
    if argument is None:
        return None
    trace = kwargs[argument]
    if trace._patch.body is not body:
        raise ValueError(f"{argument}: expected a trace of this model, got a trace of another model")
    if trace._patch.causal_lm.__dict__.get("_diffmas_patch") is not trace._patch:
        raise ValueError(f"{argument}: this model was patched again since the trace was made; make a new trace")
    if kwargs.get("output_attentions", body.config.output_attentions):
        raise ValueError("output_attentions: expected False with a trace, whose attention keeps no weights, got True")
    kwargs = {name: x for name, x in kwargs.items() if name != argument}
    x = kwargs.get("inputs_embeds") if kwargs.get("inputs_embeds") is not None else kwargs.get("input_ids")
    if x is None or x.shape[1] == 0:
        raise ValueError("input_ids: expected input_ids or inputs_embeds of at least one token")
    _check_forward(body)
    name = "inputs_embeds" if x is kwargs.get("inputs_embeds") else "input_ids"
    past, new = trace._patch.input_lengths
    if trace._patch.generating == "prompt" and x.shape[1] >= past + new:
        x = x[:, past:]  # assisted decoding begins with all of the input, what stands in for the past included
    B, S = x.shape[:2]
    valid = _new_token_mask(kwargs.get("attention_mask"), B, S)
    if valid is not None and not valid.any():
        raise ValueError("attention_mask: expected at least one token that is not padding, got none")
    positions = kwargs.get("position_ids")
    if trace._patch.generating or positions is None:
        positions = None  # the trace knows them: generate derives them from the mask, which knows no gaps
    else:
        if positions.shape[-1] != S or positions.numel() not in (S, B * S):
            raise ValueError(f"position_ids: expected [{B}, {S}], one per new token, got {list(positions.shape)}")
        positions = positions.expand(B, S).cpu()
        positions = positions.flatten() if valid is None else positions[valid]
    kind = trace._patch.generating or ("latent" if name == "inputs_embeds" else "prompt")
    if trace._patch.generating:
        trace._patch.generating = "text"  # the prompt is written by the first forward of a generate
    plan = trace.plan([S] * B if valid is None else valid.sum(1).tolist(), kind, positions)
    plan.padding = (valid if valid is None else valid.to(x.device), B, S)
    kwargs[name] = (x.flatten(0, 1) if valid is None else x[valid.to(x.device)])[None]
    kwargs.pop("cache_position", None)
    kwargs.update(
        attention_mask=skip_mask(x), position_ids=plan.position_ids(x.device), use_cache=False, diffmas_trace=plan,
    )  # fmt: skip
    return (), kwargs


def body_hook(body, args, kwargs, output):
    plan = kwargs.get("diffmas_trace")
    if not isinstance(plan, Plan) or plan.padding is None:
        return output
    plan.commit()
    valid, B, S = plan.padding

    def padded(h: Tensor) -> Tensor:  # [1, n, hidden] -> [B, S, hidden], zeros where there was padding
        if valid is None:
            return h.view(B, S, -1)
        return h.new_zeros(B, S, h.shape[-1]).masked_scatter(valid[..., None], h[0])

    if isinstance(output, tuple):  # the states of all layers, if asked for, are a tuple in it
        rest = (tuple(map(padded, x)) if isinstance(x, tuple) else x for x in output[1:])
        return (padded(output[0]), *rest)
    output.last_hidden_state = padded(output.last_hidden_state)
    if getattr(output, "hidden_states", None):
        output.hidden_states = tuple(padded(h) for h in output.hidden_states)
    setattr(output, "cache" if hasattr(output, "cache") else "past_key_values", plan.trace)
    return output


# ---- the door --------------------------------------------------------------------------------------------------------


def patch_model(model: nn.Module, backend: str = "auto", max_length: int | None = None) -> nn.Module:
    """Makes `model` (transformers, or PEFT around one) take a `diffmas.Trace` as past_key_values. In place; returns it.

    backend: "auto", or one of `diffmas.ops.BACKENDS`. max_length: the most tokens a trace of this model may hold per
    sequence; with it, sliding windows at least that long are accepted. Without it, a window must be as long as the model's
    context, and is what limits a trace.

    Raises Unsupported (a ValueError) naming layer and feature for a model that needs what diffmas does not do; the model
    is then as it was. Patching again with the same arguments does nothing.
    """
    ops.check_backend(backend)
    if max_length is not None and max_length < 1:
        raise ValueError(f"max_length: expected at least 1 token or None, got {max_length}")
    causal_lm, body = causal_lm_of(model), body_of(model)
    previous = getattr(causal_lm, "_diffmas_patch", None)
    if previous is not None:
        if (previous.backend, previous.max_length) == (backend, max_length):
            return model
        unpatch_model(model)
    try:
        record = _examine(causal_lm, body, backend, max_length)
    except Exception:
        if previous is not None:
            _install(previous)
        raise
    _install(record)
    tiers = sorted({f"{type(a).__name__} {'fused' if x.family else 'generic'}" for a, x in record.pairs()})
    logger.info("diffmas: patched %d layers of %s (%s)", len(record.layers), type(causal_lm).__name__, ", ".join(tiers))
    return model


def _examine(causal_lm: nn.Module, body: nn.Module, backend: str, max_length: int | None) -> Patch:
    """The record of a model that can be patched; changes nothing."""
    attentions = attention_layers(body)
    text_config = body.config.get_text_config()
    for attention in attentions:
        forward = attention.__dict__.get("_old_forward" if hasattr(attention, "_hf_hook") else "forward")
        # accelerate leaves the class's own forward on the instance
        if forward is not None and getattr(forward, "__func__", None) is not type(attention).forward:
            raise Unsupported(
                f"diffmas cannot patch {type(attention).__name__} (layer {attention.layer_idx}): its forward was replaced "
                "by someone else [forward]"
            )
        features = _unsupported(attention, text_config, max_length)
        if features:
            raise refuse(attention, features)
    windows = [w for a in attentions if (w := _window(a, text_config)) is not None]
    layers = probe.choose_tiers(body, attentions)
    return Patch(body, causal_lm, layers, backend, max_length, min(windows, default=None))


def _install(record: Patch) -> None:
    for attention, layer in record.pairs():
        install(attention, layer)
    pre = record.body.register_forward_pre_hook(body_pre_hook, with_kwargs=True)
    post = record.body.register_forward_hook(body_hook, with_kwargs=True)
    record.hook_ids = (pre.id, post.id)
    if hasattr(type(record.causal_lm), "generate"):
        record.causal_lm.generate = functools.partial(generate, record.causal_lm)
    record.causal_lm._diffmas_patch = record


def unpatch_model(model: nn.Module) -> nn.Module:
    """Undoes `patch_model`; returns the model. Raises ValueError if it is not patched."""
    record = patch_of(model)
    for attention, _ in record.pairs():
        uninstall(attention)
    pre, post = record.hook_ids
    for hooks, hook in (
        (record.body._forward_pre_hooks, pre), (record.body._forward_pre_hooks_with_kwargs, pre),
        (record.body._forward_hooks, post), (record.body._forward_hooks_with_kwargs, post),
    ):  # fmt: skip
        hooks.pop(hook, None)
    record.causal_lm.__dict__.pop("generate", None)
    record.causal_lm.__dict__.pop("_diffmas_patch")
    return model
