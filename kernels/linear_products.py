"""The first launch of linears with LoRA: products with W, and with `down` (a, or b when transposed), as float32 sums."""

import triton
import triton.language as tl

__all__ = ["chosen", "linear_kernel_products", "tile_of"]


@triton.jit
def chosen(i, x0, x1, x2, COUNT: tl.constexpr):
    """Of COUNT numbers or pointers that of linear i."""
    x = x0
    if COUNT > 1:
        x = tl.where(i == 1, x1, x)
    if COUNT > 2:
        x = tl.where(i == 2, x2, x)
    return x


@triton.jit
def tile_of(i_c, width0, width1, width2, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Of whose columns a program's are, where each linear has tiles of its own, and the number of the tile among those."""
    i = 0
    if COUNT > 1:
        tiles = tl.cdiv(width0, BLOCK)
        later = (i_c >= tiles).to(tl.int32)
        i = later
        if COUNT > 2:
            more = tl.cdiv(width1, BLOCK)
            last = (i_c >= tiles + more).to(tl.int32)
            i += last
            i_c -= last * more
        i_c -= later * tiles
    return i, i_c


@triton.jit
def product(
    p_x, m_m, matrix, stride, o_n, width, first, last, length,
    ACROSS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Columns [first, last) of rows p_x [BLOCK_M, 1] times rows o_n [BLOCK_N] of a matrix [width, length], or, ACROSS, times
    columns o_n of a matrix [length, width]; -> [BLOCK_M, BLOCK_N] float32. last - first: whole blocks, or until length."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(first, last, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < length  # not `last`: of that the compiler does not know that whole 16-byte pieces are there or not
        b_x = tl.load(p_x + o_k[None, :], mask=m_m & m_k[None, :], other=0.0)
        if ACROSS:
            p_w = matrix + o_k.to(tl.int64)[:, None] * stride + o_n[None, :]
            b_w = tl.load(p_w, mask=m_k[:, None] & (o_n < width)[None, :], other=0.0)
        else:
            p_w = matrix + o_n.to(tl.int64)[:, None] * stride + o_k[None, :]
            b_w = tl.trans(tl.load(p_w, mask=(o_n < width)[:, None] & m_k[None, :], other=0.0))
        acc = tl.dot(b_x.to(DOT), b_w.to(DOT), acc, input_precision="ieee", out_dtype=tl.float32)
    return acc


@triton.jit(do_not_specialize=["n"])
def linear_kernel_products(
    x0, x1, x2, weight0, weight1, weight2, bias, down0, down1, down2, parts, y,
    n, span, length0, length1, length2, to0, to1, to2, rank0, rank1, rank2, stride_x0, stride_x1, stride_x2, stride_w,
    COUNT: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Of COUNT linears, which have x and length in common, or, TRANSPOSED, `to`. Grid (tiles of columns of each W, then of each
    `down`; parts of a row's length, `span` each; tiles of rows).
    parts [parts of a length, n, all `to`, then all ranks]; None, of one linear alone: y [n, to] takes the sums."""
    i_c, i_s = tl.program_id(0), tl.program_id(1)
    i_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m = i_m < n
    first = i_s * span
    tiles, before = 0, 0  # of the Ws; their columns
    if weight0 is not None:
        tiles, before = tl.cdiv(to0, BLOCK_N), to0
        if COUNT > 1:
            tiles += tl.cdiv(to1, BLOCK_N)
            before += to1
        if COUNT > 2:
            tiles += tl.cdiv(to2, BLOCK_N)
            before += to2
    p_parts = parts
    if parts is not None:
        every = before + rank0
        if COUNT > 1:
            every += rank1
        if COUNT > 2:
            every += rank2
        p_parts = parts + (i_s * n.to(tl.int64) + i_m) * every
    if weight0 is not None:
        if i_c < tiles:
            i, i_t = tile_of(i_c, to0, to1, to2, BLOCK_N, COUNT)
            x, length, stride_x = x0, length0, stride_x0
            if TRANSPOSED:
                x, length = chosen(i, x0, x1, x2, COUNT), chosen(i, length0, length1, length2, COUNT)
                stride_x = chosen(i, stride_x0, stride_x1, stride_x2, COUNT)
                if COUNT > 1:  # one may be shorter than another
                    m_m = i_m < tl.where(first < length, n, 0)
            to, weight = chosen(i, to0, to1, to2, COUNT), chosen(i, weight0, weight1, weight2, COUNT)
            o_n = i_t * BLOCK_N + tl.arange(0, BLOCK_N)
            m_n = m_m & (o_n < to)[None, :]
            acc = product(
                x + i_m * stride_x, m_m, weight, stride_w, o_n, to, first, tl.minimum(first + span, length), length,
                TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, weight0.dtype.element_ty,
            )  # fmt: skip
            if parts is not None:
                column = chosen(i, 0, to0, to0 + to1, COUNT)
                tl.store(p_parts + column + o_n[None, :], acc, mask=m_n)
            else:
                if bias is not None:
                    acc += tl.load(bias + o_n, mask=o_n < to, other=0.0).to(tl.float32)[None, :]
                tl.store(y + i_m * to + o_n[None, :], acc.to(y.dtype.element_ty), mask=m_n)
    if down0 is not None:
        if i_c >= tiles:
            i, i_t = tile_of(i_c - tiles, rank0, rank1, rank2, BLOCK_R, COUNT)
            x, length, stride_x = x0, length0, stride_x0
            if TRANSPOSED:
                x, length = chosen(i, x0, x1, x2, COUNT), chosen(i, length0, length1, length2, COUNT)
                stride_x = chosen(i, stride_x0, stride_x1, stride_x2, COUNT)
                if COUNT > 1:  # one may be shorter than another
                    m_m = i_m < tl.where(first < length, n, 0)
            rank, down = chosen(i, rank0, rank1, rank2, COUNT), chosen(i, down0, down1, down2, COUNT)
            stride = length
            if TRANSPOSED:
                stride = rank
            o_r = i_t * BLOCK_R + tl.arange(0, BLOCK_R)
            acc = product(
                x + i_m * stride_x, m_m, down, stride, o_r, rank, first, tl.minimum(first + span, length), length,
                TRANSPOSED, BLOCK_M, BLOCK_R, BLOCK_L, tl.float32,
            )  # fmt: skip
            column = before + chosen(i, 0, rank0, rank0 + rank1, COUNT)
            tl.store(p_parts + column + o_r[None, :], acc, mask=m_m & (o_r < rank)[None, :])
