"""Frozen linear layers of few rows and their LoRA adapters, y = x W' + bias + scale (x a') b', and their transposes, which take
gradients back: dy W + scale (dy b) a. What LoRA adds to many rows, whose product with W is torch's. LoRA's gradients.

Both ways an op is two launches, for one linear as for up to three that read the same rows. The first multiplies: a program has
a tile of columns of a W, or of `down` (a, or b when transposed), and a part of the rows' length, and leaves float32 sums. The
second adds these up in order, multiplies those of `down`, u, by `up` (b, or a), and rounds once. To be there when y is finished
in one launch, u would have to be made by every program again; made beside the rest it costs no launch of its own, and where the
tiles of W do not fill a GPU, sums are split and a second launch is there anyway. Without an adapter, and with tiles enough, one
launch does all of a linear that is alone.

Each W is read where it lies: a program's number says whose tile it has. LoRA's weights, and products with them, are float32.
"""

import torch
import triton
import triton.language as tl

from diffmas.kernels.blocks import blocks
from diffmas.kernels.launch import Launch, ceil_div, on, once_per_shape, processors
from diffmas.kernels.linear_finish import (
    linear_kernel_add,
    linear_kernel_finish,
    linear_kernel_gate,
    linear_kernel_gate_backward,
    linear_kernel_sum,
)
from diffmas.kernels.linear_products import linear_kernel_products

__all__ = [
    "add_lora", "gated_linears", "linear", "linear_gate_backward", "linears", "linears_backward", "lora_grad",
]  # fmt: skip

PROGRAMS = 2  # of the first launch on a multiprocessor, at least: how many are worth a split of the sums, a guess
LEAST = 2  # blocks of a row's length that a program sums up
ROWS = 512  # of LoRA's gradients that are summed one after the other; sums of more round more than torch's
MOST = 3  # linears of one launch


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
def sizes(n, lengths, tos, ranks, transposed, weight, dtype, device) -> tuple[int, int, Launch]:
    """Parts of a sum, how long they are, and the first launch of linears; without their weights that of `add_lora`."""
    block = blocks("linear_float32" if dtype == torch.float32 else "linear")
    rows = _rows(n)
    tiles = sum(ceil_div(to, block["BLOCK_N"]) for to in tos if weight) + sum(ceil_div(r, block["BLOCK_R"]) for r in ranks)
    splits, span = _spans(max(lengths), block["BLOCK_K"], tiles * ceil_div(n, rows), device)
    constants = block | dict(BLOCK_M=rows, TRANSPOSED=transposed, COUNT=len(ranks))
    return splits, span, Launch((tiles, splits, ceil_div(n, rows)), constants)


@once_per_shape
def finish_sizes(n, tos, **constants) -> Launch:
    """The second launch, over columns of all of these."""
    block = blocks("linear_finish") | dict(BLOCK_M=_rows(n)) | constants
    return Launch((sum(ceil_div(to, block["BLOCK_N"]) for to in tos), ceil_div(n, block["BLOCK_M"])), block)


@once_per_shape
def grad_sizes(n, rank, length, device) -> tuple[int, int, Launch]:
    block = blocks("lora_grad")
    tiles = ceil_div(length, block["BLOCK_N"]), ceil_div(rank, block["BLOCK_R"])
    _, span = _spans(n, block["BLOCK_K"], tiles[0] * tiles[1], device)
    span = min(span, ROWS)
    return ceil_div(n, span), span, Launch((*tiles, ceil_div(n, span)), block)


def _rows(n: int) -> int:
    return 16 if n <= 16 else 32


def _filled(of_all) -> tuple:
    """For MOST linears, of what the first of them have: tensors, or None where none has one, or numbers."""
    nothing = None if of_all[0] is None or isinstance(of_all[0], torch.Tensor) else 0
    return (*of_all, *(nothing,) * (MOST - len(of_all)))


class Adapters:
    """Those of up to MOST linears [weight, bias, a, b, scale] as the kernels take them: where only some linears have one, the
    others have one of rank 0."""

    def __init__(self, parts):
        some = next((x for x in parts if x[2] is not None), None)
        self.ranks = tuple(0 if a is None else a.shape[0] for _, _, a, _, _ in parts)
        self.a, self.b = ([None if some is None else some[i] if x[2] is None else x[i] for x in parts] for i in (2, 3))
        self.scales = [float(x[4]) for x in parts]

    def codes(self, n: int, device) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Where u of n rows goes, of all linears and of each [n, r]."""
        all_of_them = torch.empty(n * sum(self.ranks), dtype=torch.float32, device=device)
        return all_of_them, [u.view(n, r) for u, r in zip(all_of_them.split([n * r for r in self.ranks]), self.ranks)]


def _multiply(xs, weights, downs, ranks, transposed):
    """The first launch of linears. xs: rows, of each when transposed. -> float32 sums [parts, n, columns], and how long parts
    are."""
    n, lengths = xs[0].shape[0], tuple(x.shape[1] for x in xs)
    tos = tuple(w.shape[1 if transposed else 0] for w in weights)
    splits, span, products = sizes(n, lengths, tos, ranks, transposed, True, xs[0].dtype, xs[0].device)
    parts = torch.empty((splits, n, sum(tos) + sum(ranks)), dtype=torch.float32, device=xs[0].device)
    numbers = *_filled(lengths), *_filled(tos), *_filled(ranks), *_filled([x.stride(0) for x in xs])
    pointers = *_filled(xs), *_filled(weights), None, *_filled(downs), parts, None
    products(linear_kernel_products, pointers, (n, span, *numbers, weights[0].stride(0)))
    return parts, span


def linear(x, weight, bias, a, b, scale, transposed):
    """x [n, in], up to 32 rows of weight's dtype, each in one piece; weight [out, in], in one piece; bias [out], a [r, in] and
    b [out, r] float32, or None. -> y [n, out] and x a' [n, r] float32; transposed: of dy [n, out], dx [n, in] and dy b."""
    if a is None and len(x) and (y := _at_once(x, weight, bias, transposed)) is not None:
        return y, torch.empty((len(x), 0), dtype=torch.float32, device=x.device)
    parts = [(weight, bias, a, b, scale)]
    if transposed:
        y, (u,) = linears_backward([x], parts)
    else:
        (y,), (u,) = linears(x, parts)
    return y, u


def _at_once(x, weight, bias, transposed):
    """y in one launch, where its sums are not split; else None."""
    (n, length), to = x.shape, weight.shape[1 if transposed else 0]
    splits, span, products = sizes(n, (length,), (to,), (0,), transposed, True, x.dtype, x.device)
    if splits > 1:
        return None
    y = torch.empty((n, to), dtype=x.dtype, device=x.device)
    pointers = x, None, None, weight, None, None, bias, None, None, None, None, y
    with on(x):
        products(
            linear_kernel_products, pointers, (n, span, length, 0, 0, to, 0, 0, 0, 0, 0, x.stride(0), 0, 0, weight.stride(0))
        )
    return y


def linears(x, parts):
    """Up to MOST linears of the same x; parts: weight, bias, a, b and scale of each, as `linear` has them, all with a bias or
    none. -> all y, and all x a'."""
    n, adapters = len(x), Adapters(parts)
    weights, biases = ([part[i] for part in parts] for i in (0, 1))
    tos = tuple(map(len, weights))
    ys = [torch.empty((n, to), dtype=x.dtype, device=x.device) for to in tos]
    u, us = adapters.codes(n, x.device)
    if n:
        with on(x):
            sums, _ = _multiply([x], weights, adapters.a, adapters.ranks, False)
            pointers = sums, *_filled(biases), *_filled(adapters.b), *_filled(ys), u
            numbers = *_filled(tos), *_filled(adapters.ranks), *_filled(adapters.scales)
            finish_sizes(n, tos, COUNT=len(parts))(linear_kernel_finish, pointers, (n, len(sums), *numbers))
    return ys, us


def linears_backward(dys, parts):
    """Of dy [n, out] of each of up to MOST linears: the sum of their dx [n, in], the last first, rounded as autograd does; and
    all dy b [n, r]."""
    n, adapters, lengths = len(dys[0]), Adapters(parts), tuple(dy.shape[1] for dy in dys)
    weights = [part[0] for part in parts]
    to = weights[0].shape[1]
    dx = torch.empty((n, to), dtype=dys[0].dtype, device=dys[0].device)
    v, vs = adapters.codes(n, dx.device)
    if n:
        with on(dx):
            sums, span = _multiply(dys, weights, adapters.b, adapters.ranks, True)
            numbers = *_filled(lengths), *_filled(adapters.ranks), *_filled(adapters.scales)
            launch = finish_sizes(n, (to,), COUNT=len(parts))
            launch(linear_kernel_sum, (sums, *_filled(adapters.a), dx, v), (n, span, to, *numbers))
    return dx, vs


def gated_linears(x, parts, keep: bool):
    """silu(gate) up [n, out] of two linears of x, as `linears` takes them; gate and up, if they are to be kept; and both
    x a'."""
    n, adapters = len(x), Adapters(parts)
    weights, biases = ([part[i] for part in parts] for i in (0, 1))
    to = len(weights[0])
    y, *both = (torch.empty((n, to), dtype=x.dtype, device=x.device) for _ in range(3 if keep else 1))
    both = both or [None, None]
    u, us = adapters.codes(n, x.device)
    if n:
        with on(x):
            sums, _ = _multiply([x], weights, adapters.a, adapters.ranks, False)
            numbers = n, len(sums), to, *adapters.ranks, *adapters.scales
            finish_sizes(n, (to,))(linear_kernel_gate, (sums, *biases, *adapters.b, *both, y, u), numbers)
    return y, *both, us


def linear_gate_backward(dy, weight, a, b, scale, gate, up):
    """Of dy [n, out] of a linear of silu(gate) up [n, in], both in one piece: dgate, dup and dy b."""
    n, adapters, to = len(dy), Adapters([(weight, None, a, b, scale)]), weight.shape[1]
    dgate, dup = (torch.empty((n, to), dtype=dy.dtype, device=dy.device) for _ in range(2))
    v, (of_rows,) = adapters.codes(n, dy.device)
    if n:
        with on(dy):
            sums, _ = _multiply([dy], [weight], adapters.b, adapters.ranks, True)
            pointers = sums, *adapters.a, gate, up, dgate, dup, v
            numbers = n, len(sums), to, *adapters.ranks, *adapters.scales
            finish_sizes(n, (to,))(linear_kernel_gate_backward, pointers, numbers)
    return dgate, dup, of_rows


def add_lora(y, x, a, b, scale, transposed):
    """y [n, out] += scale (x a') b' in place -> x a' [n, r] float32; transposed: dx [n, in] += scale (dy b) a -> dy b."""
    (n, length), to, rank = x.shape, y.shape[1], a.shape[0]
    down, up = (b, a) if transposed else (a, b)
    u = torch.empty((n, rank), dtype=torch.float32, device=x.device)
    if not n:
        return u
    splits, span, products = sizes(n, (length,), (to,), (rank,), transposed, False, x.dtype, x.device)
    parts = torch.empty((splits, n, rank), dtype=torch.float32, device=x.device)
    with on(x):
        pointers = x, None, None, None, None, None, None, down, None, None, parts, None
        numbers = n, span, length, 0, 0, to, 0, 0, rank, 0, 0, x.stride(0), 0, 0, 0
        products(linear_kernel_products, pointers, numbers)
        launch = finish_sizes(n, (to,), TRANSPOSED=transposed)
        launch(linear_kernel_add, (parts, up, y, u), (n, splits, to, rank, y.stride(0), float(scale)))
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
