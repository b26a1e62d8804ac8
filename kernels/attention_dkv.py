"""dK and dV of cross-agent attention: of all rows that are read, or of the newest of each view."""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import INDEX, LOG2E, SCAN, load_at_offset, load_rows, pointers, rank, sum_of

__all__ = ["cross_attention_bwd_kernel_dkv", "cross_attention_bwd_kernel_dkv_tail"]


@triton.jit
def _add_readers(
    acc_k, acc_v, k, v, b_first, q, do, base, delta, cos, sin, s, i_h, n, q_first, t_first, L,
    stride_qn, stride_qh, stride_don, stride_doh, scale_log2: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, INTERLEAVED: tl.constexpr, OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Adds what tokens [t_first, L) of a sequence give to keys of its segment s, rows k and v [BLOCK_N, BLOCK_D]. b_first
    [BLOCK_N]: the first token that sees a key, L where none does. Scores are held transposed, [BLOCK_N keys, BLOCK_M rows]."""
    o_m, o_d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    # Scalars in 64 bits, so that a row's own part stays in 32.
    o_base = (i_h.to(tl.int64) * n + q_first) * G
    p_base, p_delta = base + o_base, delta + o_base
    # Loaded a tile ahead, because copies of q and do ask for it. Rows that are not finite are zeros in the products, or they
    # would reach the tile's other rows, of other sequences too, as 0 times NaN.
    b_next = tl.load(p_base + t_first * G + o_m, mask=t_first * G + o_m < L * G, other=0)
    for i_m in range(t_first * G, L * G, BLOCK_M):
        o_r = i_m + o_m
        b_token, b_head, m_row = o_r // G, (i_h * G + o_r % G).to(tl.int64), o_r < L * G
        b_n = (q_first + b_token).to(tl.int64)
        finite = m_row & (b_next == b_next)
        b_next = tl.load(p_base + (o_r + BLOCK_M), mask=o_r + BLOCK_M < L * G, other=0)
        m_q = finite[:, None] & (o_d < D)[None, :]
        p_q = q + b_n * stride_qn + b_head * stride_qh
        if OFFSET:
            b_q = load_at_offset(p_q, finite, cos, sin, s, 0, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC).to(DOT)
        else:
            b_q = tl.load(p_q[:, None] + o_d[None, :], mask=m_q, other=0).to(DOT)
        b_base = tl.load(p_base + o_r, mask=m_row, other=0)
        s_t = tl.dot(k, tl.trans(b_q), input_precision="ieee", out_dtype=ACC) * scale_log2
        # Rows that are missing are seen by none, or add nothing: their q, do and delta are 0.
        seen = b_first[:, None] <= tl.where(m_row, b_token, -1)[None, :]
        p_t = tl.where(seen, tl.exp2(s_t - b_base[None, :]), 0.0)
        p_do = do + b_n[:, None] * stride_don + b_head[:, None] * stride_doh + o_d[None, :]
        b_do = tl.load(p_do, mask=m_q, other=0).to(DOT)
        acc_v = tl.dot(p_t.to(DOT), b_do, acc_v, input_precision="ieee", out_dtype=ACC)
        b_delta = tl.load(p_delta + o_r, mask=m_row, other=0)
        ds_t = p_t * (tl.dot(v, tl.trans(b_do), input_precision="ieee", out_dtype=ACC) - b_delta[None, :])
        acc_k = tl.dot(ds_t.to(DOT), b_q, acc_k, input_precision="ieee", out_dtype=ACC)
    return acc_k, acc_v


@triton.jit
def _covering(seg_start, seg_len, i_scan, S, r_first, BLOCK_N: tl.constexpr):
    """Which of SCAN segments from i_scan on cover any of BLOCK_N pool rows from r_first on, 0 or 1."""
    o_s = i_scan + tl.arange(0, SCAN)
    b_start = tl.load(seg_start + o_s, mask=o_s < S, other=0).to(tl.int32)
    b_end = b_start + tl.load(seg_len + o_s, mask=o_s < S, other=0).to(tl.int32)
    return ((b_start < r_first + BLOCK_N) & (b_end > r_first)).to(tl.int32)


@triton.jit
def _add_to_rows(p_rows, stride_row, b_rows, m_row, acc, D: tl.constexpr, BLOCK_D: tl.constexpr):
    o_d = tl.arange(0, BLOCK_D)
    p_d = p_rows + b_rows.to(tl.int64)[:, None] * stride_row + o_d[None, :]
    m_d = m_row[:, None] & (o_d < D)[None, :]
    tl.store(p_d, tl.load(p_d, mask=m_d, other=0) + acc, mask=m_d)


@triton.jit(do_not_specialize=[*INDEX, "n", "B", "S"])
def cross_attention_bwd_kernel_dkv(
    q, do, base, delta, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, cos, sin,
    dk_pool, dv_pool, n, B, S, stride_qn, stride_qh, stride_don, stride_doh, stride_kr, stride_kh, stride_vr, stride_vh,
    stride_dkr, stride_dkh, stride_dvr, stride_dvh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of pool rows, K/V heads): a program owns its rows and finds the segments that cover them."""
    r_first, i_h = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    readers = tl.sum(_covering(seg_start, seg_len, 0, S, r_first, BLOCK_N))
    for i_scan in range(SCAN, S, SCAN):
        readers += tl.sum(_covering(seg_start, seg_len, i_scan, S, r_first, BLOCK_N))
    if readers == 0:
        return
    b_rows = r_first + tl.arange(0, BLOCK_N)
    p_k, p_v = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    acc_k, acc_v = tl.zeros((BLOCK_N, BLOCK_D), ACC), tl.zeros((BLOCK_N, BLOCK_D), ACC)
    covered = tl.zeros((BLOCK_N,), tl.int32)
    for i_scan in range(0, S, SCAN):
        o_s = i_scan + tl.arange(0, SCAN)
        hit = _covering(seg_start, seg_len, i_scan, S, r_first, BLOCK_N)
        nth = tl.cumsum(hit, 0) * hit
        for i_hit in range(1, tl.sum(hit) + 1):
            s = tl.sum(tl.where(nth == i_hit, o_s, 0))
            i_b = rank(seg_indptr + 1, B, s)
            start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
            q_first = tl.load(q_indptr + i_b).to(tl.int32)
            L = tl.load(q_indptr + i_b + 1).to(tl.int32) - q_first
            m_row = (b_rows >= start) & (b_rows < start + length)
            b_first, t_first = tl.where(m_row, 0, L), 0
            if CAUSAL:
                # Token t sees what is L - t or more from the end of the view.
                from_end = length + sum_of(seg_len, s + 1, tl.load(seg_indptr + i_b + 1).to(tl.int32))
                b_first = tl.where(m_row, L - from_end + (b_rows - start), L)
                t_first = tl.maximum(L - from_end + tl.maximum(r_first - start, 0), 0)
            covered = covered | m_row.to(tl.int32)
            k = load_rows(pointers(p_k, stride_kr, b_rows, BLOCK_D), m_row, D, BLOCK_D, True).to(DOT)
            v = load_rows(pointers(p_v, stride_vr, b_rows, BLOCK_D), m_row, D, BLOCK_D, True).to(DOT)
            acc_k, acc_v = _add_readers(
                acc_k, acc_v, k, v, b_first, q, do, base, delta, cos, sin, s, i_h, n, q_first, t_first, L, stride_qn,
                stride_qh, stride_don, stride_doh, scale * LOG2E, G, D, HALF, INTERLEAVED, OFFSET, BLOCK_M, BLOCK_D, DOT, ACC,
            )  # fmt: skip
    _add_to_rows(dk_pool + i_h.to(tl.int64) * stride_dkh, stride_dkr, b_rows, covered > 0, acc_k * scale, D, BLOCK_D)
    _add_to_rows(dv_pool + i_h.to(tl.int64) * stride_dvh, stride_dvr, b_rows, covered > 0, acc_v, D, BLOCK_D)


@triton.jit(do_not_specialize=[*INDEX, "grad_tail", "n"])
def cross_attention_bwd_kernel_dkv_tail(
    q, do, base, delta, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, cos, sin, grad_tail,
    dk_pool, dv_pool, n, stride_qn, stride_qh, stride_don, stride_doh, stride_kr, stride_kh, stride_vr, stride_vh,
    stride_dkr, stride_dkh, stride_dvr, stride_dvh, scale: tl.constexpr,
    Hq: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, CAUSAL: tl.constexpr, INTERLEAVED: tl.constexpr,
    OFFSET: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    DOT: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Grid (sequences, K/V heads, programs of a sequence): the last grad_tail[b] rows of view b, which nobody else reads, in
    windows of BLOCK_N counted from the end. The programs of a sequence share the windows among them, those with the most
    readers first; the host need not know how many there are."""
    i_b, i_h, i_p = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    asked = tl.load(grad_tail + i_b)
    if i_p * BLOCK_N >= asked:
        return
    s_first, s_last = tl.load(seg_indptr + i_b).to(tl.int32), tl.load(seg_indptr + i_b + 1).to(tl.int32)
    tail = tl.minimum(asked, sum_of(seg_len, s_first, s_last)).to(tl.int32)  # any number may be asked for
    windows = tl.cdiv(tail, BLOCK_N)
    q_first = tl.load(q_indptr + i_b).to(tl.int32)
    L = tl.load(q_indptr + i_b + 1).to(tl.int32) - q_first
    p_k, p_v = k_pool + i_h.to(tl.int64) * stride_kh, v_pool + i_h.to(tl.int64) * stride_vh
    p_dk, p_dv = dk_pool + i_h.to(tl.int64) * stride_dkh, dv_pool + i_h.to(tl.int64) * stride_dvh
    for i_w in range(i_p, windows, tl.num_programs(2)):
        w_first = (windows - 1 - i_w) * BLOCK_N
        w_end = tl.minimum(w_first + BLOCK_N, tail)
        s, behind = s_last - 1, 0  # rows of the view behind segment s
        while (s >= s_first) & (behind < w_end):
            start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
            end = start + length
            if behind + length > w_first:
                r_first = tl.maximum(start, end - (w_end - behind))
                b_rows = r_first + tl.arange(0, BLOCK_N)
                m_row = b_rows < end - tl.maximum(w_first - behind, 0)
                b_first, t_first = tl.where(m_row, 0, L), 0
                if CAUSAL:
                    b_first = tl.where(m_row, L - behind - end + b_rows, L)
                    t_first = tl.maximum(L - behind - end + r_first, 0)
                k = load_rows(pointers(p_k, stride_kr, b_rows, BLOCK_D), m_row, D, BLOCK_D, True).to(DOT)
                v = load_rows(pointers(p_v, stride_vr, b_rows, BLOCK_D), m_row, D, BLOCK_D, True).to(DOT)
                acc_k, acc_v = _add_readers(
                    tl.zeros((BLOCK_N, BLOCK_D), ACC), tl.zeros((BLOCK_N, BLOCK_D), ACC), k, v, b_first, q, do, base, delta,
                    cos, sin, s, i_h, n, q_first, t_first, L, stride_qn, stride_qh, stride_don, stride_doh, scale * LOG2E, G,
                    D, HALF, INTERLEAVED, OFFSET, BLOCK_M, BLOCK_D, DOT, ACC,
                )  # fmt: skip
                _add_to_rows(p_dk, stride_dkr, b_rows, m_row, acc_k * scale, D, BLOCK_D)
                _add_to_rows(p_dv, stride_dvr, b_rows, m_row, acc_v, D, BLOCK_D)
            behind += length
            s -= 1
