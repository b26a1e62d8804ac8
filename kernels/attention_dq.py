"""What the backward of cross-agent attention begins with, and dq."""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import (
    LOG2E,
    entry_of,
    load_scales,
    load_tile,
    numbers,
    pointers_of_stream,
    rotate,
    rows_of_positions,
    rows_of_tile,
    stream_of,
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
    acc, q, do, base, delta, p_k, p_v, k_scale, v_scale, stride_kr, stride_vr, stride_sr, to_row, b_rows, n_tile, n_end,
    b_last, scale_log2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, PAYLOAD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Arguments as in the forward."""
    o_n = tl.arange(0, BLOCK_N)
    inside = n_tile + o_n < n_end
    k = load_tile(p_k, stride_kr, to_row, n_tile, b_rows, inside, D, BLOCK_N, BLOCK_D, ROWS, MASKED)
    k = numbers(k, PAYLOAD, DOT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale_log2
    if PAYLOAD != "floats":
        b_k = load_scales(k_scale, stride_sr, to_row, n_tile, b_rows, inside, BLOCK_N, ROWS, MASKED, PAYLOAD, ACC)
        b_v = load_scales(v_scale, stride_sr, to_row, n_tile, b_rows, inside, BLOCK_N, ROWS, MASKED, PAYLOAD, ACC)
        s *= b_k[None, :]
    p = tl.exp2(s - base[:, None])
    v = load_tile(p_v, stride_vr, to_row, n_tile, b_rows, inside, D, BLOCK_N, BLOCK_D, ROWS, MASKED)
    dp = tl.dot(do, tl.trans(numbers(v, PAYLOAD, DOT)), input_precision="ieee", out_dtype=ACC)
    if PAYLOAD != "floats":
        dp *= b_v[None, :]
        ds = p * (dp - delta[:, None]) * b_k[None, :]
    else:
        ds = p * (dp - delta[:, None])
    if MASKED:
        seen = inside[None, :]
        if b_last is not None:
            seen &= n_tile + o_n[None, :] <= b_last[:, None]
        ds = tl.where(seen, ds, 0.0)
    return tl.dot(ds.to(DOT), k, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit(do_not_specialize=["seg_offset", "n", "o_streams"])
def cross_attention_bwd_kernel_dq(
    q, do, base, delta, k_pool, v_pool, k_scale, v_scale, work, seg_offset, cos, sin, q_turned, dq, n, o_streams,
    stride_qn, stride_qh, stride_don, stride_doh, stride_kr, stride_kh, stride_vr, stride_vh, stride_sr, stride_sh,
    scale: tl.constexpr, Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr,
    INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, ROWS: tl.constexpr, PAYLOAD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid as in the forward. dq [n, Hq, D]; if SPLIT, one for every split; in ACC if SPLIT or OFFSET."""
    i_tile, i_h, i_split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_first, L, t_first, N, n_first, n_end, s, n_to, s_next, to_row = entry_of(work, i_tile, i_split)
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
    n_all, b_last = N, None  # the end of what every row sees, the last position that each row does
    if CAUSAL:
        n_all, b_last = tl.maximum(N - L + t_first + 1, 0), N - L + b_token

    k_pool, v_pool = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    if PAYLOAD != "floats":
        k_scale, v_scale = k_scale + i_h.to(tl.int64) * stride_sh, v_scale + i_h.to(tl.int64) * stride_sh
    p_dq = dq + ((b_n + i_split.to(tl.int64) * n) * Hq + b_head) * D
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)  # dq / scale, rotated as q is for the segments at hand
    scale_log2: tl.constexpr = scale * LOG2E
    if OFFSET:
        # That p_turned and acc have been turned by, and its segment. Not `s` to begin with: of two names with one value before
        # a loop, Triton 3.9 does not notice that an `if` in the loop makes one of them the other.
        offset, s_acc = tl.full((), 0, tl.int64), tl.full((), 0, tl.int32)
        p_turned = q_turned + ((b_n + i_split.to(tl.int64) * n) * Hq + b_head) * D
        tl.store(p_turned[:, None] + o_d[None, :], b_q, mask=m_q)
        tl.debug_barrier()
    while n_first < n_end:
        n_to = tl.minimum(n_to, n_end)
        n_full = n_first + tl.maximum(tl.minimum(n_to, n_all) - n_first, 0) // BLOCK_N * BLOCK_N
        if OFFSET:
            new = tl.load(seg_offset + s).to(tl.int64)
            if new != offset:
                turn(p_q, p_turned, m_row, cos, sin, s, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                acc = rotate(acc, p_dq, m_row, offset, cos, sin, s_acc, 1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                acc = rotate(acc, p_dq, m_row, new, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                offset, s_acc = new, s
            b_q = tl.load(p_turned[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
        p_k = pointers_of_stream(k_pool, stride_kr, to_row, BLOCK_N, BLOCK_D, ROWS)
        p_v = pointers_of_stream(v_pool, stride_vr, to_row, BLOCK_N, BLOCK_D, ROWS)
        b_next = rows_of_positions(work, to_row, n_first, BLOCK_N, ROWS)  # a tile ahead, or K and V would wait for them
        for i in range(n_first, n_full, BLOCK_N):
            b_rows, b_next = b_next, rows_of_positions(work, to_row, i + BLOCK_N, BLOCK_N, ROWS)
            acc = _dq_tile(
                acc, b_q, b_do, b_base, b_delta, p_k, p_v, k_scale, v_scale, stride_kr, stride_vr, stride_sr, to_row, b_rows,
                i, n_to, b_last, scale_log2, D, BLOCK_D, BLOCK_N, ROWS, False, PAYLOAD, DOT, ACC,
            )  # fmt: skip
        for i in range(n_full, n_to, BLOCK_N):
            b_rows, b_next = b_next, rows_of_positions(work, to_row, i + BLOCK_N, BLOCK_N, ROWS)
            acc = _dq_tile(
                acc, b_q, b_do, b_base, b_delta, p_k, p_v, k_scale, v_scale, stride_kr, stride_vr, stride_sr, to_row, b_rows,
                i, n_to, b_last, scale_log2, D, BLOCK_D, BLOCK_N, ROWS, True, PAYLOAD, DOT, ACC,
            )  # fmt: skip
        s, n_first = s_next, n_to
        n_to, s_next, to_row = stream_of(work, o_streams, s)
    if OFFSET:
        acc = rotate(acc, p_dq, m_row, offset, cos, sin, s_acc, 1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
    tl.store(p_dq[:, None] + o_d[None, :], acc * scale, mask=m_q)
