"""The benchmark suite itself, never its speed: the gate, the measures, the rows, the page, the command."""

import contextlib
import csv
import dataclasses
import functools
import importlib
import io
import itertools
import re
import shutil
import subprocess
import sys
import types

import pytest
import rich.console
import torch
from typer.testing import CliRunner

from diffmas import ops
from diffmas.benchmarks import (
    bench_attention,
    bench_generation,
    bench_training,
    compare,
    machine,
    measure,
    ours,
    plots,
    readme,
    report,
    run,
    store,
)
from diffmas.benchmarks.attention import libraries, sdpa
from diffmas.benchmarks.goals import GOALS, SDPA, Goal
from diffmas.benchmarks.machine import Machine, peak_bytes
from diffmas.benchmarks.measure import OURS, Cannot, Case, Contest, Problem, Senseless, Trial
from diffmas.benchmarks.result import results
from diffmas.cli import app
from diffmas.ops import backends, reference

MACHINE = Machine(
    "cpu", "a machine", 1, 32 << 20, read=10e9, read_cached=40e9, copy=8e9, copy_cached=32e9, matmul=50e9, matmul_16bit=1e9
)


def doubling() -> Problem:
    x = torch.linspace(-1, 1, 100)
    return Problem(Case("double", "any", n=100), x, lambda dtype: {"y": 2 * x.to(dtype)}, copied=800.0)


def way(function):
    return lambda p: Trial(lambda: function(p.inputs), lambda y: {"y": y})


# ---- the gate --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [lambda x: 2.0001 * x, lambda x: 2 * x.flip(0), lambda x: 2 * x[:-1], lambda x: torch.where(x > 0.9, torch.nan, 2 * x)],
    ids=["inexact", "permuted", "short", "nan"],
)
def test_a_wrong_provider_gets_no_number(wrong):
    contest = Contest(doubling(), {OURS: way(lambda x: x + x), "wrong": way(wrong)})
    contest.warm_up()
    rows = {r["provider"]: r for r in contest.rows({OURS: [contest.sample(OURS, 0)]}, MACHINE)}
    assert rows[OURS]["seconds"] > 0 and rows[OURS]["error"] == 0
    assert "wrong result" in rows["wrong"]["why"] and "seconds" not in rows["wrong"]


def test_a_provider_that_cannot_says_why_and_a_senseless_one_is_left_out():
    def cannot(p):
        raise Cannot("needs a GPU")

    def senseless(p):
        raise Senseless

    contest = Contest(doubling(), {OURS: way(lambda x: 2 * x), "gpu": cannot, "other": senseless})
    assert contest.notes == {"gpu": "needs a GPU"} and set(contest.trials) == {OURS}


def test_only_a_peer_may_leave_an_output_out_and_only_one_that_the_problem_names():
    twice = lambda dtype: {"y": 2 * x.to(dtype), "sum": x.to(dtype).sum(0, keepdim=True)}
    x = torch.linspace(1, 2, 100)
    p = Problem(Case("double", "any", n=100), x, twice, peers_lack=("sum",))
    some = lambda *names: lambda p: Trial(lambda: twice(torch.float32), lambda out: {name: out[name] for name in names})
    contest = Contest(p, {OURS: some("y"), "y": some("y"), "sum": some("sum"), "both": some("y", "sum")})
    assert set(contest.trials) == {"y", "both"} and all("wrong result" in contest.notes[name] for name in (OURS, "sum"))


def spoiled(provider, name: str, at, by: float = 1.01):
    def wrong(p):
        right = provider(p)

        def read(result):
            out = {name: x.clone() for name, x in right.read(result).items()}
            out[name][at] *= by
            return out

        return Trial(right.call, read)

    return wrong


@pytest.mark.parametrize(
    "phase, name, at",
    [("forward", "o", 17), ("forward", "lse", (17, 2)), ("full", "dk", (slice(None), 1)), ("backward", "dq", (0, 4))],
)
def test_the_gate_of_attention_sees_one_wrong_row_or_head(phase, name, at):
    case = next(c for c in bench_attention.CASES if c.N == 1024 and c.batch == 4)
    small = dataclasses.replace(case, N=96, n=32, heads="6/3", D=64, phase=phase)
    providers = {OURS: bench_attention.diffmas, "spoiled": spoiled(bench_attention.diffmas, name, at)}
    contest = Contest(bench_attention.problem(small), providers)
    assert set(contest.trials) == {OURS} and "wrong result" in contest.notes["spoiled"]


def test_the_gate_of_training_sees_one_small_wrong_gradient():
    case = dataclasses.replace(bench_training.CASES[0], N=40, T=2, layers=1)
    p = bench_training.problem(case)
    grads = {name: x.abs().max() for name, x in p.reference(torch.float64).items() if name != "loss"}
    smallest = min(grads, key=grads.get)
    assert grads[smallest] < max(grads.values()) / 5  # in a single vector of all of them nobody would see it
    ways = bench_training.PROVIDERS
    contest = Contest(p, ways | {"spoiled": spoiled(ways[OURS], smallest, ..., by=1.0005)})
    assert set(contest.trials) == set(ways) and "wrong result" in contest.notes["spoiled"]


def test_all_ways_of_a_generation_give_the_same_tokens():
    case = dataclasses.replace(bench_generation.CASES[0], N=60, T=2, layers=1, batch=3)
    contest = Contest(bench_generation.problem(case), bench_generation.PROVIDERS)
    assert set(contest.trials) == set(bench_generation.PROVIDERS), contest.notes


def test_peers_of_attention_agree_on_every_regime():
    seen = set()
    for case in bench_attention.CASES:
        shape = dataclasses.replace(case, N=min(case.N, 64), n=1 if case.n == 1 else 16 if case.n < case.N else 64, D=32)
        if (case.regime, case.phase, case.dtype) in seen or case.heads != "16/8":
            continue
        seen.add((case.regime, case.phase, case.dtype))
        providers = {k: v for k, v in bench_attention.PROVIDERS.items() if k not in bench_attention.SLOW}
        contest = Contest(bench_attention.problem(shape), providers)
        assert not contest.notes and "sdpa" in contest.trials and "eager" in contest.trials, (case.key, contest.notes)


@pytest.mark.parametrize("name", ["inject", "merge", "reposition", "deferred", "latent_step", "host"])
def test_the_smallest_case_of_every_phase_runs_right(name):
    module = importlib.import_module(f"diffmas.benchmarks.bench_{name}")
    for phase in {case.phase for case in module.CASES}:
        case = min((c for c in module.CASES if c.phase == phase), key=lambda c: c.n)
        contest = Contest(module.problem(case), module.PROVIDERS)
        assert OURS in contest.trials and len(contest.trials) > 1, contest.notes
        contest.warm_up()


def test_only_a_part_of_ours_left_out_may_have_an_answer_of_its_own():
    """It is compared with that answer, and with nothing else."""
    half = lambda factor: (
        lambda p: Trial(lambda: factor * p.inputs, lambda y: {"y": y}, answer=lambda dtype: {"y": p.inputs.to(dtype) / 2})
    )
    ways = {OURS: way(lambda x: 2 * x), f"{OURS}, half": half(0.5), f"{OURS}, wrong": half(0.6), "peer": half(0.5)}
    contest = Contest(doubling(), ways)
    assert set(contest.trials) == {OURS, f"{OURS}, half"} and "wrong result" in contest.notes[f"{OURS}, wrong"]
    assert "only a part of ours" in contest.notes["peer"]


def test_without_attention_the_result_is_another():
    """So the gate of host time sees an attention that is left out."""
    module = MODULES["bench_host"]
    for case in module.CASES:
        p = module.problem(case)
        alone = module.PROVIDERS[f"{OURS}, layers alone"](p)
        if alone.reset:
            alone.reset()
        assert measure.error(alone.read(alone.call()), p.reference(torch.float64)) > 0.1


# ---- measures --------------------------------------------------------------------------------------------------------


def test_peak_memory_is_what_was_held_at_once():
    def call():
        a = torch.empty(1000, 1000)  # 4 MB
        b = torch.empty(500, 1000)  # with it 6 MB
        del a
        return b, torch.empty(250, 1000)

    result, peak = peak_bytes(call, "cpu")
    assert peak == 6_000_000 and result[0].shape == (500, 1000)
    assert peak_bytes(lambda: None, "cpu") == (None, 0)


def test_roofline_of_a_case_computed_by_hand():
    case = Case("cross_attention", "latent step", "backward", N=256, n=1, heads="4/2", D=64)
    p = bench_attention.problem(case)
    assert p.flops == 10 * 4 * 64 * 256
    assert p.read == 2 * 2 * 64 * 256 * 4 + 4 * 4 * 64 * 4  # K and V; q, o, do, dq
    assert p.copied == 16 * 2 * 64 * 256  # float32 gradients of K and V, read and written
    cached = p.read / 40e9 + p.copied / 32e9
    assert MACHINE.seconds(p.flops, p.read, p.copied) == pytest.approx(max(cached, p.flops / 50e9))
    assert MACHINE.seconds(0, 1e9, 1e9) == pytest.approx(1 / 10 + 1 / 8)  # beyond the cache
    assert MACHINE.seconds(1e9, 0, 0, "bfloat16") == pytest.approx(1 / 50)


def test_a_ratio_pairs_samples_of_one_round():
    contest = Contest(doubling(), {OURS: way(lambda x: 2 * x), "peer": way(lambda x: x + x)})
    rows = contest.rows({OURS: [1.0, 10.0, 2.0], "peer": [2.0, 20.0, 4.0]}, MACHINE)
    peer = rows[1]
    assert (peer["seconds"], peer["ratio"], peer["rounds"]) == (4.0, 2.0, 3)
    assert peer["spread"] == pytest.approx(0.5)
    assert rows[0]["roofline_percent"] == pytest.approx(100 * 800 / 32e9 / 2.0)


def test_times_are_of_one_unit(monkeypatch):
    monkeypatch.setattr(measure, "sample", lambda call, repeats, device: 6.0)
    p = dataclasses.replace(doubling(), units=4)
    parts = lambda p: Trial(lambda: 2 * p.inputs, lambda y: {"y": y}, seconds={"part": [2.0]})
    contest = Contest(p, {OURS: parts})
    contest._repeats = {OURS: 1}
    whole, part = contest.rows({OURS: [contest.sample(OURS, 0)]}, MACHINE)
    assert whole["seconds"] == 1.5 and part["seconds"] == 0.5 and part["phase"] == "part"
    assert whole["roofline_percent"] == pytest.approx(100 * 800 / 32e9 / 6)


def test_fit_finds_the_power():
    assert plots.fit([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx((3, 2))


# ---- rows, report, README --------------------------------------------------------------------------------------------


def row(provider, seconds, **more) -> dict:
    filled = Case("cross_attention", "latent step", N=2048, n=1, heads="16/8", D=128).columns() | {"provider": provider}
    if seconds:
        filled |= dict(seconds=seconds, ratio=seconds / 0.001, spread=0.01, rounds=5, peak_bytes=1000, error=1e-7, budget=1e-6)
    return filled | more


def stored(path, rows):
    file = store.Store(path / store.FILE, store.stamp(MACHINE))
    for r in rows:
        file.add([r])
    file.finish()
    return path


def training(N, scale):
    step = dict(op="training_step", regime="agents", phase="step", N=N, T=16, agents=3, model="small", layers=4)
    parts = [row(who, s, **(step | {"phase": "backward"})) for who, s in ((OURS, 0.001), ("DynamicCache", 0.002 * scale))]
    return [row(OURS, 0.001 * scale, **step), row("DynamicCache", 0.003 * scale, **step), *parts]


ROWS = [
    row(OURS, 0.001), row("sdpa", 0.004), row("cat + sdpa", 0.008, peak_bytes=9000),
    row("flex", None, why="no <compiler> here"), *training(512, 1), *training(8192, 4),
]  # fmt: skip


def test_rows_survive_the_csv_and_are_written_as_they_come(tmp_path):
    file = store.Store(tmp_path / "deep" / store.FILE, store.stamp(MACHINE))
    for n, r in enumerate(ROWS, start=1):
        file.add([r])
        assert len(store.read(file.part)) == n and not file.path.exists()  # earlier results stay until the run is over
    file.finish()
    assert not file.part.exists()
    for got, want in zip(store.read(file.path), ROWS):
        for name, value in want.items():
            assert got[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name
        assert got["machine"] == "a machine" and got["read"] == 10e9 and got["torch"] == torch.__version__
    assert store.read(file.path)[3]["seconds"] is None


def test_a_part_of_the_suite_replaces_its_own_rows(tmp_path):
    stored(tmp_path, ROWS)
    file = store.Store(tmp_path / store.FILE, store.stamp(MACHINE), keep=True)
    again = [row(OURS, 0.0005), row("sdpa", 0.005)]
    file.add(again)
    file.finish()
    rows = store.read(tmp_path / store.FILE)
    assert [r["seconds"] for r in rows] == [r["seconds"] for r in (*ROWS[4:], *again)]
    store.Store(tmp_path / store.FILE, store.stamp(MACHINE), keep=True).finish()  # a run without a row changes nothing
    assert store.read(tmp_path / store.FILE) == rows


def test_a_peer_that_fails_costs_no_other_row():
    def broken(problem):
        raise RuntimeError("out of luck")

    case = next(c for c in bench_attention.CASES if c.regime == "prompt" and c.n == 64 and c.phase == "forward")
    contest = Contest(bench_attention.problem(case), {OURS: bench_attention.PROVIDERS[OURS], "broken": broken})
    assert list(contest.trials) == [OURS] and contest.notes == {"broken": "failed: RuntimeError: out of luck"}


def test_another_csv_is_refused(tmp_path):
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="columns of `diffmas bench`"):
        store.read(tmp_path / "other.csv")


def test_results_name_the_best_peer_and_the_plain_way():
    first = results([r | {"device": "cpu"} for r in ROWS])[-1]  # whole systems come first
    assert first.best == ("sdpa", pytest.approx(4)) and first.plain == ("cat + sdpa", pytest.approx(8))
    assert first.memory == 9 and first.judgement[0] is True
    slow = results([row(OURS, 0.001, device="cpu"), row("sdpa", 0.0009, device="cpu")])[0]
    assert slow.judgement == (False, "below 0.95x of sdpa: 0.90x")
    assert report.shortfalls([row(OURS, 0.001, device="cpu"), row("sdpa", 0.0015, device="cpu")])[0].startswith("·")


def test_a_goal_asks_for_time_and_memory():
    goal = Goal("cross_attention", "latent step", "forward", "cat + sdpa", times=3, memory=10)
    result = results([r | {"device": "cpu"} for r in ROWS])[-1]
    assert goal.fits(result) and not goal.met(result)
    assert goal.measured(result) == "8.00x as fast and 9.00x smaller"
    assert dataclasses.replace(goal, memory=9).met(result) and not dataclasses.replace(goal, memory=9, times=9).met(result)


def test_a_goal_asks_for_a_part_of_the_roofline():
    goal = Goal("cross_attention", "latent step", "forward", roofline=85)
    result = lambda percent: results([row(OURS, 0.001, device="cpu", roofline_percent=percent)])[0]
    assert goal.met(result(85)) and not goal.met(result(84)) and goal.measured(result(84)) == "84 %"
    assert goal.fits(result(84)) and not goal.fits(result(None))


def test_a_goal_asks_for_microseconds_a_peak_or_the_best_of_torch():
    step = dict(device="cuda", dtype="bfloat16", N=16384)
    goal = Goal("cross_attention", "latent step", "forward", device="cuda", dtype="bfloat16", micros=7.5)
    result = lambda *rows: results([r | step for r in rows])[0]
    assert goal.met(result(row(OURS, 7.4e-6))) and not goal.met(result(row(OURS, 7.6e-6)))
    assert goal.measured(result(row(OURS, 7.4e-6))) == "7.4 µs" and not goal.fits(result(row(OURS, None)))
    peak = dataclasses.replace(goal, micros=0, peak=1.05)
    least = 2 * 16 * 128 + 4 * 16  # o and lse
    held = 4 * 8 * 128 * 16384 + 2 * 16 * 128 + least  # with pools and q
    over = lambda part: result(row(OURS, 1e-5, peak_bytes=int(least + part * held)))
    assert peak.met(over(0.049)) and not peak.met(over(0.051)) and peak.measured(over(0.049)) == "1.05x"
    best = dataclasses.replace(goal, micros=0, peer=SDPA, times=1.0)
    slow, fast = row("sdpa", 0.003), row("sdpa, cudnn", 0.0009)
    assert best.met(result(row(OURS, 0.001), slow)) and not best.met(result(row(OURS, 0.001), slow, fast))
    assert best.measured(result(row(OURS, 0.001), slow, fast)) == "0.90x as fast" and not best.fits(result(row(OURS, 0.001)))


MODULES = {path.stem: importlib.import_module(f"diffmas.benchmarks.{path.stem}") for path in run.modules()}


def test_every_goal_has_its_case():
    for goal in GOALS:
        cases_of = lambda m: getattr(m, "CPU_CASES" if goal.device == "cpu" else "GPU_CASES", m.CASES)  # noqa: B023
        cases = [(m, c) for m in MODULES.values() for c in cases_of(m)]
        peer = "sdpa" if goal.peer == SDPA else goal.peer
        rows = [
            [row(who, 0.001, device=goal.device, roofline_percent=90, **c.columns()) for who in (OURS, peer)]
            for m, c in cases
            if not peer or peer in m.PROVIDERS
        ]
        assert any(goal.fits(result) for group in rows for result in results(group)), goal


GPU_ONLY = {"flex", "flashinfer", "compiled + static"}
WITH_GPU_CASES = [name for name, m in MODULES.items() if hasattr(m, "GPU_CASES")]


@pytest.mark.parametrize("name", WITH_GPU_CASES)
def test_cases_for_a_gpu_run_right(name):
    """Small and on the CPU: everybody's result is right, and a goal's peer takes part."""
    module, seen = MODULES[name], set()
    providers = {k: v for k, v in module.PROVIDERS.items() if k not in getattr(module, "SLOW", ())}
    for case in module.GPU_CASES:
        small = dict(N=96, n=32 if case.n < case.N else 96, batch=min(case.batch, 4), D=32, T=min(case.T, 32))
        small |= dict(n=1) if case.n == 1 else dict(N=min(case.N, 96)) if name == "bench_inject" else {}
        small |= dict(model="small", heads="4/2", D=64, layers=1) if case.model else {}
        if (case.regime, case.phase) in seen:
            continue
        seen.add((case.regime, case.phase))
        contest = Contest(module.problem(dataclasses.replace(case, **small)), providers)
        assert OURS in contest.trials and not contest.notes, (case.key, contest.notes)
        wanted = {g.peer for g in GOALS if (g.op, g.regime, g.phase, g.device) == (case.op, case.regime, case.phase, "cuda")}
        assert wanted - GPU_ONLY - {"", SDPA} <= set(contest.trials), case.key
        assert SDPA not in wanted or "sdpa" in contest.trials, case.key


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_compiled_peers_of_inject(phase, monkeypatch):
    """They run right beside each other, and what is compiled in the gate is not compiled again when it is timed."""
    monkeypatch.setattr(ours, "on_gpu", lambda: True)
    module = MODULES["bench_inject"]
    case = next(c for c in module.GPU_CASES if (c.n, c.phase) == (64, phase))
    small = dataclasses.replace(case, N=32, n=16, heads="4/2", D=32, dtype="float32")
    compiled = {name: module.PROVIDERS[name] for name in ("compiled", "compiled + static")}
    contest = Contest(module.problem(small), {OURS: module.diffmas} | compiled)
    assert not contest.notes
    assert set(contest.trials) == {OURS, "compiled", *(["compiled + static"] if phase == "forward" else [])}
    try:
        with torch.compiler.set_stance("fail_on_recompile"):
            for trial in contest.trials.values():
                trial.call()
    finally:
        torch._dynamo.reset()


# ---- what a GPU has more ---------------------------------------------------------------------------------------------


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    monkeypatch.setattr(ours, "on_gpu", lambda: True)


def contest_of(regime: str, phase: str, **providers) -> Contest:
    case = next(c for c in bench_attention.GPU_CASES if (c.regime, c.phase, c.heads) == (regime, phase, "16/8"))
    shape = dict(N=96, n=1 if case.n == 1 else 96 if case.n == case.N else 16, batch=min(case.batch, 3), D=16)
    p = bench_attention.problem(dataclasses.replace(case, dtype="float32", heads="4/2", **shape))
    return Contest(p, {OURS: bench_attention.diffmas} | providers)


REGIMES = ["latent step", "prompt", "prompt on 63 segments", "short prompts"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("grouped", [True, False])
def test_sdpa_on_a_backend(grouped, regime, phase, as_on_a_gpu, monkeypatch):
    """On the CPU's flash attention: with groups and without, every form of mask."""
    asked = []
    can = lambda params: asked.append(params) or (grouped or not params.enable_gqa)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", can)
    contest = contest_of(regime, phase, flash=sdpa.on_backend("flash"))
    assert "flash" in contest.trials, contest.notes
    assert [p.enable_gqa for p in asked] == ([True] if grouped else [True, False])
    assert (asked[0].attn_mask is None) == (regime != "short prompts")
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda params: False)
    contest = contest_of(regime, phase, flash=sdpa.on_backend("flash"))
    assert contest.notes == {"flash": "torch's flash attention does not serve it"}


def packed_attention(q, k, v, q_indptr, k_indptr, scale):
    """What libraries for packed sequences compute, in plain torch; causal from the bottom right."""
    outs = []
    for b in range(len(q_indptr) - 1):
        i, j = slice(*q_indptr[b : b + 2].tolist()), slice(*k_indptr[b : b + 2].tolist())
        L, N = i.stop - i.start, j.stop - j.start
        mask = torch.ones(L, N, dtype=torch.bool).tril(N - L)
        parts = (t.transpose(0, 1)[None] for t in (q[i], k[j], v[j]))
        o = torch.nn.functional.scaled_dot_product_attention(*parts, mask, scale=scale, enable_gqa=True)
        outs.append(o[0].transpose(0, 1))
    return torch.cat(outs)


@pytest.mark.parametrize("phase", ["forward", "backward"])
@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("new", [True, False])
def test_torch_varlen(new, regime, phase, as_on_a_gpu, monkeypatch):
    def old_attn(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False):
        assert is_causal and (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max())) and cu_q.dtype == torch.int32
        return packed_attention(q, k, v, cu_q, cu_k, q.shape[2] ** -0.5)

    def new_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert enable_gqa and window_size == (-1, 0) and scale == q.shape[2] ** -0.5
        return old_attn(q, k, v, cu_q, cu_k, max_q, max_k, True)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_attn if new else old_attn)
    contest = contest_of(regime, phase, varlen=libraries.varlen)
    assert "varlen" in contest.trials, contest.notes


class Ragged:
    """flashinfer.BatchPrefillWithRaggedKVCacheWrapper."""

    def __init__(self, workspace, layout):
        assert workspace.dtype == torch.uint8 and layout == "NHD"

    def plan(self, qo_indptr, kv_indptr, qo_heads, kv_heads, head_dim, *, causal, sm_scale, q_data_type, kv_data_type):
        assert causal and (qo_heads, kv_heads, head_dim) == (4, 2, 16) and q_data_type == kv_data_type == torch.float32
        self.given = qo_indptr, kv_indptr, sm_scale

    def run(self, q, k, v):
        return packed_attention(q, k, v, *self.given)


def single_prefill(q, k, v, *, causal, sm_scale):
    assert causal
    return packed_attention(q, k, v, torch.tensor([0, len(q)]), torch.tensor([0, len(k)]), sm_scale)


FLASHINFER = types.SimpleNamespace(
    BatchPrefillWithRaggedKVCacheWrapper=Ragged, single_prefill_with_kv_cache=single_prefill,
    single_decode_with_kv_cache=lambda q, k, v, *, sm_scale, use_tensor_cores: single_prefill(
        q[None], k, v, causal=True, sm_scale=sm_scale
    )[0],
)  # fmt: skip


class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqlen):
        mask = cls()
        mask.indptr = [torch.tensor([0, *n]).cumsum(0) for n in (q_seqlen, kv_seqlen)]
        return mask

    def make_causal_from_bottomright(self):
        return self


def memory_efficient_attention(q, k, v, attn_bias, scale):
    q, k, v = (t[0].flatten(1, 2) for t in (q, k, v))
    return packed_attention(q, k, v, *attn_bias.indptr, scale).unflatten(1, (2, -1))[None]


XFORMERS = types.SimpleNamespace(
    fmha=types.SimpleNamespace(attn_bias=types.SimpleNamespace(BlockDiagonalMask=BlockDiagonalMask)),
    memory_efficient_attention=memory_efficient_attention,
)


@pytest.mark.parametrize("regime", REGIMES)
def test_optional_libraries(regime, as_on_a_gpu, monkeypatch):
    """In their place, what they are documented to compute."""
    peers = {name: bench_attention.PROVIDERS[name] for name in ("flashinfer", "xformers")}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "flashinfer", None)
        patch.setitem(sys.modules, "xformers.ops", None)
        missing = {"flashinfer": "flashinfer is not installed", "xformers": "xformers.ops is not installed"}
        assert contest_of(regime, "forward", **peers).notes == missing
    monkeypatch.setitem(sys.modules, "flashinfer", FLASHINFER)
    monkeypatch.setitem(sys.modules, "xformers", types.SimpleNamespace(ops=XFORMERS))
    monkeypatch.setitem(sys.modules, "xformers.ops", XFORMERS)
    contest = contest_of(regime, "forward", **peers)
    assert set(peers) <= set(contest.trials), contest.notes


def test_variants_stand_beside_what_auto_takes(as_on_a_gpu, monkeypatch):
    """Not where a backend is the one of "auto", and not where "cuda" leaves the work to another."""

    class Forward(types.SimpleNamespace):
        """A backend's ops: cross_attention by another backend's."""

        def __init__(self, run):
            super().__init__(cross_attention=run)

    def backend(name, run, missing=None):
        monkeypatch.setitem(ops.BACKENDS, name, backends.Backend(name, Forward(run), ("cpu",), backends.FLOATS, missing))
        backends._choose.cache_clear()

    variants = {name: bench_attention.PROVIDERS[name] for name in ("diffmas, triton", "diffmas, cuda")}
    other = lambda *args: reference.cross_attention(*args)
    try:
        backend("triton", other)
        backend("cuda", torch.ops.diffmas_native.cross_attention)
        contest = contest_of("latent step", "forward", **variants)
        assert set(contest.trials) == {OURS, "diffmas, cuda"} and not contest.notes  # "auto" takes triton
        backend("cuda", other)
        backend("triton", reference.cross_attention)
        assert set(contest_of("latent step", "forward", **variants).trials) == {OURS}
        backend("triton", reference.cross_attention, "not here")
        assert contest_of("latent step", "forward", **variants).notes == {"diffmas, triton": "triton: not here"}
    finally:
        backends._choose.cache_clear()


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
    assert not dataclasses.replace(p, case=dataclasses.replace(p.case, n=1, model="8B")).graph


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


def test_another_way_of_ours_is_no_peer():
    result = results([row(OURS, 0.001), row(f"{OURS}, not deferred", 0.0005), row("sdpa", 0.002)])[0]
    assert result.best == ("sdpa", pytest.approx(2)) and f"{OURS}, not deferred" in result.peers
    rows = [row(OURS, 0.001, device="cpu"), row(f"{OURS}, not deferred", 0.0005), row("sdpa", 0.002)]
    assert "2.00x of sdpa  not deferred 0.50x" in report.line(rows).plain


def test_brackets_are_text_and_no_markup():
    out = io.StringIO()
    rows = [row(OURS, None, device="cpu", why="no [/such] thing"), row("sdpa[/x]", 0.002, device="cpu", N=7)]
    rich.console.Console(file=out, width=200).print(report.table([*rows, row(OURS, 0.001, device="cpu", N=7)], "a [/machine]"))
    assert all(text in out.getvalue() for text in ("no [/such] thing", "sdpa[/x]", "a [/machine]"))


def test_the_page_needs_nothing_else(tmp_path):
    from rich.console import Console

    target = report.write(stored(tmp_path, ROWS), Console(quiet=True))
    page = target.read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["'](?!data:)|url\(|@import|<link|https?://""", page)
    assert "{{" not in page and "no &lt;compiler&gt; here" in page and "DynamicCache" in page
    assert page.count("data:image/svg+xml;base64,") == 2  # headline, and growth with two lengths
    assert all(
        (tmp_path / f"{name}.{kind}").stat().st_size > 1000 for name in ("headline", "growth") for kind in ("png", "svg")
    )


def test_the_readme_block_is_rewritten_and_stays_as_it_is(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.update(stored(tmp_path, ROWS), page) is True
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| training step of 3 agents, 4 layers of small shape, N = 8192, T = 16 |" in text and "3.00x" in text
    assert readme.update(tmp_path, page) is False and page.read_text() == text
    (tmp_path / "growth.png").touch()  # beside the README, wherever the command runs
    assert readme.update(tmp_path, page) is True and "(./growth.png)" in page.read_text()
    page.write_text("no comments")
    with pytest.raises(ValueError, match="once each"):
        readme.update(tmp_path, page)


def test_the_projects_readme_tells_what_is_stored():
    root = run.HERE.parent
    text = (root / "README.md").read_text()
    assert text.count(readme.BEGIN) == 1 and text.count(readme.END) == 1
    between = text.split(readme.BEGIN)[1].split(readme.END)[0].strip()
    kept = root / "benchmarks/results/cpu"
    rows = store.read(kept / store.FILE)
    if not all(r["commit"] in between for r in rows):
        pytest.skip("measured again since: make bench-readme")
    assert between == readme.block(rows, "benchmarks/results/cpu", (kept / "growth.png").exists())
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (root / target).exists(), target


def test_every_row_of_the_readme_has_one_case():
    cases = [c for m in MODULES.values() for c in getattr(m, "CPU_CASES", m.CASES)]
    for wanted in readme.STORY:
        assert len([c for c in cases if all(getattr(c, k) == v for k, v in wanted.items())]) == 1, wanted


def test_the_names_of_stored_rows_are_those_of_the_cases():
    """A case that is renamed takes its stored rows along. Parts of a whole system's call have phases of their own."""
    cases = {(c.op, c.regime) for m in MODULES.values() for c in getattr(m, "CPU_CASES", m.CASES)}
    providers = {name for m in MODULES.values() for name in m.PROVIDERS}
    for stored_row in store.read(run.HERE / "results/cpu" / store.FILE):
        assert (stored_row["op"], stored_row["regime"]) in cases and stored_row["provider"] in providers, stored_row


# ---- the command -----------------------------------------------------------------------------------------------------


def test_every_module_has_cases_with_keys_of_their_own():
    import importlib

    keys, quick = [], set()
    for path in run.modules():
        module = importlib.import_module(f"diffmas.benchmarks.{path.stem}")
        assert OURS in module.PROVIDERS and callable(module.problem)
        keys += [c.key for c in module.CASES]
        quick |= {path.stem for c in run.selected(module, quick=True, only="")}
    assert len(keys) == len(set(keys))
    assert quick == {path.stem for path in run.modules()}


def test_bench_measures_one_case_and_reports(tmp_path):
    key = next(c for c in bench_attention.CASES if c.N == 2048 and c.quick).key
    command = [sys.executable, "-m", "diffmas", "bench", "--quick", "--only", key, "--out", str(tmp_path), "--max-rounds", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / store.FILE) as file:
        rows = list(csv.DictReader(file))
    assert {"diffmas", "sdpa", "cat + sdpa", "eager"} <= {r["provider"] for r in rows}
    assert all(float(r["seconds"]) > 0 and float(r["error"]) <= float(r["budget"]) for r in rows)
    assert "cross_attention" in done.stdout and (tmp_path / "index.html").exists()


def test_errors_of_the_command(tmp_path, monkeypatch):
    def fails(*arguments):
        result = CliRunner().invoke(app, ["bench", *arguments])
        assert result.exit_code == 1
        return " ".join(result.output.split())

    assert "got 'nothing like it'" in fails("--only", "nothing like it", "--compare", "HEAD")
    assert "no file" in fails("--readme", "--out", str(tmp_path))
    if shutil.which("git") and (run.HERE.parent / ".git").exists():
        assert "expected a commit, branch or tag" in fails("--only", "merge", "--compare", "no-such-commit")
    monkeypatch.setattr(run, "find_spec", lambda name: None)
    assert 'pip install "diffmas[test]"' in fails("--quick")


@pytest.mark.parametrize("why, status", [(("", ""), 0), (("too old [/x]", ""), 1), (("", "broken [/y]"), 1)])
def test_a_comparison_fails_if_this_tree_does_or_nothing_is_compared(why, status, tmp_path, monkeypatch):
    class Worker:
        def __init__(self, root, threads):
            self.why = why[root == run.HERE.parent]

        def ask(self, prepare=None, **_):
            return {"why": self.why} if prepare and self.why else {"rounds": 2} if prepare else {"seconds": 0.5}

        __enter__ = lambda self: self
        __exit__ = lambda *_: None

    monkeypatch.setattr(compare, "worktree", lambda rev, console: contextlib.nullcontext(tmp_path))
    monkeypatch.setattr(compare, "Worker", Worker)
    key = next(c for c in bench_attention.CASES if c.quick).key
    result = CliRunner().invoke(app, ["bench", "--only", key, "--compare", "rev[/z]", "--out", str(tmp_path)])
    assert result.exit_code == status, result.output
    with open(tmp_path / "compare.csv") as file:
        (written,) = csv.DictReader(file)
    assert (written["rev_why"], written["why"]) == why and written["times_faster"] == ("" if status else "1.0")


def test_a_case_that_nothing_matches_is_an_error_that_names_the_modules(tmp_path):
    command = [sys.executable, "-m", "diffmas", "bench", "--only", "nothing like it", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "attention" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_hopeless_providers_sit_out():
    contest = Contest(doubling(), {OURS: way(lambda x: 2 * x), "slow": way(lambda x: 2 * x)})
    contest.warm_up()
    contest._once = {OURS: 1e-3, "slow": 1e-3 * (measure.HOPELESS + 1)}
    assert contest.sample("slow", measure.HOPELESS_ROUNDS - 1) is not None
    assert contest.sample("slow", measure.HOPELESS_ROUNDS) is None and contest.sample(OURS, 9) is not None
