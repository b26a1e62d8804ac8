"""Rows of K and V in 8 or 4 bits: a small number for each element and one scale for each row and head.

A row x [D] becomes payload [D] and scale, x ~ payload * scale. Symmetric: zero stays zero, and the largest element gets the
largest payload. A row that is not finite has zeros and the scale NaN, so it reads as NaN; a payload is never NaN.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmas import formats
from diffmas.ops.reference import accumulator

__all__ = ["FORMATS", "PAYLOADS", "Format", "dequantize", "pack", "quantize", "unpack"]


class Format(NamedTuple):
    """payload: its dtype; most: its largest magnitude."""

    payload: torch.dtype
    most: int


FORMATS = {name: Format(getattr(torch, payload), most) for name, (payload, most) in formats.FORMATS.items()}
PAYLOADS = (torch.int8, torch.float8_e4m3fn)


def quantize(x: Tensor, bits: str = "int8") -> tuple[Tensor, Tensor]:
    """Rows x [..., D] of floats -> payload [..., D] and scale [...] float32. bits: "int8", "fp8" (e4m3) or "int4".

    Raises ValueError for other bits.

        >>> payload, scale = quantize(torch.tensor([[0.0, -2.54, 1.27]]))
        >>> payload.tolist(), round(float(scale), 4)
        ([[0, -127, 64]], 0.02)
    """
    form = format_of(bits)
    x = x.to(accumulator(x.dtype))
    scale = (x.abs().amax(-1) / form.most).float()
    finite = scale.isfinite()
    by = scale.masked_fill((scale == 0) | ~finite, 1).to(x.dtype)[..., None]
    y = (x / by).masked_fill(~finite[..., None], 0).clamp(-form.most, form.most)
    y = y.float() if form.payload.is_floating_point else y.round()
    return y.to(form.payload), scale.masked_fill(~finite, torch.nan)


def dequantize(payload: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The rows that payload [..., D] and scale [...] stand for."""
    acc = accumulator(dtype)
    return (payload.to(acc) * scale.to(acc)[..., None]).to(dtype)


def format_of(bits: str) -> Format:
    if bits not in FORMATS:
        raise ValueError(f"bits: expected one of {sorted(FORMATS)}, got {bits!r}")
    return FORMATS[bits]


def pack(payload: Tensor) -> Tensor:
    """int4 payload [..., D] as bytes [..., ceil(D / 2)], the even elements in the low halves."""
    if payload.shape[-1] % 2:
        payload = torch.nn.functional.pad(payload, (0, 1))
    low, high = payload[..., 0::2], payload[..., 1::2]
    return (low & 15 | high << 4).view(torch.uint8)


def unpack(packed: Tensor, D: int) -> Tensor:
    """What `pack` was given, [..., D] int8."""
    halves = torch.stack((packed.view(torch.int8) << 4, packed.view(torch.int8)), -1).flatten(-2) >> 4
    return halves[..., :D].contiguous()
