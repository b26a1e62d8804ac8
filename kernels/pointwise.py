"""What a decoder layer does between its linears: RMSNorm and the gate of its feed-forward part, silu(gate) up, a launch each.

Only inputs are kept for the backward. Numbers are rounded where transformers' chain rounds them: x / rms(x) and silu(gate) have
the dtype of the rows before they are multiplied, in the backward the gradients to them.
"""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import FUSION, blocks
from diffmas.kernels.launch import Launch, ceil_div, on, once_per_shape, power_of_two

__all__ = ["gate", "gate_backward", "gate_gradients", "gated", "norm", "norm_backward"]


@triton.jit
def norm_fwd_kernel(x, weight, y, stride_x, D, eps, BLOCK_W: tl.constexpr):
    """A program has a row."""
    i_r, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_W)
    m_d = o_d < D
    b_x = tl.load(x + i_r * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)
    b_normed = (b_x * b_r).to(y.dtype.element_ty).to(tl.float32)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y + i_r * D + o_d, (b_w * b_normed).to(y.dtype.element_ty), mask=m_d)


@triton.jit
def norm_bwd_kernel(dy, x, weight, dx, stride_dy, stride_x, D, eps, BLOCK_W: tl.constexpr):
    """y = w (x r) with r = rsqrt(mean(x^2) + eps):  dx = r (g - x r^2 mean(g x)) for g = dy w."""
    i_r, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_W)
    m_d = o_d < D
    b_x = tl.load(x + i_r * stride_x + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dy = tl.load(dy + i_r * stride_dy + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_w = tl.load(weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_g = (b_w * b_dy).to(dx.dtype.element_ty).to(tl.float32)
    b_r = tl.rsqrt(tl.sum(b_x * b_x, 0) / D + eps)
    b_along = tl.sum(b_g * b_x, 0) * b_r * b_r / D
    tl.store(dx + i_r * D + o_d, (b_r * (b_g - b_x * b_along)).to(dx.dtype.element_ty), mask=m_d)


@triton.jit
def gated(b_gate, b_up, dtype: tl.constexpr):
    """silu(gate) up of float32 numbers, rounded to a dtype."""
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(dtype).to(tl.float32)
    return (b_silu * b_up).to(dtype)


@triton.jit
def gate_gradients(b_dy, b_gate, b_up, dtype: tl.constexpr):
    """The gradients to gate and up."""
    b_sigmoid = 1.0 / (1.0 + tl.exp(-b_gate))
    b_silu = (b_gate / (1.0 + tl.exp(-b_gate))).to(dtype).to(tl.float32)
    b_dsilu = (b_dy * b_up).to(dtype).to(tl.float32)
    b_dgate = b_dsilu * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid))
    return b_dgate.to(dtype), (b_dy * b_silu).to(dtype)


@triton.jit
def gate_fwd_kernel(gate, up, y, stride_gate, stride_up, D, BLOCK_W: tl.constexpr):
    """A program has a part of a row."""
    i_r, o_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_d = o_d < D
    b_gate = tl.load(gate + i_r * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_r * stride_up + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(y + i_r * D + o_d, gated(b_gate, b_up, y.dtype.element_ty), mask=m_d)


@triton.jit
def gate_bwd_kernel(dy, gate, up, dgate, dup, stride_dy, stride_gate, stride_up, D, BLOCK_W: tl.constexpr):
    i_r, o_d = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_W + tl.arange(0, BLOCK_W)
    m_d = o_d < D
    b_dy = tl.load(dy + i_r * stride_dy + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_gate = tl.load(gate + i_r * stride_gate + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_up = tl.load(up + i_r * stride_up + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_dgate, b_dup = gate_gradients(b_dy, b_gate, b_up, dgate.dtype.element_ty)
    tl.store(dup + i_r * D + o_d, b_dup, mask=m_d)
    tl.store(dgate + i_r * D + o_d, b_dgate, mask=m_d)


@once_per_shape
def norm_sizes(n, D) -> Launch:
    """A row is in the registers of a program: up to 16 numbers a thread."""
    block = power_of_two(D)
    return Launch((n,), dict(BLOCK_W=block, num_warps=min(max(block // 512, 1), 16)) | FUSION)


@once_per_shape
def gate_sizes(n, D) -> Launch:
    block = blocks("gate")
    return Launch((n, ceil_div(D, block["BLOCK_W"])), block)


def norm(x, weight, eps):
    """weight * (x / rms(x)), x [n, D] of any stride between rows, weight [D] of its dtype -> [n, D]."""
    n, D = x.shape
    y = torch.empty((n, D), dtype=x.dtype, device=x.device)
    if n:
        with on(x):
            norm_sizes(n, D)(norm_fwd_kernel, (x, weight, y), (x.stride(0), D, eps))
    return y


def norm_backward(dy, x, weight, eps):
    """The gradient to x; the weight is frozen."""
    n, D = x.shape
    dx = torch.empty((n, D), dtype=x.dtype, device=x.device)
    if n:
        with on(x):
            norm_sizes(n, D)(norm_bwd_kernel, (dy, x, weight, dx), (dy.stride(0), x.stride(0), D, eps))
    return dx


def gate(gate, up):
    """silu(gate) * up, both [n, D] of any strides between rows -> [n, D]."""
    n, D = gate.shape
    y = torch.empty((n, D), dtype=gate.dtype, device=gate.device)
    if n:
        with on(gate):
            gate_sizes(n, D)(gate_fwd_kernel, (gate, up, y), (gate.stride(0), up.stride(0), D))
    return y


def gate_backward(dy, gate, up):
    """The gradients to gate and up."""
    n, D = gate.shape
    dgate, dup = (torch.empty((n, D), dtype=gate.dtype, device=gate.device) for _ in range(2))
    if n:
        with on(gate):
            strides = dy.stride(0), gate.stride(0), up.stride(0)
            gate_sizes(n, D)(gate_bwd_kernel, (dy, gate, up, dgate, dup), (*strides, D))
    return dgate, dup
