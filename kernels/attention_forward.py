"""The forward of cross-agent attention."""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import (
    LOG2E,
    entry_of,
    load_scales,
    load_tile,
    numbers,
    pointers_of_stream,
    rows_of_positions,
    rows_of_tile,
    stream_of,
    turn,
)

__all__ = ["cross_attention_fwd_kernel"]


@triton.jit
def _forward_tile(
    acc, m, total, q, p_k, p_v, k_scale, v_scale, stride_kr, stride_vr, stride_sr, to_row, b_rows, n_tile, n_end, b_last,
    scale_log2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, ROWS: tl.constexpr,
    MASKED: tl.constexpr, PAYLOAD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online softmax over BLOCK_N keys from view position n_tile; p_k, p_v, b_rows: as `load_tile` has them; the stream ends at
    n_end."""
    o_n = tl.arange(0, BLOCK_N)
    inside = n_tile + o_n < n_end
    k = load_tile(p_k, stride_kr, to_row, n_tile, b_rows, inside, D, BLOCK_N, BLOCK_D, ROWS, MASKED)
    s = tl.dot(q, tl.trans(numbers(k, PAYLOAD, DOT)), input_precision="ieee", out_dtype=ACC)
    if PAYLOAD != "floats":
        s *= load_scales(k_scale, stride_sr, to_row, n_tile, b_rows, inside, BLOCK_N, ROWS, MASKED, PAYLOAD, ACC)[None, :]
    # Scaled behind the maximum, in one instruction with the difference. Not where a scale turns the order round.
    factor: tl.constexpr = scale_log2 if scale_log2 > 0 else 1.0
    if scale_log2 <= 0:
        s *= scale_log2
    if MASKED:
        seen = inside[None, :]
        if b_last is not None:
            seen &= n_tile + o_n[None, :] <= b_last[:, None]
        s = tl.where(seen, s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    base = m_new
    if MASKED:
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = tl.exp2(s * factor - base[:, None])
    shrink = tl.exp2(m - base)
    v = load_tile(p_v, stride_vr, to_row, n_tile, b_rows, inside, D, BLOCK_N, BLOCK_D, ROWS, MASKED)
    total = total * shrink + tl.sum(p, 1)
    if PAYLOAD != "floats":
        p *= load_scales(v_scale, stride_sr, to_row, n_tile, b_rows, inside, BLOCK_N, ROWS, MASKED, PAYLOAD, ACC)[None, :]
    v = numbers(v, PAYLOAD, DOT)
    acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
    return acc, m_new, total


@triton.jit(do_not_specialize=["seg_offset", "n", "o_streams"])
def cross_attention_fwd_kernel(
    q, k_pool, v_pool, k_scale, v_scale, work, seg_offset, cos, sin, q_turned, o, lse,
    n, o_streams, stride_qn, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, stride_sr, stride_sh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, PAYLOAD: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, K/V heads, splits). o [n, Hq, D], lse [n, Hq]; if SPLIT, one for every split, lse in log2."""
    # The last tiles of a causal sequence see most: they start first.
    i_tile, i_h, i_split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    q_first, L, t_first, N, n_first, n_end, s, n_to, s_next, to_row = entry_of(work, i_tile, i_split)
    if t_first >= L:
        return
    b_n, b_head, b_token, m_row = rows_of_tile(i_h, q_first, L, t_first, G, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    p_q = q + b_n * stride_qn + b_head * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
    n_all, b_last = N, None  # the end of what every row sees, the last position that each row does
    if CAUSAL:
        n_all, b_last = tl.maximum(N - L + t_first + 1, 0), N - L + b_token

    k_pool, v_pool = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    if PAYLOAD != "floats":
        k_scale, v_scale = k_scale + i_h.to(tl.int64) * stride_sh, v_scale + i_h.to(tl.int64) * stride_sh
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    m, total = tl.full((BLOCK_M,), -float("inf"), ACC), tl.zeros((BLOCK_M,), ACC)
    scale_log2: tl.constexpr = scale * LOG2E
    if OFFSET:
        offset = tl.full((), 0, tl.int64)  # that p_turned has been turned by
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
                offset = new
            b_q = tl.load(p_turned[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
        p_k = pointers_of_stream(k_pool, stride_kr, to_row, BLOCK_N, BLOCK_D, ROWS)
        p_v = pointers_of_stream(v_pool, stride_vr, to_row, BLOCK_N, BLOCK_D, ROWS)
        b_next = rows_of_positions(work, to_row, n_first, BLOCK_N, ROWS)  # a tile ahead, or K and V would wait for them
        for i in range(n_first, n_full, BLOCK_N):
            b_rows, b_next = b_next, rows_of_positions(work, to_row, i + BLOCK_N, BLOCK_N, ROWS)
            acc, m, total = _forward_tile(
                acc, m, total, b_q, p_k, p_v, k_scale, v_scale, stride_kr, stride_vr, stride_sr, to_row, b_rows, i, n_to,
                b_last, scale_log2, D, BLOCK_D, BLOCK_N, ROWS, False, PAYLOAD, DOT, ACC,
            )  # fmt: skip
        for i in range(n_full, n_to, BLOCK_N):
            b_rows, b_next = b_next, rows_of_positions(work, to_row, i + BLOCK_N, BLOCK_N, ROWS)
            acc, m, total = _forward_tile(
                acc, m, total, b_q, p_k, p_v, k_scale, v_scale, stride_kr, stride_vr, stride_sr, to_row, b_rows, i, n_to,
                b_last, scale_log2, D, BLOCK_D, BLOCK_N, ROWS, True, PAYLOAD, DOT, ACC,
            )  # fmt: skip
        s, n_first = s_next, n_to
        n_to, s_next, to_row = stream_of(work, o_streams, s)

    empty = total == 0
    b_o = acc / tl.where(empty, 1.0, total)[:, None]
    b_lse = tl.where(empty, -float("inf"), m + tl.log2(tl.where(empty, 1.0, total)))
    if not SPLIT:
        b_lse /= LOG2E
    o_r = (b_n + i_split.to(tl.int64) * n) * Hq + b_head
    tl.store(o + o_r[:, None] * D + o_d[None, :], b_o, mask=m_q)
    tl.store(lse + o_r, b_lse, mask=m_row)
