"""Cross-agent attention over the segments of a trace, forward and backward, in Triton.

A tile is BLOCK_M query rows, (token, head of the GQA group) pairs of one sequence and one K/V head, so that a group reads
each K/V row once. It walks the segments of its sequence's view where they lie: tiles that it cannot see cost nothing, those
that all of its rows see need no mask. Short queries over a long view are split over the view's keys; the parts are merged
by a second kernel. dK and dV belong to the program that owns a tile of pool rows and loops over the tile's readers: no
atomics, the same bits on every run. Where a segment is read at a position offset, q is rotated, never the keys.

Nothing is read back from the device: tiles, splits and grids follow from shapes, programs find their sequence themselves.
"""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import attention_blocks, blocks
from diffmas.kernels.launch import accumulator, ceil_div, dot_dtype, on, once_per_shape, power_of_two, processors, rows_of
from diffmas.ops import reference

__all__ = ["cross_attention", "cross_attention_backward"]

LOG2E = tl.constexpr(1.4426950408889634)
MAX_SPLITS = 64
INDEX = ("q_indptr", "seg_indptr", "seg_start", "seg_len", "seg_offset")  # slices of one tensor: alignment varies
SCAN = tl.constexpr(128)  # entries of an index that are read at once


@triton.jit
def _rank(x, S, value):
    """How many of the rising x[0:S] are <= value."""
    rank = 0
    for i in range(0, S, SCAN):
        o_x = i + tl.arange(0, SCAN)
        rank += tl.sum(((tl.load(x + o_x, mask=o_x < S, other=0) <= value) & (o_x < S)).to(tl.int32))
    return rank


@triton.jit
def _total(x, first, last):
    """The sum of x[first:last]."""
    total = 0
    for i in range(first, last, SCAN):
        o_x = i + tl.arange(0, SCAN)
        total += tl.sum(tl.load(x + o_x, mask=o_x < last, other=0).to(tl.int32))
    return total


@triton.jit
def _sequence_of_tile(i_tile, q_indptr, B, TOKENS: tl.constexpr):
    """Sequence b has the tiles from q_indptr[b] // TOKENS + b on: room for ceil(length / TOKENS), known without looking at
    the other sequences. -> b, its first query and number of queries, first token of the tile."""
    i_b = -1
    for i in range(0, B, SCAN):
        o_b = i + tl.arange(0, SCAN)
        first = tl.load(q_indptr + o_b, mask=o_b < B, other=0).to(tl.int32) // TOKENS + o_b
        i_b += tl.sum(((first <= i_tile) & (o_b < B)).to(tl.int32))
    q_first = tl.load(q_indptr + i_b).to(tl.int32)
    return i_b, q_first, tl.load(q_indptr + i_b + 1).to(tl.int32) - q_first, (i_tile - q_first // TOKENS - i_b) * TOKENS


@triton.jit
def _skip_segments(seg_len, s_first, s_last, n_first):
    """The first segment of [s_first, s_last) that reaches beyond view position n_first, and its start in the view."""
    skipped, start, end = 0, 0, 0
    for i in range(s_first, s_last, SCAN):
        o_s = i + tl.arange(0, SCAN)
        b_len = tl.load(seg_len + o_s, mask=o_s < s_last, other=0).to(tl.int32)
        whole = (end + tl.cumsum(b_len, 0) <= n_first) & (o_s < s_last)
        skipped += tl.sum(whole.to(tl.int32))
        start += tl.sum(tl.where(whole, b_len, 0))
        end += tl.sum(b_len)
    return s_first + skipped, start


@triton.jit
def _rows_of_tile(i_h, q_first, L, t_first, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> packed query, query head and token of the sequence for each row of a tile, and which rows exist; all [BLOCK_M]."""
    o_m = tl.arange(0, BLOCK_M)
    b_token, b_head = t_first + o_m // G, (i_h * G + o_m % G).to(tl.int64)
    return (q_first + b_token).to(tl.int64), b_head, b_token, (o_m < BLOCK_M // G * G) & (b_token < L)


@triton.jit
def _keys_of_tile(
    i_b, seg_indptr, seg_len, L, t_first, b_token, i_split,
    TOKENS: tl.constexpr, CAUSAL: tl.constexpr, SPLIT: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """What a tile reads of its view. -> segments [s_first, s_last), the view position n_seg where the first of them starts,
    view positions [n_first, n_end), the end n_all of those that every row sees, the last of each row b_last [BLOCK_M]."""
    s_first, s_last = tl.load(seg_indptr + i_b).to(tl.int32), tl.load(seg_indptr + i_b + 1).to(tl.int32)
    N = _total(seg_len, s_first, s_last)
    b_last, n_all, n_end = N - 1 + 0 * b_token, N, N
    if CAUSAL:
        b_last = N - L + b_token
        n_all, n_end = tl.maximum(N - L + t_first + 1, 0), tl.maximum(N - L + tl.minimum(t_first + TOKENS, L), 0)
    n_first, n_seg = 0, 0
    if SPLIT:
        part = tl.cdiv(tl.cdiv(n_end, tl.num_programs(2)), BLOCK_N) * BLOCK_N
        n_first = i_split * part
        n_end = tl.minimum(n_first + part, n_end)
        s_first, n_seg = _skip_segments(seg_len, s_first, s_last, n_first)
    return s_first, s_last, n_seg, n_first, n_end, n_all, b_last


@triton.jit
def _load_at_offset(
    p_rows, m_row, cos, sin, s, SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads the rows at p_rows [M] and rotates them by SIGN * the offset of segment s in their first 2 * HALF dimensions:
    SIGN -1 makes of q what the segment's keys are multiplied with, SIGN 1 undoes that. cos, sin [S, 2 * HALF] of the offsets.
    -> [M, BLOCK_D] in ACC.

    The other dimension of a pair is read from memory: in registers it is another thread's."""
    o_d = tl.arange(0, BLOCK_D)
    rotated = o_d < 2 * HALF
    if INTERLEAVED:
        first, partner = o_d % 2 == 0, o_d ^ 1
    else:
        first = o_d < HALF
        partner = tl.where(first, o_d + HALF, o_d - HALF)
        if HALF % 8 == 0:
            partner = tl.max_contiguous(tl.multiple_of(partner, 8), 8)
    o_s = tl.cast(s, tl.int64) * (2 * HALF)
    b_cos = tl.load(cos + o_s + o_d, mask=rotated, other=1.0)
    b_sin = tl.load(sin + o_s + o_d, mask=rotated, other=0.0) * tl.where(first, -SIGN, SIGN)
    x = tl.load(p_rows[:, None] + o_d[None, :], mask=m_row[:, None] & (o_d < D)[None, :], other=0).to(ACC)
    other = tl.load(p_rows[:, None] + partner[None, :], mask=m_row[:, None] & rotated[None, :], other=0).to(ACC)
    # Join and sum, because the compiler would compute a plain addition in the layout of a product's operand: several times over
    # and with twice the registers.
    return tl.sum(tl.join(x * b_cos[None, :], other * b_sin[None, :]), 2)


@triton.jit
def _rotate(
    x, p_rows, m_row, offset, cos, sin, s, SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `_load_at_offset`, for x [M, BLOCK_D] in ACC; p_rows [M]: memory that only this program uses, overwritten."""
    if offset != 0:
        o_d = tl.arange(0, BLOCK_D)
        tl.store(p_rows[:, None] + o_d[None, :], x, mask=m_row[:, None] & (o_d < D)[None, :])
        tl.debug_barrier()
        x = _load_at_offset(p_rows, m_row, cos, sin, s, SIGN, D, BLOCK_D, HALF, INTERLEAVED, ACC)
        tl.debug_barrier()  # nobody writes there before all have read
    return x


@triton.jit
def _load_rows(p_rows, stride_row, b_rows, D: tl.constexpr, BLOCK_D: tl.constexpr, mask, MASKED: tl.constexpr):
    """Pool rows [BLOCK_N, BLOCK_D]; rows outside the mask are 0, whatever lies there."""
    o_d = tl.arange(0, BLOCK_D)
    p_x = p_rows + b_rows.to(tl.int64)[:, None] * stride_row + o_d[None, :]
    if MASKED or D != BLOCK_D:
        return tl.load(p_x, mask=mask[:, None] & (o_d < D)[None, :], other=0)
    else:
        return tl.load(p_x)


@triton.jit
def _forward_tile(
    acc, m, total, q, p_k, p_v, stride_kr, stride_vr, row, n_tile, n_end, b_last, scale_log2: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Online softmax over BLOCK_N keys from pool row `row`, at view position n_tile; the segment's part ends at n_end."""
    o_n = tl.arange(0, BLOCK_N)
    inside = n_tile + o_n < n_end
    k = _load_rows(p_k, stride_kr, row + o_n, D, BLOCK_D, inside, MASKED).to(DOT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale_log2
    if MASKED:
        s = tl.where(inside[None, :] & (n_tile + o_n[None, :] <= b_last[:, None]), s, -float("inf"))
    m_new = tl.maximum(m, tl.max(s, 1))
    base = m_new
    if MASKED:
        base = tl.where(m_new == -float("inf"), 0.0, m_new)  # a row that has seen nothing yet
    p = tl.exp2(s - base[:, None])
    shrink = tl.exp2(m - base)
    v = _load_rows(p_v, stride_vr, row + o_n, D, BLOCK_D, inside, MASKED).to(DOT)
    acc = tl.dot(p.to(DOT), v, acc * shrink[:, None], input_precision="ieee", out_dtype=ACC)
    return acc, m_new, total * shrink + tl.sum(p, 1)


@triton.jit
def _dq_tile(
    acc, q, do, base, delta, p_k, p_v, stride_kr, stride_vr, row, n_tile, n_end, b_last, scale_log2: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    o_n = tl.arange(0, BLOCK_N)
    inside = n_tile + o_n < n_end
    k = _load_rows(p_k, stride_kr, row + o_n, D, BLOCK_D, inside, MASKED).to(DOT)
    s = tl.dot(q, tl.trans(k), input_precision="ieee", out_dtype=ACC) * scale_log2
    p = tl.exp2(s - base[:, None])
    v = _load_rows(p_v, stride_vr, row + o_n, D, BLOCK_D, inside, MASKED).to(DOT)
    ds = p * (tl.dot(do, tl.trans(v), input_precision="ieee", out_dtype=ACC) - delta[:, None])
    if MASKED:
        ds = tl.where(inside[None, :] & (n_tile + o_n[None, :] <= b_last[:, None]), ds, 0.0)
    return tl.dot(ds.to(DOT), k, acc, input_precision="ieee", out_dtype=ACC)


@triton.jit(do_not_specialize=[*INDEX, "B", "n"])
def cross_attention_fwd_kernel(
    q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, cos, sin, o, lse,
    n, B, stride_qn, stride_qh, stride_kr, stride_kh, stride_vr, stride_vh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles, K/V heads, splits). o [n, Hq, D], lse [n, Hq]; if SPLIT, one for every split."""
    # The last tiles of a causal sequence see most: they start first.
    i_tile, i_h, i_split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, q_first, L, t_first = _sequence_of_tile(i_tile, q_indptr, B, BLOCK_M // G)
    if t_first >= L:
        return
    b_n, b_head, b_token, m_row = _rows_of_tile(i_h, q_first, L, t_first, G, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    p_q = q + b_n * stride_qn + b_head * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
    s_first, s_last, n_seg, n_first, n_end, n_all, b_last = _keys_of_tile(
        i_b, seg_indptr, seg_len, L, t_first, b_token, i_split, BLOCK_M // G, CAUSAL, SPLIT, BLOCK_N
    )

    p_k, p_v = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)
    m, total = tl.full((BLOCK_M,), -float("inf"), ACC), tl.zeros((BLOCK_M,), ACC)
    scale_log2: tl.constexpr = scale * LOG2E
    for s in range(s_first, s_last):
        start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
        n_from, n_to = tl.maximum(n_seg, n_first), tl.minimum(n_seg + length, n_end)
        n_full = n_from + tl.maximum(tl.minimum(n_to, n_all) - n_from, 0) // BLOCK_N * BLOCK_N
        b_qs = b_q
        if OFFSET:
            here = m_row & (b_token < tl.where(n_from < n_to, L, 0))
            b_qs = _load_at_offset(p_q, here, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC).to(DOT)
        to_row = start - n_seg
        for i in range(n_from, n_full, BLOCK_N):
            acc, m, total = _forward_tile(
                acc, m, total, b_qs, p_k, p_v, stride_kr, stride_vr, to_row + i, i, n_to, b_last, scale_log2, D, BLOCK_D,
                BLOCK_N, False, DOT, ACC,
            )  # fmt: skip
        for i in range(n_full, n_to, BLOCK_N):
            acc, m, total = _forward_tile(
                acc, m, total, b_qs, p_k, p_v, stride_kr, stride_vr, to_row + i, i, n_to, b_last, scale_log2, D, BLOCK_D,
                BLOCK_N, True, DOT, ACC,
            )  # fmt: skip
        n_seg += length

    empty = total == 0
    b_o = acc / tl.where(empty, 1.0, total)[:, None]
    b_lse = tl.where(empty, -float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) / LOG2E)
    b_n += i_split.to(tl.int64) * n
    tl.store(o + (b_n * Hq + b_head)[:, None] * D + o_d[None, :], b_o, mask=m_q)
    tl.store(lse + b_n * Hq + b_head, b_lse, mask=m_row)


@triton.jit(do_not_specialize=["rows", "splits"])
def cross_attention_fwd_kernel_merge(
    o_parts, lse_parts, o, lse, rows, splits,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Merges the states of the splits. A row is one (token, query head)."""
    o_r, o_d = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_D)
    m_r = o_r < rows
    m_o = m_r[:, None] & (o_d < D)[None, :]
    acc, total, m = tl.zeros((BLOCK_R, BLOCK_D), ACC), tl.zeros((BLOCK_R,), ACC), tl.full((BLOCK_R,), -float("inf"), ACC)
    for i in range(splits):
        o_part = i * rows.to(tl.int64) + o_r
        b_lse = tl.load(lse_parts + o_part, mask=m_r, other=-float("inf"))
        m_new = tl.maximum(m, b_lse)
        base = tl.where(m_new == -float("inf"), 0.0, m_new)
        shrink, weight = tl.exp2((m - base) * LOG2E), tl.exp2((b_lse - base) * LOG2E)
        b_o = tl.load(o_parts + o_part[:, None] * D + o_d[None, :], mask=m_o, other=0)
        acc, total, m = acc * shrink[:, None] + weight[:, None] * b_o, total * shrink + weight, m_new
    total = tl.where(total == 0, 1.0, total)
    tl.store(o + o_r[:, None] * D + o_d[None, :], acc / total[:, None], mask=m_o)
    tl.store(lse + o_r, m + tl.log2(total) / LOG2E, mask=m_r)


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


@triton.jit(do_not_specialize=[*INDEX, "B", "n"])
def cross_attention_bwd_kernel_dq(
    q, do, base, delta, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, cos, sin, dq,
    n, B, stride_qn, stride_qh, stride_don, stride_doh, stride_kr, stride_kh, stride_vr, stride_vh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, SPLIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid as in the forward. dq [n, Hq, D]; if SPLIT, one for every split; in ACC if SPLIT or OFFSET."""
    i_tile, i_h, i_split = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i_b, q_first, L, t_first = _sequence_of_tile(i_tile, q_indptr, B, BLOCK_M // G)
    if t_first >= L:
        return
    b_n, b_head, b_token, m_row = _rows_of_tile(i_h, q_first, L, t_first, G, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D)
    m_q = m_row[:, None] & (o_d < D)[None, :]
    p_q = q + b_n * stride_qn + b_head * stride_qh
    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
    b_do = tl.load(do + b_n[:, None] * stride_don + b_head[:, None] * stride_doh + o_d[None, :], mask=m_q, other=0).to(DOT)
    o_r = (i_h.to(tl.int64) * n + b_n) * G + b_head % G
    b_base, b_delta = tl.load(base + o_r, mask=m_row, other=0), tl.load(delta + o_r, mask=m_row, other=0)
    s_first, s_last, n_seg, n_first, n_end, n_all, b_last = _keys_of_tile(
        i_b, seg_indptr, seg_len, L, t_first, b_token, i_split, BLOCK_M // G, CAUSAL, SPLIT, BLOCK_N
    )

    p_k, p_v = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    p_dq = dq + ((b_n + i_split.to(tl.int64) * n) * Hq + b_head) * D
    acc = tl.zeros((BLOCK_M, BLOCK_D), ACC)  # dq / scale, rotated as q is for the segment at hand
    acc_offset, s_acc = tl.full((), 0, tl.int64), s_first
    scale_log2: tl.constexpr = scale * LOG2E
    for s in range(s_first, s_last):
        start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
        n_from, n_to = tl.maximum(n_seg, n_first), tl.minimum(n_seg + length, n_end)
        n_full = n_from + tl.maximum(tl.minimum(n_to, n_all) - n_from, 0) // BLOCK_N * BLOCK_N
        b_qs = b_q
        if OFFSET:
            here = m_row & (b_token < tl.where(n_from < n_to, L, 0))
            b_qs = _load_at_offset(p_q, here, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC).to(DOT)
            offset = tl.load(seg_offset + s)
            if (n_from < n_to) & (offset != acc_offset):
                acc = _rotate(acc, p_dq, m_row, acc_offset, cos, sin, s_acc, 1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                acc = _rotate(acc, p_dq, m_row, offset, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
                acc_offset, s_acc = offset, s
        to_row = start - n_seg
        for i in range(n_from, n_full, BLOCK_N):
            acc = _dq_tile(
                acc, b_qs, b_do, b_base, b_delta, p_k, p_v, stride_kr, stride_vr, to_row + i, i, n_to, b_last, scale_log2,
                D, BLOCK_D, BLOCK_N, False, DOT, ACC,
            )  # fmt: skip
        for i in range(n_full, n_to, BLOCK_N):
            acc = _dq_tile(
                acc, b_qs, b_do, b_base, b_delta, p_k, p_v, stride_kr, stride_vr, to_row + i, i, n_to, b_last, scale_log2,
                D, BLOCK_D, BLOCK_N, True, DOT, ACC,
            )  # fmt: skip
        n_seg += length
    if OFFSET:
        acc = _rotate(acc, p_dq, m_row, acc_offset, cos, sin, s_acc, 1, D, BLOCK_D, HALF, INTERLEAVED, ACC)
    tl.store(p_dq[:, None] + o_d[None, :], acc * scale, mask=m_q)


@triton.jit(do_not_specialize=[*INDEX, "grad_tail", "n", "B", "S"])
def cross_attention_bwd_kernel_dkv(
    q, do, base, delta, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, cos, sin, grad_tail,
    dk_pool, dv_pool, n, B, S, stride_qn, stride_qh, stride_don, stride_doh, stride_kr, stride_kh, stride_vr, stride_vh,
    stride_dkr, stride_dkh, stride_dvr, stride_dvh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, GRAD_TAIL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of pool rows, K/V heads). Scores are held transposed, [BLOCK_N keys, BLOCK_M query rows]."""
    r_first, i_h = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    o_n, o_m, o_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    b_rows = r_first + o_n
    p_k, p_v = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    acc_k, acc_v = tl.zeros((BLOCK_N, BLOCK_D), ACC), tl.zeros((BLOCK_N, BLOCK_D), ACC)
    needs_grad = tl.zeros((BLOCK_N,), tl.int32)
    scale_log2: tl.constexpr = scale * LOG2E
    for i_scan in range(0, S, SCAN):
        o_s = i_scan + tl.arange(0, SCAN)
        b_start = tl.load(seg_start + o_s, mask=o_s < S, other=0)
        b_end = b_start + tl.load(seg_len + o_s, mask=o_s < S, other=0)
        hit = ((b_start < r_first + BLOCK_N) & (b_end > r_first) & (o_s < S)).to(tl.int32)
        nth = tl.cumsum(hit, 0) * hit
        for i_hit in range(1, tl.sum(hit) + 1):
            s = tl.sum(tl.where(nth == i_hit, o_s, 0))
            i_b = _rank(seg_indptr + 1, B, s)
            start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
            s_first, s_last = tl.load(seg_indptr + i_b).to(tl.int32), tl.load(seg_indptr + i_b + 1).to(tl.int32)
            q_first = tl.load(q_indptr + i_b).to(tl.int32)
            L = tl.load(q_indptr + i_b + 1).to(tl.int32) - q_first
            n_seg = _total(seg_len, s_first, s)
            N = n_seg + _total(seg_len, s, s_last)
            b_pos = n_seg + b_rows - start  # view position of the tile's rows
            m_grad = (b_rows >= start) & (b_rows < start + length)
            n_low = n_seg + tl.maximum(r_first - start, 0)
            if GRAD_TAIL:
                n_old = N - tl.load(grad_tail + i_b).to(tl.int32)
                m_grad = m_grad & (b_pos >= n_old)
                n_low = tl.maximum(n_low, n_old)
            t_first = 0
            if CAUSAL:
                t_first = tl.maximum(n_low - (N - L), 0)
            if GRAD_TAIL:
                t_first = tl.where(tl.sum(m_grad.to(tl.int32)) > 0, t_first, L)
            needs_grad = needs_grad | m_grad.to(tl.int32)
            k = _load_rows(p_k, stride_kr, b_rows, D, BLOCK_D, m_grad, True).to(DOT)
            v = _load_rows(p_v, stride_vr, b_rows, D, BLOCK_D, m_grad, True).to(DOT)
            o_base = (i_h.to(tl.int64) * n + q_first) * G + o_m
            # Loaded a tile ahead, because copies of q and do ask for it. Rows that are not finite are zeros in the products, or
            # they would reach the tile's other rows, of other sequences too, as 0 times NaN.
            b_next = tl.load(base + o_base + t_first * G, mask=t_first * G + o_m < L * G, other=0)
            for i_m in range(t_first * G, L * G, BLOCK_M):
                b_token, b_head = (i_m + o_m) // G, (i_h * G + (i_m + o_m) % G).to(tl.int64)
                m_row = b_token < L
                b_n = (q_first + b_token).to(tl.int64)
                finite = m_row & (b_next == b_next)
                b_next = tl.load(base + o_base + (i_m + BLOCK_M), mask=i_m + BLOCK_M + o_m < L * G, other=0)
                m_q = finite[:, None] & (o_d < D)[None, :]
                p_q = q + b_n * stride_qn + b_head * stride_qh
                if OFFSET:
                    b_q = _load_at_offset(p_q, finite, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC).to(DOT)
                else:
                    b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
                b_base = tl.load(base + o_base + i_m, mask=m_row, other=0)
                s_t = tl.dot(k, tl.trans(b_q), input_precision="ieee", out_dtype=ACC) * scale_log2
                seen = m_grad[:, None] & m_row[None, :]
                if CAUSAL:
                    seen = seen & (b_pos[:, None] <= (N - L + b_token)[None, :])
                p_t = tl.where(seen, tl.exp2(s_t - b_base[None, :]), 0.0)
                p_do = do + b_n[:, None] * stride_don + b_head[:, None] * stride_doh + o_d[None, :]
                b_do = tl.load(p_do, mask=m_q, other=0).to(DOT)
                acc_v = tl.dot(p_t.to(DOT), b_do, acc_v, input_precision="ieee", out_dtype=ACC)
                b_delta = tl.load(delta + o_base + i_m, mask=m_row, other=0)
                ds_t = p_t * (tl.dot(v, tl.trans(b_do), input_precision="ieee", out_dtype=ACC) - b_delta[None, :])
                acc_k = tl.dot(ds_t.to(DOT), b_q, acc_k, input_precision="ieee", out_dtype=ACC)
    m_d = (needs_grad > 0)[:, None] & (o_d < D)[None, :]
    b_rows = b_rows.to(tl.int64)
    p_dk = dk_pool + i_h.to(tl.int64) * stride_dkh + b_rows[:, None] * stride_dkr + o_d[None, :]
    p_dv = dv_pool + i_h.to(tl.int64) * stride_dvh + b_rows[:, None] * stride_dvr + o_d[None, :]
    tl.store(p_dk, tl.load(p_dk, mask=m_d, other=0) + acc_k * scale, mask=m_d)
    tl.store(p_dv, tl.load(p_dv, mask=m_d, other=0) + acc_v, mask=m_d)


def _shape(q, k_pool, q_indptr, seg_offset, inv_freq) -> tuple:
    """The arguments of `sizes` that the tensors decide. The last is how many pairs of dimensions an offset rotates."""
    rotated = None if seg_offset is None else inv_freq.shape[0]
    return *q.shape, *k_pool.shape[:2], q_indptr.shape[0] - 1, q.dtype, k_pool.dtype, q.device, rotated


@once_per_shape
def sizes(
    kernel, n, Hq, D, R, Hkv, B, dtype, pool_dtype, device, rotated, scale, causal, interleaved, tiles
) -> tuple[tuple[int, ...], dict]:
    """The grid of fwd, dq or dkv, and the constants of its launch. From shapes alone: a split's share of the view is found on
    the device."""
    G, offset, dot = Hq // Hkv, rotated is not None, dot_dtype(dtype, pool_dtype)
    block = tiles(kernel, ceil_div(n, B) * G, D, dot.primitive_bitwidth > 16, offset, device)
    constants = block | dict(
        scale=float(scale), Hq=Hq, G=G, D=D, HALF=rotated or 0, CAUSAL=causal, INTERLEAVED=interleaved, OFFSET=offset,
        BLOCK_D=max(16, power_of_two(D)), DOT=dot, ACC=accumulator(dtype),
    )  # fmt: skip
    if kernel == "dkv":
        return (ceil_div(R, block["BLOCK_N"]), Hkv), constants
    BLOCK_M = max(block["BLOCK_M"], power_of_two(G))  # a tile holds a group
    count = n // (BLOCK_M // G) + B
    wanted = ceil_div(2 * processors(device), count * Hkv)
    splits = max(1, min(wanted, MAX_SPLITS, ceil_div(R, 4 * block["BLOCK_N"])))
    return (count, Hkv, splits), constants | dict(BLOCK_M=BLOCK_M, SPLIT=splits > 1)


@once_per_shape
def row_sizes(op, rows, D, dtype) -> tuple[tuple[int], dict]:
    """As `sizes`, for the kernels merge and delta. A row is one (token, query head)."""
    block = blocks(op)
    return (ceil_div(rows, block["BLOCK_R"]),), dict(D=D, BLOCK_D=max(16, power_of_two(D)), ACC=accumulator(dtype)) | block


def _offsets(q, seg_offset, inv_freq, interleaved) -> tuple:
    """seg_offset, and cos and sin [S, Dr] of each segment's rotation; None where no segment is read at an offset."""
    if seg_offset is None:
        return None, None, None
    return seg_offset, *reference.offset_tables(seg_offset, inv_freq, interleaved, reference.accumulator(q.dtype))


def cross_attention(
    q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved,
    *, tiles=attention_blocks,
):  # fmt: skip
    n, Hq, D = q.shape
    q, acc = rows_of(q), reference.accumulator(q.dtype)
    o, lse = q.new_empty(q.shape), q.new_empty((n, Hq), dtype=acc)
    if not n:
        return o, lse
    shape = _shape(q, k_pool, q_indptr, seg_offset, inv_freq)
    grid, constants = sizes("fwd", *shape, scale, causal, interleaved, tiles)
    splits = grid[2]
    view = q_indptr, seg_indptr, seg_start, seg_len, *_offsets(q, seg_offset, inv_freq, interleaved)
    parts = (o, lse)
    if splits > 1:
        parts = q.new_empty((splits, n, Hq, D), dtype=acc), q.new_empty((splits, n, Hq), dtype=acc)
    with on(q):
        cross_attention_fwd_kernel[grid](
            q, k_pool, v_pool, *view, *parts, n, q_indptr.shape[0] - 1, *q.stride()[:2], *k_pool.stride()[:2],
            *v_pool.stride()[:2], **constants,
        )  # fmt: skip
        if splits > 1:
            grid, constants = row_sizes("cross_attention_merge", n * Hq, D, q.dtype)
            cross_attention_fwd_kernel_merge[grid](*parts, o, lse, n * Hq, splits, **constants)
    return o, lse


def cross_attention_backward(
    do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
    scale, causal, interleaved, dk_pool, dv_pool, grad_tail=None, want_dq=True, *, tiles=attention_blocks,
):  # fmt: skip
    n, Hq, D = q.shape
    q, do, o, lse, acc = rows_of(q), rows_of(do), o.contiguous(), lse.contiguous(), reference.accumulator(q.dtype)
    dq = q.new_empty(q.shape if want_dq else 0)
    if not n:
        return dq
    B, S = q_indptr.shape[0] - 1, seg_start.shape[0]
    shape = _shape(q, k_pool, q_indptr, seg_offset, inv_freq)
    base, delta = torch.empty_like(lse), torch.empty_like(lse)
    with on(q):
        grid, constants = row_sizes("cross_attention_delta", n * Hq, D, q.dtype)
        cross_attention_bwd_kernel_delta[grid](
            do, o, lse, None if dlse is None else dlse.contiguous(), base, delta, n, *do.stride()[:2], Hq=Hq,
            G=Hq // k_pool.shape[1], DLSE=dlse is not None, **constants,
        )  # fmt: skip
        view = q_indptr, seg_indptr, seg_start, seg_len, *_offsets(q, seg_offset, inv_freq, interleaved)
        strides = *q.stride()[:2], *do.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2]
        if want_dq:
            grid, constants = sizes("dq", *shape, scale, causal, interleaved, tiles)
            splits = grid[2]
            whole = splits == 1 and (seg_offset is None or q.dtype == acc)
            part = dq if whole else q.new_empty((splits, n, Hq, D), dtype=acc)
            cross_attention_bwd_kernel_dq[grid](q, do, base, delta, k_pool, v_pool, *view, part, n, B, *strides, **constants)
            if not whole:
                dq = part.sum(0).to(q.dtype)
        grid, constants = sizes("dkv", *shape, scale, causal, interleaved, tiles)
        cross_attention_bwd_kernel_dkv[grid](
            q, do, base, delta, k_pool, v_pool, *view, grad_tail, dk_pool, dv_pool, n, B, S, *strides, *dk_pool.stride()[:2],
            *dv_pool.stride()[:2], GRAD_TAIL=grad_tail is not None, **constants,
        )  # fmt: skip
    return dq
