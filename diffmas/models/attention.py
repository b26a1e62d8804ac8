"""How an attention layer reads and writes a trace: the table of fused families, and the generic tier.

*Fused*: one call for norm, RoPE, the K/V write and attention, for the families of FAMILIES. *Generic*: the layer
computes q, k and v its own way and only its attention function is replaced. Both leave calls without a trace as they were.
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from diffmas.models.joined import same_rows
from diffmas.models.local import is_part, of_all_heads
from diffmas.models.support import dropout_in_training, refuse
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.spec import LayerSpec

__all__ = ["FAMILIES", "Family", "FusedForward", "Layer", "attend", "install", "uninstall"]


# ---- the fused families ----------------------------------------------------------------------------------------------


def _llama4_scale(attention: nn.Module, position_ids: Tensor) -> Tensor:
    """Ministral 3 scales queries beyond its pre-training length: [1, n, 1]."""
    rope = attention.config.rope_parameters
    beta, length = rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"]
    return (1 + beta * torch.log(1 + torch.floor(position_ids / length))).view(1, -1, 1)


@dataclass(frozen=True)
class Family:
    """What an attention class looks like, where it differs from Llama's.

    qkv: the name of one fused projection, rows ordered q, k, v. norm: per-head RMSNorm modules q_norm and k_norm before
    RoPE. query_scale: (attention, position_ids) -> factor on q.
    """

    qkv: str | None = None
    norm: bool = False
    query_scale: Callable | None = None

    def project(self, attention: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [1, n, hidden] -> q [1, n, Hq * D], k, v [1, n, Hkv * D]."""
        modules = attention._modules
        if self.qkv is None:
            projections = modules["q_proj"], modules["k_proj"], modules["v_proj"]
            together = same_rows(projections, x)
            return tuple(linear(module, x) for module in projections) if together is None else together
        D, config = attention.head_dim, attention.config
        Hq, Hkv = config.num_attention_heads, config.num_key_value_heads
        return linear(modules[self.qkv], x).split((Hq * D, Hkv * D, Hkv * D), dim=-1)

    def norms(self, attention: nn.Module) -> tuple[Tensor | None, Tensor | None, float]:
        """q_weight, k_weight [D] and eps of the norms before RoPE; raises RuntimeError where they are offloaded."""
        if not self.norm:
            return None, None, 0.0
        q_norm, k_norm = attention._modules["q_norm"], attention._modules["k_norm"]
        q_weight, k_weight = q_norm._parameters["weight"], k_norm._parameters["weight"]
        if q_weight.is_meta:
            raise RuntimeError(
                f"layer {attention.layer_idx}: q_norm and k_norm are offloaded; the fused tier needs them in memory"
            )
        if "forward" in q_norm.__dict__ or is_part(q_weight):
            q_weight, k_weight = (of_all_heads(w, attention) for w in (q_weight, k_weight))
        return q_weight, k_weight, q_norm.variance_epsilon


# A new family is a line here; the probe says at patch time whether the line is right.
FAMILIES = {
    "LlamaAttention": Family(),
    "MistralAttention": Family(),
    "MinistralAttention": Family(),
    "Ministral3Attention": Family(query_scale=_llama4_scale),
    "MixtralAttention": Family(),
    "Qwen2Attention": Family(),
    "Qwen3Attention": Family(norm=True),
    "Qwen3MoeAttention": Family(norm=True),
    "Phi3Attention": Family(qkv="qkv_proj"),
}


@dataclass
class Layer(LayerSpec):
    """How one attention layer is served. family: None for the generic tier. config: the config object that it had."""

    family: Family | None = None
    config: object = None


# ---- attention with a trace ------------------------------------------------------------------------------------------


def linear(module: nn.Module, x: Tensor) -> Tensor:
    """module(x). A plain Linear that nobody hooks into goes straight to its product: for one token, a Module's own call takes
    two thirds of the product's time again."""
    if torch.compiler.is_compiling() or type(module) is not nn.Linear or "forward" in module.__dict__ or _has_any_global_hook():
        return module(x)
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return module(x)
    return F.linear(x, module._parameters["weight"], module._parameters["bias"])


class FusedForward:
    """The forward of one attention module. As a method of an object of its own it is copied and pickled with the module, while
    torch.compile knows it by its code: all layers share what is compiled, which no partial or closure allows.

    The host's time counts here: parts are taken from `_modules` and `_parameters`, since a Module's attributes are looked up in
    Python, each of them for as long as a small product takes.
    """

    def __init__(self, attention: nn.Module):
        self.attention = attention

    def forward(self, *args, **kwargs):
        """One call writes K/V, rotates q and attends. Without a trace: as it was."""
        attention, forward_pass = self.attention, kwargs.get("diffmas_trace")
        if forward_pass is None:
            return type(attention).forward(attention, *args, **kwargs)
        x = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]  # [1, n, hidden]
        cos, sin = kwargs["position_embeddings"] if "position_embeddings" in kwargs else args[1]  # [1, n, Dr]
        q, k, v = attention.diffmas_layer.family.project(attention, x)
        o = attend(attention, forward_pass, q, k, v, cos, sin, kwargs.get("position_ids"))
        return linear(attention._modules["o_proj"], o), None


def attend(attention: nn.Module, forward_pass: ForwardPass, q, k, v, cos, sin, position_ids: Tensor | None) -> Tensor:
    """What a layer's projections q [1, n, Hq * D], k and v [1, n, Hkv * D] read, with the pass's K/V written; as q is laid."""
    layer, n = attention.diffmas_layer, q.shape[1]
    family = layer.family
    if family.query_scale is not None:
        q = q * family.query_scale(attention, position_ids).to(q.dtype)
    q_weight, k_weight, eps = family.norms(attention)
    compiling = torch.compiler.is_compiling()
    if compiling:  # its op needs heads to know what it returns, and a view costs a graph nothing
        heads = (n, -1, attention.head_dim)
        q, k, v, cos, sin = q.view(heads), k.view(heads), v.view(heads), cos.squeeze(0), sin.squeeze(0)
    o = forward_pass.attend(layer, q, k, v, attention.scaling, cos, sin, q_weight, k_weight, eps)
    return o.view(1, n, -1) if compiling else o


def generic_attention(module, query, key, value, attention_mask, *args, diffmas_trace=None, **kwargs):
    """The attention function of the generic tier; query [1, Hq, n, D], key, value [1, Hkv, n, D], rotated."""
    if diffmas_trace is None:
        name = module.diffmas_layer.config._attn_implementation
        eager = sys.modules[type(module).__module__].__dict__.get("eager_attention_forward")
        attention = eager if name == "eager" else ALL_ATTENTION_FUNCTIONS[name]
        return attention(module, query, key, value, attention_mask, *args, **kwargs)
    for name in ("softcap", "s_aux", "position_bias", "indices", "head_mask"):
        if kwargs.get(name) is not None:
            raise refuse(module, [f"the attention argument {name}"])
    if kwargs.get("dropout"):
        raise dropout_in_training(module, kwargs["dropout"])
    if attention_mask is not None and attention_mask.numel() > 1:  # ours has one element, which nobody reads
        raise refuse(module, ["a mask that the layer makes for itself [attention_mask]"])
    scale = kwargs.get("scaling")
    # Norms that stay in float32 under autocast leave q and k wider than v.
    o = diffmas_trace.attend(
        module.diffmas_layer, *(x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)),
        query.shape[-1] ** -0.5 if scale is None else scale,
    )  # fmt: skip
    return o[None], None


GENERIC = "diffmas"
AttentionInterface.register(GENERIC, generic_attention)  # adds a name; a model uses it only after patch_model


def install(attention: nn.Module, layer: Layer) -> None:
    """Puts an attention module on its tier."""
    layer.config = attention.config
    layer.head_dim = getattr(attention, "head_dim", None) if layer.family else None
    attention.diffmas_layer = layer
    if layer.family is None:
        # The model's config stays, so transformers goes on building the right masks for calls without a trace.
        attention.config = copy.copy(attention.config)
        attention.config._attn_implementation_internal = GENERIC
        return
    method = FusedForward(attention).forward
    if hasattr(attention, "_hf_hook"):  # accelerate wrapped forward: go inside its wrapper
        attention._old_forward = method
    else:
        attention.forward = method


def uninstall(attention: nn.Module) -> None:
    layer = attention.__dict__.pop("diffmas_layer", None)
    if layer is None:
        return
    attention.config = layer.config
    if layer.family is None:
        return
    if hasattr(attention, "_hf_hook"):
        attention._old_forward = type(attention).forward.__get__(attention)
    else:
        attention.__dict__.pop("forward", None)
