"""A decoder layer of few rows, without gradients, as three ops: norm and q, k, v; attention; output, norm and feed-forward.

Reading its weights is most of what such a layer has to do; going from module to module takes as long again. The ops round where
the layer does. What is not of the common kind, hooked, adapted otherwise than with plain LoRA, or replaced runs as it is.
"""

import itertools

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.attention import attend
from diffmas.models.plain_layer import plain_layer
from diffmas.ops.linear import FEW_ROWS
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["few_rows"]


def few_rows(layer: nn.Module, forward_pass: ForwardPass, args: tuple, kwargs: dict) -> Tensor | None:
    """The output of a decoder layer whose forward was called with these arguments, x [1, n, hidden] first; None where the layer
    has to do it."""
    x = args[0] if args else kwargs["hidden_states"]
    if type(x) is not Tensor or not x.is_cpu or x.shape[1] > FEW_ROWS or not x.is_contiguous() or _has_any_global_hook():
        return None
    if "position_embeddings" not in kwargs or (plain := plain_layer(layer, x.dtype)) is None:
        return None
    attention, (before, after), linears = plain
    q, k, v = torch.ops.diffmas_native.norm_qkv(x, *before, *itertools.chain(*linears[:3]))
    o = attend(attention, forward_pass, q, k, v, *kwargs["position_embeddings"], kwargs.get("position_ids"))
    return torch.ops.diffmas_native.after_attention(o, x, *after, *itertools.chain(*linears[3:]))
