"""Attention over rows of K and V that are those of a pool and a low-rank part beside them, which nobody builds.

A LoRA adapter on k_proj and v_proj adds z b' to what they give, z = x a' its code, r numbers for a row. So rows of several
adapters, of the same hidden states x, are one set of rows and a code for each adapter (LRAgent, arXiv 2602.01053). With k and v
the pool's rows, and RoPE that of the row's position,

    K = keep k + add RoPE(z_k b_k'),     V = v + z_v b_v'

where keep and add, of each row and head, are 1 without a norm of the keys: with one, rms(x w') / rms(x w' + z b') and
1 / rms(x w' + z b'), and b has the norm's weight in it.

Keys turn with their positions, so K is made tile by tile, and let go; V never is: P V = P v + (P z_v) b_v'. Plain torch, for
every device; queries see all of the rows.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.ops.reference import accumulator, base_of, offset_tables, rotate, rotate_transposed

__all__ = ["Codes", "Part", "low_rank_attention", "low_rank_attention_backward", "rows_built"]

TILE = 1024  # rows whose keys there are at once


class Codes(NamedTuple):
    """Of n rows in one layer. z_k, z_v [n, r]; b_k, b_v [Hkv * D, r]; keep, add [n, Hkv]. None: K or V is the pool's; without
    keep and add these are 1."""

    z_k: Tensor | None = None
    b_k: Tensor | None = None
    z_v: Tensor | None = None
    b_v: Tensor | None = None
    keep: Tensor | None = None
    add: Tensor | None = None


class Part(NamedTuple):
    """What some queries see: rows of a pool from `start` on, whose codes are those from `code` on, read `offset` positions
    later than they were written."""

    queries: slice
    start: int
    code: int
    length: int
    offset: int = 0


def _low(codes: Codes, tables: tuple[Tensor, Tensor] | None, rows: slice, like: Tensor, interleaved: bool) -> Tensor:
    """RoPE(z_k b_k') of some rows, in the shape and dtype of `like` [t, Hkv, D]."""
    low = (codes.z_k[rows].to(like.dtype) @ codes.b_k.to(like.dtype).T).view(like.shape)
    return low if tables is None else rotate(low, *(x[rows] for x in tables), interleaved)


def _keys(k: Tensor, low: Tensor | None, codes: Codes, rows: slice) -> Tensor:
    """K of some rows, k and low [t, Hkv, D]."""
    if low is None:
        return k
    if codes.keep is None:
        return k + low
    return codes.keep[rows].to(k.dtype)[..., None] * k + codes.add[rows].to(k.dtype)[..., None] * low


def rows_built(k: Tensor, v: Tensor, codes: Codes, tables, interleaved: bool) -> tuple[Tensor, Tensor]:
    """K and V [n, Hkv, D] of all rows that there are codes of, from the pool's, in their dtype. For copies."""
    acc, every = accumulator(k.dtype), slice(None)
    low = None if codes.z_k is None else _low(codes, tables, every, k.to(acc), interleaved)
    keys, values = _keys(k.to(acc), low, codes, every), v.to(acc)
    if codes.z_v is not None:
        values = values + (codes.z_v.to(acc) @ codes.b_v.to(acc).T).view(v.shape)
    return keys.to(k.dtype), values.to(v.dtype)


class _Reader:
    """The queries of a part by K/V head, [Hkv, L * G, D], and its rows, tile by tile."""

    def __init__(
        self, q: Tensor, part: Part, k_pool: Tensor, v_pool: Tensor, codes: Codes, tables, inv_freq, interleaved: bool
    ):
        self.acc, self.part, self.pools, self.codes = accumulator(q.dtype), part, (k_pool, v_pool), codes
        self.tables, self.interleaved, self.heads = tables, interleaved, k_pool.shape[1]
        self.turn = None
        if inv_freq is not None and part.offset:  # a key that is read later, against a query that is turned back
            self.turn = offset_tables(torch.tensor([-part.offset], device=q.device), inv_freq, interleaved, self.acc)
        q = q[part.queries].to(self.acc)
        self.q = self.by_head(q if self.turn is None else rotate(q, *self.turn, interleaved))
        b_v = codes.b_v
        self.b_v = None if b_v is None else b_v.to(self.acc).view(self.heads, -1, b_v.shape[1])  # [Hkv, D, r]

    def by_head(self, x: Tensor) -> Tensor:
        """[L, Hq, ...] as [Hkv, L * G, ...]."""
        return x.unflatten(1, (self.heads, -1)).transpose(0, 1).flatten(1, 2)

    def by_query(self, x: Tensor) -> Tensor:
        """The inverse of `by_head`."""
        queries = self.part.queries.stop - self.part.queries.start
        return x.unflatten(1, (queries, -1)).transpose(0, 1).flatten(1, 2)

    def tiles(self):
        """(pool rows, codes, k [t, Hkv, D], low or None, v [Hkv, t, D], z_v [t, r] or None)."""
        part, codes = self.part, self.codes
        for done in range(0, part.length, TILE):
            rows = slice(part.start + done, part.start + min(done + TILE, part.length))
            own = slice(part.code + done, part.code + done + rows.stop - rows.start)
            k, v = (x[rows].to(self.acc) for x in self.pools)
            low = None if codes.z_k is None else _low(codes, self.tables, own, k, self.interleaved)
            yield rows, own, k, low, v.transpose(0, 1), None if codes.z_v is None else codes.z_v[own].to(self.acc)


def low_rank_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, codes: Codes, tables: tuple[Tensor, Tensor] | None, parts: Sequence[Part],
    inv_freq: Tensor | None, scale: float, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """-> o [n, Hq, D], lse [n, Hq], as `diffmas.ops.reference.cross_attention` has them, of what the parts show to rotated q
    [n, Hq, D]; a query may have several. k_pool, v_pool [R, Hkv, D]. tables: cos and sin [n, Dr] of the rows that there are
    codes of, where they were written; None: nothing turns. inv_freq [Dr / 2]: turns for the parts' offsets."""
    acc = accumulator(q.dtype)
    o = torch.zeros(q.shape, dtype=acc, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=acc, device=q.device)
    for part in parts:
        at = _Reader(q, part, k_pool, v_pool, codes, tables, inv_freq, interleaved)
        most, total, values, of_codes = None, 0.0, 0.0, 0.0
        for _, own, k, low, v, z in at.tiles():
            scores = at.q @ _keys(k, low, codes, own).permute(1, 2, 0) * scale  # [Hkv, L * G, t]
            here = scores.amax(-1, keepdim=True)
            most, before = (here, None) if most is None else (torch.maximum(most, here), most)
            if before is not None:
                total, values, of_codes = (x * torch.exp(before - most) for x in (total, values, of_codes))
            p = torch.exp(scores - most)
            total, values = total + p.sum(-1, keepdim=True), values + p @ v
            of_codes = of_codes + (torch.zeros_like(most) if z is None else p @ z)
        if at.b_v is not None:
            values = values + of_codes @ at.b_v.transpose(1, 2)
        states = o[part.queries], lse[part.queries], at.by_query(values / total), at.by_query((most + total.log())[..., 0])
        o[part.queries], lse[part.queries] = _merged(*states)
    return o.to(q.dtype), lse


def _merged(o, lse, o_part, lse_part) -> tuple[Tensor, Tensor]:
    both = torch.logaddexp(lse, lse_part)
    return torch.exp(lse - both)[..., None] * o + torch.exp(lse_part - both)[..., None] * o_part, both


def low_rank_attention_backward(
    do: Tensor, q: Tensor, o: Tensor, lse: Tensor, k_pool: Tensor, v_pool: Tensor, codes: Codes,
    tables: tuple[Tensor, Tensor] | None, parts: Sequence[Part], inv_freq: Tensor | None, scale: float, interleaved: bool,
    grads: Codes | None = None, pools: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """-> dq [n, Hq, D]. o and lse may be those of a larger view than the parts. grads: to which what codes, keep and add get is
    added, in their shapes; None: they are constants. pools: dk_pool, dv_pool, to which the pool's rows' is added, or None."""
    acc = accumulator(q.dtype)
    dq = torch.zeros(q.shape, dtype=acc, device=q.device)
    delta = (do.to(acc) * o.to(acc)).sum(-1)
    for part in parts:
        at = _Reader(q, part, k_pool, v_pool, codes, tables, inv_freq, interleaved)
        of_o = at.by_head(do[part.queries].to(acc))  # [Hkv, L * G, D]
        row_lse, row_delta = (at.by_head(x[part.queries].to(acc))[..., None] for x in (base_of(lse), delta))
        of_codes = None if at.b_v is None else of_o @ at.b_v  # [Hkv, L * G, r]
        dq_part, p_z = torch.zeros_like(at.q), 0.0
        for rows, own, k, low, v, z in at.tiles():
            keys = _keys(k, low, codes, own)
            p = torch.exp(at.q @ keys.permute(1, 2, 0) * scale - row_lse)
            dp = of_o @ v.transpose(1, 2)
            if z is not None:
                dp += of_codes @ z.T
            ds = p * (dp - row_delta) * scale
            dq_part += ds @ keys.transpose(0, 1)
            if grads is None and pools is None:
                continue
            dkeys = (ds.transpose(1, 2) @ at.q).transpose(0, 1)  # [t, Hkv, D]
            if grads is not None and z is not None:
                grads.z_v[own] += (p.flatten(0, 1).T @ of_codes.flatten(0, 1)).to(grads.z_v.dtype)
                p_z = p_z + p @ z
            if grads is not None and low is not None:
                _add_key_grads(grads, codes, own, dkeys, k, low, tables, interleaved)
            if pools is not None:
                dk = dkeys if codes.keep is None else codes.keep[own].to(acc)[..., None] * dkeys
                pools[0][rows] += dk.to(pools[0].dtype)
                pools[1][rows] += (p.transpose(1, 2) @ of_o).transpose(0, 1).to(pools[1].dtype)
        if grads is not None and of_codes is not None:
            grads.b_v.add_((of_o.transpose(1, 2) @ p_z).flatten(0, 1).to(grads.b_v.dtype))
        dq_part = at.by_query(dq_part)
        dq[part.queries] += dq_part if at.turn is None else rotate_transposed(dq_part, *at.turn, interleaved)
    return dq.to(q.dtype)


def _add_key_grads(grads: Codes, codes: Codes, own: slice, dkeys: Tensor, k: Tensor, low: Tensor, tables, interleaved: bool):
    """Adds what z_k, b_k, keep and add of some rows get from their keys."""
    if codes.keep is not None:
        grads.keep[own] += (dkeys * k).sum(-1).to(grads.keep.dtype)
        grads.add[own] += (dkeys * low).sum(-1).to(grads.add.dtype)
        dkeys = codes.add[own].to(dkeys.dtype)[..., None] * dkeys
    if tables is not None:
        dkeys = rotate_transposed(dkeys, *(x[own] for x in tables), interleaved)
    dkeys = dkeys.flatten(1)
    grads.z_k[own] += (dkeys @ codes.b_k.to(dkeys.dtype)).to(grads.z_k.dtype)
    grads.b_k.add_((dkeys.T @ codes.z_k[own].to(dkeys.dtype)).to(grads.b_k.dtype))
