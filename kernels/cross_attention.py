"""Cross-agent attention over the segments of a trace, forward and backward, in Triton.

A tile is BLOCK_M query rows, (token, head of the GQA group) pairs of one sequence and one K/V head, so that a group reads
each K/V row once. It walks the segments of its sequence's view where they lie: tiles that it cannot see cost nothing, those
that all of its rows see need no mask. Short queries over a long view are split over the view's keys; a second kernel merges
the parts, with a program for each row. dK and dV belong to the program that owns a tile of pool rows, or of the newest rows
of a view, and loops over the tile's readers: no atomics, the same bits on every run. Where a segment is read at a position
offset, q is rotated, never the keys.

Nothing is read back from the device: tiles, splits and grids follow from shapes, programs find their sequence themselves.
"""

import torch

from diffmas.kernels.attention_dkv import cross_attention_bwd_kernel_dkv, cross_attention_bwd_kernel_dkv_tail
from diffmas.kernels.attention_dq import cross_attention_bwd_kernel_delta, cross_attention_bwd_kernel_dq
from diffmas.kernels.attention_forward import cross_attention_fwd_kernel
from diffmas.kernels.attention_merge import cross_attention_merge_kernel
from diffmas.kernels.blocks import FUSION, attention_blocks, blocks
from diffmas.kernels.launch import accumulator, ceil_div, dot_dtype, on, once_per_shape, power_of_two, processors, rows_of
from diffmas.ops import reference

__all__ = ["cross_attention", "cross_attention_backward"]

MAX_SPLITS = 64


def _shape(q, k_pool, q_indptr, seg_offset, inv_freq) -> tuple:
    """The arguments of `sizes` that the tensors decide. The last is how many pairs of dimensions an offset rotates."""
    rotated = None if seg_offset is None else inv_freq.shape[0]
    return *q.shape, *k_pool.shape[:2], q_indptr.shape[0] - 1, q.dtype, k_pool.dtype, q.device, rotated


@once_per_shape
def sizes(
    kernel, n, Hq, D, R, Hkv, B, dtype, pool_dtype, device, rotated, scale, causal, interleaved, tiles
) -> tuple[tuple[int, ...], dict]:
    """The grid of fwd, dq, dkv or dkv_tail, and the constants of its launch. From shapes alone: a split's share of the view is
    found on the device."""
    G, offset, dot = Hq // Hkv, rotated is not None, dot_dtype(dtype, pool_dtype)
    block = tiles(kernel.removesuffix("_tail"), ceil_div(n, B) * G, D, dot.primitive_bitwidth > 16, offset, device)
    constants = block | dict(
        scale=float(scale), Hq=Hq, G=G, D=D, HALF=rotated or 0, CAUSAL=causal, INTERLEAVED=interleaved, OFFSET=offset,
        BLOCK_D=max(16, power_of_two(D)), DOT=dot, ACC=accumulator(dtype),
    )  # fmt: skip
    if kernel == "dkv":
        return (ceil_div(R, block["BLOCK_N"]), Hkv), constants
    if kernel == "dkv_tail":
        # As many programs a sequence as windows if it had all of the tokens, but no more than fill the GPU, or than four times
        # the average; two at least, since the tail of a run of latent steps is longer than the step.
        average, most = ceil_div(n, B * block["BLOCK_N"]), ceil_div(n, block["BLOCK_N"])
        programs = max(2, min(most, max(4 * average, ceil_div(2 * processors(device), Hkv))))
        return (B, Hkv, programs), constants
    BLOCK_M = max(block["BLOCK_M"], power_of_two(G))  # a tile holds a group
    count = n // (BLOCK_M // G) + B
    wanted = ceil_div(2 * processors(device), count * Hkv)
    splits = max(1, min(wanted, MAX_SPLITS, ceil_div(R, 4 * block["BLOCK_N"])))
    return (count, Hkv, splits), constants | dict(BLOCK_M=BLOCK_M, SPLIT=splits > 1)


@once_per_shape
def row_sizes(op, rows, D, dtype) -> tuple[tuple[int], dict]:
    """As `sizes`, for the kernel delta. A row is one (token, query head)."""
    block = blocks(op)
    return (ceil_div(rows, block["BLOCK_R"]),), dict(D=D, BLOCK_D=max(16, power_of_two(D)), ACC=accumulator(dtype)) | block


@once_per_shape
def merge_constants(D) -> dict:
    """Of the launch of the kernel merge: 64 numbers a thread. One compilation serves any number of splits."""
    BLOCK_D = max(16, power_of_two(D))
    return dict(D=D, BLOCK_S=MAX_SPLITS, BLOCK_D=BLOCK_D, num_warps=max(1, MAX_SPLITS * BLOCK_D // 2048)) | FUSION


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
            cross_attention_merge_kernel[(n * Hq,)](*parts, o, lse, n * Hq, splits, **merge_constants(D))
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
            parts = dq if whole else q.new_empty((splits, n, Hq, D), dtype=acc)
            cross_attention_bwd_kernel_dq[grid](q, do, base, delta, k_pool, v_pool, *view, parts, n, B, *strides, **constants)
            if not whole:
                cross_attention_merge_kernel[(n * Hq,)](parts, None, dq, None, n * Hq, splits, **merge_constants(D))
        dkv_strides = *strides, *dk_pool.stride()[:2], *dv_pool.stride()[:2]
        if grad_tail is None:
            grid, constants = sizes("dkv", *shape, scale, causal, interleaved, tiles)
            cross_attention_bwd_kernel_dkv[grid](
                q, do, base, delta, k_pool, v_pool, *view, dk_pool, dv_pool, n, B, S, *dkv_strides, **constants
            )
        else:
            grid, constants = sizes("dkv_tail", *shape, scale, causal, interleaved, tiles)
            cross_attention_bwd_kernel_dkv_tail[grid](
                q, do, base, delta, k_pool, v_pool, *view, grad_tail, dk_pool, dv_pool, n, *dkv_strides, **constants
            )
    return dq
