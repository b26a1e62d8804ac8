"""Rows of numbers, and back: kernels take [n, length], modules any number of dimensions before the last."""

import torch
from torch import Tensor

__all__ = ["rows_of_numbers", "unflattened"]


def rows_of_numbers(x: Tensor) -> Tensor:
    """[..., length] -> [n, length] whose rows are in one piece."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def unflattened(y: Tensor, x: Tensor) -> Tensor:
    """y [n, length] in the shape of x [..., any]. y is the caller's alone; what a function of autograd returns must not be a
    view, which nobody could change in place."""
    return torch.ops.aten._unsafe_view(y, (*x.shape[:-1], y.shape[-1]))
