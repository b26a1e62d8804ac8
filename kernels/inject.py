"""inject: per-head RMSNorm, RoPE and the K/V scatter of n packed tokens in one launch, and its backward in another.

A row is one (token, head). The first programs take the rows of q, the others those of k and v, BLOCK_R each. A row is held as
the two halves of its rotary pairs, (i, i + Dr/2) or (2i, 2i + 1), and the tail [Dr, D) that is not rotated.
"""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import blocks
from diffmas.kernels.launch import Launch, accumulator, ceil_div, on, once_per_shape, power_of_two, processors, rows_of

__all__ = ["inject", "inject_backward"]

PROGRAMS = 4  # of the backward on a multiprocessor: about as many as its registers allow


@triton.jit
def load_pairs(p_row, m_row, Dr: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, ACC: tl.constexpr):
    """Both halves of the rotary pairs of the rows at p_row [BLOCK_R, 1], or of one row if p_row is a scalar."""
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_P)[None, :]
        b_x = tl.load(p_row + o_d, mask=m_row & (o_d < Dr), other=0.0).to(ACC)
        b_1, b_2 = tl.split(tl.reshape(b_x, (b_x.shape[0], BLOCK_P, 2)))
    else:
        o_p = tl.arange(0, BLOCK_P)[None, :]
        m_x = m_row & (o_p < Dr // 2)
        b_1 = tl.load(p_row + o_p, mask=m_x, other=0.0).to(ACC)
        b_2 = tl.load(p_row + Dr // 2 + o_p, mask=m_x, other=0.0).to(ACC)
    return b_1, b_2


@triton.jit
def store_pairs(p_row, m_row, b_1, b_2, Dr: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr):
    if INTERLEAVED:
        o_d = tl.arange(0, 2 * BLOCK_P)[None, :]
        b_x = tl.reshape(tl.join(b_1, b_2), (b_1.shape[0], 2 * BLOCK_P))
        tl.store(p_row + o_d, b_x.to(p_row.dtype.element_ty), mask=m_row & (o_d < Dr))
    else:
        o_p = tl.arange(0, BLOCK_P)[None, :]
        m_x = m_row & (o_p < Dr // 2)
        tl.store(p_row + o_p, b_1.to(p_row.dtype.element_ty), mask=m_x)
        tl.store(p_row + Dr // 2 + o_p, b_2.to(p_row.dtype.element_ty), mask=m_x)


@triton.jit
def load_span(p_row, m_row, first: tl.constexpr, last: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr):
    """Columns [first, last) of the rows."""
    o_d = first + tl.arange(0, BLOCK)[None, :]
    return tl.load(p_row + o_d, mask=m_row & (o_d < last), other=0.0).to(ACC)


@triton.jit
def store_span(p_row, m_row, b_x, first: tl.constexpr, last: tl.constexpr, BLOCK: tl.constexpr):
    o_d = first + tl.arange(0, BLOCK)[None, :]
    tl.store(p_row + o_d, b_x.to(p_row.dtype.element_ty), mask=m_row & (o_d < last))


@triton.jit
def norm_and_rotate(
    p_x, m_x, p_y, m_y, cos, sin, i_t, stride_cos, stride_sin, weight, eps,
    D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads rows p_x where m_x, applies norm and rotation, stores to p_y where m_y."""
    b_square = tl.zeros([BLOCK_R], ACC)
    if Dr > 0:
        b_1, b_2 = load_pairs(p_x, m_x, Dr, INTERLEAVED, BLOCK_P, ACC)
        b_square += tl.sum(b_1 * b_1 + b_2 * b_2, 1)
    if Dr < D:
        b_tail = load_span(p_x, m_x, Dr, D, BLOCK_TAIL, ACC)
        b_square += tl.sum(b_tail * b_tail, 1)
    if weight is not None:
        b_r = tl.rsqrt(b_square / D + eps)[:, None]
        if Dr > 0:
            b_w1, b_w2 = load_pairs(weight, True, Dr, INTERLEAVED, BLOCK_P, ACC)
            b_1, b_2 = b_1 * b_r * b_w1, b_2 * b_r * b_w2
        if Dr < D:
            b_tail = b_tail * b_r * load_span(weight, True, Dr, D, BLOCK_TAIL, ACC)
    if Dr > 0:
        b_c1, b_c2 = load_pairs(cos + i_t * stride_cos, m_x, Dr, INTERLEAVED, BLOCK_P, ACC)
        b_s1, b_s2 = load_pairs(sin + i_t * stride_sin, m_x, Dr, INTERLEAVED, BLOCK_P, ACC)
        store_pairs(p_y, m_y, b_1 * b_c1 - b_2 * b_s1, b_2 * b_c2 + b_1 * b_s2, Dr, INTERLEAVED, BLOCK_P)
    if Dr < D:
        store_span(p_y, m_y, b_tail, Dr, D, BLOCK_TAIL)


@triton.jit
def norm_and_rotate_backward(
    p_dy, m_dy, p_x, m_x, p_dx, dw_1, dw_2, dw_tail, cos, sin, i_t, stride_cos, stride_sin, weight, eps,
    D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """From gradient rows p_dy, zero where not m_dy: stores the gradient of rows p_x to p_dx, and adds each row's share of the
    weight's gradient to dw_1, dw_2 [BLOCK_R, BLOCK_P], of the pairs, and dw_tail [BLOCK_R, BLOCK_TAIL]; -> these."""
    if Dr > 0:
        b_y1, b_y2 = load_pairs(p_dy, m_dy, Dr, INTERLEAVED, BLOCK_P, ACC)
        b_c1, b_c2 = load_pairs(cos + i_t * stride_cos, m_x, Dr, INTERLEAVED, BLOCK_P, ACC)
        b_s1, b_s2 = load_pairs(sin + i_t * stride_sin, m_x, Dr, INTERLEAVED, BLOCK_P, ACC)
        b_d1, b_d2 = b_y1 * b_c1 + b_y2 * b_s2, b_y2 * b_c2 - b_y1 * b_s1
    if Dr < D:
        b_dt = load_span(p_dy, m_dy, Dr, D, BLOCK_TAIL, ACC)
    if weight is not None:
        # y = x r w with r = rsqrt(mean(x^2) + eps):  dx = r (g - x r^2 mean(g x)) for g = dy w
        b_square, b_dot = tl.zeros([BLOCK_R], ACC), tl.zeros([BLOCK_R], ACC)
        if Dr > 0:
            b_1, b_2 = load_pairs(p_x, m_x, Dr, INTERLEAVED, BLOCK_P, ACC)
            b_w1, b_w2 = load_pairs(weight, True, Dr, INTERLEAVED, BLOCK_P, ACC)
            b_square += tl.sum(b_1 * b_1 + b_2 * b_2, 1)
            b_dot += tl.sum(b_d1 * b_w1 * b_1 + b_d2 * b_w2 * b_2, 1)
        if Dr < D:
            b_tail = load_span(p_x, m_x, Dr, D, BLOCK_TAIL, ACC)
            b_wt = load_span(weight, True, Dr, D, BLOCK_TAIL, ACC)
            b_square += tl.sum(b_tail * b_tail, 1)
            b_dot += tl.sum(b_dt * b_wt * b_tail, 1)
        b_r = tl.where(m_x, tl.rsqrt(b_square / D + eps)[:, None], 0)  # a row that is not there has no square, eps may be 0
        b_m = b_r * b_r * b_dot[:, None] / D
        if Dr > 0:
            dw_1, dw_2 = dw_1 + b_d1 * b_1 * b_r, dw_2 + b_d2 * b_2 * b_r
            b_d1, b_d2 = b_r * (b_d1 * b_w1 - b_1 * b_m), b_r * (b_d2 * b_w2 - b_2 * b_m)
        if Dr < D:
            dw_tail += b_dt * b_tail * b_r
            b_dt = b_r * (b_dt * b_wt - b_tail * b_m)
    if Dr > 0:
        store_pairs(p_dx, m_x, b_d1, b_d2, Dr, INTERLEAVED, BLOCK_P)
    if Dr < D:
        store_span(p_dx, m_x, b_dt, Dr, D, BLOCK_TAIL)
    return dw_1, dw_2, dw_tail


@triton.jit
def store_weight_gradient(
    p_dw, dw_1, dw_2, dw_tail, weight,
    D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr,
):  # fmt: skip
    """The sum of the shares of rows to p_dw [D]."""
    if weight is not None:
        if Dr > 0:
            sum_1, sum_2 = tl.sum(dw_1, 0, keep_dims=True), tl.sum(dw_2, 0, keep_dims=True)
            store_pairs(p_dw, True, sum_1, sum_2, Dr, INTERLEAVED, BLOCK_P)
        if Dr < D:
            store_span(p_dw, True, tl.sum(dw_tail, 0, keep_dims=True), Dr, D, BLOCK_TAIL)


@triton.jit(do_not_specialize=["n"])
def inject_fwd_kernel(
    q, k, v, cos, sin, slots, q_weight, k_weight, q_rot, k_pool, v_pool, n, eps,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_vn, stride_vh, stride_cos, stride_sin,
    stride_kpr, stride_kph, stride_vpr, stride_vph,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    i_p = tl.program_id(0).to(tl.int64)
    rows_q, rows_kv = n.to(tl.int64) * Hq, n.to(tl.int64) * Hkv
    programs_q = tl.cdiv(rows_q, BLOCK_R)
    o_r = tl.arange(0, BLOCK_R)[:, None]
    if i_p < programs_q:
        i_r = i_p * BLOCK_R + o_r  # [BLOCK_R, 1]
        i_t, i_h, m_r = i_r // Hq, i_r % Hq, i_r < rows_q
        norm_and_rotate(
            q + i_t * stride_qn + i_h * stride_qh, m_r, q_rot + i_r * D, m_r,
            cos, sin, i_t, stride_cos, stride_sin, q_weight, eps,
            D, Dr, INTERLEAVED, BLOCK_R, BLOCK_P, BLOCK_TAIL, ACC,
        )  # fmt: skip
    else:
        i_r = (i_p - programs_q) * BLOCK_R + o_r
        i_t, i_h, m_r = i_r // Hkv, i_r % Hkv, i_r < rows_kv
        i_s = tl.load(slots + i_t, mask=m_r, other=-1)
        m_s = m_r & (i_s >= 0)
        b_v = load_span(v + i_t * stride_vn + i_h * stride_vh, m_s, 0, D, BLOCK_D, ACC)
        store_span(v_pool + i_s * stride_vpr + i_h * stride_vph, m_s, b_v, 0, D, BLOCK_D)
        norm_and_rotate(
            k + i_t * stride_kn + i_h * stride_kh, m_s, k_pool + i_s * stride_kpr + i_h * stride_kph, m_s,
            cos, sin, i_t, stride_cos, stride_sin, k_weight, eps,
            D, Dr, INTERLEAVED, BLOCK_R, BLOCK_P, BLOCK_TAIL, ACC,
        )  # fmt: skip


@triton.jit(do_not_specialize=["n", "programs_q"])
def inject_bwd_kernel(
    dq_rot, q, k, cos, sin, slots, q_weight, k_weight, dq, dk, dv, dq_weight, dk_weight, dk_pool, dv_pool, n, programs_q, eps,
    stride_dqn, stride_dqh, stride_qn, stride_qh, stride_kn, stride_kh, stride_cos, stride_sin,
    stride_kpr, stride_kph, stride_vpr, stride_vph,
    Hq: tl.constexpr, Hkv: tl.constexpr, D: tl.constexpr, Dr: tl.constexpr, INTERLEAVED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_TAIL: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The first programs_q programs go through the rows of q, the others through those of k and v; each leaves one row of its
    weight's gradient."""
    i_p, programs = tl.program_id(0), tl.num_programs(0)
    rows_q, rows_kv = n.to(tl.int64) * Hq, n.to(tl.int64) * Hkv
    o_r = tl.arange(0, BLOCK_R)[:, None]
    dw_1, dw_2 = tl.zeros([BLOCK_R, BLOCK_P], ACC), tl.zeros([BLOCK_R, BLOCK_P], ACC)
    dw_tail = tl.zeros([BLOCK_R, BLOCK_TAIL], ACC)
    if i_p < programs_q:
        for i_tile in range(i_p, tl.cdiv(rows_q, BLOCK_R), programs_q):
            i_r = tl.cast(i_tile, tl.int64) * BLOCK_R + o_r  # [BLOCK_R, 1]
            i_t, i_h, m_r = i_r // Hq, i_r % Hq, i_r < rows_q
            dw_1, dw_2, dw_tail = norm_and_rotate_backward(
                dq_rot + i_t * stride_dqn + i_h * stride_dqh, m_r, q + i_t * stride_qn + i_h * stride_qh, m_r, dq + i_r * D,
                dw_1, dw_2, dw_tail, cos, sin, i_t, stride_cos, stride_sin, q_weight, eps,
                D, Dr, INTERLEAVED, BLOCK_R, BLOCK_P, BLOCK_TAIL, ACC,
            )  # fmt: skip
        store_weight_gradient(dq_weight + i_p * D, dw_1, dw_2, dw_tail, q_weight, D, Dr, INTERLEAVED, BLOCK_P, BLOCK_TAIL)
    else:
        i_p -= programs_q
        for i_tile in range(i_p, tl.cdiv(rows_kv, BLOCK_R), programs - programs_q):
            i_r = tl.cast(i_tile, tl.int64) * BLOCK_R + o_r
            i_t, i_h, m_r = i_r // Hkv, i_r % Hkv, i_r < rows_kv
            i_s = tl.load(slots + i_t, mask=m_r, other=-1)
            m_s = m_r & (i_s >= 0)
            p_dk, p_dv = dk_pool + i_s * stride_kpr + i_h * stride_kph, dv_pool + i_s * stride_vpr + i_h * stride_vph
            store_span(dv + i_r * D, m_r, load_span(p_dv, m_s, 0, D, BLOCK_D, ACC), 0, D, BLOCK_D)
            dw_1, dw_2, dw_tail = norm_and_rotate_backward(
                p_dk, m_s, k + i_t * stride_kn + i_h * stride_kh, m_r, dk + i_r * D,
                dw_1, dw_2, dw_tail, cos, sin, i_t, stride_cos, stride_sin, k_weight, eps,
                D, Dr, INTERLEAVED, BLOCK_R, BLOCK_P, BLOCK_TAIL, ACC,
            )  # fmt: skip
            tl.debug_barrier()  # all have read what they need before it is zeroed
            b_zero = tl.zeros([BLOCK_R, BLOCK_D], ACC)
            store_span(p_dk, m_s, b_zero, 0, D, BLOCK_D)
            store_span(p_dv, m_s, b_zero, 0, D, BLOCK_D)
        store_weight_gradient(dk_weight + i_p * D, dw_1, dw_2, dw_tail, k_weight, D, Dr, INTERLEAVED, BLOCK_P, BLOCK_TAIL)


@triton.jit
def sum_of_rows(parts, rows, weight, o_d, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr):
    """Columns o_d [1, BLOCK_C] of the sum of parts [rows, D] to weight [D], always in the same order."""
    acc = tl.zeros([BLOCK_S, BLOCK_C], ACC)
    for i in range(0, rows, BLOCK_S):
        o_s = i + tl.arange(0, BLOCK_S)[:, None]
        acc += tl.load(parts + o_s * D + o_d, mask=(o_s < rows) & (o_d < D), other=0)
    tl.store(weight + o_d, tl.sum(acc, 0, keep_dims=True), mask=o_d < D)


@triton.jit(do_not_specialize=["programs_q", "programs_kv"])
def inject_bwd_kernel_weights(
    dq_parts, dk_parts, dq_weight, dk_weight, programs_q, programs_kv, Q: tl.constexpr, K: tl.constexpr,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_C: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of columns, q and k): the weights' gradients from the rows that the programs left. Q, K: there is one."""
    o_d = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    if tl.program_id(1) == 0:
        if Q:
            sum_of_rows(dq_parts, programs_q, dq_weight, o_d, D, BLOCK_S, BLOCK_C, ACC)
    elif K:
        sum_of_rows(dk_parts, programs_kv, dk_weight, o_d, D, BLOCK_S, BLOCK_C, ACC)


@once_per_shape
def sizes(op, n, Hq, D, Hkv, Dr, interleaved, dtype, device) -> tuple[int, int, Launch]:
    """How many programs for q, how many for k and v, and their launch. In the backward no more than the device runs at once,
    which then loop over their rows: one row of weights' gradients for each program, not for each tile."""
    block = blocks(op)
    if op == "inject_backward" and D > 128:  # registers: a tile and the sums of the weights' gradients
        block = block | dict(BLOCK_R=block["BLOCK_R"] // 2)
    programs = [ceil_div(n * heads, block["BLOCK_R"]) for heads in (Hq, Hkv)]
    if op == "inject_backward":
        traffic = 6 * Hq, 22 * Hkv  # bytes of a token and dimension, with 16-bit queries: both halves end at the same time
        most = PROGRAMS * processors(device)
        programs = [min(p, max(1, most * t // sum(traffic))) for p, t in zip(programs, traffic)]
    constants = dict(
        Hq=Hq, Hkv=Hkv, D=D, Dr=Dr, INTERLEAVED=interleaved, BLOCK_D=power_of_two(D), BLOCK_P=power_of_two(Dr // 2),
        BLOCK_TAIL=power_of_two(D - Dr), ACC=accumulator(dtype),
    )  # fmt: skip
    return *programs, Launch((sum(programs),), constants | block)


@once_per_shape
def weight_sizes(D, dtype, of_q, of_k) -> Launch:
    block = blocks("inject_weights")
    return Launch((ceil_div(D, block["BLOCK_C"]), 2), dict(Q=of_q, K=of_k, D=D, ACC=accumulator(dtype)) | block)


def shape_of(q, k, cos) -> tuple[int, ...]:
    return *q.shape, k.shape[1], 0 if cos is None else cos.shape[1]


def row_strides(cos, sin) -> tuple[int, int]:
    return (0, 0) if cos is None else (cos.stride(0), sin.stride(0))


def inject(q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool):
    q_rot = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if not q.shape[0]:
        return q_rot
    _, _, launch = sizes("inject", *shape_of(q, k, cos), interleaved, q.dtype, q.device)
    strides = *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *row_strides(cos, sin)
    with on(q):
        launch(
            inject_fwd_kernel, (q, k, v, cos, sin, slots.contiguous(), q_weight, k_weight, q_rot, k_pool, v_pool),
            (q.shape[0], eps, *strides, *k_pool.stride()[:2], *v_pool.stride()[:2]),
        )  # fmt: skip
    return q_rot


def inject_backward(dq_rot, q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool):
    n, _, D = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    empty = lambda *shape, dtype=q.dtype: torch.empty(shape, dtype=dtype, device=q.device)
    dq, dk, dv = empty(*q.shape), empty(*k.shape), empty(*k.shape)
    weights = [empty(0 if weight is None else D, dtype=wide) for weight in (q_weight, k_weight)]
    if not n:
        return dq, dk, dv, *(dw.zero_() for dw in weights)
    programs_q, programs_kv, launch = sizes("inject_backward", *shape_of(q, k, cos), interleaved, q.dtype, q.device)
    # With one program for q and one for k and v, each leaves its row where the sum would go.
    one = programs_q == programs_kv == 1
    parts = weights if one else [empty(p, dw.shape[0], dtype=wide) for p, dw in zip((programs_q, programs_kv), weights)]
    dq_rot = rows_of(dq_rot)
    strides = *dq_rot.stride()[:2], *q.stride()[:2], *k.stride()[:2], *row_strides(cos, sin)
    with on(q):
        launch(
            inject_bwd_kernel,
            (dq_rot, q, k, cos, sin, slots.contiguous(), q_weight, k_weight, dq, dk, dv, *parts, dk_pool, dv_pool),
            (n, programs_q, eps, *strides, *dk_pool.stride()[:2], *dv_pool.stride()[:2]),
        )  # fmt: skip
        if not one and (q_weight is not None or k_weight is not None):
            launch = weight_sizes(D, q.dtype, q_weight is not None, k_weight is not None)
            launch(inject_bwd_kernel_weights, (*parts, *weights), (programs_q, programs_kv))
    return dq, dk, dv, *weights
