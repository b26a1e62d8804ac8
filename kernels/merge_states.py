"""merge_states: attention over the union of two views from the states of each. A row is one (token, head)."""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import blocks
from diffmas.kernels.launch import Launch, accumulator, ceil_div, on, once_per_shape, power_of_two, rows_of

__all__ = ["merge_states", "merge_states_backward"]


@triton.jit
def base_of(lse):
    """What weights are relative to. For an empty union -inf - -inf would be NaN."""
    return tl.where(lse == -float("inf"), 0.0, lse)


@triton.jit(do_not_specialize=["rows"])
def merge_states_fwd_kernel(
    o_a, lse_a, o_b, lse_b, o, lse, rows,
    stride_an, stride_ah, stride_bn, stride_bh,
    H: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = i_r < rows
    b_la = tl.load(lse_a + i_r, mask=m_r, other=0.0).to(ACC)
    b_lb = tl.load(lse_b + i_r, mask=m_r, other=0.0).to(ACC)
    b_max = tl.maximum(b_la, b_lb, propagate_nan=tl.PropagateNan.ALL)
    b_min = tl.minimum(b_la, b_lb, propagate_nan=tl.PropagateNan.ALL)
    b_lse = b_max + tl.log(1.0 + tl.exp(b_min - base_of(b_max)))
    tl.store(lse + i_r, b_lse, mask=m_r)
    b_base = base_of(b_lse)
    b_wa, b_wb = tl.exp(b_la - b_base)[:, None], tl.exp(b_lb - b_base)[:, None]

    o_d = tl.arange(0, BLOCK_D)[None, :]
    i_r = i_r[:, None]
    i_t, i_h = i_r // H, i_r % H
    m_x = m_r[:, None] & (o_d < D)
    b_a = tl.load(o_a + i_t * stride_an + i_h * stride_ah + o_d, mask=m_x, other=0.0).to(ACC)
    b_b = tl.load(o_b + i_t * stride_bn + i_h * stride_bh + o_d, mask=m_x, other=0.0).to(ACC)
    tl.store(o + i_r * D + o_d, (b_wa * b_a + b_wb * b_b).to(o.dtype.element_ty), mask=m_x)


@triton.jit
def side_backward(
    p_o, lse_x, do_x, dlse_x, i_r, m_r, m_x, b_do, b_dlse, b_o, b_base,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """do and dlse of one of the two states, whose weight is w = exp(lse_x - lse)."""
    o_d = tl.arange(0, BLOCK_D)[None, :]
    b_w = tl.exp(tl.load(lse_x + i_r, mask=m_r, other=0.0).to(ACC) - b_base)
    b_x = tl.load(p_o + o_d, mask=m_x, other=0.0).to(ACC)
    b_dot = tl.sum(b_do * (b_x - b_o), 1)
    tl.store(dlse_x + i_r, (b_w * (b_dot + b_dlse)).to(dlse_x.dtype.element_ty), mask=m_r)
    tl.store(do_x + i_r[:, None] * D + o_d, (b_w[:, None] * b_do).to(do_x.dtype.element_ty), mask=m_x)


@triton.jit(do_not_specialize=["rows"])
def merge_states_bwd_kernel(
    do, dlse, o_a, lse_a, o_b, lse_b, o, lse, do_a, dlse_a, do_b, dlse_b, rows,
    stride_dn, stride_dh, stride_an, stride_ah, stride_bn, stride_bh, stride_on, stride_oh,
    H: tl.constexpr, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)[None, :]
    i_t, i_h = (i_r // H)[:, None], (i_r % H)[:, None]
    m_r = i_r < rows
    m_x = m_r[:, None] & (o_d < D)
    b_dlse = tl.load(dlse + i_r, mask=m_r, other=0.0).to(ACC)
    b_base = base_of(tl.load(lse + i_r, mask=m_r, other=0.0).to(ACC))
    b_do = tl.load(do + i_t * stride_dn + i_h * stride_dh + o_d, mask=m_x, other=0.0).to(ACC)
    b_o = tl.load(o + i_t * stride_on + i_h * stride_oh + o_d, mask=m_x, other=0.0).to(ACC)
    p_a, p_b = o_a + i_t * stride_an + i_h * stride_ah, o_b + i_t * stride_bn + i_h * stride_bh
    side_backward(p_a, lse_a, do_a, dlse_a, i_r, m_r, m_x, b_do, b_dlse, b_o, b_base, D, BLOCK_D, ACC)
    side_backward(p_b, lse_b, do_b, dlse_b, i_r, m_r, m_x, b_do, b_dlse, b_o, b_base, D, BLOCK_D, ACC)


@once_per_shape
def sizes(op, n, H, D, dtype) -> Launch:
    block = blocks(op)
    constants = dict(H=H, D=D, BLOCK_D=power_of_two(D), ACC=accumulator(dtype))
    return Launch((ceil_div(n * H, block["BLOCK_R"]),), constants | block)


def merge_states(o_a, lse_a, o_b, lse_b):
    n, H, D = o_a.shape
    o = torch.empty(o_a.shape, dtype=o_a.dtype, device=o_a.device)
    wide = torch.float64 if o.dtype == torch.float64 else torch.float32
    lse = torch.empty((n, H), dtype=wide, device=o_a.device)
    if n * H:
        pointers = o_a, lse_a.contiguous(), o_b, lse_b.contiguous(), o, lse
        with on(o):
            launch = sizes("merge_states", n, H, D, o.dtype)
            launch(merge_states_fwd_kernel, pointers, (n * H, *o_a.stride()[:2], *o_b.stride()[:2]))
    return o, lse


def merge_states_backward(do, dlse, o_a, lse_a, o_b, lse_b, o, lse):
    n, H, D = o_a.shape
    grads = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (o_a, lse_a, o_b, lse_b))
    if n * H:
        do = rows_of(do)
        pointers = do, dlse.contiguous(), o_a, lse_a.contiguous(), o_b, lse_b.contiguous(), o, lse.contiguous(), *grads
        strides = *do.stride()[:2], *o_a.stride()[:2], *o_b.stride()[:2], *o.stride()[:2]
        with on(o):
            sizes("merge_states_backward", n, H, D, o_a.dtype)(merge_states_bwd_kernel, pointers, (n * H, *strides))
    return grads
