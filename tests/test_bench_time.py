"""What the benchmarks say of time."""

import contextlib
import dataclasses
import functools
import itertools
import types

import pytest
import torch
from contests import MACHINE, doubling, way

from diffmas.benchmarks import bench_low_rank, bench_quantized, machine, measure, report
from diffmas.benchmarks.measure import OURS, Contest, Trial
from diffmas.benchmarks.result import results


def test_up_to_64_tokens_are_timed_in_a_graph(monkeypatch):
    """Whoever cannot be captured is timed with its launches, and says so; a first call may have been a compiler's."""

    class Graph:
        CALLS = 20

        def __init__(self, call, device):
            if call is broken.call:
                raise RuntimeError("it waits\nfor the device")

        def sample(self):
            return next(noise)

    noise = itertools.repeat(1e-6)
    broken = Trial(lambda: torch.ones(1), lambda y: {"y": 2 * torch.linspace(-1, 1, 64)})
    monkeypatch.setattr(measure, "Graph", Graph)
    monkeypatch.setattr(measure, "sample", lambda call, repeats, device: 1e-5)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: (call(), 0))
    p = doubling()
    p.inputs, p.reference = torch.linspace(-1, 1, 64), lambda dtype: {"y": 2 * torch.linspace(-1, 1, 64).to(dtype)}
    for n, captured in ((64, True), (65, False)):
        p.case = dataclasses.replace(p.case, n=n)
        contest = Contest(p, {OURS: way(lambda x: 2 * x), "broken": lambda p: broken}, "cuda")
        contest._once[OURS] = 100.0
        contest.warm_up()
        assert contest._repeats == {OURS: 20 if captured else 10, "broken": 10}
        samples = {name: [contest.sample(name, 0)] for name in contest.trials}
        assert samples == {OURS: [1e-6 if captured else 1e-5], "broken": [1e-5]}
        whys = [r["why"] for r in contest.rows(samples, MACHINE)]
        assert whys == [None, "timed with its launches, as it is not captured: it waits" if captured else None]
    assert not dataclasses.replace(p, case=dataclasses.replace(p.case, n=1, model="8B", layers=1)).graph


def test_what_drowns_in_noise_has_no_number(monkeypatch):
    """Not for ours and not against ours; nor does a first sample that is noise make everybody else hopeless."""

    class Graph:
        CALLS = 20

        def __init__(self, call, device):
            self.sample = iter(call()).__next__

    monkeypatch.setattr(measure, "Graph", Graph)
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: (None, 0))
    first, noise, clear = [-1e-6] * 2, [3e-6, -2e-6, 1e-7, -3e-6, 4e-6], [5e-6, 6e-6, 5e-6, 4e-6, 5e-6]
    assert measure.drowned(noise) and measure.drowned([-1.0]) and not measure.drowned(clear) and not measure.drowned([1.0])
    ways = {OURS: first + clear, "noise": first + noise, "peer": first + clear}
    provider = lambda x: lambda p: Trial(lambda: x, lambda _: {"y": 2 * p.inputs})
    for own in ({}, {OURS: first + noise}):
        p = doubling()
        p.case = dataclasses.replace(p.case, n=1)
        contest = Contest(p, {name: provider(x) for name, x in (ways | own).items()}, "cuda")
        contest.warm_up()
        samples = {name: [contest.sample(name, turn) for turn in range(5)] for name in contest.trials}
        rows = {r["provider"]: r for r in contest.rows(samples, MACHINE)}
        assert rows["noise"]["why"] == measure.NOISE and "seconds" not in rows["noise"]
        assert rows["peer"]["seconds"] == 5e-6 and rows["peer"]["why"] is None
        assert rows["peer"]["ratio"] == (None if own else pytest.approx(1)) and ("seconds" in rows[OURS]) == (not own)
        assert report.line(list(rows.values()))


def test_a_graph_takes_the_emptying_of_the_cache_off(monkeypatch):
    """A device whose time is what is launched: 70 for emptying the cache, 3 for a call. A capture that fails is cleared up."""
    device, left = types.SimpleNamespace(now=0.0, mode="default", pool=0, capturing=False), []

    class CUDAGraph:
        def replay(self):
            device.now += self.time

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = device.now

        def elapsed_time(self, end):
            return end.at - self.at

    @contextlib.contextmanager
    def capture(graph, pool, stream, capture_error_mode):
        graph.time, device.capturing = device.now, True
        try:
            yield
        finally:
            graph.time, device.capturing = device.now - graph.time, False

    def launch(time):
        device.now += time

    def handle():
        device.pool += 1
        return 0, device.pool

    def waits():
        if device.mode == "error":
            raise RuntimeError("a synchronizing operation")

    def breaks():
        if device.capturing:
            raise RuntimeError("invalidated")

    monkeypatch.setattr(machine, "_flush", lambda _: types.SimpleNamespace(zero_=lambda: launch(70)))
    monkeypatch.setattr(machine, "_nothing", functools.cache(machine._nothing.__wrapped__))
    fakes = dict(
        CUDAGraph=CUDAGraph, Event=Event, graph=capture, synchronize=lambda: None, graph_pool_handle=handle,
        get_sync_debug_mode=lambda: device.mode, set_sync_debug_mode=lambda mode: setattr(device, "mode", mode),
        current_stream=lambda: None, current_device=lambda: 0, stream=contextlib.nullcontext,
    )  # fmt: skip
    for name, value in fakes.items():
        monkeypatch.setattr(torch.cuda, name, value)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda *given, name=name: left.append((name, *given)), raising=False)
    with pytest.raises(RuntimeError, match="a synchronizing operation"):
        machine.Graph(waits, "cuda")
    assert (device.mode, device.pool, left) == ("default", 0, [])  # nothing was captured
    with pytest.raises(RuntimeError, match="invalidated"):
        machine.Graph(breaks, "cuda")
    assert left == [("_cuda_endAllocateToPool", 0, (0, 1)), ("_cuda_releasePool", 0, (0, 1))] and device.pool == 2
    assert machine.Graph(lambda: launch(3), "cuda").sample() == pytest.approx(3e-3)
    assert machine.Graph(lambda: launch(-1), "cuda").sample() == pytest.approx(-1e-3)  # noise, and no time
    assert device.pool == 5  # emptying alone is captured once


def test_launches_of_a_gpu_take_turns(monkeypatch):
    """One launch of each, again and again; each round begins with another one; what is in a graph is sampled alone."""
    order, resets = [], []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(order)

        def elapsed_time(self, end):
            return 1e3 * (end.at - self.at)  # launches in between, as seconds

    monkeypatch.setattr(machine, "_flush", lambda device: types.SimpleNamespace(zero_=lambda: order.append("flush")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: order.append("wait"))
    monkeypatch.setattr(measure, "canary", lambda device: types.SimpleNamespace(sing=lambda: 1.0))

    def named(name):
        call = lambda: order.append(name) or 2 * torch.linspace(-1, 1, 100)
        return lambda p: Trial(call, lambda y: {"y": y}, reset=lambda: resets.append(name))

    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: (call(), 0))
    contest = Contest(doubling(), {name: named(name) for name in (OURS, "a", "b")}, "cuda")
    contest._repeats, contest._once = {OURS: 2, "a": 3, "b": 2}, dict.fromkeys((OURS, "a", "b"), 1.0)
    contest._graphs["b"] = types.SimpleNamespace(sample=lambda: order.append("b") or 7.0)
    for turn, first in ((0, OURS), (1, "a")):
        order.clear()
        resets.clear()
        assert contest.round(turn) == {OURS: 1.0, "a": 1.0, "b": 7.0}
        launches = [x for x in order if x != "flush"]
        second = "a" if first == OURS else OURS
        assert launches[:4] == [first, second, first, second] and sorted(resets) == ["a", "b", OURS]
        assert order.count("flush") == 5 and launches[-2:] == ["wait", "b"]


def test_a_canary_tells_of_a_disturbed_machine(monkeypatch):
    """Its time against the best that it ever took, in every row; a verdict that is not good says so."""
    times = iter([5.0, 2.0, 3.0, 3.0, 3.0, 2.0, 4.0, 1.0, 2.0])
    monkeypatch.setattr(machine, "sample", lambda call, repeats, device: call() or next(times))
    bird = machine.Canary("cpu")
    assert bird.best == 2.0 and [bird.sing() for _ in range(4)] == [1.0, 2.0, 1.0, 2.0]
    songs = iter([1.0, 1.5, 1.4])
    monkeypatch.setattr(measure, "canary", lambda device: types.SimpleNamespace(sing=lambda: next(songs)))
    contest = Contest(doubling(), {OURS: way(lambda x: 2 * x), "peer": way(lambda x: x + x)})
    contest.warm_up()
    rounds = [contest.round(turn) for turn in range(3)]
    assert [list(x) for x in rounds] == [[OURS, "peer"], ["peer", OURS], [OURS, "peer"]]
    rows = contest.rows({name: [x[name] for x in rounds] for name in rounds[0]}, MACHINE)
    assert all(r["canary"] == 1.4 for r in rows)
    judged = lambda **more: results([r | {"device": "cpu", "ratio": 0.5} | more for r in rows])[0].judgement
    assert judged()[1].endswith("0.50x; the machine was disturbed, its canary took 1.40x of its best time")
    assert judged(canary=1.1)[1].endswith("0.50x") and judged(ratio=1.0) == (True, "ok")


def test_hopeless_providers_sit_out():
    contest = Contest(doubling(), {OURS: way(lambda x: 2 * x), "slow": way(lambda x: 2 * x)})
    contest.warm_up()
    contest._once = {OURS: 1e-3, "slow": 1e-3 * (measure.HOPELESS + 1)}
    assert contest.sample("slow", measure.HOPELESS_ROUNDS - 1) is not None
    assert contest.sample("slow", measure.HOPELESS_ROUNDS) is None and contest.sample(OURS, 9) is not None


def test_quantised_rows_give_one_answer_either_way():
    """And what the row says of bytes is what the rows have."""
    for case in bench_quantized.CPU_CASES:
        p = bench_quantized.problem(dataclasses.replace(case, N=130))
        contest = Contest(p, bench_quantized.PROVIDERS)
        assert set(contest.trials) == set(bench_quantized.PROVIDERS), contest.notes
        size = sum(x.numel() * x.element_size() for x in p.inputs.rows)
        own = 2 * p.inputs.q.numel() * p.inputs.q.element_size() * (1 + (case.phase == "backward"))
        assert p.read == size + own and case.note.startswith(f"{size // (2 * 8 * 130)} bytes for ")


def test_low_rank_rows_give_one_answer_either_way():
    """And what the row says of bytes is what the codes have."""
    for case in bench_low_rank.CASES:
        p = bench_low_rank.problem(dataclasses.replace(case, N=1500, n=min(case.n, 5)))
        contest = Contest(p, bench_low_rank.PROVIDERS)
        assert set(contest.trials) == set(bench_low_rank.PROVIDERS), contest.notes
        size = sum(x.numel() * x.element_size() for x in (p.inputs.codes.z_k, p.inputs.codes.z_v) if x is not None)
        assert case.note.startswith(f"{size // 1500} bytes for {2 * 3 * 64 * 4}: ")
