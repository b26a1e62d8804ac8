"""How the benchmark suite measures, never how fast: the gate, the measures, the timing."""

import dataclasses

import pytest
import torch
from contests import MACHINE, MODULES, doubling, way

from diffmas.benchmarks import bench_attention, bench_generation, bench_training, measure, store, systems
from diffmas.benchmarks.attention import problem
from diffmas.benchmarks.machine import peak_bytes
from diffmas.benchmarks.measure import OURS, Cannot, Case, Contest, Problem, Senseless, Trial
from diffmas.benchmarks.run import selected
from diffmas.ops import reference

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


def test_cases_that_take_minutes(tmp_path, monkeypatch):
    """They are measured where they are asked for, and once: each is stored when it is done."""
    found = selected(bench_training, False, "SmolLM2")
    assert len(found) == 8 and not {*found} & {*selected(bench_training, False, "")}
    assert selected(bench_training, False, "training") == bench_training.CASES
    path = tmp_path / "results.csv"
    assert len(selected(bench_training, False, found[0].key)) == 1
    rows = store.Store(path, {"machine": "this one", "threads": 1}, keep=True, at_once=True)
    rows.add([found[0].columns() | {"provider": OURS, "why": "wrong result"}])
    assert not store.measured(path, found[0], "this one", 1)
    rows.add([found[0].columns() | {"provider": OURS, "seconds": 1.5}])
    assert store.measured(path, found[0], "this one", 1) and not store.measured(path, found[1], "this one", 1)
    assert not store.measured(path, found[0], "this one", 2) and not store.measured(path, found[0], "another", 1)
    case = dataclasses.replace(found[0], N=60, T=2, layers=2)
    monkeypatch.setattr(systems, "SMOL", systems.SMOL | {"vocab_size": 4096})
    contest = Contest(bench_training.problem(case), bench_training.PROVIDERS)
    assert set(contest.trials) == {OURS, "DynamicCache"}, contest.notes


def test_all_ways_of_a_generation_give_the_same_tokens():
    case = dataclasses.replace(bench_generation.CASES[0], N=60, T=2, layers=1, batch=3)
    contest = Contest(bench_generation.problem(case), bench_generation.PROVIDERS)
    assert set(contest.trials) == set(bench_generation.PROVIDERS), contest.notes


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


@pytest.mark.parametrize(
    "regime, N, n", [("prompt", 192, 192), ("prompt on 63 segments", 256, 128), ("short prompts", 128, 128)]
)
def test_the_reference_in_parts_has_the_same_bits(regime, N, n, monkeypatch):
    """A few queries at a time; sums over queries are in another order."""
    case = next(c for c in bench_attention.GPU_CASES if c.regime == regime)
    p = bench_attention.problem(dataclasses.replace(case, phase="full", N=N, n=n, batch=min(case.batch, 3), heads="4/2", D=32))
    want, calls = p.reference(torch.float64), []
    forward = reference.cross_attention
    monkeypatch.setattr(reference, "cross_attention", lambda q, *rest: calls.append(len(q)) or forward(q, *rest))
    monkeypatch.setattr(problem, "SCORES", 2 * 32 * N)
    got = p.reference(torch.float64)
    assert len(calls) >= 2 * n // 32 and max(calls) <= 2 * 32
    assert all(torch.equal(got[name], want[name]) for name in ("o", "lse", "dq"))
    for name in ("dk", "dv"):
        torch.testing.assert_close(got[name], want[name], rtol=1e-13, atol=1e-13)


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


def test_a_peer_that_fails_costs_no_other_row():
    def broken(problem):
        raise RuntimeError("out of luck")

    case = next(c for c in bench_attention.CASES if c.regime == "prompt" and c.n == 64 and c.phase == "forward")
    contest = Contest(bench_attention.problem(case), {OURS: bench_attention.PROVIDERS[OURS], "broken": broken})
    assert list(contest.trials) == [OURS] and contest.notes == {"broken": "failed: RuntimeError: out of luck"}
