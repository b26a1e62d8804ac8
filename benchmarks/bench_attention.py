"""cross_attention over a trace: a latent step, prompts, several agents, ragged batches; forward, backward, both.

Peers compute the same on the layout a Hugging Face user has: K/V concatenated, [B, Hkv, N, D], left-padded if lengths differ,
masks built beforehand and correct. What they would have to do first (concatenate, pad, build masks) is not counted, except by
the providers with "cat" in their name.
"""

import functools
import importlib
import inspect
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as torch_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from diffmas.benchmarks import ours
from diffmas.benchmarks.measure import OURS, Cannot, Case, Problem, Run, Senseless
from diffmas.benchmarks.ours import run_op, twins
from diffmas.ops import reference

__all__ = ["CASES", "PROVIDERS", "problem"]

# Where peers that were far behind at smaller shapes are left out: they take minutes and teach nothing more.
EAGER_SCORES = 1 << 24  # attention scores that eager PyTorch would store
EXPANDED = 1 << 26  # elements of K repeated for each query head; on a GPU:
EXPANDED_GPU = 1 << 29

# ---- cases -----------------------------------------------------------------------------------------------------------


def _case(out: list[Case], regime, N, n=1, heads="16/8", phases=("forward", "backward"), quick=(), **more) -> None:
    for phase in phases:
        shape = dict(N=N, n=n, heads=heads, D=128) | more
        out.append(Case("cross_attention", regime, phase, quick=phase in quick, **shape))


def _gpu_cases() -> list[Case]:
    out = []
    add = functools.partial(_case, out, dtype="bfloat16")
    both = ("forward", "backward")
    for heads in ("16/8", "32/8"):
        quick = both if heads == "16/8" else ()  # every shape of heads has binaries of its own, which take seconds to compile
        for N in (1024, 4096, 16384, 65536):
            phases = both if N >= 16384 else ("forward",)
            add("latent step", N, heads=heads, phases=phases, quick=() if N == 1024 else quick if N == 16384 else quick[:1])
        add("few queries", 16384, 16, heads=heads)
        for n in (1024, 4096, 16384):
            add("prompt", n, n, heads=heads, quick=quick if n == 4096 else ())
        add("prompt on a trace", 16384, 4096, heads=heads)
        add("prompt on 63 segments", 16384, 4096, heads=heads, quick=quick[:1])
        add("short prompts", 1024, 1024, batch=16, heads=heads, quick=quick)
        add("ragged latent step", 16384, batch=8, heads=heads, phases=("forward",))
    add("agents side by side", 4608, 512, batch=4)
    add("prompt", 4096, 4096, dtype="float16")
    add("prompt", 2048, 2048, dtype="float32")
    return out


def _cpu_cases() -> list[Case]:
    out = []
    add = functools.partial(_case, out)
    everything = ("forward", "backward", "full")
    for N in (1024, 2048, 4096, 8192, 32768):
        quick = {2048: ("forward",), 8192: everything}.get(N, ())
        add("latent step", N, phases=everything if N <= 8192 else ("forward", "backward"), quick=quick)
    for heads in ("8/8", "32/8"):
        add("latent step", 2048, heads=heads)
        add("latent step", 8192, heads=heads, quick=("forward",))
    for N in (2048, 8192):
        add("latent step", N, dtype="bfloat16", phases=("forward",), quick=("forward",) if N == 2048 else ())
    add("few queries", 8192, 16, quick=("forward",))
    add("few queries", 8192, 16, heads="32/8", phases=("forward",))
    for n in (64, 128, 512):
        add("prompt", n, n)
    add("prompt", 1024, 1024, quick=("forward", "backward"))
    add("prompt", 1024, 1024, heads="8/8")
    add("prompt", 1024, 1024, heads="32/8")
    add("prompt", 2048, 2048)
    add("prompt", 4096, 4096, phases=("forward",))
    add("prompt", 1024, 1024, dtype="bfloat16", phases=("forward",))
    add("prompt on a trace", 2048, 256, quick=("forward",))
    add("prompt on a trace", 4096, 512)
    add("prompt on a trace", 8192, 1024, phases=("forward",))
    add("agents side by side", 1024, 256, batch=4, quick=("forward",))
    add("agents side by side", 4608, 512, batch=4, phases=("forward",))
    add("ragged prompts", 1024, 256, batch=8, quick=("forward",))
    add("ragged prompts", 2048, 512, batch=8, phases=("forward",))
    add("ragged latent step", 4096, 1, batch=8, quick=("forward",))
    add("ragged latent step", 8192, 1, batch=8, phases=("forward",))
    return out


CPU_CASES, GPU_CASES = _cpu_cases(), _gpu_cases()
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def layout(case: Case) -> tuple[list[int], list[list[tuple[int, int]]]]:
    """Queries of each sequence, and the (first row, rows) of each sequence's segments."""
    N, n, B = case.N, case.n, case.batch
    if case.regime == "prompt on a trace":  # three agents' segments, not next to each other in the pool
        first = (N - n) // 2
        return [n], [[(N, first), (0, N - n - first), (2 * N, n)]]
    if case.regime == "prompt on 63 segments":  # in another order than they lie in the pool, with a row between them
        rows = [(N - n) // 63 + (i < (N - n) % 63) for i in range(63)]
        start = [sum(rows[:i]) + i for i in range(63)]
        return [n], [[(start[i * 37 % 63], rows[i * 37 % 63]) for i in range(63)] + [(sum(rows) + 63, n)]]
    if case.regime == "agents side by side":  # branches that share a prefix and do not see each other
        prefix = N - n
        return [n] * B, [[(0, prefix), (prefix + b * n, n)] for b in range(B)]
    if case.regime == "short prompts":  # a quarter of N to N tokens, and nothing before them
        lengths = [N // 4 + (N - N // 4) * b // (B - 1) for b in range(B)]
        return lengths, [[(sum(lengths[:b]), n)] for b, n in enumerate(lengths)]
    if case.regime.startswith("ragged"):
        lengths = [max(1, N * (b + 1) // B) for b in range(B)]
        queries = [max(1, min(n * (B - b) // B, lengths[b])) for b in range(B)]
        starts = [sum(lengths[:b]) for b in range(B)]
        return queries, [[(s, rows)] for s, rows in zip(starts, lengths)]
    return [n] * B, [[(0, N)]] * B


@dataclass
class Inputs:
    """q, do [n, Hq, D], packed; pools [R, Hkv, D], head-major; view: index tensors of the op; rows: of each sequence's view;
    shift, inv_freq: as the op takes them."""

    q: Tensor
    do: Tensor
    k: Tensor
    v: Tensor
    queries: list[int]
    view: tuple
    rows: list[Tensor]
    scale: float
    shift: Tensor | None = None
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

    def args(self) -> tuple:
        return (*self.view, self.shift, self.inv_freq, self.scale, True, False)


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
        o, lse = reference.cross_attention(y.q, y.k, y.v, *y.args())
        out = {"o": o, "lse": lse} if forward else {}
        if backward:
            wide = reference.accumulator(y.q.dtype)
            dk, dv = (torch.zeros(t.shape, dtype=wide, device=device) for t in (y.k, y.v))
            out["dq"] = reference.cross_attention_backward(y.do, None, y.q, o, lse, y.k, y.v, *y.args(), dk, dv)
            out |= {"dk": dk, "dv": dv}
        return out

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


# ---- diffmas ---------------------------------------------------------------------------------------------------------


def diffmas(p: Problem, run_op=run_op) -> Run:
    x: Inputs = p.inputs
    args = x.args()
    run = lambda op, *rest: run_op(op, x.q, *rest)  # as the package calls it, layer by layer
    o, lse = run("cross_attention", x.q, x.k, x.v, *args)
    # Pools stay from step to step in training: zero-filled once, added to by every backward.
    dk, dv = (torch.zeros_like(t, dtype=reference.accumulator(t.dtype)) for t in (x.k, x.v))

    def forward():
        return run("cross_attention", x.q, x.k, x.v, *args)

    def backward():
        return run("cross_attention_backward", x.do, None, x.q, o, lse, x.k, x.v, *args, dk, dv)

    def full():
        o, lse = forward()
        return o, lse, run("cross_attention_backward", x.do, None, x.q, o, lse, x.k, x.v, *args, dk, dv)

    if p.case.phase == "forward":
        return Run(forward, lambda r: {"o": r[0], "lse": r[1]})
    if p.case.phase == "backward":
        return Run(backward, lambda dq: {"dq": dq, "dk": dk, "dv": dv})
    return Run(full, lambda r: {"o": r[0], "lse": r[1], "dq": r[2], "dk": dk, "dv": dv})


TWINS = twins("cross_attention", diffmas)

# ---- peers -----------------------------------------------------------------------------------------------------------


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


def torch_peer(attend, leaves=lambda y: (y.q, y.k, y.v), take=lambda y, grads: grads, layout="padded"):
    """A provider from attend(y, *leaves) -> o [B, Hq, L, D]. Gradients of K/V are added into a buffer, as ours are.

    leaves(y): what autograd differentiates by; take(y, grads) -> dq, dk, dv in the layout of y, which is padded or packed.
    """

    def provider(p: Problem) -> Run:
        y = getattr(p.inputs, layout)
        inputs = [t.detach().requires_grad_(p.case.phase != "forward") for t in leaves(y)]
        if p.case.phase == "forward":
            return Run(torch.no_grad()(lambda: attend(y, *inputs)), lambda o: {"o": y.packed(o)})
        wide = [torch.zeros_like(t, dtype=reference.accumulator(t.dtype)) for t in inputs]
        kept = attend(y, *inputs)

        def call():
            o = attend(y, *inputs) if p.case.phase == "full" else kept
            grads = torch.autograd.grad(o, inputs, y.do, retain_graph=p.case.phase != "full")
            for buffer, grad in zip(wide[1:], grads[1:]):
                buffer.add_(grad)
            return o, grads[0]

        def outputs(result):
            o, dq = result
            dq, dk, dv = take(y, (dq, *wide[1:]))
            out = {"dq": y.packed(dq), "dk": y.pooled(dk), "dv": y.pooled(dv)}
            return out | ({"o": y.packed(o.detach())} if p.case.phase == "full" else {})

        return Run(call, outputs)

    return provider


def _sdpa(y: Padded, q, k, v):
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, y.mask, is_causal=y.causal, scale=y.x.scale, enable_gqa=grouped)


def on_backend(name: str):
    """SDPA on one backend of torch's for GPUs, which by itself does not always take the fastest: in the form that serves it,
    without a mask where it knows the diagonal, and with K/V expanded beforehand where it knows no groups."""

    def provider(p: Problem) -> Run:
        if not ours.on_gpu():
            raise Senseless
        y, train = p.inputs.padded, p.case.phase != "forward"
        L, N, G = y.q.shape[2], y.k.shape[2], y.q.shape[1] // y.k.shape[1]
        mask = None if y.lower_right and name != "cudnn" else y.mask
        for groups in dict.fromkeys((1, G)):
            if groups > 1 and y.k.numel() * groups > EXPANDED_GPU:
                continue
            leaves = [t.detach().requires_grad_(train) for t in (y.q, *(t.repeat_interleave(groups, 1) for t in (y.k, y.v)))]
            grouped = groups < G
            if getattr(torch_cuda, f"can_use_{name}_attention")(torch_cuda.SDPAParams(*leaves, mask, 0.0, y.causal, grouped)):
                break
        else:
            raise Cannot(f"torch's {name} attention does not serve it")
        bias = causal_lower_right(L, N) if mask is not y.mask else mask

        def attend(y: Padded, q, k, v):
            with sdpa_kernel([getattr(SDPBackend, f"{name.upper()}_ATTENTION")]):
                return F.scaled_dot_product_attention(q, k, v, bias, is_causal=y.causal, scale=y.x.scale, enable_gqa=grouped)

        def take(y: Padded, grads):
            dq, *kv = grads
            return dq, *(t.unflatten(1, (-1, groups)).sum(2) for t in kv)

        return torch_peer(attend, lambda y: leaves, take)(p)

    return provider


def varlen(p: Problem) -> Run:
    """torch's own attention of packed sequences, which came with torch 2.10; its options have changed since."""
    if not ours.on_gpu():
        raise Senseless
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Cannot("this torch has no varlen_attn") from None
    y: Packed = p.inputs.packed
    options = dict(window_size=(-1, 0), is_causal=True, enable_gqa=True, scale=p.inputs.scale)  # a window that is causal
    options = {name: x for name, x in options.items() if name in inspect.signature(varlen_attn).parameters}
    index = *y.indptr(), *map(max, y.lengths)
    return torch_peer(lambda y, *qkv: varlen_attn(*qkv, *index, **options), layout="packed")(p)


def _repeat(t: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return t
    if t.numel() * groups >= EXPANDED:
        raise Senseless("too much to expand")
    return t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _expanded(y: Padded, q, k, v):
    G = q.shape[1] // k.shape[1]
    if G == 1:
        raise Senseless("nothing to expand: as many K/V heads as query heads")
    return F.scaled_dot_product_attention(q, _repeat(k, G), _repeat(v, G), y.mask, is_causal=y.causal, scale=y.x.scale)


def _grouped(y: Padded, q, k, v):
    """One token's query heads of a group as that many queries of its K/V head: no expansion and no mask."""
    if q.shape[2] > 1 or q.shape[1] == k.shape[1]:
        raise Senseless("for one query and fewer K/V heads than query heads")
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    return F.scaled_dot_product_attention(rows, k, v, y.mask, scale=y.x.scale).flatten(1, 2)[:, :, None]


def _eager(y: Padded, q, k, v):
    G = q.shape[1] // k.shape[1]
    if q.shape[:3].numel() * k.shape[2] > EAGER_SCORES:
        raise Senseless("too many scores to store")
    if q.requires_grad and q.dtype != torch.float32:
        raise Senseless("scores in 16 bits, which give gradients that are too wrong for the gate")
    scores = q @ _repeat(k, G).transpose(2, 3) * y.x.scale
    if y.causal:
        scores = scores + torch.full(scores.shape[2:], -math.inf, dtype=q.dtype, device=q.device).triu(1)
    elif y.mask is not None:
        scores = scores + y.mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ _repeat(v, G)


def _cat_leaves(y: Padded):
    L = y.q.shape[2]
    return (y.q, *(t[:, :, part].contiguous() for t in (y.k, y.v) for part in (slice(None, -L), slice(-L, None))))


def _cat_sdpa(y: Padded, q, k_old, k_new, v_old, v_new):
    if k_old.shape[2] == 0:
        raise Senseless("nothing to concatenate to: the first prompt")
    return _sdpa(y, q, torch.cat((k_old, k_new), 2), torch.cat((v_old, v_new), 2))


def _cat_take(y: Padded, grads):
    dq, dk_old, dk_new, dv_old, dv_new = grads
    return dq, torch.cat((dk_old, dk_new), 2), torch.cat((dv_old, dv_new), 2)


def cat_into_buffer_sdpa(p: Problem) -> Run:
    """Into memory that is kept: a large result of torch.cat is fresh pages at every call, and each of them a fault."""
    if p.case.phase != "forward":
        raise Senseless("torch.cat(out=...) has no gradient")
    buffers = [torch.empty_like(t) for t in (p.inputs.padded.k, p.inputs.padded.v)]

    def attend(y: Padded, q, k_old, k_new, v_old, v_new):
        if k_old.shape[2] == 0:
            raise Senseless("nothing to concatenate to: the first prompt")
        k, v = (torch.cat(parts, 2, out=buffer) for parts, buffer in zip(((k_old, k_new), (v_old, v_new)), buffers))
        return _sdpa(y, q, k, v)

    return torch_peer(attend, _cat_leaves)(p)


def per_sequence(p: Problem) -> Run:
    """SDPA on one sequence after the other: no padding, no mask beyond the new tokens' own."""
    x: Inputs = p.inputs
    if len(x.queries) == 1:
        raise Senseless("one sequence only")
    if p.case.phase != "forward":
        raise Senseless("measured forward only")
    firsts = [sum(x.queries[:b]) for b in range(len(x.queries))]
    parts = []
    for first, n, rows in zip(firsts, x.queries, x.rows):
        alone = Inputs(x.q[first : first + n], x.do[first : first + n], x.k, x.v, [n], x.view, [rows], x.scale)
        parts.append(alone.padded)

    @torch.no_grad()
    def call():
        return [_sdpa(y, y.q, y.k, y.v) for y in parts]

    return Run(call, lambda os: {"o": torch.cat([o[0].transpose(0, 1) for o in os])})


def flex(p: Problem) -> Run:
    """FlexAttention, compiled, with a block mask; no backward on a CPU."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x: Inputs = p.inputs
    if x.q.device.type == "cpu" and p.case.phase != "forward":
        raise Cannot("FlexAttention has no backward on a CPU")
    if x.q.device.type == "cpu" and not (p.case.quick and p.case.heads == "16/8" and p.case.dtype == "float32"):
        raise Senseless("compiled for one or two shapes of each regime")
    y = x.padded
    L, N = y.q.shape[2], y.k.shape[2]
    lengths = torch.tensor([len(r) for r in x.rows], device=y.q.device)

    def visible(b, h, i, j):
        return ((j - (N - L)) <= i) & (j >= N - lengths[b])

    try:
        mask = create_block_mask(visible, len(x.queries), None, L, N, device=str(y.q.device))
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # or the fallback runs in silence
        torch._functorch.config.donated_buffer = False  # the graph of the forward is kept
        attend = torch.compile(flex_attention, dynamic=False)
        grouped = y.q.shape[1] != y.k.shape[1]
        peer = torch_peer(lambda y, *qkv: attend(*qkv, block_mask=mask, scale=x.scale, enable_gqa=grouped))
        peer(p).call()  # compiles, for leaves and in the mode that are timed; its buffers have a gradient in them
        return peer(p)
    except Exception as reason:  # the compiler's errors are of many kinds; any of them means: does not run here
        raise Cannot(f"FlexAttention does not run here: {type(reason).__name__}: {str(reason).splitlines()[0][:120]}") from None


def gpu_library(name: str, prepare):
    """A provider from prepare(module, y: Packed) -> a call that gives o [n, Hq, D] of an optional library; forward only. Never
    run: there was no GPU."""

    def provider(p: Problem) -> Run:
        if not ours.on_gpu() or p.case.phase != "forward":
            raise Senseless
        try:
            module = importlib.import_module(name)
        except ImportError:
            raise Cannot(f"{name} is not installed") from None
        return Run(torch.no_grad()(prepare(module, p.inputs.packed)), lambda o: {"o": o})

    return provider


def _flashinfer(flashinfer, y: Packed):
    q, k, v, scale = y.q, y.k, y.v, y.x.scale
    if len(y.x.queries) > 1:
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            torch.zeros(1 << 28, dtype=torch.uint8, device=q.device), "NHD"
        )
        heads = q.shape[1], k.shape[1], q.shape[2]
        wrapper.plan(*y.indptr(), *heads, causal=True, sm_scale=scale, q_data_type=q.dtype, kv_data_type=k.dtype)
        return lambda: wrapper.run(q, k, v)
    if len(q) == 1:
        products = q.shape[1] // k.shape[1] >= 4  # what its authors say of tensor cores
        return lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v, sm_scale=scale, use_tensor_cores=products)[None]
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, sm_scale=scale)


def _xformers(ops, y: Packed):
    Hkv = y.k.shape[1]
    q = y.q.unflatten(1, (Hkv, -1))[None]
    k, v = (t[None, :, :, None].expand(-1, -1, -1, q.shape[3], -1) for t in (y.k, y.v))
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(*y.lengths).make_causal_from_bottomright()
    return lambda: ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=y.x.scale)[0].flatten(1, 2)


PROVIDERS = {
    OURS: diffmas,
    **TWINS,
    "sdpa": torch_peer(_sdpa),
    "sdpa, grouped": torch_peer(_grouped),
    "sdpa, expanded": torch_peer(_expanded),
    "sdpa, one by one": per_sequence,
    "sdpa, flash": on_backend("flash"),
    "sdpa, cudnn": on_backend("cudnn"),
    "sdpa, efficient": on_backend("efficient"),
    "torch varlen": varlen,
    "cat + sdpa": torch_peer(_cat_sdpa, _cat_leaves, _cat_take),
    "cat into a buffer + sdpa": cat_into_buffer_sdpa,
    "eager": torch_peer(_eager),
    "flex": flex,
    "flashinfer": gpu_library("flashinfer", _flashinfer),
    "xformers": gpu_library("xformers.ops", _xformers),
}
SLOW = {"flex"}  # compiling takes most of a minute: not with --quick


def test_attention(bench, case):
    bench(case, problem, PROVIDERS)
