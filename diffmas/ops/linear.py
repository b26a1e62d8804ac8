"""A linear layer with a LoRA adapter as one op on the CPU: y = x W' + bias + scale (x a') b', and its transpose, which takes
the gradient back: dy W + scale (dy b) a.

With few rows, reading W is what takes the time, and the kernel reads it once. With many, W's product is torch's, and LoRA's two
small ones go over x and y where they lie, with no float32 copy of either.
"""

import torch
from torch import Tensor

from diffmas.ops import extension
from diffmas.ops.backends import AUTO

__all__ = ["available", "linear", "lora_grads", "serves"]

COLUMNS = 32  # row lengths are multiples of it
# Against torch on one core of a Zen 4, weights of 192 x 576 to 2048 x 2048 that come from memory: bfloat16 forward
# 4.2-2.1x with one row, 2.7-1.7x with 12, 1.6-1.3x with 32, to the input 3.4-2.5x, 2.0-1.7x and 1.2-1.1x; float32 forward
# 1.9-1.4x, 2.3-2.0x and 1.6-1.4x, to the input 2.3-1.8x and 1.5-1.2x; one row of it stays torch's (1.4-0.7x).
FEW_ROWS = 32


def available(backend: str) -> bool:
    """Whether the ops of a backend, or "auto", have it."""
    return extension.loaded and (AUTO if backend == "auto" else backend) in ("auto", "cpu")


def serves(weight: Tensor) -> bool:
    """weight [out, in]: of a device, dtype and shape that the kernels take."""
    out, length = weight.shape
    return (
        weight.device.type == "cpu" and weight.dtype in (torch.float32, torch.bfloat16) and weight.is_contiguous()
        and out % COLUMNS == 0 and length % COLUMNS == 0
    )  # fmt: skip


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, transposed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x [n, in] of weight's dtype, a [r, in] and b [out, r] float32 or None. -> y [n, out] and x a' [n, r] float32; transposed:
    of dy [n, out], dx [n, in] and dy b."""
    if x.stride(1) != 1:
        x = x.contiguous()
    if x.shape[0] <= FEW_ROWS and not (transposed and x.shape[0] == 1 and x.dtype == torch.float32):
        return torch.ops.diffmas_native.linear(x, weight, bias, a, b, scale, transposed)
    y = torch.mm(x, weight) if transposed else torch.nn.functional.linear(x, weight, bias)
    return y, None if a is None else torch.ops.diffmas_native.add_lora(y, x, a, b, scale, transposed)


def lora_grads(x: Tensor, u: Tensor, dy: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """da [r, in] and db [out, r] of what `linear` gave: y, u of x and dx, v of dy."""
    x, dy = (z if z.stride(1) == 1 else z.contiguous() for z in (x, dy))  # a sum's gradient has strides of 0
    grad = torch.ops.diffmas_native.lora_grad
    return grad(v, x, scale), grad(u, dy, scale).t().contiguous()
