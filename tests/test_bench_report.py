"""What becomes of the benchmark suite's rows: the CSV, goals, report, page and README; the command."""

import contextlib
import csv
import dataclasses
import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import rich.console
import torch
from contests import MACHINE, MODULES, row
from typer.testing import CliRunner

from diffmas.benchmarks import bench_attention, compare, plots, readme, report, run, store
from diffmas.benchmarks.goals import SDPA, Goal
from diffmas.benchmarks.measure import OURS
from diffmas.benchmarks.result import results
from diffmas.cli import app


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


def test_rows_from_before_the_canary_can_be_read(tmp_path):
    stored(tmp_path, ROWS)
    with open(tmp_path / store.FILE) as file:
        old = [{k: v for k, v in r.items() if k != "canary"} for r in csv.DictReader(file)]
    with open(tmp_path / store.FILE, "w", newline="") as file:
        writer = csv.DictWriter(file, old[0])
        writer.writeheader()
        writer.writerows(old)
    assert len(results(store.read(tmp_path / store.FILE))) == len({r["N"] + r["phase"] + r["op"] for r in old})
    file = store.Store(tmp_path / store.FILE, store.stamp(MACHINE), keep=True)
    file.add([row(OURS, 0.0005, canary=1.25), row("sdpa", 0.005)])
    file.finish()
    assert [r["canary"] for r in store.read(tmp_path / store.FILE)][-2:] == [1.25, None]


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


def test_fit_finds_the_power():
    assert plots.fit([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx((3, 2))


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
    drawn = [tmp_path / f"{name}.{kind}" for name in ("headline", "growth", "story") for kind in ("png", "svg")]
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_the_readme_block_is_rewritten_and_stays_as_it_is(tmp_path):
    page = tmp_path / "README.md"
    page.write_text(f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n")
    assert readme.update(stored(tmp_path, ROWS), page) is True
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| training step of 3 agents, 4 layers of small shape, N = 8192, T = 16 |" in text and "3.00x" in text
    assert readme.update(tmp_path, page) is False and page.read_text() == text
    (tmp_path / "growth.png").touch()  # beside the README, wherever the command runs
    assert readme.update(tmp_path, page) is True and "(./story.png)" in page.read_text()
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


def cases_of(module):
    """On a CPU, those that are only measured where they are asked for, too."""
    return (*getattr(module, "CPU_CASES", module.CASES), *getattr(module, "LONG", ()))


def test_every_row_of_the_readme_has_one_case():
    cases = [c for m in MODULES.values() for c in cases_of(m)]
    for wanted in readme.STORY:
        assert len([c for c in cases if all(getattr(c, k) == v for k, v in wanted.items())]) == 1, wanted


def test_the_names_of_stored_rows_are_those_of_the_cases():
    """A case that is renamed takes its stored rows along. Parts of a whole system's call have phases of their own."""
    cases = {(c.op, c.regime) for m in MODULES.values() for c in cases_of(m)}
    providers = {name for m in MODULES.values() for name in m.PROVIDERS}
    for stored_row in store.read(run.HERE / "results/cpu" / store.FILE):
        assert (stored_row["op"], stored_row["regime"]) in cases and stored_row["provider"] in providers, stored_row


# ---- the command -----------------------------------------------------------------------------------------------------


def test_bench_measures_one_case_and_reports(tmp_path):
    key = next(c for c in bench_attention.CASES if c.N == 2048 and c.quick).key
    command = [sys.executable, "-m", "diffmas", "bench", "--quick", "--only", key, "--out", str(tmp_path), "--max-rounds", "2"]
    command += ["--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with open(tmp_path / store.FILE) as file:
        rows = list(csv.DictReader(file))
    assert {"diffmas", "sdpa", "cat + sdpa", "eager"} <= {r["provider"] for r in rows}
    assert all(float(r["seconds"]) > 0 and float(r["error"]) <= float(r["budget"]) for r in rows)
    told = json.loads(done.stdout)["rows"]
    assert [(r["provider"], f"{r['seconds']:.6g}") for r in told] == [(r["provider"], r["seconds"]) for r in rows]
    assert "cross_attention" in done.stderr and (tmp_path / "index.html").exists()


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
    result = CliRunner().invoke(app, ["bench", "--only", key, "--compare", "rev[/z]", "--out", str(tmp_path), "--json"])
    assert result.exit_code == status, result.output
    with open(tmp_path / "compare.csv") as file:
        (written,) = csv.DictReader(file)
    (told,) = json.loads(result.stdout)["rows"]
    assert (told["rev_why"], told["why"]) == (written["rev_why"], written["why"]) == why and written["times_faster"] == (
        "" if status else "1.0"
    )


def test_a_case_that_nothing_matches_is_an_error_that_names_the_modules(tmp_path):
    command = [sys.executable, "-m", "diffmas", "bench", "--only", "nothing like it", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "attention" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
