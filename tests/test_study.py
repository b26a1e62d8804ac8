"""Studies: what a killed one leaves, what is refused, and the task that is made for them."""

import csv
import json
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import test_tasks
import tiny_systems as tiny
import torch
import yaml
from matplotlib.figure import Figure
from transformers import GenerationConfig
from typer.testing import CliRunner

from diffmas import training
from diffmas.cli import build, study
from diffmas.cli import main as cli
from diffmas.cli import recipe as reading
from diffmas.cli.recipe import study_of
from diffmas.cli.stages import slug
from diffmas.demo.experiment import BASE
from diffmas.evaluation import Scorer, pooled_costs
from diffmas.evaluation.metrics import difference_of_rates
from diffmas.evaluation.pooled import pool, pooled_table, write_pooled
from diffmas.evaluation.tasks import facts as tasks
from diffmas.evaluation.tasks import task
from diffmas.trace.views import SINKS

T = task("facts").latent_steps
RECIPE = {
    "about": "Is it the same after a kill?", "seeds": [0, 3], "methods": ["single", "latent_mas", "diffmas"],
    "alone": {"all facts": "Facts: {facts} Question: {question}"}, "audit": "all",
    "config": {
        "model": str(BASE), "dtype": "float32", "task": "facts",
        "system": {"realign": "norm", "trace_content": "latent_only", "sinks": 0},
        "training": {
            "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_strategy": "steps",
            "save_steps": 2, "report_to": [], "use_cpu": True, "disable_tqdm": True, "learning_rate": 1e-2,
        },
        "generation": {"max_new_tokens": 3, "temperature": 0}, "evaluation": {"limit": 6, "batch_size": 3},
    },
    "cases": {"one fact": {}, "two facts": {"task": "facts_two", "latent_steps": 2, "methods": ["single", "diffmas"]}},
}  # fmt: skip


# A process that is killed in the second seed's training, after its checkpoint of step 2.
KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from diffmas import training
from diffmas.cli import study
from diffmas.cli.recipe import study_of

torch.set_num_threads(int(sys.argv[3]))
steps, step = [], training.Trainer.training_step

def killed(self, *args):
    steps.append(self.state.global_step)
    print("at step", self.state.global_step, flush=True)
    if len(steps) == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args)

training.Trainer.training_step = killed
study.run(study_of(Path(sys.argv[1]), Path(sys.argv[2]), cases=["one fact"]), "cpu", lambda text: None)
"""


SAVEFIG = Figure.savefig


@pytest.fixture(autouse=True)
def pictures_are_not_drawn(monkeypatch):
    """Which takes a third of a small study's time; one test draws them."""
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: Path(path).touch())


def recipe(tmp_path, **changes):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump({**RECIPE, **changes}))
    return path


def call(*arguments, code: int = 0):
    result = CliRunner().invoke(cli.app, ["study", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def run(path, output, cases=("one fact",)):
    """The tables of a study, by method and by message."""
    outcome = study.run(study_of(path, output, cases=list(cases)), "cpu", lambda text: None)
    for row in outcome.costs:
        assert row["latent_steps"] == (6 * 3 * T if row["method"] in ("latent_mas", "diffmas") else 0)
    assert not outcome.failures
    return outcome.methods, outcome.audits


# ---- running ---------------------------------------------------------------------------------------------------------


def test_a_killed_study_gives_the_same_table(tmp_path, monkeypatch):
    path = recipe(tmp_path)
    whole = run(path, tmp_path / "whole")
    steps, step = [], training.Trainer.training_step
    command = [sys.executable, "-c", KILLED, path, tmp_path / "killed", str(torch.get_num_threads())]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    steps += map(int, re.findall(r"^at step (\d+)$", ran.stdout, re.MULTILINE))
    assert steps == [0, 1, 2, 3, 0, 1, 2]
    left = tmp_path / "killed" / "one_fact"
    assert (left / "seed0" / "audited.json").is_file() and not (left / "seed3" / "trained_diffmas.json").exists()
    with monkeypatch.context() as patched:
        patched.setattr(
            training.Trainer, "training_step", lambda self, *a: (steps.append(self.state.global_step), step(self, *a))[1]
        )
        again = run(path, tmp_path / "killed")
    assert steps[7:] == [2, 3]  # only what was missing
    assert again == whole
    weights = [(tmp_path / d / "one_fact/seed3/adapter/adapter_model.safetensors").read_bytes() for d in ("whole", "killed")]
    assert weights[0] == weights[1]
    with monkeypatch.context() as patched:
        patched.setattr(study.Stages, "_system", lambda self, trained: pytest.fail("a stage was done again"))
        assert run(path, tmp_path / "killed") == whole

    # A kill between the last step and the adapter that is saved, and a change of what was there.
    (left / "seed3" / "trained_diffmas.json").unlink()
    shutil.rmtree(left / "seed3" / "adapter")
    done = len(steps)
    with monkeypatch.context() as patched:
        patched.setattr(
            training.Trainer, "training_step", lambda self, *a: (steps.append(self.state.global_step), step(self, *a))[1]
        )
        evaluated = []
        patched.setattr(
            study.Stages,
            "_method",
            lambda self, name, method=study.Stages._method: (evaluated.append(name), method(self, name))[1],
        )
        assert run(path, tmp_path / "killed") == whole
    assert steps[done:] == [] and evaluated == ["diffmas", "all facts"]  # what rests on that training

    methods, audits = whole
    assert [r.name for r in methods] == ["single", "latent_mas", "all facts, bare", "diffmas", "all facts"]
    of_one = [f"{change}: reader{i}" for i in (1, 2, 3) for change in ("none", "other", "noise")]
    assert [r.name for r in audits] == ["own", "none", "other", "noise", *of_one]
    assert all(len(r.by_seed) == 2 and r.questions == 6 for r in methods + audits)
    assert {r.to for r in methods} <= {"single", "latent_mas"} and all(
        r.to == ":".join(["other", *r.name.split(":")[1:]]) for r in audits
    )
    own = next(r for r in audits if r.name == "own")
    assert own.by_seed == next(r for r in methods if r.name == "diffmas").by_seed
    assert next(r for r in methods if r.name == "all facts, bare").accuracy > 0.8  # its base model answers by recall


def test_a_case_may_be_measured_with_the_adapters_of_another(tmp_path, monkeypatch):
    """With more latent steps than these were trained with."""
    cases = {"unseen": {"task": "facts_unseen", "trained_by": "one fact", "latent_steps": T + 1}, "one fact": {}}
    path, trained, train = recipe(tmp_path, cases=cases, seeds=[0]), [], training.Trainer.train
    with monkeypatch.context() as patched:
        patched.setattr(
            training.Trainer, "train", lambda self, *a, **k: (trained.append(self.args.output_dir), train(self, *a, **k))[1]
        )
        outcome = study.run(study_of(path, tmp_path / "out", cases=["unseen"]), "cpu", lambda text: None)
        assert not outcome.failures and {r.case for r in outcome.methods} == {"unseen"}
        taken = {row["method"]: row["latent_steps"] for row in outcome.costs}
        assert taken["diffmas"] == taken["latent_mas"] == 6 * 3 * (T + 1)
        methods, audits = run(path, tmp_path / "out", ["one fact"])
    assert [d.rsplit("/", 3)[-3:] for d in trained] == [["one_fact", "seed0", "training"]]  # once, for both
    assert not list((tmp_path / "out" / "unseen").rglob("adapter_model.safetensors"))
    left = [
        json.loads((tmp_path / "out" / case / "seed0" / "measured_diffmas.json").read_text()) for case in ("unseen", "one_fact")
    ]
    assert left[0]["rests_on"] == left[1]["rests_on"] and left[0]["result"]["perplexity"] != left[1]["result"]["perplexity"]
    for of, changes in (("none", {}), ("unseen", {"third": {"trained_by": "unseen"}})):
        bad = {"unseen": {"trained_by": "one fact" if changes else of}, "one fact": {}, **changes}
        with pytest.raises(ValueError, match=rf"trained_by: expected one of \['one fact'\], got '{of}'"):
            reading.read(recipe(tmp_path, cases=bad))


def test_the_command_writes_tables_and_what_they_were_made_with(tmp_path, monkeypatch):
    asked = ("training.max_steps=1", "training.logging_steps=1", "gradient_report_steps=1")
    asked += ("evaluation={limit: 3, samples: 4}", "generation.temperature=0.6")
    changes = [part for change in asked for part in ("--set", change)]
    versions = {"torch": version("torch").partition("+")[0], "peft": "0.1"}
    with monkeypatch.context() as patched:
        patched.setattr(Figure, "savefig", SAVEFIG)
        ran = call(
            recipe(tmp_path, audit=None, versions=versions), "--output", tmp_path / "out", "--results", tmp_path / "shown",
            "--case", "two facts", "--seed", "3", *changes, "--json",
        )  # fmt: skip
    output, told = ran.stderr, json.loads(ran.stdout)
    assert "two facts" in output and "peft: the recipe was made with 0.1" in output and "torch: the recipe" not in output
    with (tmp_path / "shown" / "methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["case"] for row in rows} == {"two facts"} and {row["questions"] for row in rows} == {"3"}
    for row, same in zip(rows, told["methods"], strict=True):
        assert (row["name"], row["accuracy"], row["difference"] or None) == (
            same["name"], f"{same['accuracy']:.4f}", None if same["difference"] is None else f"{same['difference']:.4f}"
        )  # fmt: skip
    assert [row["name"] for row in rows] == ["single", "all facts, bare", "diffmas", "all facts"]  # the case's methods
    with (tmp_path / "shown" / "costs.csv").open() as file:
        costs = {row["method"]: row for row in csv.DictReader(file)}
    assert costs["diffmas"]["latent_steps"] == str(3 * 3 * 2) and costs["single"]["latent_steps"] == "0"
    for row in costs.values():  # of three questions
        three, four = (float(row[f"agree_{k}_of_4"]) for k in (3, 4))
        assert row["samples"] == "4" and 0 <= four <= three <= 1 and three in (0, 1 / 3, 2 / 3, 1)
    sure, _ = pooled_costs.cost_tables(told["costs"])
    assert [c.header for c in sure.columns][-3:] == ["agree %", "3 of 4 agree %", "4 of 4 agree %"] and len(sure.rows) == 4
    shown = f"{100 * float(costs['diffmas']['agree_3_of_4']):.1f}"
    assert list(sure.columns[-2].cells)[2] == shown and "perplexity" in output
    assert (tmp_path / "shown" / "results.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "shown" / "gradients.csv").open() as file:
        norms = {row["norm of"]: row for row in csv.DictReader(file)}
    assert norms["parameters"]["looks"] == "1" and norms["rows of a reader's latent steps"]["looks"] == "3"
    assert float(norms["parameters"]["largest"]) > 0 and (tmp_path / "shown" / "gradients.png").is_file()
    with (tmp_path / "shown" / "entropy.csv").open() as file:
        curve = [row for row in csv.DictReader(file) if row["method"] == "diffmas"]
    left = json.loads((tmp_path / "out" / "two_facts" / "seed3" / "measured_diffmas.json").read_text())["result"]
    assert [(r["case"], r["seed"], r["token"]) for r in curve] == [("two facts", "3", str(t)) for t in range(len(curve))]
    assert curve[0]["tokens"] == "12" and [float(r["nats"]) for r in curve] == left["entropy_curve"]
    assert left["entropy_curve"] and (tmp_path / "shown" / "entropy.png").is_file()
    text = (tmp_path / "shown" / "made_with.json").read_text()
    made = json.loads(text)
    assert told["made_with"] == made and told["failures"] == [] and str(tmp_path / "shown" / "costs.csv") in told["files"]
    assert made["changes"]["training"] == {"max_steps": 1, "logging_steps": 1}
    assert made["recipe"]["seeds"] == [0, 3] and made["recipe"]["config"]["model"] == "base" and str(BASE.parent) not in text
    (with_what,) = made["made_with"]
    assert with_what["versions"]["torch"] and with_what["machine"]
    (rate,) = made["training_tokens_per_second"]["diffmas"]
    assert rate > 0 and not (tmp_path / "shown" / "audit.csv").exists()
    assert (
        "expected results of the same changes"
        in call(recipe(tmp_path, audit=None, versions=versions), "--output", tmp_path / "out", code=1).output
    )
    other = call(recipe(tmp_path, about="other"), "--output", tmp_path / "out", code=1)
    assert "expected results of the same recipe" in other.output

    # The tables once more, of what is there; a case has been added since.
    monkeypatch.setattr(study.Stages, "_system", lambda *_: pytest.fail("something ran"))
    monkeypatch.setattr(training.Trainer, "train", lambda *_, **__: pytest.fail("something ran"))
    more = recipe(tmp_path, audit=None, versions=versions, cases={**RECIPE["cases"], "three": {}}, seeds=[0, 3, 4])
    case = tmp_path / "out" / "two_facts"
    shutil.copytree(case / "seed3" / "training", case / "seed4" / "training")  # of a training that is not done
    ran = call(more, "--report", "--output", tmp_path / "out", "--results", tmp_path / "again")
    (line,) = [line for line in ran.stderr.splitlines() if line.startswith("not done: ")]
    assert line.endswith("; three, seed 4: all; two facts, seed 0: all; two facts, seed 4: all")  # seed 3 is
    for name in ("methods.csv", "costs.csv", "entropy.csv", "gradients.csv"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "shown" / name).read_bytes(), name
    again = json.loads((tmp_path / "again" / "made_with.json").read_text())
    assert again["changes"] == made["changes"] and "three" in again["recipe"]["cases"]
    empty = call(more, "--report", "--output", tmp_path / "empty", code=1)
    assert "--report: expected something that is done in" in empty.output and not (tmp_path / "empty").exists()


def test_a_report_of_another_model_leaves_cases_with_their_own_out(tmp_path):
    """`--model` is refused beside such a case; the model that an output was written with is no `--model`."""
    cases = {"one fact": {}, "own": {"model": "elsewhere"}}
    changes = {"evaluation": {"limit": 1}, "generation": {"max_new_tokens": 1}}
    path = recipe(tmp_path, audit=None, seeds=[0], alone={}, methods=["single"], cases=cases)
    asked = study_of(path, tmp_path / "out", str(BASE), ["one fact"], changes=changes)
    study.run(asked, "cpu", lambda text: None)
    outcome = study.run(study_of(path, tmp_path / "out", only_done=True), "cpu", lambda text: None)
    assert [(of.case, of.name) for of in outcome.methods] == [("one fact", "single")]
    assert outcome.missing == ["own, seed 0: all"] and outcome.made["model"] == str(BASE)


def test_what_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    """Text agents that are never right, and a method that breaks, are told at the end; then they are tried again."""
    methods = ["single", "text_sft", "latent_mas"]
    path = recipe(tmp_path, seeds=[0], methods=methods, audit=None, alone={})
    arguments = (path, "--output", tmp_path / "out", "--case", "one fact", "--set", "evaluation.max_message_tokens=1")
    method = study.Stages._method

    def breaks(self, name):
        if name == "latent_mas":
            raise RuntimeError("a broken method")
        return method(self, name)

    with monkeypatch.context() as patched:
        patched.setattr(study.Stages, "_method", breaks)
        patched.setattr(tasks.Facts, "splits", {"train": (4, 1), "validation": (2, 2), "test": (6, 3)})
        output = call(*arguments, code=1).output
        assert "one fact, seed 0, text_sft: train rows: expected a right answer" in output
        assert "one fact, seed 0, latent_mas: a broken method" in output and "one fact: single" in output
        patched.setattr(study.Stages, "_method", method)
        assert "latent_mas" in (again := call(*arguments, code=1).output) and "a broken method" not in again


@pytest.mark.parametrize(
    "changes, arguments, error",
    [
        ({}, ("--case", "three"), "--case: expected some of ['one fact', 'two facts'], got 'three'"),
        ({}, ("--seed", "1"), "--seed: expected some of [0, 3], got 1"),
        ({}, ("--set", "training"), "--set: expected KEY=VALUE, got 'training'"),
        ({"cases": {"a": {"model": "m"}}}, ("--model", "n"), "--model: expected none, since the case 'a' has its own, got 'n'"),
        ({"cases": {"a b": {}, "a_b": {}}}, (), "cases: expected names that differ in letters or digits"),
        ({"seeds": [1, 1]}, (), "seeds: expected distinct seeds"),
        ({"cases": {"a": {"audit": "some"}}}, (), "cases.a.audit: expected all,"),
        ({"audit": "some"}, (), "audit: expected all, latent, prompt, text or none, got 'some'"),
        ({"method": []}, (), "method: expected 'methods', or another of .* got an unknown key"),
        ({"cases": {"a": 3}}, (), "cases.a: expected a mapping, got 3"),
        ({}, ("--set", "training.learning_rat=1"), "case 'one fact': training.learning_rat: expected 'learning_rate'"),
        ({}, ("--set", "evaluation=3"), "case 'one fact': evaluation: expected a mapping, got 3"),
        ({"methods": ["magic"]}, (), "case 'one fact': evaluation.methods: expected some of"),
        ({"cases": {"a": {"system": {"sink": 1}}}}, (), "case 'a': system.sink: expected 'sinks', or another of"),
        ({"config": {"task": "facts"}}, (), "case 'one fact': model: expected a value, got none"),
        ({"cases": {"a": {"agents": [{"name": "a", "prompt": "a"}], "latent_steps": 1}}}, (), "latent_steps: expected it"),
        ({"cases": {"a": {"agents": [{"name": "a", "prompt": "a"}], "passes": 1}}}, (), "passes: expected it for a task"),
        ({"cases": {"a": {"grad_passes": 1}}}, (), "grad_passes: expected None without passes, got 1"),
    ],
)
def test_what_is_refused(tmp_path, changes, arguments, error):
    output = call(recipe(tmp_path, **changes), "--output", tmp_path / "out", *arguments, code=1).output
    assert re.search(error.replace("[", r"\[").replace("]", r"\]"), output), output


def test_an_empty_section_is_none(tmp_path):
    read = reading.read(recipe(tmp_path, cases={"a": {"training": None, "generation": None, "evaluation": None}}))
    config = reading.config_of(read, "a", 3, tmp_path, None, {})
    assert config.training == {"seed": 3} and config.generation.seed == 3 and config.evaluation.methods == read.methods


def test_studies_that_come_with_diffmas_are_found_and_whole():
    names = sorted(p.stem for p in reading.named("facts").parent.glob("*.yaml"))
    assert "facts" in names
    for name in names:
        read = reading.read(reading.named(name))
        for case in read.cases:
            config = reading.config_of(read, case, read.seeds[0], reading.named(name).parent, None, {})
            assert config.evaluation.methods == read.cases[case].get("methods", read.methods)
            assert config.training["seed"] == read.seeds[0] and build.training_arguments(config).seed == read.seeds[0]
    with pytest.raises(ValueError, match="study: expected a YAML file or one of .*got 'fact'"):
        reading.named("fact")
    with pytest.raises(FileNotFoundError, match="none.yaml: expected a study's file, found none"):
        reading.read(reading.named("none.yaml"))


def test_pooling_pairs_questions_over_seeds():
    scores = {
        "a": {0: [1, 0, 0, 0], 3: [1, 1, 0, 0]}, "b": {0: [0, 0, 0, 0], 3: [0, 0, 0, 1]},
        "ours": {0: [1, 1, 1, 0], 3: [1, 1, 1, 1]},
    }  # fmt: skip
    a, b, ours = rows = pool("case", scores)
    assert (a.accuracy, b.accuracy, ours.accuracy) == (0.375, 0.125, 0.875) and ours.by_seed == {0: 0.75, 3: 1.0}
    assert {r.to for r in rows} == {"a"} and a.difference is None and ours.difference.value == pytest.approx(0.5)
    with pytest.raises(ValueError, match="scores: expected the same questions for all seeds of 'a'"):
        pool("case", {"a": {0: [1, 0], 1: [1]}})


def test_a_seed_that_one_method_lacks_is_left_out_of_their_difference(tmp_path):
    scores = {
        "a": {0: [1, 0, 0, 0], 3: [1, 1, 0, 0]}, "once": {3: [1, 1, 1, 0]}, "other": {4: [0, 0, 0, 0]},
        "ours": {0: [1, 1, 1, 0], 3: [1, 1, 1, 1], 4: [0, 0, 0, 0]},
    }  # fmt: skip
    _, once, other, ours = rows = pool("case", scores)
    assert {r.to for r in rows} == {"a"}  # of two seeds, if worse than `once` of one
    assert once.difference == difference_of_rates([1, 1, 1, 0], [1, 1, 0, 0]) and once.compared_seeds == [3]
    assert ours.difference == difference_of_rates([1, 1, 1, 0.5], [1, 0.5, 0, 0]) and ours.compared_seeds == [0, 3]
    assert other.difference is None and other.compared_seeds == [] and ours.accuracy == pytest.approx(7 / 12)
    write_pooled(rows, tmp_path / "methods.csv")
    with (tmp_path / "methods.csv").open() as file:
        written = {row["name"]: row for row in csv.DictReader(file)}
    assert [(row["by_seed"], row["seeds"], row["compared_seeds"]) for row in map(written.get, ("once", "ours"))] == [
        ("0.7500", "3", "3"), ("0.7500 1.0000 0.0000", "0 3 4", "0 3")
    ]  # fmt: skip
    caption = " ".join(str(pooled_table(rows).caption).split())
    assert caption == "case: difference to a; case: only seeds 0, 3 of a; case: only seed 3 of once; case: only seed 4 of other"


def test_legends_cover_no_bars(tmp_path, monkeypatch):
    kinds = {
        "perplexity": 3.0,
        "decoded_perplexity": 2.0,
        "agree_3_of_4": 0.9,
        **dict.fromkeys(pooled_costs.SECONDS.values(), 4.0),
    }
    costs, drawn = [{"case": "all", "method": name, "samples": 4, **kinds} for name in ("single", "diffmas")], []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: drawn.append(self))
    pooled_costs.plot_costs(costs, tmp_path / "results.png", "two methods")
    drawn[0].draw_without_rendering()
    legends = [axes.get_legend().get_window_extent() for axes in drawn[0].axes]
    assert len(legends) == 3 and not any(axes.bbox.overlaps(legend) for axes in drawn[0].axes for legend in legends)
    assert all(drawn[0].bbox.y1 > legend.y1 for legend in legends)


def test_the_recipe_of_passes_runs_to_its_end(tmp_path):
    """On a model of two layers: nothing is changed but how much there is to do."""
    base = tiny.save_base(tmp_path / "base", max_position_embeddings=4096)
    less = {
        "training.max_steps": 2, "training.save_steps": 1, "training.eval_steps": 1, "training.use_cpu": True, "data.limit": 32,
        "dtype": "float32", "generation.max_new_tokens": 2, "evaluation.limit": 3, "training.warmup_steps": 0,
    }  # fmt: skip
    cases = ("T = 4, J = 2", "T = 16, J = 4 of a team that was trained one by one", "T = 4, J = T")
    changes = [part for key, value in less.items() for part in ("--set", f"{key}={value}")]
    asked = [part for case in cases for part in ("--case", case)]
    call("passes", "--model", base, *asked, "--seed", 0, "--output", tmp_path / "out", "--device", "cpu", *changes)
    with (tmp_path / "out" / "costs.csv").open() as file:
        taken = {row["case"]: row["latent_steps"] for row in csv.DictReader(file) if row["method"] == "diffmas"}
    assert taken == dict(zip(cases, map(str, (3 * 3 * 4, 3 * 3 * 16, 3 * 3 * 4))))
    of = lambda case, name: json.loads((tmp_path / "out" / slug(case) / "seed0" / name).read_text())
    agents = of(cases[0], "adapter/agents.json")["agents"]
    assert [agent["passes"] for agent in agents] == [2, 2, 2, None]
    assert len({of(case, "measured_diffmas.json")["result"]["perplexity"] for case in cases}) == 3


# ---- the facts -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["facts", "facts_two", "facts_long", "facts_unseen"])
def test_facts_are_split_between_readers(name):
    chosen = task(name)
    train, test = chosen.rows("train", limit=500), chosen.rows("test")
    assert len(test) == chosen.questions and test == chosen.rows("test") and test[:3] == chosen.rows("test", limit=3)
    for row in train + test:
        parts = [row[f"facts{i}"] for i in (1, 2, 3)]
        assert " ".join(parts) == row["facts"] and row["facts"].count(".") == 3 * chosen.facts_per_reader
        person = re.search(r"did (\w+) ", row["question"])[1]
        (known,) = [part for part in parts if person in part.split()]
        told, _, value = row["answer"].partition(" Answer: ")
        assert {person, value} <= set(re.findall(r"\w+", told)) <= set(re.findall(r"\w+", known))
        assert len(set(chosen.agents())) == 4
    words = {w for row in train for w in (row["answer"].split()[-1], row["question"].split()[2])}
    others = {w for row in test for w in (row["answer"].split()[-1], row["question"].split()[2])}
    assert (not words & others) if chosen.unseen else (others <= words)
    if chosen.long:
        assert all(20 <= len(re.findall(r"\w+|[^\w\s]", row["facts1"])) <= 30 for row in test)
    rate = sum(row["answer"].split()[-1] == train[0]["answer"].split()[-1] for row in train) / len(train)
    assert rate < 0.1  # nobody is right by always saying the same


def test_the_prompts_and_verdicts_of_facts():
    chosen = task("facts")
    row = chosen.rows(limit=1)[0]
    assert [a.latent_steps for a in chosen.agents(latent_steps=2)] == [2, 2, 2, 0]
    assert "{messages}" in chosen.agents("text")[-1].prompt and chosen.agents("single") == chosen.agents()[-1:]
    assert row["facts2"] in chosen.agents()[1].render(row) and row["facts2"] not in chosen.agents()[0].render(row)
    right = chosen.scorer().correct
    value = row["answer"].split()[-1]
    assert right(row["answer"], row["answer"]) and right(f"It is the {value.title()}.", row["answer"])
    assert right(f"The attic? Answer: {value}, not the key", row["answer"]) and not right("nothing", row["answer"])
    assert not right(value + "s", row["answer"]) and not right(f"the attic, or the {value}", row["answer"])
    assert not right(f"{value}. Answer: the attic", row["answer"]) and not right(f"{value}. Answer:", row["answer"])
    first = lambda text: tuple(re.findall(r"\w+|[^\w\s]", text)[:SINKS])  # a word or a full stop is at least one token
    starts = {first(agent.render(row)) for agent in chosen.agents()[:3] for row in chosen.rows(limit=50)}
    assert len(starts) == 1  # what stays as a sink tells nothing
    for bad in ({"part": "dev"}, {"path": "rows.jsonl"}):
        with pytest.raises(ValueError, match="expected"):
            chosen.rows(**bad)
    with pytest.raises(ValueError, match="way: expected one of .*got 'magic'"):
        chosen.agents("magic")
    assert tasks.make_rows(3, 5) == tasks.make_rows(3, 5) != tasks.make_rows(3, 6)


# ---- the paper's experiments -----------------------------------------------------------------------------------------

CHAT = "{% for m in messages %}{{ m['role'] + ' : ' + m['content'] + ' ' }}{% endfor %}"
PAPERS = {
    "aime24": ("Qwen3-8B", test_tasks.AIME), "gpqa_diamond": ("Qwen3-8B", test_tasks.GPQA),
    "humaneval_plus": ("Qwen3-4B", test_tasks.HUMANEVAL), "mbpp_plus": ("Qwen3-4B", test_tasks.PLUS),
}  # fmt: skip


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_have_rows_to_train_on_or_ask_for_them_before_anything_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(study.Stages, "measure", lambda *_: pytest.fail("something ran"))
    case, _ = PAPERS[name]
    out, measured = tmp_path / "out", []
    refused = lambda *asked: " ".join(call(name, "--output", out, *asked, code=1).output.split())
    file = "data.train: expected a file, found none at none.jsonl"
    assert file in refused("--set", "data.train=none.jsonl")
    if "plus" in name:  # MBPP's training part
        assert "since aime24 has no part to train on" in refused("--set", "data.task=null", "--set", "task=aime24")
    else:
        asks = f"data.train: expected a file, since {name} has no part to train on, got none; --set data.train=FILE names one"
        assert f"case '{case}': {asks}, --set data.task=NAME takes another task's rows" in refused()
    assert not out.exists()
    monkeypatch.setattr(study.Stages, "measure", lambda self, name: measured.append(name) or {}["nothing"])
    call(name, "--output", out, "--case", case, "--set", "evaluation.limit=1", "--set", "data.task=mbpp", code=1)
    assert "diffmas" in measured


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipes_run_to_their_end(name, tmp_path, monkeypatch):
    """On a model of two layers and a published record: nothing is changed but how much there is to do, and that text agents are
    right, so that there is something to train them on."""
    pytest.importorskip("math_verify")
    case, record = PAPERS[name]
    base = tiny.save_base(tmp_path / "base", max_position_embeddings=4096)
    words = tiny.tokenizer()
    words.chat_template = CHAT
    words.save_pretrained(base)
    GenerationConfig(eos_token_id=list(range(2, 14)), pad_token_id=0).save_pretrained(base)  # half of the words end a turn
    monkeypatch.setattr(Scorer, "verdicts", lambda self, texts, *rest: [[True] * len(row) for row in texts])
    data = test_tasks.published(tmp_path / "data.jsonl", [record, record])
    other = test_tasks.published(tmp_path / "other.jsonl", [{**record, "task_id": 601}] * 2)
    less = {
        "data.train": other, "evaluation.data": data, "evaluation.samples": 2, "evaluation.max_message_tokens": 12,
        "generation.max_new_tokens": 12, "training.num_train_epochs": 1, "training.gradient_accumulation_steps": 2,
        "training.use_cpu": True, "dtype": "float32",
    }  # fmt: skip
    changes = [part for key, value in less.items() for part in ("--set", f"{key}={value}")]
    call(name, "--model", base, "--case", case, "--seed", 0, "--output", tmp_path / "out", "--device", "cpu", *changes)
    with (tmp_path / "out" / "costs.csv").open() as file:
        rows = {row["method"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["single", "text", "text_sft", "latent_mas", "stitch", "diffmas"]
    assert {name for name, row in rows.items() if int(row["latent_steps"])} == {"latent_mas", "stitch", "diffmas"}
    assert (tmp_path / "out" / "audit.png").is_file()
    with (tmp_path / "out" / "audit.csv").open() as file:
        assert {"none", "none: planner", "other: critic"} <= {row["name"] for row in csv.DictReader(file)}
