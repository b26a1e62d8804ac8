"""What the steps of a run on a GPU do, each in a process of its own: `python -m diffmas.benchmarks.gpu.steps JSON`.

A step goes through its cases. What ends the process (a crash, a hang, a GPU whose context is lost) costs the provider that was
being tried: the step is started again, tries the case without it, and goes on.
"""

import dataclasses
import gc
import importlib
import importlib.util
import json
import os
import platform
import shutil
import signal
import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from diffmas.benchmarks.gpu.record import Record

__all__ = ["chosen", "each", "small"]

OURS = "diffmas"  # nothing of diffmas is imported before tests/conftest.py has seen to Triton
TIMING = "while it was timed"  # in the place of a provider
LOST = 70  # exit status where the GPU's context is lost


def small(case):
    """A case's own regime in a shape that a CPU computes in no time."""
    n = 1 if case.n == 1 else 32 if case.n < case.N else 96
    N = min(case.N, 96) if case.op == "inject" else 96
    shape = dict(N=N, n=n, batch=min(case.batch, 4), D=32, T=min(case.T, 32))
    shape |= dict(model="small", heads="4/2", D=64, layers=1) if case.model else {}
    return dataclasses.replace(case, **shape)


# ---- the cases of a step ---------------------------------------------------------------------------------------------


def each(record: Record, step: str, cases: dict[str, Callable], seconds: float) -> int:
    """cases: by key, a function (tried, without) -> rows. It calls tried(name) before each provider, and leaves those of
    `without` out, whose place a row with the reason takes. seconds: the most that a case may take. -> 1 where something of ours
    failed or a process ended in this run, else 0."""
    known = record.known(step)
    for key, measure in cases.items():
        without = record.guilty(step).get(key, {})
        if key in known or {OURS, TIMING} & without.keys():
            continue
        tried = lambda name, key=key: record.add(step, "began", case=key, provider=name)
        signal.alarm(int(seconds))  # nobody handles it, so it ends the process even where the driver waits for ever
        try:
            tried(TIMING)
            rows = measure(tried, without)
        except Exception as error:
            rows = [{"provider": OURS, "why": f"failed: {type(error).__name__}: {error}"[:200]}]
        finally:
            signal.alarm(0)
        alive()
        for row in rows:
            record.add(step, "row", **{"case": key, **row})
        rows = None
        gc.collect()
    return int(record.spoiled(step))


def alive() -> None:
    """Ends a process that has lost its GPU: everything after it would fail, and others would be blamed."""
    import torch

    if torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except Exception as error:
            print(f"the context is lost: {error}", file=sys.stderr, flush=True)
            os._exit(LOST)


def chosen(module, where: dict) -> list:
    """Cases for a GPU of a module of the suite whose fields are as `where` says: a value, or a list of them."""
    fits = lambda case: all(getattr(case, k) in (v if isinstance(v, list) else [v]) for k, v in where.items())
    return [case for case in getattr(module, "GPU_CASES", module.CASES) if fits(case)]


def rows(record: Record, step: str, dry: bool, groups: list[dict], seconds: float = 45) -> int:
    """Cases of modules of the suite against some peers. groups: of module, where and peers."""
    import torch

    from diffmas.benchmarks import store
    from diffmas.benchmarks.machine import Machine, measure_machine, own_stream
    from diffmas.benchmarks.measure import Contest

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1 if dry else torch.get_num_threads())
    facts = record.rows(kind="machine")
    machine = Machine(**facts[-1]["facts"]) if facts else measure_machine(device)
    stamp = store.stamp(machine)

    def measured(suite, case, providers):
        def measure(tried, without):
            def entering(name, provider):
                def enter(problem):
                    alive()
                    tried(name)
                    return provider(problem)

                return enter

            torch.manual_seed(0)
            entered = {name: entering(name, p) for name, p in providers.items() if name not in without}
            contest = Contest(suite.problem(case), entered, device)
            alive()
            tried(TIMING)
            contest.warm_up()
            samples = defaultdict(list)
            for turn in range(contest.rounds(0.3, 2 if dry else 5, 25) if contest.trials else 0):
                for name, seconds in contest.round(turn).items():
                    samples[name].append(seconds)
            lost = [case.columns() | {"provider": name, "why": f"failed: {why}"} for name, why in without.items()]
            return [stamp | row for row in contest.rows(samples, machine) + lost]

        return measure

    cases = {}
    for group in groups:
        suite = importlib.import_module(f"diffmas.benchmarks.{group['module']}")
        found = chosen(suite, group["where"])
        if dry:
            found = list({case.key: case for case in map(small, found)}.values())[:2]
        providers = {n: p for n, p in suite.PROVIDERS.items() if n.split(",")[0] == OURS or n in group["peers"]}
        cases |= {case.key: measured(suite, case, providers) for case in found}
    with own_stream(device):
        return each(record, step, cases, seconds * (10 if dry else 1))


def tiles(record: Record, step: str, dry: bool, lines: list, most: int) -> int:
    """The first candidates of lines of the table of tiles, timed: (kernel, rows, head size)."""
    import torch

    from diffmas.kernels import blocks

    if not torch.cuda.is_available():
        record.add(step, "fact", name="tiles", value="not timed: there is no GPU")
        return 0
    from tools import triton_tune

    here, cases = blocks.architecture(torch.device("cuda", 0)), {}

    def timed(key, tile):
        def measure(tried, without):
            seconds = triton_tune.seconds(*key, here, dict(zip(blocks.TILE, tile)))
            return [{"provider": OURS, "line": " ".join(map(str, key[:3])), "tile": list(tile), "seconds": seconds}]

        return measure

    for line in lines:
        key = (*line, False, False)
        for tile in triton_tune.candidates(*key)[:most]:
            cases[f"{line} {tile}"] = timed(key, tile)
    return each(record, step, cases, 30)


# ---- what is no case -------------------------------------------------------------------------------------------------


class Outcomes:
    """A plugin of pytest: what becomes of each test, as it comes."""

    def __init__(self, record: Record, step: str):
        self.record, self.step, self.passed = record, step, 0

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            why = (crash.message if crash else str(report.longrepr or "")).split("\n")[0][:200]
            self.passed += report.outcome == "passed"
            seconds = round(report.duration, 2)
            self.record.add(self.step, "test", test=report.nodeid, outcome=report.outcome, seconds=seconds, why=why)


def tests(record: Record, step: str, dry: bool, files: list[str], only: str, workers: int = 1, seconds: int = 60) -> int:
    """Tests by pytest's own choice, on several cores; one that takes longer than `seconds` ends its process, not the others."""
    import pytest

    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-k", only]
    if importlib.util.find_spec("pytest_timeout"):
        options += [f"--timeout={seconds}", "--timeout-method=thread"]  # a signal would wait for the driver
    if workers > 1 and importlib.util.find_spec("xdist"):
        options += [f"-n{workers}"]
    outcomes = Outcomes(record, step)
    return int(pytest.main([*files, *options], plugins=[outcomes])) or int(not outcomes.passed)  # a skipped test shows nothing


def environment(record: Record, step: str, dry: bool) -> None:
    """Versions, tools, backends, and the machine's own rates."""
    import torch

    from diffmas import ops
    from diffmas.benchmarks import store
    from diffmas.benchmarks.machine import measure_machine
    from diffmas.ops import extension

    fact = lambda name, value: record.add(step, "fact", name=name, value=str(value))
    fact("python", platform.python_version())
    for package in ("torch", "triton", "transformers", "flashinfer-python", "flash-attn-4", "xformers"):
        try:
            fact(package, version(package))
        except PackageNotFoundError:
            fact(package, "not installed")
    fact("commit", store.commit())
    fact("extension", extension.error or f"CUDA binaries: {' '.join(extension.cuda_targets) or extension.cuda_error}")
    for name, why in ops.available().items():
        fact(f"backend {name}", why or "ready")
    for tool in ("nvcc", "compute-sanitizer", "ncu"):
        fact(tool, shutil.which(tool) or "not installed")
    machine = measure_machine("cuda" if torch.cuda.is_available() else "cpu")
    record.add(step, "machine", facts=machine.describe())


WHAT = {"environment": environment, "rows": rows, "tests": tests, "tiles": tiles}


def main() -> None:
    given = json.loads(sys.argv[1])
    record = Record(Path(given["out"]), given["run"])
    sys.exit(WHAT[given["what"]](record, given["step"], given["dry"], **given["arguments"]) or 0)


if __name__ == "__main__":
    main()
