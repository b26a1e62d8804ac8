"""The math of every op, in plain PyTorch: the oracle the kernels are tested against, and the backend that runs anywhere.

Shapes. n packed query tokens of B sequences ("thd" layout, no padding), Hq query heads, Hkv key/value heads
(Hq = G * Hkv; query head h reads K/V head h // G), D head size, Dr <= D rotary dimensions, R pool rows ("slots").

A sequence's *view* is the concatenation, in order, of its segments: runs of consecutive pool rows. Nothing here needs
the runs to be disjoint between sequences (forked traces share rows), only that a row is written before it is read.

Everything is accumulated in float32, or in float64 when the inputs are. Backward passes are written by hand because the
pools are mutated; `*_backward` functions mutate the gradient pools as the op contracts say.
"""

import torch
from torch import Tensor

__all__ = [
    "attention_work",
    "inject",
    "inject_backward",
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_quantized",
    "cross_attention_quantized_backward",
    "merge_states",
    "merge_states_backward",
    "reposition",
    "reposition_backward",
]


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums over `dtype` are kept in: float64 for float64, float32 for everything shorter."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# ---- building blocks -------------------------------------------------------------------------------------------------


def base_of(lse: Tensor) -> Tensor:
    """What scores are taken relative to: lse, or 0 where nothing was seen."""
    return lse.masked_fill(lse == -torch.inf, 0.0)


def rotate_half(x: Tensor, interleaved: bool) -> Tensor:
    """The quarter turn of RoPE. Pairs are (i, i + Dr/2), or (2i, 2i + 1) when interleaved. x [..., Dr]."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., 0::2]), dim=-1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """RoPE on the first Dr of D dimensions. x [n, H, D]; cos, sin [n, Dr]."""
    Dr = cos.shape[-1]
    head, rest = x[..., :Dr], x[..., Dr:]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat((head * cos + rotate_half(head, interleaved) * sin, rest), dim=-1)


def rotate_transposed(dy: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """The transpose of `rotate`, which is its inverse when cos and sin are not scaled."""
    Dr = cos.shape[-1]
    head, rest = dy[..., :Dr], dy[..., Dr:]
    cos, sin = cos[:, None].to(dy.dtype), sin[:, None].to(dy.dtype)
    return torch.cat((head * cos - rotate_half(head * sin, interleaved), rest), dim=-1)


def offset_tables(offset: Tensor, inv_freq: Tensor, interleaved: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos, sin [n, Dr] of a pure rotation by `offset` positions. Angles in float64: offsets reach 1e5 and more."""
    angle = offset.double()[:, None] * inv_freq.double()
    angle = angle.repeat_interleave(2, dim=-1) if interleaved else torch.cat((angle, angle), dim=-1)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Per-head RMSNorm over D; identity without a weight. x [n, H, D]."""
    if weight is None:
        return x
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)


def rms_norm_backward(dy: Tensor, x: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """-> dx [n, H, D], dweight [D] ([0] without a weight)."""
    if weight is None:
        return dy, dy.new_zeros(0)
    r = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    g = dy * weight.to(x.dtype)
    dx = r * (g - x * r.square() * (g * x).mean(-1, keepdim=True))
    return dx, (dy * x * r).sum((0, 1))


# ---- inject ----------------------------------------------------------------------------------------------------------


def inject(q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool) -> Tensor:
    """Norm, rotate and store: K and V rows go to the pools at `slots` (-1: not stored); -> rotated q [n, Hq, D].

    q [n, Hq, D]; k, v [n, Hkv, D]; cos, sin [n, Dr] or None; slots [n] int64; q_weight, k_weight [D] or None;
    k_pool, v_pool [R, Hkv, D], mutated.
    """
    acc = accumulator(q.dtype)
    q_rot = rms_norm(q.to(acc, copy=True), q_weight, eps)  # an op returns no memory of what it is given
    k_rot = rms_norm(k.to(acc), k_weight, eps)
    if cos is not None:
        q_rot, k_rot = rotate(q_rot, cos, sin, interleaved), rotate(k_rot, cos, sin, interleaved)
    stored = slots >= 0
    k_pool[slots[stored]] = k_rot[stored].to(k_pool.dtype)
    v_pool[slots[stored]] = v[stored].to(v_pool.dtype)
    return q_rot.to(q.dtype, memory_format=torch.contiguous_format)


def inject_backward(dq_rot, q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool):
    """Takes (reads and zeroes) the gradient-pool rows at `slots`; -> dq, dk, dv, dq_weight, dk_weight.

    Zeroing makes a second backward over the same graph start from nothing. dq_weight, dk_weight are [D], or [0] without
    a norm, in the accumulation dtype.
    """
    acc = accumulator(q.dtype)
    stored = slots >= 0
    dk_rot = torch.zeros(k.shape, dtype=acc, device=k.device)
    dv = torch.zeros_like(dk_rot)
    dk_rot[stored], dv[stored] = dk_pool[slots[stored]].to(acc), dv_pool[slots[stored]].to(acc)
    dk_pool[slots[stored]] = 0
    dv_pool[slots[stored]] = 0
    dq_rot = dq_rot.to(acc, copy=True)  # as above
    if cos is not None:
        dq_rot = rotate_transposed(dq_rot, cos, sin, interleaved)
        dk_rot = rotate_transposed(dk_rot, cos, sin, interleaved)
    dq, dq_weight = rms_norm_backward(dq_rot, q.to(acc), q_weight, eps)
    dk, dk_weight = rms_norm_backward(dk_rot, k.to(acc), k_weight, eps)
    return dq.to(q.dtype).contiguous(), dk.to(q.dtype).contiguous(), dv.to(q.dtype), dq_weight, dk_weight


# ---- cross-agent attention -------------------------------------------------------------------------------------------


def view_rows(segments, seg_start: Tensor, seg_len: Tensor, seg_offset: Tensor | None) -> tuple[Tensor, Tensor]:
    """Pool row and offset of every token of one sequence's view: two [N] int64 tensors."""
    empty = seg_start.new_zeros(0)
    rows, offsets = [empty], [empty]
    for s in segments:
        rows.append(torch.arange(int(seg_len[s]), device=seg_start.device) + seg_start[s])
        offset = seg_offset[s] if seg_offset is not None else seg_start.new_zeros(())
        offsets.append(offset.expand(rows[-1].shape[0]))
    return torch.cat(rows), torch.cat(offsets)


def sequences(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, causal, interleaved):
    """For each sequence with queries: its number and query range, pool rows, K (at its position offset) and V [N, Hkv, D], the
    mask, and the rotary tables of the offsets."""
    acc = accumulator(q.dtype)
    for b in range(q_indptr.shape[0] - 1):
        first, last = int(q_indptr[b]), int(q_indptr[b + 1])
        if first == last:
            continue
        rows, offsets = view_rows(range(int(seg_indptr[b]), int(seg_indptr[b + 1])), seg_start, seg_len, seg_offset)
        keys, values = k_pool[rows].to(acc), v_pool[rows].to(acc)
        tables = None
        if inv_freq is not None and offsets.any():
            # q rotated by -offset against k equals q against k rotated by +offset; the oracle takes the plain form.
            tables = offset_tables(offsets, inv_freq, interleaved, acc)
            keys = rotate(keys, *tables, interleaved)
        L, N = last - first, rows.shape[0]
        visible = torch.ones(L, N, dtype=torch.bool, device=q.device)
        if causal:  # bottom-right aligned: the newest L tokens of the view are the queries' own
            visible = visible.tril(N - L)
        yield b, slice(first, last), rows, keys, values, visible, tables


def attention_work(kernel, *_) -> None:
    """Nothing. Of a backend whose programs look for their work in the index: what `kernel`, "fwd" or "dq", finds there, which
    is the same in all layers; for the argument `work` of `cross_attention` or its backward. Arguments as there but without
    v_pool, and how many rows all views have."""


def cross_attention(
    q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved
) -> tuple[Tensor, Tensor]:
    """Attention of ragged queries over their views, without building a concatenation; -> o [n, Hq, D], lse [n, Hq].

    q [n, Hq, D] already rotated; q_indptr [B + 1]; sequence b has segments seg_indptr[b]:seg_indptr[b + 1] with rows
    seg_start[s] .. seg_start[s] + seg_len[s], read seg_offset[s] positions later than they were stored (inv_freq [Dr/2]
    gives the rotation). Causal is bottom-right aligned. lse is the natural log-sum-exp of the scaled scores, float32.
    A query that sees nothing gets o = 0 and lse = -inf.
    """
    acc = accumulator(q.dtype)
    o = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=acc, device=q.device)
    G = q.shape[1] // k_pool.shape[1]
    for _, span, _, keys, values, visible, _ in sequences(
        q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, causal, interleaved
    ):
        queries = q[span].to(acc).unflatten(1, (-1, G))  # [L, Hkv, G, D]
        scores = torch.einsum("lhgd,nhd->hgln", queries, keys) * scale
        scores = scores.masked_fill(~visible, -torch.inf)
        row_lse = torch.logsumexp(scores, dim=-1)  # [Hkv, G, L]
        p = torch.exp(scores - base_of(row_lse)[..., None])
        o[span] = torch.einsum("hgln,nhd->lhgd", p, values).flatten(1, 2).to(q.dtype)
        lse[span] = row_lse.flatten(0, 1).T
    return o, lse


def cross_attention_backward(
    do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
    scale, causal, interleaved, dk_pool, dv_pool, grad_tail=None, want_dq=True,
) -> Tensor:  # fmt: skip
    """Adds dK and dV of the rows read into the gradient pools; -> dq [n, Hq, D], or [0] if it is not wanted.

    grad_tail [B]: only the last grad_tail[b] tokens of view b, in rows that no other tail has, get their dK and dV (the rest
    are constants, or wait for a later call: o and lse may be those of a larger view than the one given); None: all of them.

    With p = exp(s - lse) and delta = rowsum(do * o) - dlse:  dV = p' do,  ds = p * (do v' - delta) * scale,  dq = ds k.
    """
    acc = accumulator(q.dtype)
    dq = torch.zeros(q.shape if want_dq else 0, dtype=q.dtype, device=q.device)
    G = q.shape[1] // k_pool.shape[1]
    delta = (do.to(acc) * o.to(acc)).sum(-1)
    if dlse is not None:
        delta = delta - dlse.to(acc)
    for b, span, rows, keys, values, visible, tables in sequences(
        q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, causal, interleaved
    ):
        queries = q[span].to(acc).unflatten(1, (-1, G))
        grads = do[span].to(acc).unflatten(1, (-1, G))
        row_lse = base_of(lse[span].to(acc).T.unflatten(0, (-1, G)))  # [Hkv, G, L]
        row_delta = delta[span].T.unflatten(0, (-1, G))
        scores = torch.einsum("lhgd,nhd->hgln", queries, keys) * scale
        p = torch.exp(scores - row_lse[..., None]).masked_fill(~visible, 0.0)
        ds = p * (torch.einsum("lhgd,nhd->hgln", grads, values) - row_delta[..., None]) * scale
        if want_dq:
            dq[span] = torch.einsum("hgln,nhd->lhgd", ds, keys).flatten(1, 2).to(q.dtype)
        dkeys = torch.einsum("hgln,lhgd->nhd", ds, queries)
        if tables is not None:
            dkeys = rotate_transposed(dkeys, *tables, interleaved)
        dvalues = torch.einsum("hgln,lhgd->nhd", p, grads)
        needs_grad = slice(0 if grad_tail is None else max(0, rows.shape[0] - int(grad_tail[b])), None)
        dk_pool.index_add_(0, rows[needs_grad], dkeys[needs_grad].to(dk_pool.dtype))
        dv_pool.index_add_(0, rows[needs_grad], dvalues[needs_grad].to(dv_pool.dtype))
    return dq


# ---- the same over quantised rows ------------------------------------------------------------------------------------


def dequantized(k_pool, v_pool, k_scale, v_scale, q) -> tuple[Tensor, Tensor]:
    """The whole pools, in the accumulation dtype of q."""
    acc = accumulator(q.dtype)
    return tuple(x.to(acc) * scale.to(acc)[..., None] for x, scale in ((k_pool, k_scale), (v_pool, v_scale)))


def cross_attention_quantized(
    q, k_pool, v_pool, k_scale, v_scale, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, interleaved
) -> tuple[Tensor, Tensor]:
    """As `cross_attention`, of queries that see all of their views, rows of 8 bits: k_pool, v_pool [R, Hkv, D] int8 or
    float8_e4m3fn (no NaN), and k_scale, v_scale [R, Hkv], by which a row is larger (diffmas.ops.quantize)."""
    pools = dequantized(k_pool, v_pool, k_scale, v_scale, q)
    view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq
    return cross_attention(q, *pools, *view, scale, False, interleaved)


def cross_attention_quantized_backward(
    do, q, o, lse, k_pool, v_pool, k_scale, v_scale, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale,
    interleaved,
) -> Tensor:  # fmt: skip
    """-> dq [n, Hq, D]: the rows are constants. o and lse may be those of a larger view than the one given."""
    pools = dequantized(k_pool, v_pool, k_scale, v_scale, q)
    view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq
    grads, no_rows = (torch.zeros_like(x) for x in pools), torch.zeros_like(q_indptr[1:])
    return cross_attention_backward(do, None, q, o, lse, *pools, *view, scale, False, interleaved, *grads, no_rows)


# ---- merge_states ----------------------------------------------------------------------------------------------------


def merge_states(o_a, lse_a, o_b, lse_b) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint views from the states of each; associative and commutative.

    o_a, o_b [n, H, D]; lse_a, lse_b [n, H]. The empty state is o = 0, lse = -inf. (FlashInfer's merge operator.)
    """
    acc = accumulator(o_a.dtype)
    lse = torch.logaddexp(lse_a.to(acc), lse_b.to(acc))
    finite = base_of(lse)
    w_a, w_b = torch.exp(lse_a.to(acc) - finite), torch.exp(lse_b.to(acc) - finite)
    o = w_a[..., None] * o_a.to(acc) + w_b[..., None] * o_b.to(acc)
    return o.to(o_a.dtype), lse


def merge_states_backward(do, dlse, o_a, lse_a, o_b, lse_b, o, lse):
    """-> do_a, dlse_a, do_b, dlse_b. With w = exp(lse_x - lse): dlse_x = w * (do . (o_x - o) + dlse)."""
    acc = accumulator(o_a.dtype)
    do, dlse, finite = do.to(acc), dlse.to(acc), base_of(lse.to(acc))
    grads = []
    for o_x, lse_x in ((o_a, lse_a), (o_b, lse_b)):
        w = torch.exp(lse_x.to(acc) - finite)
        dot = (do * (o_x.to(acc) - o.to(acc))).sum(-1)
        grads += [(w[..., None] * do).to(o_x.dtype), (w * (dot + dlse)).to(lse_x.dtype)]
    return tuple(grads)


# ---- reposition ------------------------------------------------------------------------------------------------------


def reposition(src, dst, offset, inv_freq, interleaved, k_pool, v_pool) -> None:
    """Copies rows `src` [m] to rows `dst` [m], the keys rotated by `offset` [m] positions more; inv_freq [Dr/2]."""
    acc = accumulator(k_pool.dtype)
    tables = offset_tables(offset, inv_freq, interleaved, acc)
    k_pool[dst] = rotate(k_pool[src].to(acc), *tables, interleaved).to(k_pool.dtype)
    v_pool[dst] = v_pool[src]


def reposition_backward(src, dst, offset, inv_freq, interleaved, dk_pool, dv_pool) -> None:
    """Moves the gradient of rows `dst` back to rows `src`: added there, zeroed in `dst`."""
    tables = offset_tables(offset, inv_freq, interleaved, dk_pool.dtype)
    dk, dv = rotate_transposed(dk_pool[dst], *tables, interleaved), dv_pool[dst]
    dk_pool[dst] = 0
    dv_pool[dst] = 0
    dk_pool.index_add_(0, src, dk)
    dv_pool.index_add_(0, src, dv)
