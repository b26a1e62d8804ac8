"""Random inputs of the ops over odd shapes: ragged queries, empty views, one-row segments, rows shared by sequences."""

import random
from dataclasses import dataclass, field

import torch

ROWS = 4096


@dataclass
class View:
    """Queries per sequence, and per sequence the (start, length, offset) of its segments."""

    queries: list[int]
    segments: list[list[tuple[int, int, int]]]
    causal: bool = True

    def tensors(self):
        flat = [s for row in self.segments for s in row]
        column = lambda i: torch.tensor([s[i] for s in flat], dtype=torch.int64)  # noqa: E731
        q_indptr = torch.tensor([0, *self.queries]).cumsum(0)
        seg_indptr = torch.tensor([0, *map(len, self.segments)]).cumsum(0)
        return q_indptr, seg_indptr, column(0), column(1), column(2)

    @property
    def at_offsets(self) -> bool:
        return any(s[2] for row in self.segments for s in row)


VIEWS = {
    "one_token": View([1], [[(5, 1, 0)]]),
    "one_query_long_view": View([1], [[(3, 257, 0), (400, 64, 0)]]),
    "prefill": View([70], [[(10, 70, 0)]]),
    "prefill_on_trace": View([33], [[(600, 63, 0), (0, 130, 0), (200, 33, 0)]]),
    "ragged": View([5, 0, 17, 1], [[(0, 9, 0)], [(20, 4, 0)], [(100, 17, 0)], [(30, 31, 0), (300, 1, 0)]]),
    "one_row_segments": View([3], [[(i * 7, 1, 0) for i in range(40)]]),
    "empty_view": View([2, 3], [[], [(0, 3, 0)]], causal=False),
    "more_queries_than_rows": View([6], [[(40, 2, 0)]]),
    "not_causal": View([9, 2], [[(0, 50, 0)], [(0, 20, 0), (60, 70, 0)]], causal=False),
    "shared_rows": View(
        [1, 4, 2], [[(0, 90, 0), (200, 1, 0)], [(0, 90, 0), (210, 4, 0)], [(30, 60, 0), (0, 20, 0), (20, 10, 0)]]
    ),
    "offset": View([7, 1], [[(0, 40, 13), (100, 30, -5), (300, 7, 0)], [(0, 40, -100), (400, 1, 0)]]),
    # Long enough that the CPU kernels split a forward's keys and cut a backward's rows into chunks.
    "split": View([1, 2], [[(2000, 900, 0), (100, 700, 9), (3200, 40, 0), (850, 1100, 0)], [(2000, 900, 0), (3000, 150, 0)]]),
    "chunks": View([100], [[(1500, 1300, 0), (0, 1100, 0), (3900, 100, 0)]]),
    "many_queries": View([150, 90], [[(0, 100, 0), (100, 150, 0)], [(300, 90, 0)]]),
}

HEADS = {"mha": (2, 2), "gqa2": (4, 2), "gqa8": (8, 1)}


@dataclass
class Inputs:
    q: torch.Tensor
    k_pool: torch.Tensor
    v_pool: torch.Tensor
    view: View
    interleaved: bool
    inv_freq: torch.Tensor | None
    scale: float
    extra: dict = field(default_factory=dict)

    def to(self, dtype, device="cpu"):
        cast = lambda x: x.to(device, dtype)  # noqa: E731
        return Inputs(
            cast(self.q), cast(self.k_pool), cast(self.v_pool), self.view, self.interleaved, self.inv_freq.to(device),
            self.scale,
        )  # fmt: skip

    def args(self):
        """The arguments of the raw forward op."""
        q_indptr, seg_indptr, start, length, offset = (x.to(self.q.device) for x in self.view.tensors())
        moved = self.view.at_offsets
        return (
            self.q, self.k_pool, self.v_pool, q_indptr, seg_indptr, start, length, offset if moved else None,
            self.inv_freq if moved else None, self.scale, self.view.causal, self.interleaved,
        )  # fmt: skip


def head_major(rows: int, heads: int, head_dim: int, dtype, fill=float("nan"), device="cpu") -> torch.Tensor:
    """A pool as the trace stores it, unwritten rows poisoned."""
    return torch.full((heads, rows, head_dim), fill, dtype=dtype, device=device).transpose(0, 1)


def as_it_lies(x: torch.Tensor, dtype, device="cpu") -> torch.Tensor:
    """`x` in another dtype with its strides; `to` would pack a slice of a fused projection."""
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=device).copy_(x)


def attention_inputs(view: View, heads=(4, 2), D=64, Dr=None, interleaved=False, seed=0, rows=ROWS) -> Inputs:
    """float64 inputs whose values are exact in bfloat16, so that every dtype computes the same function."""
    g = torch.Generator().manual_seed(seed)
    exact = lambda *shape: torch.randn(*shape, generator=g).bfloat16().double()  # noqa: E731
    k_pool, v_pool = (head_major(rows, heads[1], D, torch.float64) for _ in "kv")
    for row in view.segments:
        for start, length, _ in row:
            k_pool[start : start + length] = exact(length, heads[1], D)
            v_pool[start : start + length] = exact(length, heads[1], D)
    inv_freq = 1e4 ** (-torch.arange(0, Dr or D, 2).float() / (Dr or D))
    return Inputs(exact(sum(view.queries), heads[0], D), k_pool, v_pool, view, interleaved, inv_freq, 1.3 * D**-0.5)


def random_attention(seed: int, rows: int = 400) -> Inputs:
    """Any shape: sequences without queries or without a view, rows shared by sequences, segments in any order, at offsets."""
    choose = random.Random(seed)
    heads = choose.choice([(1, 1), (2, 2), (4, 2), (3, 1), (8, 1)])
    D, Dr = choose.choice([(16, 16), (64, 64), (64, 16), (80, 80), (80, 48), (128, 128)])
    cuts = [0, *sorted(choose.sample(range(1, rows), 12)), rows]
    pieces = [(start, end - start) for start, end in zip(cuts, cuts[1:])]
    at_offsets, queries, segments = choose.random() < 0.5, [], []
    for _ in range(choose.randint(1, 5)):
        queries.append(choose.choice([0, 1, 1, 2, 7, 33]))
        view = choose.sample(pieces, choose.randint(0, 7))
        segments.append([(start, length, choose.choice([0, 0, 5, -40_000]) * at_offsets) for start, length in view])
    view = View(queries, segments, causal=choose.random() < 0.8)
    return attention_inputs(view, heads, D, Dr, choose.random() < 0.3, seed, rows)


@dataclass
class InjectInputs:
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    cos: torch.Tensor | None
    sin: torch.Tensor | None
    slots: torch.Tensor
    q_weight: torch.Tensor | None
    k_weight: torch.Tensor | None
    interleaved: bool
    eps: float = 1e-6

    def to(self, dtype, device="cpu"):
        cast = lambda x: None if x is None else as_it_lies(x, dtype, device)  # noqa: E731
        return InjectInputs(
            *(cast(getattr(self, n)) for n in ("q", "k", "v", "cos", "sin")), self.slots.to(device), cast(self.q_weight),
            cast(self.k_weight), self.interleaved, self.eps,
        )  # fmt: skip

    def rope(self):
        """cos .. interleaved, as the raw ops take them."""
        return self.cos, self.sin, self.slots, self.q_weight, self.k_weight, self.eps, self.interleaved


def inject_inputs(
    n=37, heads=(4, 2), D=64, Dr=None, norm=True, interleaved=False, strided=False, seed=0, rows=ROWS
) -> InjectInputs:
    """float64, exact in bfloat16. Dr=0: no rotation. strided: q, k, v are parts of one fused projection."""
    g = torch.Generator().manual_seed(seed)
    exact = lambda *shape: torch.randn(*shape, generator=g).bfloat16().double()  # noqa: E731
    Hq, Hkv = heads
    q, k, v = exact(n, Hq + 2 * Hkv, D).split((Hq, Hkv, Hkv), dim=1)
    if not strided:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
    cos = sin = None
    if Dr != 0:
        Dr = Dr or D
        angle = torch.arange(n)[:, None] * 1e4 ** (-torch.arange(0, Dr, 2).double() / Dr)
        angle = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
        cos, sin = (1.1 * angle.cos()).bfloat16().double(), (1.1 * angle.sin()).bfloat16().double()
    slots = torch.randperm(rows, generator=g)[:n]
    slots[n // 3 :: 5] = -1
    weights = (exact(D), exact(D)) if norm else (None, None)
    return InjectInputs(q, k, v, cos, sin, slots, *weights, interleaved)
