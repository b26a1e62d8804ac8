"""The types of PTX in numpy. A register holds an array of one number per thread; instructions say how its bits are read."""

import numpy as np

from ptx.text import Fault

__all__ = ["IN_FLIGHT", "TYPES", "UNSIGNED", "UNWRITTEN", "from_bfloat16", "read", "to_bfloat16"]

# numpy has no bfloat16: its bits are uint16 here, converted where an instruction computes with them
TYPES = {
    name: np.dtype(kind)
    for name, kind in dict(
        pred=bool, b8="u1", u8="u1", s8="i1", b16="u2", u16="u2", s16="i2", f16="f2", bf16="u2", b32="u4", u32="u4", s32="i4",
        f32="f4", f16x2="u4", bf16x2="u4", b64="u8", u64="u8", s64="i8", f64="f8",
    ).items()
}  # fmt: skip
UNSIGNED = {1: np.dtype("u1"), 2: np.dtype("u2"), 4: np.dtype("u4"), 8: np.dtype("u8")}


def read(value: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """The bits of a register as numbers of a type; the lower ones if the register is wider, zeros above if it is narrower."""
    if value.dtype is dtype:
        return value
    if value.dtype.itemsize == dtype.itemsize:
        return value.view(dtype)
    if "b" in (dtype.kind, value.dtype.kind):
        raise Fault(f"a predicate and {dtype} are mixed")
    return value.view(UNSIGNED[value.dtype.itemsize]).astype(UNSIGNED[dtype.itemsize]).view(dtype)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    """uint16 -> float32."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
    """float32 -> uint16, to the nearest, ties to even."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


class Missing:
    """In a register that has no number: whatever is done with it is a fault."""

    def __init__(self, why: str):
        self.why = why

    def __getattr__(self, name):
        raise Fault(self.why)


IN_FLIGHT = Missing("the result of a product is used before it was waited for")
UNWRITTEN = Missing("a register is read that nothing was written to")
