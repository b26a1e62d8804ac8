"""What the launchers share."""

import contextlib
import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "accumulator", "ceil_div", "dot_dtype", "interpreting", "on", "once_per_shape", "power_of_two", "processors", "rows_of",
]  # fmt: skip

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}
NOTHING = contextlib.nullcontext()

# Grids, constants and tiles follow from shapes and dtypes: looking them up is faster than computing them, and every layer and
# latent step asks for the same ones. Bounded, because the number of tokens differs from batch to batch.
once_per_shape = functools.lru_cache(maxsize=4096)


def on(x: Tensor):
    """Launch on the GPU of `x`. Nothing to do where that one is current, or for the interpreter on a CPU."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return NOTHING


def interpreting() -> bool:
    """Triton's interpreter runs the kernels: TRITON_INTERPRET was set when they were imported."""
    return triton.knobs.runtime.interpret


def accumulator(dtype: torch.dtype):
    """As `reference.accumulator`, in Triton's terms; float64 is for the interpreter's gradient checks."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def dot_dtype(*operands: torch.dtype):
    """The dtype of products: the widest of the operands'."""
    return TYPES[functools.reduce(torch.promote_types, operands)]


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a few without a GPU, so that the interpreter runs splits."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def ceil_div(a: int, b: int) -> int:
    """As triton.cdiv, which takes microseconds on the host."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n and 1."""
    return 1 << max(n - 1, 0).bit_length()


def rows_of(x: Tensor) -> Tensor:
    """`x` with a last stride of 1, as the kernels expect. A gradient that autograd expanded has stride 0."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
