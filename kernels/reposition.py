"""reposition: copies pool rows, keys rotated by a position offset, and its backward. A row is one (token, head).

The angle offset * inv_freq is computed in float64 and reduced to a quarter turn there: offsets reach 1e5 and more.
"""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import blocks
from diffmas.kernels.inject import load_pairs, load_span, store_pairs, store_span
from diffmas.kernels.launch import Launch, accumulator, ceil_div, on, once_per_shape, power_of_two

__all__ = ["reposition", "reposition_backward"]

HALF_PI = tl.constexpr(1.5707963267948966)


@triton.jit
def cos_sin(b_angle, ACC: tl.constexpr):
    """Cosine and sine of float64 angles, in ACC."""
    b_turns = b_angle * (1.0 / HALF_PI)
    b_quarter = tl.floor(b_turns + 0.5)
    b_x = ((b_turns - b_quarter) * HALF_PI).to(ACC)  # [-pi/4, pi/4]
    if ACC == tl.float64:
        b_cos, b_sin = tl.cos(b_x), tl.sin(b_x)
    else:
        # Cephes' cosf and sinf. CUDA's have a branch for large angles, which costs a stack.
        b_z = b_x * b_x
        b_sin = b_x + b_x * b_z * ((-1.9515295891e-4 * b_z + 8.3321608736e-3) * b_z - 1.6666654611e-1)
        b_cos = 1.0 - 0.5 * b_z + b_z * b_z * ((2.443315711809948e-5 * b_z - 1.388731625493765e-3) * b_z + 4.166664568298827e-2)
    i_q = b_quarter.to(tl.int64) & 3
    m_swap = (i_q & 1) == 1
    b_c, b_s = tl.where(m_swap, b_sin, b_cos), tl.where(m_swap, b_cos, b_sin)
    return tl.where((i_q == 1) | (i_q == 2), -b_c, b_c), tl.where(i_q >= 2, -b_s, b_s)


@triton.jit
def rotate_keys(
    p_x, p_y, m_r, b_offset, inv_freq,
    D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows p_x, rotated by b_offset [BLOCK_R, 1] positions, to p_y."""
    if Dr > 0:
        o_p = tl.arange(0, BLOCK_P)[None, :]
        b_freq = tl.load(inv_freq + o_p, mask=o_p < Dr // 2, other=0.0).to(tl.float64)
        b_cos, b_sin = cos_sin(b_offset.to(tl.float64) * b_freq, ACC)
        b_1, b_2 = load_pairs(p_x, m_r, Dr, INTERLEAVED, BLOCK_P, ACC)
        store_pairs(p_y, m_r, b_1 * b_cos - b_2 * b_sin, b_2 * b_cos + b_1 * b_sin, Dr, INTERLEAVED, BLOCK_P)
    if Dr < D:
        store_span(p_y, m_r, load_span(p_x, m_r, Dr, D, BLOCK_TAIL, ACC), Dr, D, BLOCK_TAIL)


@triton.jit(do_not_specialize=["m"])
def reposition_fwd_kernel(
    src, dst, offset, inv_freq, k_pool, v_pool, m, stride_kr, stride_kh, stride_vr, stride_vh,
    H: tl.constexpr, D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i_t, i_h, m_r = i_r // H, i_r % H, i_r < m.to(tl.int64) * H
    i_src, i_dst = tl.load(src + i_t, mask=m_r, other=0), tl.load(dst + i_t, mask=m_r, other=0)
    b_offset = tl.load(offset + i_t, mask=m_r, other=0)
    o_k, o_v = i_h * stride_kh, i_h * stride_vh
    b_v = load_span(v_pool + i_src * stride_vr + o_v, m_r, 0, D, BLOCK_D, ACC)
    store_span(v_pool + i_dst * stride_vr + o_v, m_r, b_v, 0, D, BLOCK_D)
    rotate_keys(
        k_pool + i_src * stride_kr + o_k, k_pool + i_dst * stride_kr + o_k, m_r, b_offset, inv_freq,
        D, Dr, INTERLEAVED, BLOCK_P, BLOCK_TAIL, ACC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["m"])
def reposition_bwd_kernel(
    dst, offset, inv_freq, dk_pool, dv_pool, dk, dv, m, stride_kr, stride_kh, stride_vr, stride_vh, stride_m, stride_h,
    H: tl.constexpr, D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows `dst` of the gradient pools rotated back to dk, dv [m, H, D], and zeroed."""
    i_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    i_t, i_h, m_r = i_r // H, i_r % H, i_r < m.to(tl.int64) * H
    i_dst = tl.load(dst + i_t, mask=m_r, other=0)
    b_offset = tl.load(offset + i_t, mask=m_r, other=0)
    p_dk, p_dv = dk_pool + i_dst * stride_kr + i_h * stride_kh, dv_pool + i_dst * stride_vr + i_h * stride_vh
    o_x = i_t * stride_m + i_h * stride_h
    store_span(dv + o_x, m_r, load_span(p_dv, m_r, 0, D, BLOCK_D, ACC), 0, D, BLOCK_D)
    rotate_keys(p_dk, dk + o_x, m_r, -b_offset, inv_freq, D, Dr, INTERLEAVED, BLOCK_P, BLOCK_TAIL, ACC)
    tl.debug_barrier()  # all have read what they need before it is zeroed
    b_zero = tl.zeros([BLOCK_R, BLOCK_D], ACC)
    store_span(p_dk, m_r, b_zero, 0, D, BLOCK_D)
    store_span(p_dv, m_r, b_zero, 0, D, BLOCK_D)


@once_per_shape
def sizes(op, m, H, D, Dr, interleaved, dtype) -> Launch:
    block = blocks(op)
    constants = dict(
        H=H, D=D, Dr=Dr, INTERLEAVED=interleaved, BLOCK_D=power_of_two(D), BLOCK_P=power_of_two(Dr // 2),
        BLOCK_TAIL=power_of_two(D - Dr), ACC=accumulator(dtype),
    )  # fmt: skip
    return Launch((ceil_div(m * H, block["BLOCK_R"]),), constants | block)


def add_rows(pool, rows, values) -> None:
    """pool[rows] += values, always in the same order; rows may repeat."""
    if pool.stride(0) < pool.stride(1):  # head-major: index_put_ would copy the pool otherwise
        torch.ops.aten.index_put_(pool.transpose(0, 1), [None, rows], values.transpose(0, 1), True)
    else:
        pool.index_put_((rows,), values, accumulate=True)


def reposition(src, dst, offset, inv_freq, interleaved, k_pool, v_pool) -> None:
    m = src.shape[0]
    if not m:
        return
    launch = sizes("reposition", m, *k_pool.shape[1:], 2 * inv_freq.shape[0], interleaved, k_pool.dtype)
    pointers = src.contiguous(), dst.contiguous(), offset.contiguous(), inv_freq.contiguous(), k_pool, v_pool
    with on(k_pool):
        launch(reposition_fwd_kernel, pointers, (m, *k_pool.stride()[:2], *v_pool.stride()[:2]))


def reposition_backward(src, dst, offset, inv_freq, interleaved, dk_pool, dv_pool) -> None:
    m = src.shape[0]
    if not m:
        return
    _, H, D = dk_pool.shape
    launch = sizes("reposition_backward", m, H, D, 2 * inv_freq.shape[0], interleaved, dk_pool.dtype)
    dk, dv = (torch.empty(H, m, D, dtype=dk_pool.dtype, device=dk_pool.device).transpose(0, 1) for _ in "kv")
    with on(dk_pool):
        launch(
            reposition_bwd_kernel, (dst.contiguous(), offset.contiguous(), inv_freq.contiguous(), dk_pool, dv_pool, dk, dv),
            (m, *dk_pool.stride()[:2], *dv_pool.stride()[:2], *dk.stride()[:2]),
        )  # fmt: skip
    add_rows(dk_pool, src, dk)
    add_rows(dv_pool, src, dv)
