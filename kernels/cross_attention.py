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
from diffmas.kernels.attention_tiles import ENTRY, STREAM
from diffmas.kernels.attention_work import attention_work_kernel, attention_work_kernel_streams
from diffmas.kernels.blocks import FUSION, QUANTIZED, attention_blocks, blocks
from diffmas.kernels.launch import (
    Launch,
    accumulator,
    ceil_div,
    dot_dtype,
    on,
    once_per_shape,
    power_of_two,
    processors,
    rows_of,
)
from diffmas.ops import reference

__all__ = [
    "attention_work",
    "cross_attention",
    "cross_attention_backward",
    "cross_attention_quantized",
    "cross_attention_quantized_backward",
]

MAX_SPLITS = 64
MAX_BLOCK_N = 128
SHORT = 512  # rows of a segment, on average: from there on its own loop over tiles costs less than gathering them
MAX_PROGRAMS = 65_535  # CUDA's limit of a grid's third number


def _shape(q, k_pool, q_indptr, seg_offset, inv_freq) -> tuple:
    """The arguments of `sizes` that the tensors decide. The last is how many pairs of dimensions an offset rotates."""
    rotated = None if seg_offset is None else inv_freq.shape[0]
    return *q.shape, *k_pool.shape[:2], q_indptr.shape[0] - 1, q.dtype, _bits(k_pool).dtype, q.device, rotated


def _bits(pool) -> torch.Tensor:
    """Payloads as int8, whatever they are."""
    return pool.view(torch.int8) if pool.element_size() == 1 else pool


@once_per_shape
def sizes(
    kernel, n, Hq, D, R, Hkv, B, dtype, pool_dtype, device, rotated, scale, causal, interleaved, tiles,
) -> Launch:  # fmt: skip
    """Of fwd, dq, dkv or dkv_tail, from shapes alone: a split's share of the view is found on the device."""
    G, offset, dot = Hq // Hkv, rotated is not None, dot_dtype(dtype, pool_dtype)
    tiled = kernel.removesuffix("_tail") + (QUANTIZED if pool_dtype == torch.int8 else "")
    block = tiles(tiled, ceil_div(n, B) * G, D, dot.primitive_bitwidth > 16, offset, device)
    BLOCK_D = max(16, power_of_two(D))
    constants = block | dict(
        scale=float(scale), Hq=Hq, G=G, D=D, HALF=rotated or 0, CAUSAL=causal, INTERLEAVED=interleaved, OFFSET=offset,
        BLOCK_D=BLOCK_D, DOT=dot, ACC=accumulator(dtype),
    )  # fmt: skip
    hoist = constants.pop("HOIST", True)
    if kernel == "dkv":
        return Launch((ceil_div(R, block["BLOCK_N"]), Hkv), constants)
    if kernel == "dkv_tail":
        # As many programs a sequence as windows if it had all of the tokens, but no more than fill the GPU, or than four times
        # the average; two at least, since the tail of a run of latent steps is longer than the step.
        average, most = ceil_div(n, B * block["BLOCK_N"]), ceil_div(n, block["BLOCK_N"])
        wanted = max(4 * average, ceil_div(2 * processors(device), Hkv))
        programs = max(2, min(most, wanted, MAX_PROGRAMS))
        return Launch((B, Hkv, programs), constants)
    BLOCK_M = max(block["BLOCK_M"], power_of_two(G))  # a tile holds a group
    count = n // (BLOCK_M // G) + B
    wanted = ceil_div(2 * processors(device), count * Hkv)
    splits = max(1, min(wanted, MAX_SPLITS, ceil_div(R, 4 * block["BLOCK_N"])))
    hoist = hoist and block["BLOCK_N"] * BLOCK_D <= 2048 * block.get("num_warps", 8)  # eight pointers a thread, or fewer
    constants |= dict(BLOCK_M=BLOCK_M, SPLIT=splits > 1, ROWS="hoisted" if hoist else "computed", PAYLOAD="floats")
    return Launch((count, Hkv, splits), constants)


@once_per_shape
def gathering(launch: Launch) -> Launch:
    """The same of fwd or dq, but tiles are gathered row by row."""
    return Launch(launch.grid, launch.constants | dict(ROWS="gathered"))


@once_per_shape
def reading(launch: Launch, payload: torch.dtype) -> Launch:
    """The same of fwd or dq, but rows are quantised."""
    name = "int8" if payload == torch.int8 else "e4m3"
    return Launch(launch.grid, launch.constants | dict(PAYLOAD=name))


@once_per_shape
def delta_sizes(n, Hq, D, Hkv, dtype, dlse) -> Launch:
    block = blocks("cross_attention_delta")
    constants = dict(Hq=Hq, G=Hq // Hkv, D=D, DLSE=dlse, BLOCK_D=max(16, power_of_two(D)), ACC=accumulator(dtype))
    return Launch((ceil_div(n * Hq, block["BLOCK_R"]),), constants | block)


@once_per_shape
def merge_sizes(rows, D) -> Launch:
    """64 numbers a thread. One compilation serves any number of splits."""
    BLOCK_D = max(16, power_of_two(D))
    constants = dict(D=D, BLOCK_S=MAX_SPLITS, BLOCK_D=BLOCK_D, num_warps=max(1, MAX_SPLITS * BLOCK_D // 2048))
    return Launch((rows,), constants | FUSION)


def _places(launch: Launch, S: int) -> tuple[int, int]:
    """Where streams and rows begin in the work of a launch, and the rest of it."""
    o_streams = launch.grid[0] * launch.grid[2] * ENTRY.value
    return o_streams, o_streams + (S + 1) * STREAM.value


def attention_work(
    kernel, q, k_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved, rows=None,
    out=None, *, tiles=attention_blocks,
):  # fmt: skip
    """What the launches of `kernel`, fwd or dq, with these arguments work on, whatever the layer: int32. rows: of all views
    together, by default as many as there could be. out: one made for the same arguments, overwritten."""
    B, S, offset = q_indptr.shape[0] - 1, seg_start.shape[0], seg_offset is not None
    launch = sizes(kernel, *_shape(q, k_pool, q_indptr, seg_offset, inv_freq), scale, causal, interleaved, tiles)
    rows = min(B, S) * k_pool.shape[0] if rows is None else rows
    o_streams, o_rows = _places(launch, S)
    if out is None:
        gather = S > B and rows <= S * SHORT
        # A program looks beyond its part, by two tiles at most.
        out = torch.empty(o_rows + (rows + 2 * MAX_BLOCK_N) * gather, dtype=torch.int32, device=q.device)
    gather, end = out.shape[0] > o_rows, out.shape[0]
    (count, _, splits), block = launch.grid, launch.constants
    index, tokens = (q_indptr, seg_indptr, seg_start, seg_len, seg_offset, out), block["BLOCK_M"] // block["G"]
    with on(q):
        entries = entries_sizes((count, splits), causal, splits > 1, offset, gather)
        entries(attention_work_kernel, index, (B, o_rows, tokens, block["BLOCK_N"]))
        if S:
            streams = streams_sizes(S, offset, gather)
            streams(attention_work_kernel_streams, index[1:], (B, o_streams, o_rows, end))
    return out


@once_per_shape
def entries_sizes(grid, causal, split, offset, gather) -> Launch:
    return Launch(grid, dict(CAUSAL=causal, SPLIT=split, OFFSET=offset, GATHER=gather, num_warps=4) | FUSION)


@once_per_shape
def streams_sizes(S, offset, gather) -> Launch:
    programs = 4 if gather else 1
    return Launch((S, programs), dict(OFFSET=offset, GATHER=gather, BLOCK=1024, num_warps=4) | FUSION)


def _working(kernel, work, q, k_pool, view, scale, causal, interleaved, tiles) -> tuple[torch.Tensor, Launch, int]:
    """`work`, or that of this call alone; the launch that it is for; where its streams begin."""
    if work is None:
        work = attention_work(kernel, q, k_pool, *view, scale, causal, interleaved, tiles=tiles)
    launch = sizes(kernel, *_shape(q, k_pool, view[0], *view[4:]), scale, causal, interleaved, tiles)
    o_streams, o_rows = _places(launch, view[2].shape[0])
    return work, gathering(launch) if work.shape[0] > o_rows else launch, o_streams


def _offsets(q, seg_offset, inv_freq, interleaved) -> tuple:
    """seg_offset, and cos and sin [S, Dr] of each segment's rotation; None where no segment is read at an offset."""
    if seg_offset is None:
        return None, None, None
    return seg_offset, *reference.offset_tables(seg_offset, inv_freq, interleaved, reference.accumulator(q.dtype))


def _turned(splits, q, k_pool, seg_offset) -> torch.Tensor | None:
    """Memory for q as it is turned for segments at an offset."""
    if seg_offset is None:
        return None
    return q.new_empty((splits, *q.shape), dtype=torch.promote_types(q.dtype, k_pool.dtype))


class _Rows:
    """The pools of a call, as the kernels take them: pointers, and strides of K and V, then of the scales."""

    def __init__(self, k_pool, v_pool, k_scale=None, v_scale=None):
        self.payload = k_pool.dtype if k_scale is not None else None
        self.k, self.v = _bits(k_pool), _bits(v_pool)
        self.strides = (*k_pool.stride()[:2], *v_pool.stride()[:2])
        self.scales, self.scale_strides = (k_scale, v_scale), (0, 0)
        if k_scale is not None:
            if k_scale.stride() != v_scale.stride():
                self.scales = k_scale.contiguous(), v_scale.contiguous()
            self.scale_strides = self.scales[0].stride()

    def launch(self, launch: Launch) -> Launch:
        return launch if self.payload is None else reading(launch, self.payload)


def cross_attention(
    q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved,
    work=None, *, tiles=attention_blocks,
):  # fmt: skip
    """work: of `attention_work`, which is made here without it."""
    view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq
    return _forward(q, _Rows(k_pool, v_pool), view, scale, causal, interleaved, work, tiles)


def cross_attention_quantized(
    q, k_pool, v_pool, k_scale, v_scale, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, interleaved,
    work=None, *, tiles=attention_blocks,
):  # fmt: skip
    view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq
    return _forward(q, _Rows(k_pool, v_pool, k_scale, v_scale), view, scale, False, interleaved, work, tiles)


def _forward(q, rows: _Rows, view, scale, causal, interleaved, work, tiles):
    n, Hq, D = q.shape
    q, acc = rows_of(q), reference.accumulator(q.dtype)
    o, lse = torch.empty(q.shape, dtype=q.dtype, device=q.device), torch.empty((n, Hq), dtype=acc, device=q.device)
    if not n:
        return o, lse
    work, launch, o_streams = _working("fwd", work, q, rows.k, view, scale, causal, interleaved, tiles)
    splits, offsets = launch.grid[2], _offsets(q, *view[4:], interleaved)
    strides = *q.stride()[:2], *rows.strides, *rows.scale_strides
    turned = _turned(splits, q, rows.k, view[4])
    parts = (o, lse)
    if splits > 1:
        parts = q.new_empty((splits, n, Hq, D), dtype=acc), q.new_empty((splits, n, Hq), dtype=acc)
    with on(q):
        pointers = q, rows.k, rows.v, *rows.scales, work, *offsets, turned, *parts
        rows.launch(launch)(cross_attention_fwd_kernel, pointers, (n, o_streams, *strides))
        if splits > 1:
            merge_sizes(n * Hq, D)(cross_attention_merge_kernel, (*parts, o, lse), (n * Hq, splits))
    return o, lse


def cross_attention_backward(
    do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
    scale, causal, interleaved, dk_pool, dv_pool, grad_tail=None, want_dq=True, work=None, *, tiles=attention_blocks,
):  # fmt: skip
    """work: of dq."""
    n = q.shape[0]
    q, do, o, lse = rows_of(q), rows_of(do), o.contiguous(), lse.contiguous()
    dq = q.new_empty(q.shape if want_dq else 0)
    if not n:
        return dq
    B, S = q_indptr.shape[0] - 1, seg_start.shape[0]
    sizes_of = lambda kernel: sizes(
        kernel, *_shape(q, k_pool, q_indptr, seg_offset, inv_freq), scale, causal, interleaved, tiles
    )
    with on(q):
        base, delta = _delta(do, dlse, q, o, lse, k_pool.shape[1])
        index, offsets = (q_indptr, seg_indptr, seg_start, seg_len), _offsets(q, seg_offset, inv_freq, interleaved)
        read = q, do, base, delta, k_pool, v_pool
        strides = *q.stride()[:2], *do.stride()[:2], *k_pool.stride()[:2], *v_pool.stride()[:2]
        if want_dq:
            view, rows = (*index, seg_offset, inv_freq), _Rows(k_pool, v_pool)
            _dq(dq, q, do, base, delta, rows, view, offsets, scale, causal, interleaved, work, tiles)
        strides = *strides, *dk_pool.stride()[:2], *dv_pool.stride()[:2]
        if grad_tail is None:
            sizes_of("dkv")(cross_attention_bwd_kernel_dkv, (*read, *index, *offsets, dk_pool, dv_pool), (n, B, S, *strides))
        else:
            launch, pointers = sizes_of("dkv_tail"), (*read, *index, *offsets, grad_tail, dk_pool, dv_pool)
            launch(cross_attention_bwd_kernel_dkv_tail, pointers, (n, *strides))
    return dq


def cross_attention_quantized_backward(
    do, q, o, lse, k_pool, v_pool, k_scale, v_scale, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale,
    interleaved, work=None, *, tiles=attention_blocks,
):  # fmt: skip
    """work: of dq."""
    q, do, o, lse = rows_of(q), rows_of(do), o.contiguous(), lse.contiguous()
    dq = q.new_empty(q.shape)
    if not q.shape[0]:
        return dq
    view, rows = (q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq), _Rows(k_pool, v_pool, k_scale, v_scale)
    with on(q):
        base, delta = _delta(do, None, q, o, lse, k_pool.shape[1])
        offsets = _offsets(q, seg_offset, inv_freq, interleaved)
        _dq(dq, q, do, base, delta, rows, view, offsets, scale, False, interleaved, work, tiles)
    return dq


def _delta(do, dlse, q, o, lse, Hkv) -> tuple[torch.Tensor, torch.Tensor]:
    (n, Hq, D), base, delta = q.shape, torch.empty_like(lse), torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    launch = delta_sizes(n, Hq, D, Hkv, q.dtype, dlse is not None)
    launch(cross_attention_bwd_kernel_delta, (do, o, lse, dlse, base, delta), (n, *do.stride()[:2]))
    return base, delta


def _dq(dq, q, do, base, delta, rows: _Rows, view, offsets, scale, causal, interleaved, work, tiles) -> None:
    (n, Hq, D), acc, seg_offset = q.shape, reference.accumulator(q.dtype), view[4]
    work, launch, o_streams = _working("dq", work, q, rows.k, view, scale, causal, interleaved, tiles)
    splits = launch.grid[2]
    whole = splits == 1 and (seg_offset is None or q.dtype == acc)
    parts = dq if whole else q.new_empty((splits, n, Hq, D), dtype=acc)
    turned = _turned(splits, q, rows.k, seg_offset)
    pointers = q, do, base, delta, rows.k, rows.v, *rows.scales, work, *offsets, turned, parts
    strides = *q.stride()[:2], *do.stride()[:2], *rows.strides, *rows.scale_strides
    rows.launch(launch)(cross_attention_bwd_kernel_dq, pointers, (n, o_streams, *strides))
    if splits == 1 and not whole:
        dq.copy_(parts[0])
    elif splits > 1:
        merge_sizes(n * Hq, D)(cross_attention_merge_kernel, (parts, None, dq, None), (n * Hq, splits))
