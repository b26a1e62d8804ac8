"""Attention over rows and low-rank parts of them, against attention over the rows that these make, by autograd."""

import pytest
import torch
from models import assert_close

from diffmas.ops.low_rank import Codes, Tile, low_rank_attention, low_rank_attention_backward, of_pairs, rows_built
from diffmas.ops.reference import offset_tables, rotate

Hq, Hkv, D, R, N, r = 6, 2, 8, 40, 30, 3
FIRST = 5  # the pool's row that the first code is of
# Ragged: the second sequence has a query and two runs of rows, of which it reads one later; the last query sees no rows.
# (queries, first code, rows, offset)
PARTS = [((0, 4), 0, 23, 0), ((4, 5), 3, 9, 7), ((4, 5), 20, 10, 0)]


def tiles(each, listed=False):
    """Of so many codes each; listed: which rows they are as tensors."""
    found = []
    for first in range(0, N, each):
        after, start, length, offset, indptr = min(first + each, N), [], [], [], [0]
        for queries in ((0, 4), (4, 5), (5, 6)):
            for own, at, n, by in PARTS:
                low, high = max(at, first), min(at + n, after)
                if own == queries and low < high:
                    start, length, offset = start + [low - first], length + [high - low], offset + [by]
            indptr.append(len(start))
        view = tuple(map(torch.tensor, ([0, 4, 5, 6], indptr, start, length, offset)))
        rows = slice(first + FIRST, after + FIRST), slice(first, after)
        found.append(Tile(*(torch.arange(x.start, x.stop) if listed else x for x in rows), view))
    return found


KINDS = {
    "k and v": ("z_k", "b_k", "z_v", "b_v"),
    "k": ("z_k", "b_k"),
    "v": ("z_v", "b_v"),
    "normed": Codes._fields,
}
SHAPES = {"z_k": (N, r), "b_k": (Hkv * D, r), "z_v": (N, r), "b_v": (Hkv * D, r), "keep": (N, Hkv), "add": (N, Hkv)}


def made(kind, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    random = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)  # noqa: E731
    codes = {name: random(*SHAPES[name]).requires_grad_() for name in KINDS[kind]}
    q, k, v, do = random(6, Hq, D), random(R, Hkv, D), random(R, Hkv, D), random(6, Hq, D)
    do[5] = 0
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), do, Codes(**codes)


def plain(q, k, v, codes, tables, inv_freq, scale, interleaved):
    """Rows built, moved to where they are read, and torch's softmax; o, lse."""
    o, lse = torch.zeros_like(q), torch.full(q.shape[:2], -torch.inf, dtype=q.dtype)
    for first, last in ((0, 4), (4, 5)):
        keys, values = [], []
        for queries, at, n, by in PARTS:
            if queries != (first, last):
                continue
            own, rows = slice(at, at + n), slice(at + FIRST, at + FIRST + n)
            key, value = k[rows], v[rows]
            if codes.z_k is not None:
                low = rotate((codes.z_k @ codes.b_k.T)[own].view(-1, Hkv, D), *(t[own] for t in tables), interleaved)
                if codes.keep is not None:
                    key, low = codes.keep[own, :, None] * key, codes.add[own, :, None] * low
                key = key + low
            if codes.z_v is not None:
                value = value + (codes.z_v @ codes.b_v.T)[own].view(-1, Hkv, D)
            keys.append(rotate(key, *offset_tables(torch.full((n,), by), inv_freq, interleaved, q.dtype), interleaved))
            values.append(value)
        keys, values = (torch.cat(x).repeat_interleave(Hq // Hkv, 1) for x in (keys, values))
        scores = torch.einsum("lhd,nhd->lhn", q[first:last], keys) * scale
        o[first:last] = torch.einsum("lhn,nhd->lhd", scores.softmax(-1), values)
        lse[first:last] = scores.logsumexp(-1)
    return o, lse


@pytest.mark.parametrize("turned", [8, 4], ids=["all of D", "half of D"])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("each, listed", [(7, False), (N, False), (11, True)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_attention_over_the_rows(kind, each, listed, interleaved, turned):
    """Output and all gradients, whatever the tiles; o and lse may be a larger view's."""
    q, k, v, do, codes = made(kind)
    inv_freq, scale = torch.tensor([1.0, 0.3, 0.1, 0.02][: turned // 2], dtype=torch.float64), 0.4
    tables = tuple(1.3 * x for x in offset_tables(torch.arange(N) + 11, inv_freq, interleaved, torch.float64))
    want, want_lse = plain(q, k, v, codes, tables, inv_freq, scale, interleaved)
    tables = of_pairs(tables, interleaved)
    want.backward(do)
    with torch.no_grad():
        rest = tables, tiles(each, listed), inv_freq, scale, interleaved
        o, lse = low_rank_attention(q, k, v, codes, *rest)
        assert_close(o, want, 1e-12)
        assert_close(lse[:5], want_lse[:5], 1e-12)
        assert torch.isinf(lse[5]).all()
        grads = Codes(*(x if x is None else torch.zeros_like(x) for x in codes))
        pools = torch.zeros_like(k), torch.zeros_like(v)
        dq = low_rank_attention_backward(do, q, o, lse, k, v, codes, *rest, "auto", grads, pools)
        assert_close(dq, q.grad, 1e-12)
        assert_close(pools[0], k.grad, 1e-12)
        assert_close(pools[1], v.grad, 1e-12)
        for got, x in zip(grads, codes):
            if x is not None:
                assert_close(got, x.grad, 1e-12)
        assert_close(low_rank_attention_backward(do, q, o, lse, k, v, codes, *rest), dq, 1e-12)


@pytest.mark.parametrize("dtype, within", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_other_dtypes(dtype, within):
    """Codes of adapters in float32 beside rows of another dtype, on the kernels that there are."""
    q, k, v, _, codes = (x.detach() if isinstance(x, torch.Tensor) else x for x in made("normed", dtype))
    codes = Codes(*(x.detach().float() for x in codes))
    inv_freq = torch.tensor([1.0, 0.3, 0.1, 0.02])
    tables = of_pairs(offset_tables(torch.arange(N), inv_freq, False, torch.float32), False)
    exact = [x.double() for x in (q, k, v)], Codes(*(x.double() for x in codes))
    o, _ = low_rank_attention(q, k, v, codes, tables, tiles(7), inv_freq, 0.4, False)
    want, _ = low_rank_attention(*exact[0], exact[1], tables, tiles(7), inv_freq, 0.4, False)
    assert o.dtype == dtype
    assert_close(o.double(), want, within)
    own = slice(FIRST, FIRST + N)
    built = [x.double() for x in rows_built(k[own], v[own], codes, tables, False)]
    for x, y in zip(built, rows_built(*(t[own] for t in exact[0][1:]), exact[1], tables, False)):
        assert_close(x, y, within)
