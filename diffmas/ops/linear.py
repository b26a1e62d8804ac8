"""A linear layer with a LoRA adapter as one op: y = x W' + bias + scale (x a') b', and its transpose, which takes the gradient
back: dy W + scale (dy b) a.

With few rows, reading W is what takes the time, and the kernel reads it once. With many, W's product is torch's, and LoRA's two
small ones go over x and y where they lie, with no float32 copy of either. Kernels: the CPU's, or those of
diffmas.ops.layer.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.ops.backends import BACKENDS

__all__ = ["FEW_ROWS", "Adapter", "Parts", "linear", "lora_grads", "rows_of"]

CPU = BACKENDS["cpu"].ops
# Against torch on one core of a Zen 4, weights of 192 x 576 to 2048 x 2048 that come from memory: bfloat16 forward
# 4.2-2.1x with one row, 2.7-1.7x with 12, 1.6-1.3x with 32, to the input 3.4-2.5x, 2.0-1.7x and 1.2-1.1x; float32 forward
# 1.9-1.4x, 2.3-2.0x and 1.6-1.4x, to the input 2.3-1.8x and 1.5-1.2x; one row of it stays torch's (1.4-0.7x).
# On a GPU a guess: as many rows as its kernel keeps sums of.
FEW_ROWS = 32


class Adapter(NamedTuple):
    """a [r, in] and b [out, r] in float32."""

    a: Tensor
    b: Tensor
    scale: float


class Parts(NamedTuple):
    """weight [out, in], bias [out]. adapters: none, one, or several, of which each has a part of the rows."""

    weight: Tensor
    bias: Tensor | None
    adapters: tuple[Adapter, ...] = ()

    @property
    def alone(self) -> tuple:
        """weight, bias, a, b and scale, where there is one adapter at most."""
        return (*self[:2], *(self.adapters[0] if self.adapters else NO_ADAPTER))


NO_ADAPTER = (None, None, 0.0)


def rows_of(adapters: Sequence, ends: Sequence[int] | None, x: Tensor) -> list[Tensor]:
    """The rows of x [n, length] that each adapter has. ends: where those of each of several end; raises RuntimeError where
    they do not fit, rather than giving an adapter rows that are not its own."""
    if len(adapters) <= 1:
        return [x] * len(adapters)
    if ends is None or len(ends) != len(adapters) or ends[-1] != len(x):
        raise RuntimeError(
            f"{len(adapters)} adapters: expected a forward pass that says where of {len(x)} rows those of each end, got "
            f"{ends}; a system whose `together` is False takes agents one by one"
        )
    return [x[begin:end] for begin, end in zip((0, *ends), ends)]


def linear(
    x: Tensor, parts: Parts, ends: Sequence[int] | None = None, transposed: bool = False, ops=CPU
) -> tuple[Tensor, list[Tensor]]:
    """x [n, in] of weight's dtype. -> y [n, out], and of each adapter x a' [its rows, r] float32; transposed: of dy [n, out],
    dx [n, in] and dy b. ends: as `rows_of` takes them."""
    if x.stride(1) != 1:
        x = x.contiguous()
    weight, bias, adapters = parts
    torchs = ops is CPU and transposed and x.shape[0] == 1 and x.dtype == torch.float32
    if x.shape[0] > FEW_ROWS or torchs:
        y = torch.mm(x, weight) if transposed else torch.nn.functional.linear(x, weight, bias)
    elif len(adapters) == 1:
        y, u = ops.linear(x, weight, bias, *adapters[0], transposed)
        return y, [u]
    else:
        y, _ = ops.linear(x, weight, bias, *NO_ADAPTER, transposed)
    rows = zip(rows_of(adapters, ends, y), rows_of(adapters, ends, x), adapters)
    return y, [ops.add_lora(to, own, *adapter, transposed) for to, own, adapter in rows]


def lora_grads(x: Tensor, u: Tensor, dy: Tensor, v: Tensor, scale: float, ops=CPU) -> tuple[Tensor, Tensor]:
    """da [r, in] and db [out, r] of what `linear` gave: y, u of x and dx, v of dy."""
    x, dy = (z if z.stride(1) == 1 else z.contiguous() for z in (x, dy))  # a sum's gradient has strides of 0
    return ops.lora_grad(v, x, scale), ops.lora_grad(u, dy, scale).t().contiguous()
