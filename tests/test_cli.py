"""The command line on a tiny model on disk, and what a config may hold."""

import csv
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import tiny_systems as tiny
import torch
import yaml
from typer.testing import CliRunner

from diffmas import MultiAgentSystem, evaluation
from diffmas.cli import build, config
from diffmas.cli import main as cli
from diffmas.cli.methods import METHODS, TRAINED
from diffmas.evaluation import Stitched, tasks

AGENTS = [{"name": a.name, "prompt": a.prompt, "latent_steps": a.latent_steps} for a in tiny.agents()]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A directory with a base model, data and a config."""
    path = tmp_path_factory.mktemp("project")
    tiny.save_base(path / "base")
    tiny.write_jsonl(path / "rows.jsonl", tiny.rows(10))
    settings = {
        "model": "base", "output_dir": "run", "agents": AGENTS, "lora": {"r": 2, "alpha": 4},
        "data": {"train": "rows.jsonl", "validation_fraction": 0.2, "seed": 1},
        "training": {
            "num_train_epochs": 2, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "learning_rate": "1e-2",
            "use_cpu": True,
            "disable_tqdm": True,
        },
        "early_stopping_patience": 2, "gradient_report_steps": 2, "explosion_factor": 1000,
        "generation": {"max_new_tokens": 4, "temperature": 0.6},
        "evaluation": {"samples": 2, "batch_size": 4, "max_message_tokens": 3},
    }  # fmt: skip
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    return path


def call(*arguments, code: int = 0):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture(scope="module")
def trained(project):
    """What `diffmas train` printed."""
    torch.set_num_threads(1)
    return call("train", project / "config.yaml").output


def test_train_says_what_it_does_and_saves(project, trained):
    assert "parameters (" in trained and "shared, r=2, alpha=4" in trained
    assert "planner (T=2), critic (T=2) -> solver" in trained and "8 rows, 2 for validation" in trained
    assert "best eval_loss" in trained and "4 steps" in trained
    names = {p.name for p in (project / "run").iterdir()} - {"README.md", "special_tokens_map.json"}
    assert names == {
        "adapter_config.json", "adapter_model.safetensors", "agents.json", "card.json", "checkpoint-2", "checkpoint-4", "runs",
        "gradients.csv", "gradients.png", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert list((project / "run").glob("runs/**/events.out.tfevents.*"))


def test_resume_goes_on_from_the_last_whole_checkpoint(project, trained):
    weights = project / "run" / "adapter_model.safetensors"
    state = project / "run" / "checkpoint-4" / "trainer_state.json"
    before = weights.read_bytes()
    state.write_text(state.read_text()[:100])
    weights.unlink()
    assert "4 steps" in call("train", project / "config.yaml", "--resume").output
    assert weights.read_bytes() == before and json.loads(state.read_text())["global_step"] == 4


def test_generate_loads_adapter_and_agents(project, trained):
    options = ("--question", "where is the key", "--max-new-tokens", 5, "--temperature", 0, "--device", "cpu")
    output = call("generate", "--adapter", project / "run", *options).stdout
    system = MultiAgentSystem.from_pretrained(project / "run", tiny.model(), tiny.tokenizer())
    assert output.rstrip("\n") == system.generate(["where is the key"], 5, temperature=0)[0][0]
    moved = call("generate", "--adapter", project / "run", "--model", project / "base", *options, "--samples", 2).stdout
    assert moved == output * 2
    fields = ("--field", "question=where is the key", "--device", "cpu", "--max-new-tokens", 5, "--temperature", 0)
    assert call("generate", "--adapter", project / "run", *fields).stdout == output


def test_what_nobody_says_is_the_models_own(project, trained, tmp_path):
    """In `generate`, in a config without a section generation, and in what is written to be trained on."""
    shutil.copytree(project / "base", tmp_path / "base")
    own = {"do_sample": True, "top_k": 1, "max_new_tokens": 3, "transformers_version": "5.0.0"}
    (tmp_path / "base" / "generation_config.json").write_text(json.dumps(own))
    run = ("--adapter", project / "run", "--device", "cpu")
    system = MultiAgentSystem.from_pretrained(project / "run", tmp_path / "base")
    greedy = system.generate(["where is the key"], 3, temperature=0)[0][0]
    options = ("--model", tmp_path / "base", "--question", "where is the key")
    assert call("generate", *run, *options).stdout.rstrip("\n") == greedy
    assert call("generate", *run, *options, "--max-new-tokens", 2).stdout.rstrip("\n") == " ".join(greedy.split()[:2])
    assert [name for name, value in vars(config.Generation()).items() if value is not None] == ["seed"]
    path = settings_of(project, tmp_path, model=str(tmp_path / "base"), generation={}, evaluation={"methods": ["diffmas"]})
    call("evaluate", path, *run, "--output", tmp_path / "out")
    rows = [json.loads(line) for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    questions = [row["fields"] for row in rows]
    assert [row["given"]["diffmas"] for row in rows] == system.generate(questions, 3, temperature=0)
    conditions = evaluation.audit(system, tiny.rows(2))
    assert conditions[0].texts == system.generate([row["question"] for row in tiny.rows(2)], 3, temperature=0)
    turns, _ = evaluation.TextAgents(system, 5).write(questions)
    assert [turn.most for turn in turns] == [5, 5, 3] and max(turns[-1].lengths) == 3


def test_evaluate_compares(project, trained):
    result = call("evaluate", project / "config.yaml", "--adapter", project / "run", "--device", "cpu")
    assert all(name in result.stdout for name in ("single", "text", "latent_mas", "diffmas", "perplexity"))
    directory = project / "run" / "evaluation"
    assert {p.name for p in directory.iterdir()} == {
        "results.csv", "entropy.csv", "results.png", "answers.jsonl", "made_with.json",
    }  # fmt: skip
    assert len((directory / "answers.jsonl").read_text().splitlines()) == 2
    for row in read_csv(directory / "results.csv"):
        # Two samples of each of two questions: pass@1 is the accuracy, and pass@2 counts questions with a right one.
        assert row["pass_at_1"] == row["accuracy"] and float(row["pass_at_1"]) <= float(row["pass_at_2"]) <= 1
    made = json.loads((directory / "made_with.json").read_text())
    assert made["versions"]["torch"] and "commit" in made and made["seed"] == 0 and made["data"] == "rows.jsonl"
    said = (project / "run" / "README.md").read_text()
    row = read_csv(directory / "results.csv")[-1]
    assert f"| rows.jsonl | diffmas | {100 * float(row['accuracy']):.1f} | [" in said and "- seed: 42" in said
    assert "- validation rows: 2" in said and f"torch {made['versions']['torch']}" in said
    bare = call("evaluate", project / "config.yaml", "--output", project / "bare", "--device", "cpu").stdout
    assert "latent_mas" in bare and len((project / "bare" / "results.csv").read_text().splitlines()) == 4


def test_generate_answers_a_file_and_goes_on(project, trained, tmp_path):
    """With a cut last line, as a kill leaves it, the file is in the end what it would have been."""
    rows = [{"question": row["question"], "id": i} for i, row in enumerate(tiny.rows(5))]
    tiny.write_jsonl(tmp_path / "questions.jsonl", rows)
    run = ("generate", "--adapter", project / "run", "--device", "cpu", "--seed", 3, "--max-new-tokens", 4, "--samples", 2)
    files = ("--questions", tmp_path / "questions.jsonl", "--output", tmp_path / "out" / "answers.jsonl")
    call(*run, *files, "--batch-size", 2)
    whole = (tmp_path / "out" / "answers.jsonl").read_text()
    lines = [json.loads(line) for line in whole.splitlines()]
    assert [{k: line[k] for k in ("question", "id")} for line in lines] == rows and all(len(x["answers"]) == 2 for x in lines)
    assert len({tuple(x["answers"]) for x in lines}) > 1
    (tmp_path / "out" / "answers.jsonl").write_text("".join(whole.splitlines(True)[:3]) + whole.splitlines()[3][:9])
    call(*run, *files, "--batch-size", 3)
    assert (tmp_path / "out" / "answers.jsonl").read_text() == whole
    made = json.loads((tmp_path / "out" / "answers.jsonl.made_with.json").read_text())
    assert (made["seed"], made["samples"], len(made["made_with"])) == (3, 2, 1) and made["made_with"][0]["versions"]["torch"]
    assert "expected answers of max_new_tokens 5, found 4" in call(*run[:-3], 5, *run[-2:], *files, code=1).output
    (tmp_path / "out" / "answers.jsonl").write_text("".join(whole.splitlines(True)[:3]))
    call(*run[:5], *run[7:], *files)
    assert (tmp_path / "out" / "answers.jsonl").read_text() == whole, "the seed is the earlier one"
    tiny.write_jsonl(tmp_path / "questions.jsonl", rows[1:])
    assert "answers.jsonl:1: expected the answers to line 1" in call(*run, *files, code=1).output
    assert (tmp_path / "out" / "answers.jsonl").read_text() == whole, "nothing that was computed is lost"
    assert "expected both or none" in call(*run, *files[:2], code=1).output
    assert "expected it without --question" in call(*run, *files, "--question", "a", code=1).output
    tiny.write_jsonl(tmp_path / "questions.jsonl", [{"other": 1}])
    assert "questions.jsonl:1" in call(*run, *files, code=1).output


def test_answers_go_on_by_the_same_team_alone(project, trained, tmp_path, monkeypatch):
    """And what they were made with is there, and is so. Nothing is loaded before that is known."""
    shutil.copytree(project / "run", tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*", "runs"))
    tiny.write_jsonl(tmp_path / "questions.jsonl", [{"question": row["question"]} for row in tiny.rows(2)])
    run = ("generate", "--adapter", tmp_path / "run", "--device", "cpu", "--max-new-tokens", 2, "--questions")
    run = (*run, tmp_path / "questions.jsonl", "--output")
    output, beside = tmp_path / "a.jsonl", tmp_path / "a.jsonl.made_with.json"
    call(*run, output)
    call(*run, tmp_path / "a.txt")
    assert (tmp_path / "a.txt.made_with.json").exists() and beside.exists()
    whole, said = output.read_text(), beside.read_text()
    monkeypatch.setattr(MultiAgentSystem, "from_pretrained", lambda *_, **__: pytest.fail("loaded"))
    made = {"versions": {}, "commit": "another", "machine": "m"}
    with monkeypatch.context() as patched:
        patched.setattr("diffmas.cli.made_with.made_with", lambda: made)
        call(*run, output)
    assert (output.read_text(), beside.read_text()) == (whole, said), "all was answered, by nothing of now"
    output.write_text(whole.splitlines(True)[0])
    (tmp_path / "run" / "card.json").write_text("{}")  # tells of the team, and is none of it
    weights = tmp_path / "run" / "adapter_model.safetensors"
    before = weights.read_bytes()
    weights.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))  # as training into the same directory would
    line = call(*run, output, code=1).output
    assert "a.jsonl.made_with.json: expected answers of team '" in line and line.count("\n") == 1
    weights.write_bytes(before)
    beside.write_text(json.dumps({k: v for k, v in json.loads(said).items() if k != "top_p" and k != "model"} | {"samples": 3}))
    assert "expected answers of samples None, found 3" in call(*run, output, code=1).output
    beside.unlink()
    line = call(*run, output, code=1).output
    assert "a.jsonl.made_with.json: expected what the earlier answers were made with, found none" in line


def test_no_right_answer_at_all_is_explained(project, tmp_path):
    """Two answers are shown, and what decides; a single right one needs no explanation."""
    rows = [{"question": "where is the key", "answer": f"nowhere {i}"} for i in range(3)]
    data = str(tiny.write_jsonl(tmp_path / "rows.jsonl", rows))
    path = settings_of(project, tmp_path, evaluation={"data": data, "methods": ["single", "latent_mas"]})
    output = call("evaluate", path, "--output", tmp_path / "out", "--device", "cpu").stdout
    assert "single, latent_mas: no answer is right. Of single:" in output and output.count("was expected") == 2
    assert "where 'nowhere 0' was expected" in output and "evaluation.match (exact | contains | math)" in output
    everything = {"data": data, "methods": ["single"], "extract": "()"}
    path = settings_of(project, tmp_path, evaluation=everything)
    assert "no answer is right" not in call("evaluate", path, "--output", tmp_path / "out", "--device", "cpu").stdout


def test_trained_baselines_go_to_directories_of_their_own_and_are_compared(project, trained, tmp_path):
    rows = str(project / "rows.jsonl")
    judged = {"samples": 30, "batch_size": 8, "max_message_tokens": 25, "extract": "(kitchen|cellar|garden|attic|garage)"}
    path = settings_of(
        project, tmp_path, generation={"max_new_tokens": 25, "temperature": 5.0, "top_p": 1.0}, data={"train": rows},
        evaluation={"data": rows, "limit": 2, **judged}, system={"adapter_scope": "final_only"}, early_stopping_patience=None,
        training={"max_steps": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-2, "use_cpu": True},
    )  # fmt: skip
    for method in ("text_sft", "stitch"):
        assert "shared, r=2, alpha=4" in call("train", path, "--method", method).output
    written = json.loads((tmp_path / "run-text_sft" / "right_turns_train.json").read_text())
    assert written and {row["agent"] for row in written} == {"planner", "critic", "solver"}
    (tmp_path / "run-text_sft" / "right_turns_train.json").write_text(json.dumps(written[:4]))
    assert "data          │ 4 rows" in call("train", path, "--method", "text_sft", "--resume").output  # not written anew
    for checkpoint in (tmp_path / "run-text_sft").glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    assert "step 0, with what text agents wrote before" in call("train", path, "--method", "text_sft", "--resume").stderr
    directories = ("--text-sft", tmp_path / "run-text_sft", "--stitch", tmp_path / "run-stitch", "--device", "cpu")
    call("evaluate", path, "--adapter", project / "run", *directories)
    lines = (tmp_path / "run" / "evaluation" / "results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == ["single", "text", "text_sft", "latent_mas", "stitch", "diffmas"]
    perplexities = [line.split(",")[lines[0].split(",").index("perplexity")] for line in lines[1:]]
    assert len(set(perplexities)) == 6
    call("evaluate", path, *directories, "--output", tmp_path / "bare")  # the adapters are not those of the bare methods
    bare = (tmp_path / "bare" / "results.csv").read_text().splitlines()[1:]
    assert [line.split(",")[lines[0].split(",").index("perplexity")] for line in bare] == perplexities[:5]
    assert "--method: expected one of ('diffmas', 'text_sft', 'stitch', 'c2c'), got 'sft'" in call(
        "train", path, "--method", "sft", code=1
    ).output  # fmt: skip
    path = settings_of(project, tmp_path, evaluation={"methods": ["text_sft"]})
    assert "'text_sft' needs --text-sft DIR" in call("evaluate", path, "--device", "cpu", code=1).output


def test_attention_dropout_is_told_before_anything_runs(project, tmp_path):
    """Models with it are patched, for they answer without it."""
    shutil.copytree(project / "base", tmp_path / "base")
    file = tmp_path / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "attention_dropout": 0.1}))
    path = settings_of(project, tmp_path, model=str(tmp_path / "base"), output_dir=str(tmp_path / "out"))
    for method in TRAINED[:3]:
        said = call("train", path, "--method", method, code=1).output
        assert "expected attention dropout 0 in training mode, got 0.1" in said and "config.json" in said
        assert "text agents answer" not in said
    assert not (tmp_path / "out").exists()


def test_two_processes_write_right_turns_once(project, tmp_path):
    path = settings_of(
        project, tmp_path, generation={"max_new_tokens": 25, "temperature": 5.0, "top_p": 1.0},
        data={"train": str(project / "rows.jsonl")}, early_stopping_patience=None, gradient_report_steps=0,
        evaluation={"samples": 30, "max_message_tokens": 25, "extract": "(kitchen|cellar|garden|attic|garage)"},
        training={"max_steps": 1, "use_cpu": True, "ddp_backend": "gloo", "report_to": [], "save_strategy": "no"},
    )  # fmt: skip
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "diffmas.cli.main"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    done = subprocess.run(
        [*command, "train", path, "--method", "text_sft"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("text agents answer 10 questions (train)") == 1 and "1 steps" in done.stdout


def test_an_adapter_has_the_agents_that_were_asked_for(project, trained, tmp_path):
    """What an adapter was not trained with is not taken for it, and not passed over in silence."""
    adapter = ("--adapter", project / "run", "--device", "cpu")
    other = [{**AGENTS[0], "latent_steps": 5}, *AGENTS[1:]]
    for change, message in (
        ({"agents": other}, "run: expected latent_steps 5 of agent 'planner', got 2"),
        ({"agents": AGENTS[1:]}, "run: expected agents ['critic', 'solver'], got ['planner', 'critic', 'solver']"),
        ({"system": {"trace_content": "latent_only"}}, "run: expected trace_content 'latent_only', got 'all'"),
    ):
        for command in ("evaluate", "audit"):
            output = call(command, settings_of(project, tmp_path, **change), *adapter, code=1).output
            assert message in output and len(output.strip().splitlines()) == 1
    task = ("evaluate", "--task", "facts", "--model", project / "base", *adapter, "--latent-steps")
    output = call(*task, 3, code=1).output
    assert "--latent-steps: expected none with --adapter, whose agents have T = 2, 2, got 3" in output
    output = call(*task, 2, "--text-sft", tmp_path / "none", "--methods", "text", code=1).output
    assert "none: expected a directory with agents.json" in output  # the same T is taken


def test_a_baselines_adapter_is_that_baselines(project, trained, tmp_path):
    bare = build.trained_system(config.load(project / "config.yaml"), None)
    with pytest.raises(ValueError, match="run: expected class 'diffmas.*Writers', got 'diffmas.*MultiAgentSystem'"):
        build.methods_of(config.load(project / "config.yaml"), bare, ["text_sft"], {"text_sft": project / "run"})
    with pytest.raises(ValueError, match="run: expected class 'diffmas.*Stitched', got 'diffmas.*MultiAgentSystem'"):
        build.methods_of(config.load(project / "config.yaml"), bare, ["stitch"], {"stitch": project / "run"})
    team = build.untrained_system(config.load(project / "config.yaml"))
    Stitched(team.model, team.tokenizer, team.agents).save_pretrained(tmp_path / "stitched")
    for change, message in (
        ({"agents": [*AGENTS[:1], {**AGENTS[1], "latent_steps": 7}, AGENTS[2]]}, "expected latent_steps 7 of agent 'critic'"),
        ({"system": {"sinks": 1}}, "expected sinks 1, got 4"),
        ({"system": {"trace_content": "latent_only"}}, "expected trace_content 'latent_only', got 'all'"),
    ):
        settings = config.load(settings_of(project, tmp_path, **change))
        with pytest.raises(ValueError, match=f"stitched: {message}"):
            build.methods_of(settings, build.trained_system(settings, None), ["stitch"], {"stitch": tmp_path / "stitched"})
    with pytest.raises(ValueError, match="got one of diffmas.evaluation.baselines.Stitched; load it by that class"):
        build.trained_system(config.load(project / "config.yaml"), tmp_path / "stitched")


def test_text_agents_of_a_task_keep_system_messages(project):
    """A task's own text prompts stand for its agents alone, not for others that have a system message more."""
    settings = config.Config(str(project / "base"), task="gsm8k")
    system = build.trained_system(settings, None)
    assert build.text_team(settings, system) is not system
    assert build.alone(settings) == tasks.task("gsm8k").agents("single")[0]
    system.agents[1] = settings.agents[1] = dataclasses.replace(system.agents[1], system="Doubt everything.")
    assert build.text_team(settings, system) is system and build.alone(settings) is settings.agents[-1]


def test_audit_says_who_communicates(project, trained, tmp_path):
    result = call("audit", project / "config.yaml", "--adapter", project / "run", "--device", "cpu", "--kind", "latent")
    assert "no evidence that the team communicates" in result.stdout and "other: critic" in result.stdout
    assert {p.name for p in (project / "run" / "audit").iterdir()} == {"audit.csv", "audit.png", "made_with.json"}
    of_two = ("--device", "cpu", "--limit", 2, "--output", tmp_path)
    result = call("audit", settings_of(project, tmp_path, evaluation={"data": str(project / "rows.jsonl")}), *of_two)
    assert "2 questions" in result.stdout and "10 questions" not in result.stdout


def read_csv(path) -> list[dict]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def settings_of(project, path, **changes):
    """The project's config with changes, in a directory of its own."""
    settings = yaml.safe_load((project / "config.yaml").read_text())
    settings |= {"model": str(project / "base"), "data": {**settings["data"], "train": str(project / "rows.jsonl")}, **changes}
    (path / "config.yaml").write_text(yaml.safe_dump(settings))
    return path / "config.yaml"


def test_a_method_that_fails_is_named_and_the_others_are_written(project, trained, tmp_path):
    # Messages of 100 tokens do not fit in the model's context of 128.
    path = settings_of(project, tmp_path, evaluation={"max_message_tokens": 100})
    result = call("evaluate", path, "--adapter", project / "run", "--device", "cpu", code=1)
    assert "error: text: questions[0]" in result.stderr and "has single, latent_mas, diffmas" in result.stderr.splitlines()[-1]
    directory = tmp_path / "run" / "evaluation"
    lines = (directory / "results.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines] == ["method", "single", "latent_mas", "diffmas"]
    given = json.loads((directory / "answers.jsonl").read_text().splitlines()[0])["given"]
    assert list(given) == ["single", "latent_mas", "diffmas"] and (directory / "results.png").is_file()


def test_an_earlier_runs_checkpoints_are_not_lost(project, tmp_path):
    path, earlier = settings_of(project, tmp_path), tmp_path / "run" / "checkpoint-7"
    earlier.mkdir(parents=True)
    output = call("train", path, code=1).output
    assert "expected no checkpoints of an earlier run, found checkpoint-7" in output and earlier.is_dir()
    assert "expected it without --resume" in call("train", path, "--resume", "--overwrite", code=1).output
    assert "4 steps" in call("train", path, "--overwrite").output
    assert {p.name for p in (tmp_path / "run").glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}


def test_help_names_all_methods():
    said = re.sub(r"[│\s]+", " ", call("evaluate", "--help").output)  # in columns
    assert f"some of {', '.join(METHODS)}, with commas between" in said


def test_a_loss_that_is_nan_is_one_line(project, tmp_path, monkeypatch):
    from diffmas.training import NonFiniteLoss, Trainer

    def train(self, **_):
        raise NonFiniteLoss("step 1: expected a finite loss")

    monkeypatch.setattr(Trainer, "train", train)
    output = call("train", settings_of(project, tmp_path), code=1).output
    assert "error: step 1: expected a finite loss" in output and "Traceback" not in output


def test_env_says_what_is_there():
    from diffmas import ops

    output = call("env").output
    for name in (*ops.available(), "torch", "transformers", "peft", "accelerate", "python", "C++ extension", "CUDA devices"):
        assert name in output
    assert torch.__version__.split("+")[0] in output
    found = json.loads(call("env", "--json").stdout)
    assert found["versions"]["torch"] == torch.__version__ and found["backends"]["reference"]["missing"] is None
    assert found["extension"]["loaded"] == (found["extension"]["error"] is None) == (ops.available()["cpu"] is None)


# ---- errors are one line ---------------------------------------------------------------------------------------------


def test_errors_are_one_line(project, tmp_path):
    assert "error:" in (output := call("train", tmp_path / "none.yaml", code=1).output) and "found none" in output
    (tmp_path / "bad.yaml").write_text("model: [")
    assert "bad.yaml: expected YAML" in call("train", tmp_path / "bad.yaml", code=1).output
    assert (
        "expected a directory with agents.json, found none"
        in call("generate", "--adapter", tmp_path, "--question", "a", code=1).output
    )
    assert "--field: expected name=text" in call("generate", "--adapter", tmp_path, "--field", "a", code=1).output
    assert "Traceback" not in output and len(output.strip().splitlines()) == 1


def test_a_damaged_agents_file_is_one_line(project, trained, tmp_path):
    shutil.copytree(project / "run", tmp_path / "run")
    agents = tmp_path / "run" / "agents.json"
    agents.write_text(json.dumps({**json.loads(agents.read_text()), "extra": 1}))
    output = call("generate", "--adapter", tmp_path / "run", "--question", "a", "--device", "cpu", code=1).output
    assert "agents.json: expected the keys" in output and "extra" in output and len(output.strip().splitlines()) == 1


def test_an_adapter_of_another_model_is_refused(project, trained, tmp_path):
    tiny.save_base(tmp_path / "other", seed=9)
    arguments = ("generate", "--adapter", project / "run", "--model", tmp_path / "other", "--question", "a", "--device", "cpu")
    assert "expected agents of this base model" in call(*arguments, code=1).output


# ---- config ----------------------------------------------------------------------------------------------------------


def test_latents_unlike_tokens_are_told_before_training(project, tmp_path):
    system, limits = {"realign": "none"}, {"methods": ["latent_mas"], "limit": 1}
    path = settings_of(project, tmp_path, system=system, evaluation=limits, output_dir=str(tmp_path / "run"))
    assert "times a token's norm; try realign='ridge'" in call("train", path, "--overwrite").output
    assert "times a token's norm" in call("evaluate", path, "--output", tmp_path / "out", "--device", "cpu").output
    path = settings_of(project, tmp_path, evaluation=limits, output_dir=str(tmp_path / "run"))
    assert "token's norm" not in call("evaluate", path, "--output", tmp_path / "out", "--device", "cpu").output
