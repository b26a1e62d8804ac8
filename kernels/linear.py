"""A frozen linear layer of few rows and its LoRA adapter, y = x W' + bias + scale (x a') b', and its transpose, which takes the
gradient back: dy W + scale (dy b) a. What LoRA adds to many rows, whose product with W is torch's. LoRA's gradients.

Both ways an op is two launches. The first multiplies: a program has a tile of columns of W, or of `down` (a, or b when
transposed), and a part of the rows' length, and leaves its sums in float32. The second adds these up in order, multiplies those
of `down`, u, by `up` (b, or a), and rounds once. To be there when y is finished in one launch, u would have to be made by every
program again; made beside the rest it costs no launch of its own, and where the tiles of W do not fill a GPU, sums are split
and a second launch is there anyway. Without an adapter, and with tiles enough, one launch does it all.

LoRA's weights, and products with them, are float32.
"""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import blocks
from diffmas.kernels.launch import Launch, ceil_div, on, once_per_shape, processors

__all__ = ["add_lora", "linear", "lora_grad"]

PROGRAMS = 2  # of the first launch on a multiprocessor, at least: how many are worth a split of the sums, a guess
LEAST = 2  # blocks of a row's length that a program sums up
ROWS = 512  # of LoRA's gradients that are summed one after the other; sums of more round more than torch's


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
    x, weight, bias, down, parts, y, n, length, to, rank, span, stride_x, stride_w,
    TRANSPOSED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of columns of W, then of `down`; parts of a row's length, `span` each; tiles of rows).
    parts [parts of a length, n, to + rank]; None: y [n, to] takes the sums."""
    i_c, i_s = tl.program_id(0), tl.program_id(1)
    i_m = tl.program_id(2).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    m_m = i_m < n
    p_x = x + i_m * stride_x
    first = i_s * span
    last = tl.minimum(first + span, length)
    tiles, before = 0, 0  # of W; its columns
    if weight is not None:
        tiles, before = tl.cdiv(to, BLOCK_N), to
    p_parts = parts
    if parts is not None:
        p_parts = parts + (i_s * n.to(tl.int64) + i_m) * (before + rank)
    if weight is not None:
        if i_c < tiles:
            o_n = i_c * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = product(
                p_x, m_m, weight, stride_w, o_n, to, first, last, length,
                TRANSPOSED, BLOCK_M, BLOCK_N, BLOCK_K, weight.dtype.element_ty,
            )  # fmt: skip
            m_n = m_m & (o_n < to)[None, :]
            if parts is not None:
                tl.store(p_parts + o_n[None, :], acc, mask=m_n)
            else:
                if bias is not None:
                    acc += tl.load(bias + o_n, mask=o_n < to, other=0.0).to(tl.float32)[None, :]
                tl.store(y + i_m * to + o_n[None, :], acc.to(y.dtype.element_ty), mask=m_n)
    if down is not None:
        if i_c >= tiles:
            o_r = (i_c - tiles) * BLOCK_R + tl.arange(0, BLOCK_R)
            stride = length
            if TRANSPOSED:
                stride = rank
            acc = product(
                p_x, m_m, down, stride, o_r, rank, first, last, length, TRANSPOSED, BLOCK_M, BLOCK_R, BLOCK_L, tl.float32
            )  # fmt: skip
            tl.store(p_parts + before + o_r[None, :], acc, mask=m_m & (o_r < rank)[None, :])


@triton.jit
def sum_of_parts(p_part, splits, step, mask, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """[BLOCK_M, BLOCK_N] of `splits` parts that lie `step` apart, always in the same order."""
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for _ in range(splits):
        acc += tl.load(p_part, mask=mask, other=0.0)
        p_part += step
    return acc


@triton.jit(do_not_specialize=["n", "splits"])
def linear_kernel_finish(
    parts, bias, up, y, u, n, to, rank, splits, stride_y, scale,
    ADD: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of columns, tiles of rows). ADD: y is added to; else its sums are in parts, before those of u."""
    i_c = tl.program_id(0)
    i_m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    o_n = i_c * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = i_m < n
    m_n = m_m & (o_n < to)[None, :]
    p_y = y + i_m * stride_y + o_n[None, :]
    before = to
    if ADD:
        before = 0
    p_parts = parts + i_m * (before + rank)
    step = n.to(tl.int64) * (before + rank)
    if ADD:
        acc = tl.load(p_y, mask=m_n, other=0.0).to(tl.float32)
    else:
        acc = sum_of_parts(p_parts + o_n[None, :], splits, step, m_n, BLOCK_M, BLOCK_N)
    if bias is not None:
        acc += tl.load(bias + o_n, mask=o_n < to, other=0.0).to(tl.float32)[None, :]
    if up is not None:
        lora = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for i_r in range(0, rank, BLOCK_R):
            o_r = i_r + tl.arange(0, BLOCK_R)
            m_u = m_m & (o_r < rank)[None, :]
            b_u = sum_of_parts(p_parts + before + o_r[None, :], splits, step, m_u, BLOCK_M, BLOCK_R)
            if i_c == 0:
                tl.store(u + i_m * rank + o_r[None, :], b_u, mask=m_u)
            if TRANSPOSED:  # a [rank, to]
                p_up = up + o_r.to(tl.int64)[:, None] * to + o_n[None, :]
            else:  # b [to, rank]
                p_up = up + o_n.to(tl.int64)[None, :] * rank + o_r[:, None]
            b_up = tl.load(p_up, mask=(o_r < rank)[:, None] & (o_n < to)[None, :], other=0.0)
            lora = tl.dot(b_u, b_up, lora, input_precision="ieee", out_dtype=tl.float32)
        acc += scale * lora
    tl.store(p_y, acc.to(y.dtype.element_ty), mask=m_n)


@triton.jit(do_not_specialize=["n", "span"])
def lora_grad_kernel(
    c, z, grad, n, rank, length, span, stride_z, scale, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr
):  # fmt: skip
    """Grid (tiles of columns, tiles of the rank, parts of the rows, `span` each).
    grad [parts of the rows, rank, length]: takes scale c' z."""
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    i_s = tl.program_id(2)
    first = i_s * span
    last = tl.minimum(first + span, n)
    m_n, m_r = (o_n < length)[None, :], o_r < rank
    acc = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)
    for k in range(first, last, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = (o_k < last)[:, None]
        i_k = o_k.to(tl.int64)[:, None]
        b_c = tl.load(c + i_k * rank + o_r[None, :], mask=m_k & m_r[None, :], other=0.0)
        b_z = tl.load(z + i_k * stride_z + o_n[None, :], mask=m_k & m_n, other=0.0).to(tl.float32)
        acc = tl.dot(tl.trans(b_c), b_z, acc, input_precision="ieee", out_dtype=tl.float32)
    p_grad = grad + (i_s.to(tl.int64) * rank + o_r)[:, None] * length + o_n[None, :]
    tl.store(p_grad, scale * acc, mask=m_r[:, None] & m_n)


def _spans(length: int, block: int, programs: int, device) -> tuple[int, int]:
    """Into how many parts a sum over `length` is split where so many programs would have it whole, and how long these are."""
    most = max(1, length // (LEAST * block))
    splits = min(most, max(1, PROGRAMS * processors(device) // programs))
    span = ceil_div(ceil_div(length, splits), block) * block
    return ceil_div(length, span), span


@once_per_shape
def sizes(n, length, to, rank, transposed, weight, dtype, device) -> tuple[int, int, Launch, Launch]:
    """Parts of a sum, how long they are, and the launches of `linear`; without the weight those of `add_lora`."""
    block = blocks("linear_float32" if dtype == torch.float32 else "linear")
    rows = 16 if n <= 16 else 32
    tiles = (ceil_div(to, block["BLOCK_N"]) if weight else 0) + ceil_div(rank, block["BLOCK_R"])
    splits, span = _spans(length, block["BLOCK_K"], tiles * ceil_div(n, rows), device)
    products = block | dict(BLOCK_M=rows, TRANSPOSED=transposed)
    finish = blocks("linear_finish") | dict(BLOCK_M=rows, TRANSPOSED=transposed, ADD=not weight)
    return (
        splits, span, Launch((tiles, splits, ceil_div(n, rows)), products),
        Launch((ceil_div(to, finish["BLOCK_N"]), ceil_div(n, rows)), finish),
    )  # fmt: skip


@once_per_shape
def grad_sizes(n, rank, length, device) -> tuple[int, int, Launch]:
    block = blocks("lora_grad")
    tiles = ceil_div(length, block["BLOCK_N"]), ceil_div(rank, block["BLOCK_R"])
    _, span = _spans(n, block["BLOCK_K"], tiles[0] * tiles[1], device)
    span = min(span, ROWS)
    return ceil_div(n, span), span, Launch((*tiles, ceil_div(n, span)), block)


def linear(x, weight, bias, a, b, scale, transposed):
    """x [n, in], up to 32 rows of weight's dtype, each in one piece; weight [out, in]; bias [out], a [r, in] and b [out, r]
    float32, or None. -> y [n, out] and x a' [n, r] float32; transposed: of dy [n, out], dx [n, in] and dy b."""
    n, length = x.shape
    to = weight.shape[1 if transposed else 0]
    rank = 0 if a is None else a.shape[0]
    down, up = (b, a) if transposed else (a, b)
    y = torch.empty((n, to), dtype=x.dtype, device=x.device)
    u = torch.empty((n, rank), dtype=torch.float32, device=x.device)
    if not n:
        return y, u
    splits, span, products, finish = sizes(n, length, to, rank, transposed, True, x.dtype, x.device)
    two = splits > 1 or rank > 0
    parts = torch.empty((splits, n, to + rank), dtype=torch.float32, device=x.device) if two else None
    with on(x):
        pointers = x, weight, None if two else bias, down, parts, None if two else y
        products(linear_kernel_products, pointers, (n, length, to, rank, span, x.stride(0), weight.stride(0)))
        if two:
            finish(linear_kernel_finish, (parts, bias, up, y, u), (n, to, rank, splits, to, float(scale)))
    return y, u


def add_lora(y, x, a, b, scale, transposed):
    """y [n, out] += scale (x a') b' in place -> x a' [n, r] float32; transposed: dx [n, in] += scale (dy b) a -> dy b."""
    (n, length), to, rank = x.shape, y.shape[1], a.shape[0]
    down, up = (b, a) if transposed else (a, b)
    u = torch.empty((n, rank), dtype=torch.float32, device=x.device)
    if not n:
        return u
    splits, span, products, finish = sizes(n, length, to, rank, transposed, False, x.dtype, x.device)
    parts = torch.empty((splits, n, rank), dtype=torch.float32, device=x.device)
    with on(x):
        numbers = n, length, to, rank, span, x.stride(0), 0
        products(linear_kernel_products, (x, None, None, down, parts, None), numbers)
        finish(linear_kernel_finish, (parts, None, up, y, u), (n, to, rank, splits, y.stride(0), float(scale)))
    return u


def lora_grad(c, z, scale):
    """scale c' z of c [n, r] float32 and z [n, length] of any stride between rows -> [r, length] float32."""
    (n, rank), length = c.shape, z.shape[1]
    if not n:
        return torch.zeros((rank, length), dtype=torch.float32, device=c.device)
    splits, span, launch = grad_sizes(n, rank, length, c.device)
    parts = torch.empty((splits, rank, length), dtype=torch.float32, device=c.device)
    with on(c):
        launch(lora_grad_kernel, (c, z, parts), (n, rank, length, span, z.stride(0), float(scale)))
    return parts[0] if splits == 1 else parts.sum(0)
