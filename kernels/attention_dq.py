"""What the backward of cross-agent attention begins with, and dq."""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import (
    INDEX,
    LOG2E,
    keys_of_tile,
    load_tile,
    pointers_of_tile,
    rotate,
    rows_of_tile,
    sequence_of_tile,
    turn,
)

__all__ = ["cross_attention_bwd_kernel_delta", "cross_attention_bwd_kernel_dq"]


@triton.jit(do_not_specialize=["n"])
def cross_attention_bwd_kernel_delta(
    do, o, lse, dlse, base, delta, n, stride_don, stride_doh, Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    DLSE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """base = lse in log2 and delta = rowsum(do * o) - dlse of every (token, query head), [Hkv, n, G]. A row that is not finite,
    or sees nothing, has base NaN and delta 0: it makes NaN of the keys that it sees, and dK and dV do not multiply with it."""
    o_r, o_d = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    m_r = o_r < n * Hq
    m_o = m_r[:, None] & (o_d < D)[None, :]
    b_do = tl.load(do + (o_r // Hq * stride_don + o_r % Hq * stride_doh)[:, None] + o_d[None, :], mask=m_o, other=0).to(ACC)
    b_o = tl.load(o + o_r[:, None] * D + o_d[None, :], mask=m_o, other=0).to(ACC)
    b_delta = tl.sum(b_do * b_o, 1)
    if DLSE:
        b_delta -= tl.load(dlse + o_r, mask=m_r, other=0).to(ACC)
    b_base = tl.load(lse + o_r, mask=m_r, other=0).to(ACC) * LOG2E
    finite = (tl.abs(b_base) < float("inf")) & (tl.abs(b_delta) < float("inf"))
    b_n, b_head = o_r // Hq, o_r % Hq
    o_r = (b_head // G * n + b_n) * G + b_head % G
    tl.store(base + o_r, tl.where(finite, b_base, float("nan")), mask=m_r)
    tl.store(delta + o_r, tl.where(finite, b_delta, 0.0), mask=m_r)


@triton.jit
def _dq_tile(
    acc, q, do, base, delta, p_k, p_v, stride_kr, stride_vr, to_row, n_tile, n_end, b_last, scale_log2: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, HOIST: tl.constexpr, MASKED: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    inside = n_tile + o_n < n_end
    k = load_tile(p_k, stride_kr, n_tile, to_row, inside, D, BLOCK_N, BLOCK_D, HOIST, MASKED).to(DOT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale_log2
    p = tl.exp2(s - base[:, None])
    v = load_tile(p_v, stride_vr, n_tile, to_row, inside, D, BLOCK_N, BLOCK_D, HOIST, MASKED).to(DOT)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC) - delta[:, None])
    if MASKED:
        ds = tl.where(inside[None, :] & (n_tile + o_n[None, :] <= b_last[:, None]), ds, 0.0)
    return tl.dot(ds.to(DOT), k, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit(do_not_specialize=[*INDEX, "B", "n"])
def cross_attention_bwd_kernel_dq(
    q, do, base, delta, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, cos, sin, q_turned, dq,
    n, B, stride_qn, stride_qh, stride_don, stride_doh, stride_kr, stride_kh, stride_vr, stride_vh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    HOIST: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid as in the forward. dq [n, Hq, D]; if SPLIT, one for every split; in ACC if SPLIT or OFFSET."""
    i_tile, i_h, i_split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, q_first, L, t_first = sequence_of_tile(i_tile, q_indptr, B, BLOCK_M // G)
    if t_first >= L:
        return
    b_n, b_head, b_token, m_row = rows_of_tile(i_h, q_first, L, t_first, G, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    p_q = q + b_n * stride_qn + b_head * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
    b_do = tl.load(do + b_n[:, None] * stride_don + b_head[:, None] * stride_doh + o_d[None, :], mask=m_q, other=0).to(DOT)
    o_r = (i_h.to(tl.int64) * n + b_n) * G + b_head % G
    b_base, b_delta = tl.load(base + o_r, mask=m_row, other=0), tl.load(delta + o_r, mask=m_row, other=0)
    s_first, s_last, n_seg, n_first, n_end, n_all, b_last = keys_of_tile(
        i_b, seg_indptr, seg_len, L, t_first, b_token, i_split, BLOCK_M // G, CAUSAL, SPLIT, BLOCK_N
    )

    k_pool, v_pool = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    p_dq = dq + ((b_n + i_split.to(tl.int64) * n) * Hq + b_head) * D
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)  # dq / scale, rotated as q is for the segment at hand
    acc_offset, s_acc = tl.full((), 0, tl.int64), s_first
    scale_log2: tl.constexpr = scale * LOG2E
    if OFFSET:
        q_offset = tl.full((), 0, tl.int64)  # that p_turned has been turned by
        p_turned = q_turned + ((b_n + i_split.to(tl.int64) * n) * Hq + b_head) * D
        tl.store(p_turned[:, None] + o_d[None, :], b_q, mask=m_q)
        tl.debug_barrier()
    for s in range(s_first, s_last):
        start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
        n_from, n_to = tl.maximum(n_seg, n_first), tl.minimum(n_seg + length, n_end)
        n_full = n_from + tl.maximum(tl.minimum(n_to, n_all) - n_from, 0) // BLOCK_N * BLOCK_N
        if OFFSET:
            offset = tl.load(seg_offset + s)
            if (n_from < n_to) & (offset != q_offset):
                turn(p_q, p_turned, m_row, cos, sin, s, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                q_offset = offset
            b_q = tl.load(p_turned[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
            if (n_from < n_to) & (offset != acc_offset):
                acc = rotate(acc, p_dq, m_row, acc_offset, cos, sin, s_acc, 1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                acc = rotate(acc, p_dq, m_row, offset, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                acc_offset, s_acc = offset, s
        to_row = start - n_seg
        p_k, p_v = k_pool, v_pool
        if HOIST:
            p_k = pointers_of_tile(k_pool, stride_kr, to_row, BLOCK_N, BLOCK_D)
            p_v = pointers_of_tile(v_pool, stride_vr, to_row, BLOCK_N, BLOCK_D)
        for i in range(n_from, n_full, BLOCK_N):
            acc = _dq_tile(
                acc, b_q, b_do, b_base, b_delta, p_k, p_v, stride_kr, stride_vr, to_row, i, n_to, b_last, scale_log2,
                D, BLOCK_D, BLOCK_N, HOIST, False, DOT, ACC,
            )  # fmt: skip
        for i in range(n_full, n_to, BLOCK_N):
            acc = _dq_tile(
                acc, b_q, b_do, b_base, b_delta, p_k, p_v, stride_kr, stride_vr, to_row, i, n_to, b_last, scale_log2,
                D, BLOCK_D, BLOCK_N, HOIST, True, DOT, ACC,
            )  # fmt: skip
        n_seg += length
    if OFFSET:
        acc = rotate(acc, p_dq, m_row, acc_offset, cos, sin, s_acc, 1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
    tl.store(p_dq[:, None] + o_d[None, :], acc * scale, mask=m_q)
