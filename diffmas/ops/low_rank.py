"""Attention over rows of K and V that are those of a pool and a low-rank part beside them, of which a tile at a time is built.

A LoRA adapter on k_proj and v_proj adds z b' to what they give, z = x a' its code, r numbers for a row. So rows of several
adapters, of the same hidden states x, are one set of rows and a code for each adapter (LRAgent, arXiv 2602.01053). With k and v
the pool's rows, and RoPE that of the row's position,

    K = keep k + add RoPE(z_k b_k'),     V = v + z_v b_v'

where keep and add, of each row and head, are 1 without a norm of the keys: with one, rms(x w') / rms(x w' + z b') and
1 / rms(x w' + z b'), and b has the norm's weight in it.

A tile's K and V go through the attention kernels that there are, and are let go; what tiles give is merged. So all queries of a
call share what it costs to build them. Few queries have kernels of their own on a CPU, which write no row anywhere.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from diffmas.ops.backends import implementation
from diffmas.ops.reference import accumulator, rotate_half
from diffmas.ops.register import call

__all__ = [
    "BY_ROW", "FEW_ROWS", "Codes", "Tile", "Whole", "few_kernels", "low_rank_attention", "low_rank_attention_backward",
    "of_pairs", "rows_built",
]  # fmt: skip

BY_ROW = ("z_k", "z_v", "keep", "add")
FEW_ROWS = 12  # heads of a group and sequence that the kernels of few queries take (csrc/cpu/tasks.h)
Rows = slice | Tensor


class Codes(NamedTuple):
    """Of n rows in one layer. z_k, z_v [n, r]; b_k, b_v [Hkv * D, r]; keep, add [n, Hkv]. None: K or V is the pool's; without
    keep and add these are 1."""

    z_k: Tensor | None = None
    b_k: Tensor | None = None
    z_v: Tensor | None = None
    b_v: Tensor | None = None
    keep: Tensor | None = None
    add: Tensor | None = None

    def of(self, rows: Rows) -> "Codes":
        """Of some rows."""
        return self._replace(**{name: x[rows] for name in BY_ROW if (x := getattr(self, name)) is not None})

    def constant(self) -> "Codes":
        """Without a graph. b are copies: an adapter's weights, which may change while the rows stay what they are."""
        rows = {name: x.detach() for name in BY_ROW if (x := getattr(self, name)) is not None}
        weights = {name: x.detach().clone() for name in ("b_k", "b_v") if (x := getattr(self, name)) is not None}
        return Codes(**rows, **weights)


class Tile(NamedTuple):
    """Some of the rows that there are codes of: their numbers in the pool, and among the codes. view: q_indptr, seg_indptr,
    seg_start, seg_len, seg_offset of all queries, as `diffmas.ops.reference.cross_attention` takes them, of the tile's rows."""

    pool: Rows
    codes: Rows
    view: tuple[Tensor, ...]

    def at(self, inv_freq: Tensor | None) -> tuple:
        """The view for a layer that turns by these frequencies, or by none."""
        return *self.view[:4], self.view[4] if inv_freq is not None else None, inv_freq


class Whole(NamedTuple):
    """All of the rows that queries see, for the kernels of few queries: up to FEW_ROWS heads of a group in each sequence.
    codes [S]: of each segment's first row. view: as a tile's, of rows of the pool."""

    codes: Tensor
    view: tuple[Tensor, ...]


Reads = Sequence[Tile] | Whole
Tables = tuple[Tensor, Tensor] | None


def few_kernels(q: Tensor, backend: str) -> bool:
    """Whether there are kernels of few queries for q."""
    native = torch.ops.diffmas_native.cross_attention
    return q.device.type == "cpu" and implementation("cross_attention", q, backend) is native


def of_pairs(tables: tuple[Tensor, Tensor], interleaved: bool) -> tuple[Tensor, Tensor]:
    """cos and sin [n, Dr / 2] of each pair, from those of each number [n, Dr], as transformers has them. Raises ValueError
    where a pair has more than one angle."""
    pairs = tuple(x[:, ::2] if interleaved else x[:, : x.shape[1] // 2] for x in tables)
    others = tuple(x[:, 1::2] if interleaved else x[:, x.shape[1] // 2 :] for x in tables)
    if not all(map(torch.equal, pairs, others)):
        raise ValueError("tables: expected one angle for both numbers of a pair, got two")
    return tuple(x.to(accumulator(x.dtype)).contiguous() for x in pairs)


def _by_head(b: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """[Hkv * D, r] as [Hkv, r, D]."""
    return b.to(dtype).view(heads, -1, b.shape[1]).transpose(1, 2)


class _Turn:
    """RoPE(z b') by head, [Hkv, t, D], as (z b') cos + (z b_turned') sin: b turned by a quarter in place of each row's z b', so
    that nothing but products of whole rows is left to do."""

    def __init__(self, b: Tensor, heads: int, tables: Tables, interleaved: bool, dtype: torch.dtype):
        self.interleaved, self.b = interleaved, _by_head(b, heads, dtype)
        self.cos = self.sin = None
        if tables is not None:
            self.Dr = 2 * tables[0].shape[1]
            whole = (t.to(dtype).repeat_interleave(2, 1) if interleaved else torch.cat((t, t), 1).to(dtype) for t in tables)
            self.cos, self.sin = (F.pad(t, (0, self.b.shape[2] - self.Dr), value=x) for t, x in zip(whole, (1.0, 0.0)))
            self.turned = self._quarter(self.b)

    def _quarter(self, x: Tensor) -> Tensor:
        return torch.cat((rotate_half(x[..., : self.Dr], self.interleaved), x[..., self.Dr :]), -1)

    def of(self, z: Tensor) -> Tensor:
        if self.cos is None:
            return z @ self.b
        return (z @ self.b).mul_(self.cos).addcmul_(z @ self.turned, self.sin)

    def grads(self, dy: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """dz [t, r] and db [Hkv * D, r] of dy [Hkv, t, D]."""
        by_cos = dy if self.cos is None else dy * self.cos
        dz, db = (by_cos @ self.b.transpose(1, 2)).sum(0), z.T @ by_cos  # [t, r], [Hkv, r, D]
        if self.cos is not None:
            by_sin = dy * self.sin
            dz, of_turned = dz + (by_sin @ self.turned.transpose(1, 2)).sum(0), z.T @ by_sin
            of_turned[..., self.Dr :] = 0
            db = db - self._quarter(of_turned)  # a quarter back
        return dz, db.transpose(1, 2).flatten(0, 1)


def rows_built(k: Tensor, v: Tensor, codes: Codes, tables: Tables, interleaved: bool) -> tuple[Tensor, Tensor]:
    """K and V [t, Hkv, D] of rows that there are codes of, from the pool's k and v, in their dtype: what codes change is built,
    head-major, the rest is the pool's. tables: cos and sin [t, Dr / 2] of each pair, of the rows as
    they were written; None: nothing turns."""
    heads, dtype, acc = k.shape[1], k.dtype, accumulator(k.dtype)
    if codes.z_k is not None:
        low, k = _Turn(codes.b_k, heads, tables, interleaved, acc).of(codes.z_k.to(acc)), k.transpose(0, 1).to(acc)
        if codes.keep is None:
            low.add_(k)
        else:
            low.mul_(codes.add.T.to(acc)[..., None]).addcmul_(k, codes.keep.T.to(acc)[..., None])
        k = low.to(dtype).transpose(0, 1)
    if codes.z_v is not None:
        z, b = codes.z_v.to(acc).expand(heads, -1, -1), _by_head(codes.b_v, heads, acc)
        v = torch.baddbmm(v.transpose(0, 1).to(acc), z, b).to(dtype).transpose(0, 1)
    return k, v


def _add_grads(grads: Codes, dk: Tensor, dv: Tensor, k: Tensor, codes: Codes, tables: Tables, interleaved: bool, rows: Rows):
    """Adds what some rows' codes get from dk and dv [t, Hkv, D] of the rows that they make. codes: theirs; rows: which."""
    acc, heads = dk.dtype, dk.shape[1]
    if codes.z_v is not None:
        dz, db = _Turn(codes.b_v, heads, None, interleaved, acc).grads(dv.transpose(0, 1), codes.z_v.to(acc))
        grads.z_v[rows] += dz
        grads.b_v.add_(db)
    if codes.z_k is None:
        return
    turn, dlow, z = _Turn(codes.b_k, heads, tables, interleaved, acc), dk.transpose(0, 1), codes.z_k.to(acc)
    if codes.keep is not None:
        grads.keep[rows] += (dk * k.to(acc)).sum(-1)
        grads.add[rows] += (dlow * turn.of(z)).sum(-1).T
        dlow = dlow * codes.add.T.to(acc)[..., None]
    dz, db = turn.grads(dlow, z)
    grads.z_k[rows] += dz
    grads.b_k.add_(db)


def low_rank_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, codes: Codes, tables: Tables, reads: Reads, inv_freq: Tensor | None,
    scale: float, interleaved: bool, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> o [n, Hq, D], lse [n, Hq], as `diffmas.ops.reference.cross_attention` has them without a mask, of what reads show to
    rotated q [n, Hq, D]: tiles, or all at once where there are kernels for it. k_pool, v_pool [R, Hkv, D]. tables: cos and
    sin [n, Dr / 2] of each pair, of the rows that there are codes of, where they were written; None: nothing turns.
    inv_freq [Dr / 2]: turns for the views' offsets."""
    if isinstance(reads, Whole):
        rest = _whole(codes, tables, reads, inv_freq, scale, interleaved)
        return torch.ops.diffmas_native.low_rank_attention(q, k_pool, v_pool, *rest)
    states = None
    for tile in reads:
        kv = _built(k_pool, v_pool, codes, tables, tile, interleaved)
        more = call("cross_attention", q, q, *kv, *tile.at(inv_freq), scale, False, interleaved, backend=backend)
        states = more if states is None else call("merge_states", q, *states, *more, backend=backend)
    return states


def _whole(codes: Codes, tables: Tables, reads: Whole, inv_freq: Tensor | None, scale: float, interleaved: bool) -> tuple:
    """Those arguments of the kernels of few queries that follow the pools."""
    device = reads.codes.device  # all layers have the same tables, but not one device
    floats = (None if x is None else x.to(device, torch.float32).contiguous() for x in (*codes, *(tables or (None, None))))
    view = *reads.view[:4], reads.view[4] if inv_freq is not None else None, inv_freq
    return reads.codes, *floats, *view, scale, interleaved


def _turns(tables: Tables, tile: Tile, like: Tensor) -> Tables:
    """Of a tile, where its rows lie: all layers have the same tables, but not one device."""
    return None if tables is None else tuple(x.to(like.device)[tile.codes] for x in tables)


def _built(k_pool, v_pool, codes: Codes, tables: Tables, tile: Tile, interleaved: bool) -> tuple[Tensor, Tensor]:
    turns = _turns(tables, tile, k_pool)
    return rows_built(k_pool[tile.pool], v_pool[tile.pool], codes.of(tile.codes), turns, interleaved)


def low_rank_attention_backward(
    do: Tensor, q: Tensor, o: Tensor, lse: Tensor, k_pool: Tensor, v_pool: Tensor, codes: Codes, tables: Tables,
    reads: Reads, inv_freq: Tensor | None, scale: float, interleaved: bool, backend: str = "auto",
    grads: Codes | None = None, pools: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """-> dq [n, Hq, D]. o and lse may be those of a larger view than reads'. grads: to which is added what codes, keep, add
    and b get, in their shapes and float32 (float64 for float64 pools); None: they are constants. pools: dk_pool, dv_pool, to
    which is added what the pool's rows get, or None."""
    if isinstance(reads, Whole):
        rest = _whole(codes, tables, reads, inv_freq, scale, interleaved)
        sums = *(grads or Codes()), *(pools or (None, None))
        return torch.ops.diffmas_native.low_rank_attention_backward(do, q, o, lse, k_pool, v_pool, *rest, *sums)
    acc, learning = accumulator(q.dtype), grads is not None or pools is not None
    dq = torch.zeros_like(q)
    for tile in reads:
        k, v = _built(k_pool, v_pool, codes, tables, tile, interleaved)
        dk, dv = (torch.zeros_like(x.transpose(0, 1), dtype=acc).transpose(0, 1) for x in (k, v))
        tail = None if learning else torch.zeros_like(tile.view[0][1:])
        args = *tile.at(inv_freq), scale, False, interleaved, dk, dv, tail, True
        dq += call("cross_attention_backward", q, do, None, q, o, lse, k, v, *args, backend=backend)
        own = codes.of(tile.codes)
        if grads is not None:
            turns = _turns(tables, tile, k_pool)
            _add_grads(grads, dk, dv, k_pool[tile.pool], own, turns, interleaved, tile.codes)
        if pools is not None:
            pools[0][tile.pool] += dk if own.keep is None else own.keep.to(acc)[..., None] * dk
            pools[1][tile.pool] += dv
    return dq
