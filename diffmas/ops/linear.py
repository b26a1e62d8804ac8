"""A linear layer with a LoRA adapter as one op: y = x W' + bias + scale (x a') b', and its transpose, which takes the gradient
back: dy W + scale (dy b) a.

With few rows, reading W is what takes the time, and the kernel reads it once. With many, W's product is torch's, and LoRA's two
small ones go over x and y where they lie, with no float32 copy of either. Kernels: the CPU's, or those of
diffmas.ops.layer.
"""

import torch
from torch import Tensor

from diffmas.ops.backends import BACKENDS

__all__ = ["FEW_ROWS", "linear", "lora_grads"]

CPU = BACKENDS["cpu"].ops
# Against torch on one core of a Zen 4, weights of 192 x 576 to 2048 x 2048 that come from memory: bfloat16 forward
# 4.2-2.1x with one row, 2.7-1.7x with 12, 1.6-1.3x with 32, to the input 3.4-2.5x, 2.0-1.7x and 1.2-1.1x; float32 forward
# 1.9-1.4x, 2.3-2.0x and 1.6-1.4x, to the input 2.3-1.8x and 1.5-1.2x; one row of it stays torch's (1.4-0.7x).
# On a GPU a guess: as many rows as its kernel keeps sums of.
FEW_ROWS = 32


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor | None, b: Tensor | None, scale: float, transposed: bool = False,
    ops=CPU,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """x [n, in] of weight's dtype, a [r, in] and b [out, r] float32 or None. -> y [n, out] and x a' [n, r] float32; transposed:
    of dy [n, out], dx [n, in] and dy b."""
    if x.stride(1) != 1:
        x = x.contiguous()
    torchs = ops is CPU and transposed and x.shape[0] == 1 and x.dtype == torch.float32
    if x.shape[0] <= FEW_ROWS and not torchs:
        return ops.linear(x, weight, bias, a, b, scale, transposed)
    y = torch.mm(x, weight) if transposed else torch.nn.functional.linear(x, weight, bias)
    return y, None if a is None else ops.add_lora(y, x, a, b, scale, transposed)


def lora_grads(x: Tensor, u: Tensor, dy: Tensor, v: Tensor, scale: float, ops=CPU) -> tuple[Tensor, Tensor]:
    """da [r, in] and db [out, r] of what `linear` gave: y, u of x and dx, v of dy."""
    x, dy = (z if z.stride(1) == 1 else z.contiguous() for z in (x, dy))  # a sum's gradient has strides of 0
    return ops.lora_grad(v, x, scale), ops.lora_grad(u, dy, scale).t().contiguous()
