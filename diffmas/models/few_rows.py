"""A decoder layer of few rows as three parts: norm and q, k, v; attention; output, norm and feed-forward.

Reading its weights is most of what such a layer has to do; going from module to module takes as long again. Without gradients
a part is an op, and in a latent step with gradients a node of autograd. They round where the layer does. What is not of the
common kind, hooked, adapted otherwise than with plain LoRA, or replaced runs as it is.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.attention import FusedForward, attend
from diffmas.models.few_rows_learning import AfterAttention, Learning, NormedLinears
from diffmas.models.kinds import is_plain, kind_of
from diffmas.models.linear_parts import is_ours, parts_of, waiting
from diffmas.ops.linear import FEW_ROWS
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["few_rows"]

CAPTURING = "transformers.utils.output_capturing"


def _seen(attention: nn.Module) -> bool:
    """Whether somebody hooks into it. transformers leaves hooks behind that collect attention weights, of which a trace has
    none, once it was asked for hidden states."""
    hooks = attention._forward_hooks.values()
    others = attention._forward_pre_hooks or attention._backward_hooks or attention._backward_pre_hooks
    return bool(others) or any(getattr(hook, "__module__", None) != CAPTURING for hook in hooks)


def _linear(module: nn.Module, dtype: torch.dtype):
    """Its parts, where nobody else sees or does anything."""
    if module._forward_hooks or module._forward_pre_hooks or not is_ours(module.__dict__.get("forward")):
        return None
    if module._backward_hooks or module._backward_pre_hooks:
        return None
    parts = parts_of(module)
    return parts if parts is not None and parts[0].dtype == dtype else None


def _norm(module: nn.Module, like: Tensor):
    """Its weight and eps."""
    if not is_plain(module, "RMSNorm"):
        return None
    weight = module._parameters["weight"]
    right = type(weight) is nn.Parameter and weight.dtype == like.dtype and weight.device == like.device
    right = right and weight.is_contiguous() and not (weight.requires_grad and torch.is_grad_enabled())
    return (weight, module.variance_epsilon) if right else None


def _learning(linears: list[tuple], forward_pass: ForwardPass) -> list[Learning] | None:
    """None where the gradients of an adapter do not wait."""
    found = []
    for parts in linears:
        weights = parts[2:4]
        waits = waiting(*weights, parts[4], forward_pass)
        if waits is None and any(w is not None and w.requires_grad for w in weights):
            return None
        found.append(Learning(parts, waits))
    return found


def few_rows(layer: nn.Module, forward_pass: ForwardPass, args: tuple, kwargs: dict) -> Tensor | None:
    """The output of a decoder layer whose forward was called with these arguments, x [1, n, hidden] first; None where the layer
    has to do it."""
    x = args[0] if args else kwargs["hidden_states"]
    if type(x) is not Tensor or not x.is_cpu or x.shape[1] > FEW_ROWS or not x.is_contiguous():
        return None
    if kind_of(layer) != "DecoderLayer" or _has_any_global_hook():
        return None
    if "position_embeddings" not in kwargs:
        return None
    modules = layer._modules
    attention, mlp = modules["self_attn"], modules["mlp"]
    forward = getattr(attention.__dict__.get("forward"), "__self__", None)
    if type(forward) is not FusedForward or attention.diffmas_layer.family.qkv is not None:
        return None
    if _seen(attention) or not is_plain(mlp, "MLP"):
        return None
    projections, inner, dtype = attention._modules, mlp._modules, x.dtype
    before, after = _norm(modules["input_layernorm"], x), _norm(modules["post_attention_layernorm"], x)
    if before is None or after is None or not is_plain(inner["act_fn"], "SiLU"):
        return None
    linears = []
    for module in (
        projections["q_proj"], projections["k_proj"], projections["v_proj"], projections["o_proj"], inner["gate_proj"],
        inner["up_proj"], inner["down_proj"],
    ):  # fmt: skip
        parts = _linear(module, dtype)
        if parts is None:
            return None
        linears.append(parts)
    if torch.is_grad_enabled():
        learning = _learning(linears, forward_pass) if x.requires_grad else None
        if learning is None:
            return None
        q, k, v = NormedLinears.apply(x, before, learning[:3], *(one.token for one in learning[:3]))
    else:
        q, k, v = torch.ops.diffmas_native.norm_qkv(x, *before, *itertools.chain(*linears[:3]))
    o = attend(attention, forward_pass, q, k, v, *kwargs["position_embeddings"], kwargs.get("position_ids"))
    if torch.is_grad_enabled():
        return AfterAttention.apply(o, x, after, learning[3:], *(one.token for one in learning[3:]))
    return torch.ops.diffmas_native.after_attention(o, x, *after, *itertools.chain(*linears[3:]))
