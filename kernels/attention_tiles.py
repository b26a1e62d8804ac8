"""What the programs of cross-agent attention share: which tile is theirs, what it reads, and loads of its rows."""

import triton
import triton.language as tl

__all__ = [
    "ENTRY", "INDEX", "LOG2E", "SCAN", "STREAM", "entry_of", "load_at_offset", "load_rows", "load_scales", "load_tile",
    "numbers", "pointers", "pointers_of_stream", "rank", "rotate", "rows_of_positions", "rows_of_tile", "sequence_of_tile",
    "skip_segments", "stream_of", "sum_of", "turn",
]  # fmt: skip

LOG2E = tl.constexpr(1.4426950408889634)
INDEX = ("q_indptr", "seg_indptr", "seg_start", "seg_len", "seg_offset")  # slices of one tensor: alignment varies
SCAN = tl.constexpr(128)  # entries of an index that are read at once
ENTRY = tl.constexpr(10)  # numbers of an entry and of a stream (attention_work.py)
STREAM = tl.constexpr(3)


@triton.jit
def rank(x, S, value):
    """How many of the rising x[0:S] are <= value."""
    rank = 0
    for i in range(0, S, SCAN):
        o_x = i + tl.arange(0, SCAN)
        rank += tl.sum(((tl.load(x + o_x, mask=o_x < S, other=0) <= value) & (o_x < S)).to(tl.int32))
    return rank


@triton.jit
def sum_of(x, first, last):
    """The sum of x[first:last]."""
    total = 0
    for i in range(first, last, SCAN):
        o_x = i + tl.arange(0, SCAN)
        total += tl.sum(tl.load(x + o_x, mask=o_x < last, other=0).to(tl.int32))
    return total


@triton.jit
def sequence_of_tile(i_tile, q_indptr, B, TOKENS: tl.constexpr):
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
def skip_segments(seg_len, s_first, s_last, n_first):
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
def rows_of_tile(i_h, q_first, L, t_first, G: tl.constexpr, BLOCK_M: tl.constexpr):
    """-> packed query, query head and token of the sequence for each row of a tile, and which rows exist; all [BLOCK_M]."""
    o_m = tl.arange(0, BLOCK_M)
    b_token, b_head = t_first + o_m // G, (i_h * G + o_m % G).to(tl.int64)
    return (q_first + b_token).to(tl.int64), b_head, b_token, (o_m < BLOCK_M // G * G) & (b_token < L)


@triton.jit
def entry_of(work, i_tile, i_split):
    """What `attention_work_kernel` has found for a program: its sequence's first query and number of queries, the tile's first
    token; the length of the view, [n_first, n_end) of it that is the program's; the first segment there, and what `stream_of`
    gives of that one."""
    p = work + (i_tile * tl.num_programs(2) + i_split) * ENTRY
    q_first, L, t_first, N, n_first, n_end = (
        tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3), tl.load(p + 4), tl.load(p + 5)
    )  # fmt: skip
    return q_first, L, t_first, N, n_first, n_end, tl.load(p + 6), tl.load(p + 7), tl.load(p + 8), tl.load(p + 9)


@triton.jit
def stream_of(work, o_streams, s):
    """Of the stream from segment s on: its end in the view, the segment that follows, `to_row` as `load_tile` takes it."""
    p = work + o_streams + s * STREAM
    return tl.load(p), tl.load(p + 1), tl.load(p + 2)


@triton.jit
def load_at_offset(
    p_rows, m_row, cos, sin, s, d_first, SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Loads the rows at p_rows [M] and rotates them by SIGN * the offset of segment s in their first 2 * HALF dimensions:
    SIGN -1 makes of q what the segment's keys are multiplied with, SIGN 1 undoes that. cos, sin [S, 2 * HALF] of the offsets.
    -> [M, BLOCK_D] in ACC, of the dimensions from d_first on.

    The other dimension of a pair is read from memory: in registers it is another thread's."""
    o_d = d_first + tl.arange(0, BLOCK_D)
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
def turn(
    p_rows, p_turned, m_row, cos, sin, s, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rotates the rows at p_rows [M] by minus the offset of segment s to p_turned [M], memory that only this program uses: some
    dimensions after the others, since all at once need more registers than the products."""
    PART: tl.constexpr = min(BLOCK_D, 32)
    tl.debug_barrier()  # nobody writes there before all have read
    for d_first in range(0, BLOCK_D, PART):
        o_d = d_first + tl.arange(0, PART)
        x = load_at_offset(p_rows, m_row, cos, sin, s, d_first, -1, D, PART, HALF, INTERLEAVED, ACC)
        tl.store(p_turned[:, None] + o_d[None, :], x, mask=m_row[:, None] & (o_d < D)[None, :])
    tl.debug_barrier()


@triton.jit
def rotate(
    x, p_rows, m_row, offset, cos, sin, s, SIGN: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """As `load_at_offset`, for x [M, BLOCK_D] in ACC; p_rows [M]: memory that only this program uses, overwritten."""
    if offset != 0:
        o_d = tl.arange(0, BLOCK_D)
        tl.store(p_rows[:, None] + o_d[None, :], x, mask=m_row[:, None] & (o_d < D)[None, :])
        tl.debug_barrier()
        x = load_at_offset(p_rows, m_row, cos, sin, s, 0, SIGN, D, BLOCK_D, HALF, INTERLEAVED, ACC)
        tl.debug_barrier()  # nobody writes there before all have read
    return x


@triton.jit
def load_rows(p_x, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Pool rows [BLOCK_N, BLOCK_D] at pointers p_x; rows outside the mask are 0, whatever lies there."""
    if MASKED or D != BLOCK_D:
        return tl.load(p_x, mask=mask[:, None] & (tl.arange(0, BLOCK_D) < D)[None, :], other=0)
    else:
        return tl.load(p_x)


@triton.jit
def pointers(p_rows, stride_row, b_rows, BLOCK_D: tl.constexpr):
    """Where pool rows b_rows [BLOCK_N] lie, [BLOCK_N, BLOCK_D]."""
    return p_rows + b_rows.to(tl.int64)[:, None] * stride_row + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def pointers_of_stream(p_rows, stride_row, to_row, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr):
    """p_x as `load_tile` takes it."""
    if ROWS == "hoisted":
        return pointers(p_rows, stride_row, to_row + tl.arange(0, BLOCK_N), BLOCK_D)
    else:
        return p_rows


@triton.jit
def rows_of_positions(work, to_row, n_tile, BLOCK_N: tl.constexpr, ROWS: tl.constexpr):
    """b_rows as `load_tile` takes them."""
    if ROWS == "gathered":
        return tl.load(work + tl.arange(0, BLOCK_N) + (to_row + n_tile))
    else:
        return tl.arange(0, BLOCK_N)


@triton.jit
def load_tile(
    p_x, stride_row, to_row, n_tile, b_rows, mask, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """The tile at view position n_tile. ROWS says where its rows are. computed: in the pool p_x from row to_row + n_tile on.
    hoisted: there, and p_x is pointers to the rows of position 0, so that a loop adds one number to them; that takes registers.
    gathered: b_rows of the pool p_x."""
    if ROWS == "hoisted":
        return load_rows(p_x + tl.cast(n_tile, tl.int64) * stride_row, mask, D, BLOCK_D, MASKED)
    elif ROWS == "gathered":
        return load_rows(gathered(p_x, stride_row, b_rows, BLOCK_D), mask, D, BLOCK_D, MASKED)
    else:
        b_rows = to_row + n_tile + tl.arange(0, BLOCK_N)
        return load_rows(pointers(p_x, stride_row, b_rows, BLOCK_D), mask, D, BLOCK_D, MASKED)


@triton.jit
def numbers(x, PAYLOAD: tl.constexpr, DOT: tl.constexpr):
    """Rows as they were loaded, for a product in DOT. PAYLOAD "floats": numbers. "int8", "e4m3": of quantised rows, which are
    `load_scales` times as large; e4m3 comes as int8 too, without NaN. Not all GPUs that Triton serves know its type, but its
    bits are those of a float16, 256 times smaller. Divided likewise, int8 needs no scale that float16 is too short for."""
    if PAYLOAD == "e4m3":
        x = ((x.to(tl.int16) << 7) & -0x4001).to(tl.float16, bitcast=True)
    if PAYLOAD == "int8":
        x = x.to(tl.float32) * (1 / 128)
    return x.to(DOT)


@triton.jit
def load_scales(
    p_scale, stride_row, to_row, n_tile, b_rows, mask, BLOCK_N: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr,
    PAYLOAD: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """What `numbers` of the tile at view position n_tile are multiplied with, [BLOCK_N]; arguments as in `load_tile`."""
    if ROWS != "gathered":
        b_rows = to_row + n_tile + tl.arange(0, BLOCK_N)
    p_rows = p_scale + b_rows.to(tl.int64) * stride_row
    if MASKED:
        x = tl.load(p_rows, mask=mask, other=0)
    else:
        x = tl.load(p_rows)
    unit: tl.constexpr = 256 if PAYLOAD == "e4m3" else 128
    return x.to(ACC) * unit


@triton.jit
def gathered(p_rows, stride_row, b_rows, BLOCK_D: tl.constexpr):
    """As `pointers`, in bytes: one instruction multiplies and adds."""
    SIZE: tl.constexpr = p_rows.dtype.element_ty.primitive_bitwidth // 8
    p_bytes = p_rows.to(tl.pointer_type(tl.int8)) + b_rows.to(tl.int64) * (stride_row.to(tl.int64) * SIZE)
    return p_bytes.to(p_rows.dtype)[:, None] + tl.arange(0, BLOCK_D)[None, :]
