"""Triton's interpreter keeps bfloat16 as its bits, cuts instead of rounding, and multiplies the bits. Here it does it right."""

import contextlib

import pytest
import triton.language as tl
from ptx.numbers import from_bfloat16, to_bfloat16
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from diffmas import ops

__all__ = ["interpreted_bfloat16"]


@contextlib.contextmanager
def interpreted_bfloat16():
    """Casts from and to bfloat16 and products of it are right, and the Triton backend takes it. Arithmetic is not: kernels
    convert after a load and before a store."""
    cast, to_float, dot = (getattr(InterpreterBuilder, name) for name in ("cast_impl", "create_fp_to_fp", "create_dot"))

    def widened(x):
        return TensorHandle(from_bfloat16(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x

    def new_cast(builder, x, wanted):
        if x.dtype.scalar == wanted.scalar:
            return cast(builder, x, wanted)
        if wanted.scalar == tl.bfloat16:
            return TensorHandle(to_bfloat16(cast(builder, x, tl.float32).data), tl.bfloat16)
        return cast(builder, widened(x), wanted)

    def new_to_float(builder, x, wanted, rounding):
        short = tl.bfloat16 in (x.dtype.scalar, wanted.scalar)
        return new_cast(builder, x, wanted) if short else to_float(builder, x, wanted, rounding)

    def new_dot(builder, a, b, *rest):
        return dot(builder, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        for name, function in {"cast_impl": new_cast, "create_fp_to_fp": new_to_float, "create_dot": new_dot}.items():
            patch.setattr(InterpreterBuilder, name, function)
        patch.setattr(ops.BACKENDS["triton"], "dtypes", None)
        yield
