"""The cases of cross_attention, for a CPU and for a GPU, and where the rows of each regime lie."""

import functools

import torch

from diffmas.benchmarks.measure import Case

__all__ = ["CASES", "CPU_CASES", "GPU_CASES", "layout"]


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
        add("small-q", 16384, 16, heads=heads)
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
    for N in (2048, 4096, 8192, 16384):
        add("latent step", N, dtype="bfloat16", phases=("forward",), quick=("forward",) if N == 2048 else ())
    add("small-q", 8192, 16, quick=("forward",))
    add("small-q", 8192, 16, heads="32/8", phases=("forward",))
    for n in (64, 128, 512):
        add("prompt", n, n)
    add("prompt", 1024, 1024, quick=("forward", "backward"))
    add("prompt", 1024, 1024, heads="8/8")
    add("prompt", 1024, 1024, heads="32/8")
    add("prompt", 2048, 2048)
    add("prompt", 4096, 4096, phases=("forward",))
    for D, heads in ((64, "8/8"), (128, "16/8")):
        add("prompt", 1024, 1024, D=D, heads=heads, dtype="bfloat16", quick=("forward",) if D == 128 else ())
        add("prompt on a trace", 4096, 512, D=D, heads=heads, dtype="bfloat16")
        add("small-q", 4096, 16, D=D, heads=heads, dtype="bfloat16", phases=("forward",))
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
