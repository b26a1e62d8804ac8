"""What the programs of the forward and of dq work on, found once for all layers of a forward pass: a table of int32.

    entries [tiles, splits, ENTRY]   all that a program needs to begin: its queries, its part of the view, its first stream
    streams [S + 1, STREAM]          for each segment the stream of tiles from there on: where it ends in the view, the segment
                                     that follows it, and where its rows are
    rows [sum of N, and room]        the pool row of each view position, one view behind the other, where tiles are gathered

A stream is a segment; or, where segments are short, all that follow each other at one position offset. Their tiles are then
gathered row by row, whatever segments a tile consists of. So a program knows all that it needs after one round of loads that do
not wait for each other.
"""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import ENTRY, SCAN, STREAM, rank, sequence_of_tile, skip_segments, sum_of

__all__ = ["attention_work_kernel", "attention_work_kernel_streams"]


@triton.jit
def _stream_of(s, s_first, s_last, b_row, seg_start, seg_len, seg_offset, OFFSET: tl.constexpr, GATHER: tl.constexpr):
    """Of the stream from segment s on, in a view [s_first, s_last) whose rows begin at work + b_row. -> its end in the view,
    the segment that follows, and what makes of a view position a pool row, or, to be gathered, the place of one in work."""
    s_next = s + 1
    if GATHER:
        s_next = s_last
        if OFFSET:
            offset = tl.load(seg_offset + s)
            for i in range(s, s_last, SCAN):
                o_s = i + tl.arange(0, SCAN)
                differs = (tl.load(seg_offset + o_s, mask=o_s < s_last, other=0) != offset) & (o_s < s_last)
                s_next = tl.minimum(s_next, tl.min(tl.where(differs, o_s, s_last)))
        return sum_of(seg_len, s_first, s_next), s_next, b_row
    else:
        n_seg = sum_of(seg_len, s_first, s)
        return n_seg + tl.load(seg_len + s).to(tl.int32), s_next, tl.load(seg_start + s).to(tl.int32) - n_seg


@triton.jit(do_not_specialize=[
    "q_indptr", "seg_indptr", "seg_start", "seg_len", "seg_offset", "B", "o_rows", "TOKENS", "BLOCK_N"
])  # fmt: skip
def attention_work_kernel(
    q_indptr, seg_indptr, seg_start, seg_len, seg_offset, work, B, o_rows, TOKENS, BLOCK_N,
    CAUSAL: tl.constexpr, SPLIT: tl.constexpr, OFFSET: tl.constexpr, GATHER: tl.constexpr,
):  # fmt: skip
    """The entries. Grid (tiles, splits). Rows begin at work + o_rows."""
    i_tile, i_split = tl.program_id(0), tl.program_id(1)
    i_b, q_first, L, t_first = sequence_of_tile(i_tile, q_indptr, B, TOKENS)
    s_first, s_last = tl.load(seg_indptr + i_b).to(tl.int32), tl.load(seg_indptr + i_b + 1).to(tl.int32)
    N = sum_of(seg_len, s_first, s_last)
    n_first, n_end, s = 0, N, s_first
    if CAUSAL:
        n_end = tl.maximum(N - L + tl.minimum(t_first + TOKENS, L), 0)
    if SPLIT:
        part = tl.cdiv(tl.cdiv(n_end, tl.num_programs(1)), BLOCK_N) * BLOCK_N
        n_first = i_split * part
        n_end = tl.minimum(n_first + part, n_end)
        s, _ = skip_segments(seg_len, s_first, s_last, n_first)
    p = work + (i_tile * tl.num_programs(1) + i_split) * ENTRY
    tl.store(p, q_first)
    tl.store(p + 1, L)
    tl.store(p + 2, t_first)
    tl.store(p + 3, N)
    tl.store(p + 4, n_first)
    tl.store(p + 5, n_end)
    tl.store(p + 6, s)
    if n_first < n_end:
        b_row = o_rows
        if GATHER:
            b_row += sum_of(seg_len, 0, s_first)
        n_to, s_next, to_row = _stream_of(s, s_first, s_last, b_row, seg_start, seg_len, seg_offset, OFFSET, GATHER)
        tl.store(p + 7, n_to)
        tl.store(p + 8, s_next)
        tl.store(p + 9, to_row)


@triton.jit(do_not_specialize=["seg_indptr", "seg_start", "seg_len", "seg_offset", "B", "o_streams", "o_rows", "end"])
def attention_work_kernel_streams(
    seg_indptr, seg_start, seg_len, seg_offset, work, B, o_streams, o_rows, end,
    OFFSET: tl.constexpr, GATHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Streams and rows, which begin at work + o_streams and work + o_rows; no rows from work + end on. Grid (segments, programs
    of a segment)."""
    s, i_p = tl.program_id(0), tl.program_id(1)
    before = o_rows
    if GATHER:
        before += sum_of(seg_len, 0, s)
        start, length = tl.load(seg_start + s).to(tl.int32), tl.load(seg_len + s).to(tl.int32)
        for i in range(i_p * BLOCK, length, tl.num_programs(1) * BLOCK):
            o_n = i + tl.arange(0, BLOCK)
            tl.store(work + before + o_n, start + o_n, mask=(o_n < length) & (before + o_n < end))
    if i_p == 0:
        i_b = rank(seg_indptr + 1, B, s)
        s_first, s_last = tl.load(seg_indptr + i_b).to(tl.int32), tl.load(seg_indptr + i_b + 1).to(tl.int32)
        b_row = before - sum_of(seg_len, s_first, s)
        n_to, s_next, to_row = _stream_of(s, s_first, s_last, b_row, seg_start, seg_len, seg_offset, OFFSET, GATHER)
        p = work + o_streams + s * STREAM
        tl.store(p, n_to)
        tl.store(p + 1, s_next)
        tl.store(p + 2, to_row)
