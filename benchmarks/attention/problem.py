"""The problem of cross_attention: inputs in the pool's layout and in those of the peers, the float64 answer, the least work."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffmas.benchmarks.attention.cases import layout
from diffmas.benchmarks.measure import Case, Problem
from diffmas.ops import reference

__all__ = ["Inputs", "Packed", "Padded", "problem"]

SCORES = 1 << 26  # of a K/V head that the reference computes at once: half a GB in float64, and it holds six times as much


@dataclass
class Inputs:
    """q, do [n, Hq, D], packed; pools [R, Hkv, D], head-major; view: index tensors of the op; rows: of each sequence's view;
    seg_offset, inv_freq: as the op takes them."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    queries: list[int]
    view: tuple
    rows: list[Tensor]
    scale: float
    seg_offset: Tensor | None = None
    inv_freq: Tensor | None = None

    @functools.cached_property
    def padded(self) -> "Padded":
        return padded(self)

    @functools.cached_property
    def packed(self) -> "Packed":
        rows = torch.cat(self.rows)
        return Packed(self.q, self.do, self.k[rows], self.v[rows], rows, self)

    def by_head(self, dtype: torch.dtype) -> Iterator["Inputs"]:
        """One K/V head and its query heads at a time."""
        heads = self.k.shape[1]
        for parts in zip(*(t.chunk(heads, 1) for t in (self.q, self.do, self.k, self.v))):
            yield replace(self, **dict(zip(("q", "do", "k", "v"), (t.to(dtype) for t in parts))))

    def by_queries(self, scores: int) -> Iterator["Inputs"]:
        """Consecutive queries of one sequence at a time, of about so many scores, over all that the last of them sees. By 32,
        so that matrix products and sums have their elements in the lanes where they have them at once: the same bits."""
        _, seg_indptr, starts, lengths = self.view
        first, groups = 0, self.q.shape[1] // self.k.shape[1]
        for b, (n, rows) in enumerate(zip(self.queries, self.rows)):
            segments = slice(seg_indptr[b], seg_indptr[b + 1])
            length, step = lengths[segments], max(1, scores // (32 * groups * len(rows))) * 32
            before = length.cumsum(0) - length
            for i in range(0, n, step):
                j = min(i + step, n)
                seen = (len(rows) - (n - j) - before).clamp_min(0).minimum(length)
                index = lambda *xs: torch.tensor(xs, device=self.q.device)
                view = index(0, j - i), index(0, len(length)), starts[segments], seen
                span = slice(first + i, first + j)
                yield replace(
                    self, q=self.q[span], do=self.do[span], queries=[j - i], rows=[rows[: len(rows) - (n - j)]], view=view
                )
            first += n

    def args(self) -> tuple:
        return (*self.view, self.seg_offset, self.inv_freq, self.scale, True, False)


@dataclass
class Packed:
    """The problem as peers for ragged batches have it: q, do [n, Hq, D]; k, v [sum of N, Hkv, D], every sequence's own."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    rows: Tensor
    x: Inputs

    def packed(self, o: Tensor) -> Tensor:
        return o

    def pooled(self, dk: Tensor) -> Tensor:
        return torch.zeros(self.x.k.shape, dtype=dk.dtype, device=dk.device).index_add_(0, self.rows, dk)

    @property
    def lengths(self) -> tuple[list[int], list[int]]:
        """Queries and keys of each sequence."""
        return self.x.queries, [len(r) for r in self.x.rows]

    def indptr(self) -> tuple[Tensor, Tensor]:
        """Where each sequence's queries and keys begin, int32."""
        return tuple(torch.tensor([0, *n], device=self.q.device).cumsum(0, dtype=torch.int32) for n in self.lengths)


@dataclass
class Padded:
    """The problem as Hugging Face has it: q, do [B, Hq, L, D]; k, v [B, Hkv, N, D], left-padded; mask [B, 1, L, N] or None."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    mask: Tensor | None
    causal: bool
    x: Inputs

    @property
    def lower_right(self) -> bool:
        """Whether the mask is causal_lower_right's: nothing but new tokens at the end of as many keys each."""
        return self.mask is not None and len(self.q) == 1

    def packed(self, o: Tensor) -> Tensor:
        """[B, Hq, L, D] -> [n, Hq, D]."""
        return torch.cat([row[:, row.shape[1] - n :].transpose(0, 1) for row, n in zip(o, self.x.queries)])

    def pooled(self, dk: Tensor) -> Tensor:
        """[B, Hkv, N, D] -> gradient pool [R, Hkv, D]."""
        out = torch.zeros(self.x.k.shape, dtype=dk.dtype, device=dk.device)
        for row, rows in zip(dk, self.x.rows):
            out.index_add_(0, rows, row[:, row.shape[1] - len(rows) :].transpose(0, 1))
        return out


def padded(x: Inputs) -> Padded:
    """Of a single sequence without gaps, K and V are the pool's own memory: the same pages for everyone."""
    B, L, N = len(x.queries), max(x.queries), max(map(len, x.rows))
    q, do = (x.q.new_zeros(B, x.q.shape[1], L, x.q.shape[2]) for _ in range(2))
    shared = B == 1 and N == len(x.k)
    if shared:
        k, v = (pool.transpose(0, 1)[None] for pool in (x.k, x.v))
    else:
        k, v = (x.k.new_zeros(B, x.k.shape[1], N, x.k.shape[2]) for _ in range(2))
    mask = torch.full((B, 1, L, N), -torch.inf, dtype=x.q.dtype, device=x.q.device)
    first = 0
    for b, (n, rows) in enumerate(zip(x.queries, x.rows)):
        for packed, wide in ((x.q, q), (x.do, do)):
            wide[b, :, L - n :] = packed[first : first + n].transpose(0, 1)
        for pool, wide in () if shared else ((x.k, k), (x.v, v)):
            wide[b, :, N - len(rows) :] = pool[rows].transpose(0, 1)
        seen = torch.ones(n, len(rows), dtype=torch.bool, device=mask.device).tril(len(rows) - n)
        mask[b, 0, L - n :, N - len(rows) :].masked_fill_(seen, 0)
        mask[b, 0, : L - n, -1] = 0  # rows of padding see something, or they would be NaN
        first += n
    even = B * L == len(x.q) and B * N == sum(map(len, x.rows))
    square, single = even and L == N, even and L == 1
    return Padded(q, do, k, v, None if square or single else mask, square and not single, x)


def problem(case: Case) -> Problem:
    Hq, Hkv = map(int, case.heads.split("/"))
    dtype, device = getattr(torch, case.dtype), "cuda" if torch.cuda.is_available() else "cpu"
    queries, segments = layout(case)
    size = max(start + length for row in segments for start, length in row)
    random = lambda *shape: torch.randn(*shape, device=device).to(dtype)
    q, do = 3 * random(sum(queries), Hq, case.D), random(sum(queries), Hq, case.D)  # 3: attention that is far from uniform
    k, v = (random(Hkv, size, case.D).transpose(0, 1) for _ in range(2))
    flat = [s for row in segments for s in row]
    index = lambda xs: torch.tensor(xs, dtype=torch.int64, device=device)
    view = (
        index([0, *queries]).cumsum(0), index([0, *map(len, segments)]).cumsum(0),
        index([s for s, _ in flat]), index([n for _, n in flat]),
    )  # fmt: skip
    rows = [torch.cat([torch.arange(s, s + n, device=device) for s, n in row]) for row in segments]
    x = Inputs(q, do, k, v, queries, view, rows, case.D**-0.5)

    pairs = sum(n * len(r) - n * (n - 1) // 2 for n, r in zip(queries, rows))  # visible (query, key) pairs
    distinct = torch.cat(rows).unique().numel()
    width, D = q.element_size(), case.D
    forward = case.phase in ("forward", "full")
    backward = case.phase in ("backward", "full")

    def answer_of_head(y: Inputs) -> dict[str, Tensor]:
        wide, out = reference.accumulator(y.q.dtype), []
        dk, dv = (torch.zeros(t.shape, dtype=wide, device=device) for t in (y.k, y.v))
        for part in y.by_queries(SCORES):
            o, lse = reference.cross_attention(part.q, y.k, y.v, *part.args())
            out.append({"o": o, "lse": lse} if forward else {})
            if backward:
                given = part.do, None, part.q, o, lse, y.k, y.v, *part.args()
                out[-1]["dq"] = reference.cross_attention_backward(*given, dk, dv)
        whole = {name: torch.cat([part[name] for part in out]) for name in out[0]}
        return whole | ({"dk": dk, "dv": dv} if backward else {})

    def answer(dtype: torch.dtype) -> dict[str, Tensor]:
        heads = [answer_of_head(y) for y in x.by_head(dtype)]  # not at once: all scores in float64 would take gigabytes
        return {name: torch.cat([head[name] for head in heads], 1) for name in heads[0]}

    own = 2 * q.numel() * width * (forward + 2 * backward)
    return Problem(
        case, x, answer,
        flops=(4 * forward + 10 * backward) * Hq * D * pairs,
        read=2 * Hkv * D * distinct * width * (forward + backward) + own,
        copied=16 * Hkv * D * distinct * backward,  # float32 gradient pools, K and V, read and written
        peers_lack=("lse",),
    )  # fmt: skip
