"""The four ops of diffmas on tensors, `inject`, `cross_attention`, `merge_states` and `reposition`, and their backends."""

from diffmas.ops import register  # noqa: F401  defines torch.ops.diffmas
from diffmas.ops.api import cross_attention, inject, merge_states, reposition
from diffmas.ops.backends import BACKENDS, available, check_backend, implementation
from diffmas.ops.quantize import dequantize, quantize

__all__ = [
    "BACKENDS",
    "available",
    "check_backend",
    "cross_attention",
    "dequantize",
    "implementation",
    "inject",
    "merge_states",
    "quantize",
    "reposition",
]
