"""What every launcher needs: dtypes as Triton names them, the device to launch on."""

import contextlib
import functools
import os

import torch
import triton.language as tl
from torch import Tensor

__all__ = ["accumulator", "dot_dtype", "interpreting", "on_device", "processors"]

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def dot_dtype(*operands: Tensor) -> tl.dtype:
    """The dtype that products of these are taken in: the widest; float32 where bfloat16 is storage only."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in operands))
    return tl.float32 if widest == torch.bfloat16 and interpreting() else TYPES[widest]


def on_device(x: Tensor):
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; in the interpreter a few, so that splits are taken."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
