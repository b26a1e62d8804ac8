"""The second launch of linears with LoRA: adds up what the first has left in `parts` (diffmas.kernels.linear_products), with
bias and LoRA's part, rounds once, and does what comes next: silu(gate) up, the gradients to both, the sum of several gradients.

A linear's columns in `parts` come one after the other, those of u of each behind them all. n rows; parts of a length: `splits`.
u: that of one linear after that of the other, [n, rank] each.
"""

import triton
import triton.language as tl

from diffmas.kernels.linear_products import chosen, tile_of
from diffmas.kernels.pointwise import gate_gradients, gated

__all__ = [
    "linear_kernel_add", "linear_kernel_finish", "linear_kernel_gate", "linear_kernel_gate_backward", "linear_kernel_sum",
]  # fmt: skip


@triton.jit
def sum_of_parts(p_part, splits, step, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of `splits` parts that lie `step` apart, always in the same order."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(splits):
        acc += tl.load(p_part, mask=mask, other=0.0)
        p_part += step
    return acc


@triton.jit
def of_adapter(
    p_codes, splits, step, up, p_u, first, o_n, to, rank, m_m,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """u up' for columns o_n of `to`, u from its parts at p_codes [BLOCK_M, 1]. first: leave u at p_u [BLOCK_M, 1]."""
    lora = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_r in range(0, rank, BLOCK_R):
        o_r = i_r + tl.arange(0, BLOCK_R)
        m_u = m_m & (o_r < rank)[None, :]
        b_u = sum_of_parts(p_codes + o_r[None, :], splits, step, m_u, BLOCK_M, BLOCK_R)
        if first:
            tl.store(p_u + o_r[None, :], b_u, mask=m_u)
        if TRANSPOSED:  # a [rank, to]
            p_up = up + o_r.to(tl.int64)[:, None] * to + o_n[None, :]
        else:  # b [to, rank]
            p_up = up + o_n.to(tl.int64)[None, :] * rank + o_r[:, None]
        b_up = tl.load(p_up, mask=(o_r < rank)[:, None] & (o_n < to)[None, :], other=0.0)
        lora = tl.dot(b_u, b_up, lora, input_precision="ieee", out_dtype=tl.float32)
    return lora


@triton.jit
def finished(
    p_parts, column, code, splits, step, bias, up, p_u, first, o_n, to, rank, scale, m_m,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Columns o_n of a linear whose sums begin at `column` of a row of parts, and those of its u at `code`; float32."""
    m_n = m_m & (o_n < to)[None, :]
    acc = sum_of_parts(p_parts + column + o_n[None, :], splits, step, m_n, BLOCK_M, BLOCK_N)
    if bias is not None:
        acc += tl.load(bias + o_n, mask=o_n < to, other=0.0).to(tl.float32)[None, :]
    if up is not None:
        acc += scale * of_adapter(
            p_parts + code, splits, step, up, p_u, first, o_n, to, rank, m_m, TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_R
        )
    return acc


@triton.jit(do_not_specialize=["n", "splits"])
def linear_kernel_finish(
    parts, bias0, bias1, bias2, up0, up1, up2, y0, y1, y2, u,
    n, splits, to0, to1, to2, rank0, rank1, rank2, scale0, scale1, scale2,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y [n, to] of COUNT linears. Grid (tiles of columns of each, tiles of rows)."""
    i, i_t = tile_of(tl.program_id(0), to0, to1, to2, BLOCK_N, COUNT)
    i_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m, o_n = i_m < n, i_t * BLOCK_N + tl.arange(0, BLOCK_N)
    to, rank = chosen(i, to0, to1, to2, COUNT), chosen(i, rank0, rank1, rank2, COUNT)
    column, code = chosen(i, 0, to0, to0 + to1, COUNT), chosen(i, 0, rank0, rank0 + rank1, COUNT)
    before, every = to0, rank0
    if COUNT > 1:
        before += to1
        every += rank1
    if COUNT > 2:
        before += to2
        every += rank2
    every += before
    bias, up, y = bias0, up0, chosen(i, y0, y1, y2, COUNT)
    if bias0 is not None:
        bias = chosen(i, bias0, bias1, bias2, COUNT)
    if up0 is not None:
        up = chosen(i, up0, up1, up2, COUNT)
    acc = finished(
        parts + i_m * every, column, before + code, splits, n.to(tl.int64) * every, bias, up,
        u + n.to(tl.int64) * code + i_m * rank, i_t == 0, o_n, to, rank, chosen(i, scale0, scale1, scale2, COUNT), m_m,
        False, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    tl.store(y + i_m * to + o_n[None, :], acc.to(y0.dtype.element_ty), mask=m_m & (o_n < to)[None, :])


@triton.jit(do_not_specialize=["n", "splits"])
def linear_kernel_gate(
    parts, bias0, bias1, up0, up1, gate, up, y, u, n, splits, to, rank0, rank1, scale0, scale1,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y = silu(gate) up [n, to] of two linears, and, unless they are None, gate and up. Grid (tiles of columns, of rows)."""
    i_c = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m, o_n = i_m < n, i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    every, rows = 2 * to + rank0 + rank1, n.to(tl.int64)
    p_parts, step = parts + i_m * every, rows * every
    b_gate = finished(
        p_parts, 0, 2 * to, splits, step, bias0, up0, u + i_m * rank0, i_c == 0, o_n, to, rank0, scale0, m_m,
        False, BLOCK_M, BLOCK_N, BLOCK_R,
    ).to(y.dtype.element_ty)  # fmt: skip
    b_up = finished(
        p_parts, to, 2 * to + rank0, splits, step, bias1, up1, u + rows * rank0 + i_m * rank1, i_c == 0, o_n, to, rank1, scale1,
        m_m, False, BLOCK_M, BLOCK_N, BLOCK_R,
    ).to(y.dtype.element_ty)  # fmt: skip
    at, m_n = i_m * to + o_n[None, :], m_m & (o_n < to)[None, :]
    if gate is not None:
        tl.store(gate + at, b_gate, mask=m_n)
        tl.store(up + at, b_up, mask=m_n)
    tl.store(y + at, gated(b_gate.to(tl.float32), b_up.to(tl.float32), y.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["n", "span"])
def linear_kernel_sum(
    parts, up0, up1, up2, dx, v, n, span, to, length0, length1, length2, rank0, rank1, rank2, scale0, scale1, scale2,
    COUNT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dx [n, to], the sum of what COUNT linears give, the last first, rounded where autograd adds up tensors one by one; `span`
    numbers of a length in a part. Grid (tiles of columns, of rows)."""
    dtype: tl.constexpr = dx.dtype.element_ty
    i_c = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m, o_n = i_m < n, i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    before, every, rows = COUNT * to, COUNT * to + rank0, n.to(tl.int64)
    if COUNT > 1:
        every += rank1
    if COUNT > 2:
        every += rank2
    p_parts, step = parts + i_m * every, rows * every
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if COUNT > 2:
        code = rank0 + rank1
        total = finished(
            p_parts, 2 * to, before + code, tl.cdiv(length2, span), step, None, up2, v + rows * code + i_m * rank2, i_c == 0,
            o_n, to, rank2, scale2, m_m, True, BLOCK_M, BLOCK_N, BLOCK_R,
        ).to(dtype).to(tl.float32)  # fmt: skip
    if COUNT > 1:
        acc = finished(
            p_parts, to, before + rank0, tl.cdiv(length1, span), step, None, up1, v + rows * rank0 + i_m * rank1, i_c == 0,
            o_n, to, rank1, scale1, m_m, True, BLOCK_M, BLOCK_N, BLOCK_R,
        )  # fmt: skip
        total = (total + acc.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    acc = finished(
        p_parts, 0, before, tl.cdiv(length0, span), step, None, up0, v + i_m * rank0, i_c == 0,
        o_n, to, rank0, scale0, m_m, True, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    total += acc.to(dtype).to(tl.float32)
    tl.store(dx + i_m * to + o_n[None, :], total.to(dtype), mask=m_m & (o_n < to)[None, :])


@triton.jit(do_not_specialize=["n", "splits"])
def linear_kernel_gate_backward(
    parts, of_a, gate, up, dgate, dup, v, n, splits, to, rank, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """dgate and dup [n, to] of y = silu(gate) up, where a linear gives back dy, which nobody else needs. of_a: its `up`. Grid
    (tiles of columns, of rows)."""
    dtype: tl.constexpr = dgate.dtype.element_ty
    i_c = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m, o_n = i_m < n, i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    every = to + rank
    b_dy = finished(
        parts + i_m * every, 0, to, splits, n.to(tl.int64) * every, None, of_a, v + i_m * rank, i_c == 0,
        o_n, to, rank, scale, m_m, True, BLOCK_M, BLOCK_N, BLOCK_R,
    ).to(dtype).to(tl.float32)  # fmt: skip
    at, m_n = i_m * to + o_n[None, :], m_m & (o_n < to)[None, :]
    b_gate = tl.load(gate + at, mask=m_n, other=0.0).to(tl.float32)
    b_up = tl.load(up + at, mask=m_n, other=0.0).to(tl.float32)
    b_dgate, b_dup = gate_gradients(b_dy, b_gate, b_up, dtype)
    tl.store(dgate + at, b_dgate, mask=m_n)
    tl.store(dup + at, b_dup, mask=m_n)


@triton.jit(do_not_specialize=["n", "splits"])
def linear_kernel_add(
    parts, up, y, u, n, splits, to, rank, stride_y, scale,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """LoRA's part, added to y [n, to] where it lies. Grid (tiles of columns, of rows)."""
    i_c = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m, o_n = i_m < n, i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    p_y, m_n = y + i_m * stride_y + o_n[None, :], m_m & (o_n < to)[None, :]
    lora = of_adapter(
        parts + i_m * rank, splits, n.to(tl.int64) * rank, up, u + i_m * rank, i_c == 0, o_n, to, rank, m_m,
        TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_R,
    )  # fmt: skip
    acc = tl.load(p_y, mask=m_n, other=0.0).to(tl.float32) + scale * lora
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=m_n)
