"""What a decoder layer of the common kind is made of, where nobody hooks into it and its adapters are plain LoRA."""

from collections.abc import Collection
from typing import NamedTuple

import torch
from torch import nn

from diffmas.models.attention import FusedForward
from diffmas.models.kinds import is_plain, kind_of
from diffmas.models.linear_parts import unseen_parts
from diffmas.ops.layer import LayerOps
from diffmas.ops.linear import Parts

__all__ = ["PlainLayer", "hooked_by_others", "plain_layer"]

CAPTURING = "transformers.utils.output_capturing"
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class PlainLayer(NamedTuple):
    """attention: the module. norms: weight and eps of the one before attention and of the one after it. linears: q, k, v,
    output, gate, up and down."""

    attention: nn.Module
    norms: list[tuple]
    linears: list[Parts]


def hooked_by_others(module: nn.Module, own: Collection[int | None] = ()) -> bool:
    """Whether somebody hooks into its calls. own: the ids of hooks that do not count. transformers leaves hooks behind that
    collect attention weights, of which a trace has none, and hidden states, which whoever asks for them gets in another way,
    once it was asked for hidden states."""
    for hooks in (module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks):
        if hooks and not hooks.keys() <= set(own):
            return True
    after = module._forward_hooks.items()
    return any(i not in own and getattr(hook, "__module__", None) != CAPTURING for i, hook in after)


def _norm(module: nn.Module, kernels: LayerOps):
    """Its weight and eps."""
    if not is_plain(module, "RMSNorm"):
        return None
    weight = module._parameters["weight"]
    right = type(weight) is nn.Parameter and kernels.takes_weight(weight)
    return (weight, module.variance_epsilon) if right and not (weight.requires_grad and torch.is_grad_enabled()) else None


def plain_layer(layer: nn.Module, kernels: LayerOps) -> PlainLayer | None:
    """None where it has to run as it is."""
    if kind_of(layer) != "DecoderLayer":
        return None
    modules = layer._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    forward = getattr(attention.__dict__.get("forward"), "__self__", None)
    if type(forward) is not FusedForward or attention.diffmas_layer.family.qkv is not None:
        return None
    if hooked_by_others(attention) or not is_plain(mlp, "MLP"):
        return None
    projections, inner = attention._modules, mlp._modules
    norms = [_norm(modules[name], kernels) for name in ("input_layernorm", "post_attention_layernorm")]
    if None in norms or not is_plain(inner["act_fn"], "SiLU"):
        return None
    linears = []
    for name in LINEARS:
        parts = unseen_parts(projections[name] if name in projections else inner[name], kernels)
        if parts is None:
            return None
        linears.append(parts)
    return PlainLayer(attention, norms, linears)
