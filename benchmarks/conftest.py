"""How pytest runs the suite: `bench_*.py` modules with CASES, problem, PROVIDERS and one test; rows go to a CSV as they come.

`diffmas bench` calls pytest on these modules; `pytest benchmarks/bench_inject.py --quick` does the same by hand. The benchmark
fixture of pytest-benchmark drives the rounds; one round takes a sample of every provider, so that they are interleaved.
"""

import gc
import itertools
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from diffmas.benchmarks import report, store
from diffmas.benchmarks.machine import measure_machine, name_of, own_stream
from diffmas.benchmarks.measure import OURS, Case, Contest
from diffmas.benchmarks.run import selected

SESSION = pytest.StashKey()


def pytest_addoption(parser):
    group = parser.getgroup("diffmas")
    group.addoption("--quick", action="store_true", help="the cases that end in under three minutes")
    group.addoption("--only", default="", help="cases whose module or key has this text")
    group.addoption("--missing", action="store_true", help="cases that are not in results.csv yet")
    group.addoption("--out", type=Path, default=Path("runs/bench"), help="directory for results.csv")
    group.addoption("--threads", type=int, default=1, help="threads that torch uses")
    group.addoption("--max-rounds", type=int, default=25, help="rounds per case at most")


class Session:
    """One run of the suite: the machine, the CSV, and the progress line."""

    def __init__(self, config):
        self.config, self.console = config, Console(highlight=False)
        torch.set_num_threads(config.getoption("threads"))
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.machine = measure_machine(self.device)
        gc.freeze()  # what the imports made lives on; collecting it again before every case takes long
        target = config.getoption("out") / store.FILE
        missing = config.getoption("missing")
        keep = missing or bool(config.getoption("only"))
        self.store = store.Store(target, store.stamp(self.machine), keep, at_once=missing)
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, transient=True)
        self.progress.start()
        self.task = self.progress.add_task("machine")

    def rounds(self, contest: Contest) -> int:
        quick, most = self.config.getoption("quick"), self.config.getoption("max_rounds")
        seconds, least = (0.4, 3) if quick else (1.0, 5)
        one = contest.round_seconds()
        if contest.problem.case.model or one > 2:
            least = 2 if quick or one > 25 else 3
        return contest.rounds(seconds, min(least, most), most)


def pytest_collection_modifyitems(session, config, items):
    items[:] = [item for item in items if isinstance(item.callspec.params["case"], Case)]  # not those of a module without any
    if items and not config.getoption("collectonly"):
        config.stash[SESSION] = Session(config)
        config.stash[SESSION].progress.update(config.stash[SESSION].task, total=len(items))


def pytest_sessionfinish(session, exitstatus):
    if SESSION in session.config.stash:
        if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            session.config.stash[SESSION].store.finish()
        session.config.stash[SESSION].progress.stop()
        gc.unfreeze()  # or nanobind reports leaks at exit


def pytest_runtest_logreport(report):
    if report.failed:  # pytest's own reporter is off under `diffmas bench`
        Console(stderr=True).print(report.longreprtext, style="red", markup=False, highlight=False)


def pytest_collectreport(report):
    if report.failed:
        Console(stderr=True).print(report.longreprtext, style="red", markup=False, highlight=False)


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        module, option = metafunc.module, metafunc.config.getoption
        cases = selected(module, option("quick"), option("only"))
        if option("missing"):
            here = name_of("cuda" if torch.cuda.is_available() else "cpu"), option("threads")
            cases = [case for case in cases if not store.measured(option("out") / store.FILE, case, *here)]
        metafunc.parametrize("case", cases, ids=[c.key for c in cases])


@pytest.fixture
def bench(benchmark, request):
    """bench(case, problem, providers): gate, time, weigh and store one case; fails if diffmas itself is wrong."""
    session = request.config.stash[SESSION]

    def run(case, problem, providers):
        session.progress.update(session.task, description=case.key)
        with own_stream(session.device):
            measured(case, problem, providers)

    def measured(case, problem, providers):
        torch.manual_seed(0)
        if session.config.getoption("quick"):
            providers = {k: v for k, v in providers.items() if k not in getattr(request.module, "SLOW", ())}
        contest = Contest(problem(case), providers, session.device)
        contest.warm_up()
        samples, turns = defaultdict(list), itertools.count()

        def take():
            for name, seconds in contest.round(next(turns)).items():
                samples[name].append(seconds)

        gc.collect()
        gc.disable()
        try:
            benchmark.pedantic(take, rounds=session.rounds(contest) if contest.trials else 1)
        finally:
            gc.enable()
        rows = session.store.add(contest.rows(samples, session.machine))
        benchmark.extra_info["rows"] = rows
        session.progress.advance(session.task)
        session.console.print(report.line(rows))
        if OURS in contest.errors and OURS in contest.notes:
            pytest.fail(f"{case.key}: diffmas: {contest.notes[OURS]}", pytrace=False)

    return run
