"""dK and dV of cross-agent attention."""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import INDEX, LOG2E, SCAN, load_at_offset, load_rows, rank, sum_of

__all__ = ["cross_attention_bwd_kernel_dkv"]


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
            i_b = rank(seg_indptr + 1, B, s)
            start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
            s_first, s_last = tl.load(seg_indptr + i_b).to(tl.int32), tl.load(seg_indptr + i_b + 1).to(tl.int32)
            q_first = tl.load(q_indptr + i_b).to(tl.int32)
            L = tl.load(q_indptr + i_b + 1).to(tl.int32) - q_first
            n_seg = sum_of(seg_len, s_first, s)
            N = n_seg + sum_of(seg_len, s, s_last)
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
            k = load_rows(p_k, stride_kr, b_rows, D, BLOCK_D, m_grad, True).to(DOT)
            v = load_rows(p_v, stride_vr, b_rows, D, BLOCK_D, m_grad, True).to(DOT)
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
                    b_q = load_at_offset(p_q, finite, cos, sin, s, -1, D, BLOCK_D, HALF, INTERLEAVED, ACC).to(DOT)
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
