"""The machine under test: its own measured read, copy and matmul rates, and how time and memory are taken on it.

Nothing here is taken from a data sheet. Rates are measured at the start of every run, with the threads of that run, for a
working set that fits the last-level cache and for one that does not, so that a percentage of the roofline means the same
on a laptop, a shared virtual machine and a GPU. On a GPU every timed call begins with a cold L2 cache, so its rates are those
of memory. The GPU branches were written without a GPU at hand and never run.
"""

import contextlib
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from diffmas.models.capture import captured
from diffmas.ops import extension

__all__ = [
    "Canary", "Graph", "Machine", "canary", "clock", "cpu_name", "in_turns", "measure_machine", "name_of", "own_stream",
    "peak_bytes", "sample",
]  # fmt: skip

SMALL, LARGE, LARGE_GPU = 8 << 20, 256 << 20, 1 << 30  # bytes of the working sets


@dataclass(frozen=True)
class Machine:
    """Rates in bytes/s and flop/s; cache_bytes: the last-level cache."""

    device: str
    name: str
    threads: int
    cache_bytes: int
    read: float
    read_cached: float
    copy: float  # bytes read plus bytes written
    copy_cached: float
    matmul: float  # float32
    matmul_16bit: float  # bfloat16

    def seconds(self, flops: float, read: float, copied: float, dtype: str = "float32") -> float:
        """The roofline: no implementation of `flops`, `read` bytes read once and `copied` bytes moved is faster.

        bfloat16 arithmetic counts at the faster of the two matmul rates: a CPU without bfloat16 units computes in float32.
        """
        cached = read + copied <= self.cache_bytes / 2
        reads = read / (self.read_cached if cached else self.read)
        copies = copied / (self.copy_cached if cached else self.copy)
        rate = self.matmul if dtype == "float32" else max(self.matmul, self.matmul_16bit)
        return max(flops / rate, reads + copies)

    def describe(self) -> dict:
        return asdict(self)


# ---- time ------------------------------------------------------------------------------------------------------------


def clock(device: str) -> Callable[[], float]:
    """Seconds. On one CPU thread the process's own time: what other processes do is not ours."""
    if device == "cpu" and torch.get_num_threads() == 1:
        return time.process_time
    return time.perf_counter


def sample(call: Callable, repeats: int, device: str) -> float:
    """Seconds of one call, mean over `repeats` of them in a row; on a GPU by events, each call with a cold L2 cache."""
    if device != "cpu":
        return in_turns([call], [repeats], device)[0]
    now = clock(device)
    start = now()
    for _ in range(repeats):
        call()
    return (now() - start) / repeats


def in_turns(calls: list[Callable], repeats: list[int], device: str) -> list[float]:
    """Seconds of one call of each on a GPU, mean over its repeats. Launch by launch (A B C A B C ...), so that clocks that rise
    with the load or fall with the heat, and others' work on the GPU, are everybody's."""
    flush = _flush(device)
    pairs = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)] for n in repeats]
    for turn in range(max(repeats)):
        for call, events in zip(calls, pairs):
            if turn < len(events):
                begin, end = events[turn]
                flush.zero_()  # takes long enough for the host to be ahead with a call of a few launches
                begin.record()
                call()
                end.record()
    torch.cuda.synchronize()
    return [sum(begin.elapsed_time(end) for begin, end in events) / len(events) / 1e3 for events in pairs]


class Canary:
    """The same small work again and again: a product of matrices and a sum. It slows down where the machine does, by its clock
    or by what others run on it, and so tells of a disturbance that a ratio of two providers hides."""

    def __init__(self, device: str):
        size = 128 if device == "cpu" else 4096
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        self.device, self.matrix = device, torch.randn(size, size, device=device).to(dtype)
        self.rows = torch.randn((SMALL if device == "cpu" else LARGE) // 4, device=device)
        self.best = min(self._sing() for _ in range(5))

    def _work(self) -> None:
        self.matrix @ self.matrix
        self.rows.sum()

    def _sing(self) -> float:
        self._work()  # what others left in the caches is no disturbance
        return sample(self._work, 1 if self.device != "cpu" else 3, self.device)

    def sing(self) -> float:
        """Its time now / the best that it ever took."""
        seconds = self._sing()
        self.best = min(self.best, seconds)
        return seconds / self.best


@functools.cache
def canary(device: str) -> Canary:
    """The one of this process: disturbed is a case that is slower than all others."""
    return Canary(device)


class Graph:
    """Some calls in one CUDA graph, each with a cold L2 cache, and the same graph without the calls: the difference is what a
    call takes when no host launches it. Raises what torch says where the call cannot be captured; others still can be."""

    CALLS, REPLAYS = 20, 5

    def __init__(self, call: Callable, device: str):
        call()  # whatever is compiled or allocated once, now
        _watched(call)
        self._graphs = _captured(call, device), _nothing(device)

    def sample(self) -> float:
        """Seconds of one call; where that is next to nothing, noise may make it negative."""
        spans = [[[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in self._graphs] for _ in range(self.REPLAYS)]
        for pairs in spans:
            for graph, (begin, end) in zip(self._graphs, pairs):
                begin.record()
                graph.replay()
                end.record()
        torch.cuda.synchronize()
        full, nothing = (statistics.median(begin.elapsed_time(end) for begin, end in side) for side in zip(*spans))
        return (full - nothing) / 1e3 / self.CALLS


@functools.cache
def _flush(device: str) -> torch.Tensor:
    """What empties the cache when it is written."""
    return torch.empty(LARGE, dtype=torch.int8, device=device)


def _watched(call: Callable) -> None:
    """Raises where the call waits for the device: better before a capture than in it."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode(mode)


def _captured(work: Callable, device: str) -> torch.cuda.CUDAGraph:
    flush = _flush(device)

    def calls():
        for _ in range(Graph.CALLS):
            flush.zero_()
            work()

    torch.cuda.synchronize()
    return captured(calls, torch.cuda.current_stream(), flush)  # a backward launches on its forward's stream, the current one


@functools.cache
def _nothing(device: str) -> torch.cuda.CUDAGraph:
    """The graph that only empties the cache."""
    return _captured(lambda: None, device)


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def own_stream(device: str):
    """Where all work of a contest belongs on a GPU: autograd runs a backward on its forward's stream, and the default one
    cannot be captured."""
    return contextlib.nullcontext() if device == "cpu" else torch.cuda.stream(_stream())


# ---- memory ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet():
    """Without what the profiler's C++ side writes to stderr."""
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def peak_bytes(call: Callable, device: str) -> tuple[object, int]:
    """One call's result, and the most bytes that torch's allocator held at once during it, beyond what it held before.

    Exact on the CPU too: the profiler reports every allocation and release. Not seen: what a kernel takes from malloc itself
    (here a thread's scratch, under 2 MB; partial results are torch's). Pages never touched count, unlike in a resident set.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        return result, torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with _quiet(), torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        result = call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return result, peak


# ---- rates -----------------------------------------------------------------------------------------------------------


def _best(call: Callable, device: str, seconds: float = 0.1) -> float:
    """The fastest of several samples: a rate is what the machine can do, not what it did while disturbed."""
    call()
    once = max(sample(call, 1, device), 1e-6)
    repeats = max(1, math.ceil(2e-3 / once)) if device == "cpu" else 3
    return min(sample(call, repeats, device) for _ in range(max(5, int(seconds / (repeats * once)))))


def name_of(device: str) -> str:
    return cpu_name() if device == "cpu" else torch.cuda.get_device_name(0)


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {k.strip(): v.strip() for k, v in fields.items()}
    flags = set(fields.get("flags", fields.get("Features", "")).split())
    simd = next((name for name in ("avx512f", "avx2", "asimd") if name in flags), "no SIMD")
    form = f", kernels for {extension.cpu_form()}" if extension.loaded else ""
    return f"{fields.get('model name', platform.machine())}, {os.cpu_count()} cores, {simd}{form}"


def _cache_bytes(device: str) -> int:
    if device != "cpu":
        return torch.cuda.get_device_properties(0).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 1 << 10, "M": 1 << 20}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=2 * SMALL)


def measure_machine(device: str = "cpu") -> Machine:
    """Takes about two seconds."""
    rates = {}
    for suffix, size in (("_cached", SMALL), ("", LARGE)) if device == "cpu" else (("", LARGE_GPU),):
        some = torch.randn(1 << 20, device=device)  # of ones a GPU is faster: they take less power
        x, y = (some.repeat(size // 4 // (1 + i) // len(some)) for i in range(2))
        half = x[: y.numel()]
        # Neither sum nor dot is written to be a bandwidth test; the faster one is nearer to what memory gives.
        rates["read" + suffix] = size / min(_best(x.sum, device), _best(lambda x=x: torch.dot(x, x), device))
        rates["copy" + suffix] = size / _best(lambda y=y, half=half: y.copy_(half), device)
    for name, dtype in (("matmul", torch.float32), ("matmul_16bit", torch.bfloat16)):
        size = (768 if dtype == torch.float32 else 256) if device == "cpu" else 8192
        a = torch.randn(size, size, device=device).to(dtype)
        rates[name] = 2 * size**3 / _best(lambda a=a: a @ a, device)
    if device != "cpu":
        rates |= {f"{rate}_cached": rates[rate] for rate in ("read", "copy")}
    return Machine(device, name_of(device), torch.get_num_threads(), _cache_bytes(device), **rates)
