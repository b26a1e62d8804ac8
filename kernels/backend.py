"""The op functions of the Triton backend, by the names of their counterparts in `diffmas.ops.reference`."""

from diffmas.kernels.cross_attention import (
    attention_work,
    cross_attention,
    cross_attention_backward,
    cross_attention_quantized,
    cross_attention_quantized_backward,
)
from diffmas.kernels.inject import inject, inject_backward
from diffmas.kernels.linear import (
    add_lora,
    gated_linears,
    linear,
    linear_gate_backward,
    linears,
    linears_backward,
    lora_grad,
)
from diffmas.kernels.merge_states import merge_states, merge_states_backward
from diffmas.kernels.pointwise import gate, gate_backward, norm, norm_backward
from diffmas.kernels.reposition import reposition, reposition_backward

__all__ = [
    "add_lora",
    "attention_work",
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_quantized",
    "cross_attention_quantized_backward",
    "gate",
    "gate_backward",
    "gated_linears",
    "inject",
    "inject_backward",
    "linear",
    "linear_gate_backward",
    "linears",
    "linears_backward",
    "lora_grad",
    "merge_states",
    "merge_states_backward",
    "norm",
    "norm_backward",
    "reposition",
    "reposition_backward",
]
