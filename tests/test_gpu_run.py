"""benchmarks/gpu_run.py without a GPU: real steps in tiny shapes, and what crashes, hangs, has no time or is there already."""

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from contests import MACHINE, MODULES, row
from rich.console import Console

from diffmas.benchmarks import goals, gpu_run, store
from diffmas.benchmarks.gpu import report, steps
from diffmas.benchmarks.gpu.record import Record
from diffmas.benchmarks.gpu_run import PLAN, ROOT, Run, Step, take
from diffmas.benchmarks.measure import OURS
from diffmas.benchmarks.result import results

QUIET = Console(quiet=True)


def test_a_dry_run(tmp_path, monkeypatch):
    """Every step that has a dry form; a second run into the folder finds all of it there."""
    program = [sys.executable, "benchmarks/gpu_run.py", "--dry", "--out", str(tmp_path), "--budget", "500"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    record = Record(tmp_path)
    assert {r["outcome"] for r in record.rows("smoke: triton inject", "test")} == {"passed"}
    rows = store.read(tmp_path / store.FILE)
    of_inject = [r for r in rows if r["op"] == "inject"]
    assert {r["provider"] for r in of_inject} == {OURS, "eager", "eager + cat"} and len({r["n"] for r in of_inject}) == 2
    assert {r["step"] for r in record.rows(kind="row")} == {"decoding and latent steps", "inject"}
    assert {r["name"] for r in record.rows("environment", "fact")} >= {"torch", "extension"}
    assert all(r["seconds"] > 0 and r["error"] <= r["budget"] and r["canary"] >= 1 for r in rows)
    text = (tmp_path / "summary.md").read_text()
    assert "not measured" in text and "smoke: triton inject" in text and (tmp_path / "index.html").exists()
    monkeypatch.setattr(gpu_run, "command", lambda step, run: pytest.fail("it is known"))
    dry = [s for s in PLAN if s.dry]
    with open(tmp_path / "said", "w") as said:
        take(dry, Run(tmp_path, 100, True, Console(file=said)))
    assert "4 of 4 steps are known" in (tmp_path / "said").read_text()
    assert [r["step"] for r in record.rows(kind="end")] == [s.name for s in dry]


def test_the_library_that_a_run_takes_along_has_cuda_kernels(tmp_path):
    """make builds one that has none, and stops where it still has none: nvcc is not there."""
    (tmp_path / "diffmas").mkdir()
    (tmp_path / "Makefile").write_bytes((ROOT / "Makefile").read_bytes())
    python, info = tmp_path / "python", tmp_path / "diffmas" / "build_info.json"
    python.write_text('#!/bin/sh\necho "$1"\nif [ "$1" = setup.py ] && [ -f nvcc ]; then cp nvcc diffmas/build_info.json; fi\n')
    python.chmod(0o755)

    def makes(*options):
        done = subprocess.run(["make", "gpu-run", f"PY={python}", *options], cwd=tmp_path, capture_output=True, text=True)
        return done.returncode == 0, done.stdout.replace(f"{python} ", "").split("\n"), done.stderr

    without, there = json.dumps({"cuda_targets": []}, indent=2), json.dumps({"cuda_targets": ["80", "90a"]}, indent=2)
    info.write_text(without)
    (tmp_path / "diffmas" / "libdiffmas.so").touch()
    ended_well, said, error = makes()
    assert not ended_well and "setup.py" in said and "benchmarks/gpu_run.py" not in said
    assert "no CUDA kernels for sm_90a" in error
    ended_well, said, _ = makes("DRY=1")
    assert ended_well and "setup.py" not in said and "benchmarks/gpu_run.py" in said
    (tmp_path / "nvcc").write_text(there)
    ended_well, said, _ = makes()
    assert ended_well and "setup.py" in said and "benchmarks/gpu_run.py" in said
    ended_well, said, _ = makes()
    assert ended_well and "setup.py" not in said and "benchmarks/gpu_run.py" in said


# ---- processes -------------------------------------------------------------------------------------------------------


@pytest.fixture
def programs(monkeypatch):
    """Steps that are programs of their own: by name, in the place of what gpu/steps.py does."""
    codes = {}
    monkeypatch.setattr(gpu_run, "LEAST", 0.2)
    head = "import os, signal, subprocess, sys, time\nfrom diffmas.benchmarks.gpu import steps\nfrom pathlib import Path\n"
    head += "from diffmas.benchmarks.gpu.record import Record\nsteps.alive = lambda: None\n"

    def command(step, run):
        given = f"record, step = Record(Path({str(run.out)!r}), {run.record.run}), {step.name!r}\n"
        return [*step.under, sys.executable, "-c", head + given + textwrap.dedent(codes[step.name])]

    monkeypatch.setattr(gpu_run, "command", command)
    return codes


def statuses(record: Record) -> dict[str, str]:
    return {r["step"]: r["status"] for r in record.rows(kind="end")}


def step(name: str, seconds: float = 60, **more) -> Step:
    return Step(name, seconds, "program", **more)


def test_what_crashes_or_hangs_costs_itself_alone(tmp_path, programs):
    note = "record.add(step, 'fact', name=step, value='known')\n"
    programs |= {
        "good": note,
        "crash": note + "os.kill(os.getpid(), signal.SIGSEGV)",
        "hang": note + "other = subprocess.Popen(['sleep', '60'])\n"
        "record.add(step, 'machine', other=other.pid)\ntime.sleep(60)",
        "fails": "sys.exit(3)",
        "lost": "os._exit(steps.LOST)",
        "absent": "",
        "last": note,
    }
    run = Run(tmp_path, 100, False, QUIET)
    more = {"hang": dict(seconds=6), "absent": dict(under=("no-such-sanitizer",))}
    take([step(name, **more.get(name, {})) for name in programs], run)
    assert statuses(run.record) == {
        "good": "ok", "crash": "crashed: SIGSEGV", "hang": "hung", "fails": "failed", "lost": "crashed: the GPU was lost",
        "absent": "not here: No such file or directory: no-such-sanitizer", "last": "ok",
    }  # fmt: skip
    assert [r["name"] for r in run.record.rows(kind="fact")] == ["good", "crash", "hang", "last"]
    assert run.left() > 40  # nobody waited for the hanging step
    state = Path(f"/proc/{run.record.rows(kind='machine')[0]['other']}/stat")
    assert not state.exists() or ") Z " in state.read_text()  # nor did what it started outlive it


CASES = """
def case(tried, without, providers, ends=lambda name: None):
    for name in providers:
        if name not in without:
            tried(name)
            ends(name)
    return [{"provider": name, "seconds": 1.0} for name in providers if name not in without] + [
        {"provider": name, "why": "failed: " + why} for name, why in without.items()
    ]

def crash(name):
    if name == "diffmas, cuda":
        os.kill(os.getpid(), signal.SIGSEGV)

def hang(name):
    if name == "diffmas":
        time.sleep(60)

def raises(name):
    raise ValueError("out of luck")

make = lambda *given: lambda tried, without: case(tried, without, *given)
"""


def test_a_case_is_tried_again_without_the_provider_that_crashed(tmp_path, programs):
    """And given up where it was ours; the cases after it are measured by the same step. Mended, it is measured again."""
    programs["rows"] = CASES + textwrap.dedent("""
        sys.exit(steps.each(record, step, {
            "first": make(["diffmas", "sdpa"]), "crashes": make(["diffmas", "diffmas, cuda", "sdpa"], crash),
            "hangs": make(["diffmas"], hang), "raises": make(["diffmas"], raises), "last": make(["diffmas", "sdpa"]),
        }, seconds=2))
    """)
    run = Run(tmp_path, 100, False, QUIET)
    take([step("rows")], run)
    assert statuses(run.record) == {"rows": "failed"}
    found = {}
    for r in run.record.rows("rows", "row"):
        found.setdefault(r["case"], {})[r["provider"]] = r.get("why", r.get("seconds"))
    both = {"diffmas": 1.0, "sdpa": 1.0}
    assert found == {
        "first": both, "crashes": {**both, "diffmas, cuda": "failed: crashed: SIGSEGV"},
        "raises": {"diffmas": "failed: ValueError: out of luck"}, "last": both,
    }  # fmt: skip
    guilty = [(r["case"], r["provider"], r["why"]) for r in run.record.rows("rows", "guilty")]
    assert guilty == [("crashes", "diffmas, cuda", "crashed: SIGSEGV"), ("hangs", "diffmas", "hung")]
    programs["rows"] = CASES + textwrap.dedent("""
        names = ["first", "crashes", "hangs", "raises", "last"]
        sys.exit(steps.each(record, step, {name: make(["diffmas", "diffmas, cuda"]) for name in names}, seconds=2))
    """)
    again = Run(tmp_path, 100, False, QUIET)
    assert again.record.run == 2
    take([step("rows")], again)
    assert statuses(again.record) == {"rows": "ok"}
    assert [r["case"] for r in again.record.rows("rows", "row") if r["run"] == 2 and r["provider"] == "diffmas"] == [
        "crashes", "hangs", "raises",
    ]  # fmt: skip


def test_a_budget_that_runs_out_and_a_run_that_goes_on(tmp_path, programs):
    programs |= {"a": "time.sleep(1)", "b": "time.sleep(60)", "c": "", "d": ""}
    plan = [step("a"), step("b"), step("c", beside="both"), step("d", beside="both")]
    first = Run(tmp_path, 12, False, QUIET)
    take(plan, first)
    assert statuses(first.record) == {"a": "ok", "b": "hung", "c": "no time left", "d": "no time left"}
    programs |= {"a": "sys.exit(1)", "b": ""}  # a is not run again
    take(plan, Run(tmp_path, 60, False, QUIET))
    assert statuses(Record(tmp_path)) == dict.fromkeys("abcd", "ok")
    assert [r["step"] for r in Record(tmp_path).rows(kind="end") if r["run"] == 2][0] == "b"


def test_steps_side_by_side(tmp_path, programs, monkeypatch):
    """Both must be there at once to end."""
    wait = "Path({!r}).touch()\nwhile not Path({!r}).exists(): time.sleep(0.05)"
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    programs |= {"a": wait.format(a, b), "b": wait.format(b, a)}
    monkeypatch.setattr(gpu_run, "WORKERS", 2)
    run = Run(tmp_path, 60, False, QUIET)
    take([step("a", 30, beside="both"), step("b", 30, beside="both")], run)
    assert statuses(run.record) == {"a": "ok", "b": "ok"}


def test_a_line_that_was_cut_off_is_no_row(tmp_path):
    record = Record(tmp_path, 1)
    record.add("a", "fact", name="x", value="1")
    with open(record.path, "a") as file:
        file.write('{"run": 1, "step": "a", "ki')
    assert len(record.rows()) == 1


def test_outcomes_of_tests_are_written_as_they_come(tmp_path):
    """One fails and one hangs, for which the process is ended; what was known stays. Skipped tests alone are no success."""
    (tmp_path / "test_some.py").write_text(
        "import time, pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n@pytest.mark.skip\ndef test_c(): pass\n"
        "def test_d(): time.sleep(60)\n"
    )

    def outcomes(only, **arguments):
        arguments = dict(files=[str(tmp_path / "test_some.py")], only=only, **arguments)
        given = dict(out=str(tmp_path), run=1, step=only, what="tests", dry=True, arguments=arguments)
        program = [sys.executable, "-m", "diffmas.benchmarks.gpu.steps", json.dumps(given)]
        done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True)
        found = Record(tmp_path).rows(only, "test")
        return done.returncode, [(r["test"].split("::")[1], r["outcome"]) for r in found], found[0]["why"]

    assert outcomes("test_a") == (0, [("test_a", "passed")], "")
    code, found, why = outcomes("test_b")
    assert code == 1 and found == [("test_b", "failed")] and "assert 1 == 2" in why
    code, found, _ = outcomes("test_c")
    assert code == 1 and found == [("test_c", "skipped")]
    code, found, _ = outcomes("test_a or test_b or test_d", seconds=1)
    assert code != 0 and found == [("test_a", "passed"), ("test_b", "failed")]


# ---- the plan, and what is told of it --------------------------------------------------------------------------------


def test_the_plan_measures_every_goal_of_a_gpu():
    """With its peer; and names of steps, modules, fields and peers are right."""
    assert len({s.name for s in PLAN}) == len(PLAN)
    measured = []
    for s in PLAN:
        if s.what != "rows":
            continue
        keys = []
        for group in s.arguments["groups"]:
            module, peers = MODULES[group["module"]], group["peers"]
            cases = steps.chosen(module, group["where"])
            assert cases and set(peers) <= set(module.PROVIDERS), (s.name, group)
            keys += [c.key for c in cases]
            peers = peers + [name for name in module.PROVIDERS if name.startswith(f"{OURS},")]
            measured += [row(OURS, 1e-3, device="cuda", roofline_percent=50, **c.columns()) for c in cases]
            measured += [row(peer, 1e-3, device="cuda", **c.columns()) for c in cases for peer in peers]
        assert len(keys) == len(set(keys)), s.name
    card = goals.scorecard(results(measured), "cuda")
    assert [line for line in card if line[0] is None] == []
    assert len(card) > len([g for g in goals.GOALS if g.device == "cuda"])


def test_every_smoke_chooses_a_few_tests():
    """Also those that a GPU is needed for."""
    files = [f"tests/test_{name}.py" for name in ("triton", "triton_layer", "triton_model", "cuda", "gpu")]
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "no:cacheprovider", *files]
    collected = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
    tests = [line for line in collected.splitlines() if "::" in line]
    for file, only in [*gpu_run.SMOKES.values(), *gpu_run.SANITIZED.values()]:
        word = lambda test: lambda m: m[0] if m[0] in ("and", "or", "not") else str(m[0] in test)
        chosen = [test for test in tests if f"/{file}.py" in test and eval(re.sub(r"\w+", word(test), only))]
        assert 1 <= len(chosen) <= 6, (only, chosen)


def test_the_report_of_a_run(tmp_path):
    """Goals beside numbers, tiles, what is wrong and what did not end well; the newest result counts."""
    record, stamp = Record(tmp_path, 1), store.stamp(dataclasses.replace(MACHINE, device="cuda"))
    shape = dict(N=16384, n=1, dtype="bfloat16")

    def measured(run, provider, seconds, **more):
        values = stamp | row(provider, seconds, **shape) | more
        Record(tmp_path, run).add("decoding", "row", case="a step", **values)

    record.add("environment", "fact", name="torch", value="2.11")
    for name, outcome in (("a", "failed"), ("b", "failed"), ("a", "passed")):
        record.add("tests", "test", test=name, outcome=outcome, seconds=1.0, why="1 | 2" if outcome == "failed" else "")
    measured(1, OURS, 1e-3, roofline_percent=45)
    measured(1, "sdpa", 2e-3)
    measured(1, "diffmas, cuda", None, why="failed: crashed: SIGSEGV")
    record.add("decoding", "guilty", case="a step", provider="diffmas, cuda", why="crashed: SIGSEGV")
    for seconds, tile in ((2e-3, [64, 64, 4, 2]), (1e-3, [128, 64, 8, 3])):
        record.add("tiles", "row", case=str(tile), provider=OURS, line="fwd 128 128", tile=tile, seconds=seconds)
    record.add("decoding", "end", status="failed", seconds=3.0)
    console = Console(file=(tmp_path / "shown").open("w"), width=200)
    assert report.write(record, tmp_path, console) == 1
    text = (tmp_path / "summary.md").read_text()
    assert "| ✗ cross attention latent step, forward, N=16384 n=1 16/8 bfloat16 | 90 % of the roofline | 45 % |" in text
    assert "128x64x8x3 1 ms, 64x64x4x2 2 ms" in text and "| ✗ a step: diffmas, cuda | " in text and "crashed: SIGSEGV" in text
    assert "| ✗ b | 1 \\| 2 |" in text and "| ✗ a |" not in text and "1 passed, 1 failed" not in text
    assert (tmp_path / "goals.png").stat().st_size > 1000 and "not measured" in text
    measured(2, OURS, 5e-4, roofline_percent=91)
    measured(2, "diffmas, cuda", 1e-3)
    record.add("tests", "test", test="b", outcome="passed", seconds=1.0, why="")
    Record(tmp_path, 2).add("decoding", "end", status="ok", seconds=3.0)
    assert report.write(record, tmp_path, console) == 0
    text = (tmp_path / "summary.md").read_text()
    assert "| ✓ cross attention latent step, forward, N=16384 n=1 16/8 bfloat16 | 90 % of the roofline | 91 % |" in text
    assert "What is wrong" not in text


def test_cases_of_a_dry_run_are_small():
    for module in MODULES.values():
        for case in getattr(module, "GPU_CASES", []):
            assert steps.small(case).N <= 96 and steps.small(case).n <= 96
