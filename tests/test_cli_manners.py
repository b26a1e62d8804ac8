"""What a command says besides its results: JSON for machines, how an interrupted one goes on, errors before a model is loaded,
and no warnings."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_systems as tiny
import torch
import typer
import yaml
from test_cli import AGENTS, call
from typer.testing import CliRunner

from diffmas import Trainer, evaluation, patch_model
from diffmas.cli import main as cli
from diffmas.cli.terminal import Partly, explained, with_json
from diffmas.models import load as loading


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.save_base(tmp_path_factory.mktemp("model") / "base")


@pytest.fixture
def config(base, tmp_path):
    """Writes a config with changes."""
    tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(4))

    def write(**changes):
        settings = {
            "model": str(base), "output_dir": "run", "agents": AGENTS, "lora": {"r": 2}, "data": {"train": "rows.jsonl"},
            "training": {
                "max_steps": 3, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 1, "save_strategy": "steps",
                "save_steps": 1, "use_cpu": True, "report_to": [],
            },
            "generation": {"max_new_tokens": 2}, "evaluation": {"data": "rows.jsonl", "methods": ["single", "latent_mas"]},
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**settings, **changes}))
        return tmp_path / "config.yaml"

    return write


# ---- JSON ------------------------------------------------------------------------------------------------------------


def test_results_as_json(config, tmp_path):
    run = call("evaluate", config(), "--json", "--output", tmp_path / "out", "--device", "cpu")
    said = json.loads(run.stdout, parse_constant=pytest.fail)
    assert [r["method"] for r in said["results"]] == ["single", "latent_mas"] and said["results"][0]["questions"] == 4
    assert said["made_with"]["versions"]["torch"] and said["made_with"]["seed"] == 0 and "commit" in said["made_with"]
    assert json.loads((tmp_path / "out" / "made_with.json").read_text()) == said["made_with"]
    run = call("audit", config(), "--json", "--output", tmp_path / "audit", "--device", "cpu", "--limit", 2)
    own, none, *_ = json.loads(run.stdout)["conditions"]
    assert (own["message"], own["agent"], own["gain"], none["message"]) == ("own", None, None, "none")
    assert isinstance(none["accuracy"], float) and isinstance(none["gain_low"], float) and "own" in run.stderr
    assert json.loads((tmp_path / "audit" / "made_with.json").read_text()) == json.loads(run.stdout)["made_with"]
    assert "gsm8k" in [t["name"] for t in json.loads(call("tasks", "--json").stdout)["tasks"]]


def test_training_and_answers_as_json(config, tmp_path):
    """All else that a command, or transformers in it, prints is on stderr."""
    run = call("train", config(), "--json")
    said = json.loads(run.stdout, parse_constant=pytest.fail)
    assert (said["steps"], said["rows"], said["rows_a_step"]) == (3, 4, [1, 1, 1]) and said["agents"][0]["latent_steps"] == 2
    assert said["training_loss"] > 0 and said["trainable"] < said["parameters"] and said["made_with"]["seed"] == 42
    assert "diffmas train" in run.stderr and "train_loss" in run.stderr
    asked = ("--question", "where is the key", "--max-new-tokens", 2, "--samples", 2, "--device", "cpu")
    run = call("generate", "--adapter", tmp_path / "run", *asked, "--json")
    said = json.loads(run.stdout)
    assert said["fields"] == {"question": "where is the key"} and said["made_with"]["versions"]["torch"]
    assert "".join(text + "\n" for text in said["answers"]) == run.stderr[-sum(len(text) + 1 for text in said["answers"]) :]
    again = call("generate", "--adapter", tmp_path / "run", *asked, "--seed", said["made_with"]["seed"], "--json")
    assert json.loads(again.stdout) == said, "a seed that nobody gave is told"


def test_every_command_has_json_and_says_what_its_options_are():
    for name, command in typer.main.get_command(cli.app).commands.items():
        assert ("--json" in [x for p in command.params for x in p.opts]) == (name not in ("schema", "serve")), name
        assert command.help and all(p.help for p in command.params), name


def test_what_a_failed_command_has_is_json_all_the_same(capsys):
    def fails(number: int):
        print("a table")
        raise Partly({"done": number}, ValueError("number: expected 2"))

    with pytest.raises(typer.Exit):
        explained(with_json(fails))(1, as_json=True)
    said = capsys.readouterr()
    assert json.loads(said.out) == {"done": 1} and said.err == "a table\nerror: number: expected 2\n"
    with pytest.raises(typer.Exit):
        explained(with_json(fails))(1)
    assert capsys.readouterr() == ("a table\n", "error: number: expected 2\n")


def test_numbers_that_json_does_not_know_are_null(capsys):
    from diffmas.cli.terminal import print_json

    print_json({"a": [float("inf"), 1.5], "b": (float("nan"), "x")})
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail) == {"a": [None, 1.5], "b": [None, "x"]}
    print_json({"files": [Path("a") / "b"]})
    assert json.loads(capsys.readouterr().out) == {"files": [str(Path("a") / "b")]}
    with pytest.raises(TypeError, match="expected what JSON has, or a Path, got Tensor"):
        print_json({"loss": torch.tensor(1.0)})


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def interrupted(*arguments) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 130, (result.output, result.exception)
    return result.output


def test_an_interrupted_training_says_how_it_goes_on(config, tmp_path, monkeypatch):
    path, step = config(), Trainer.training_step
    calls = []

    def stop_at(n):
        def once(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == n:
                raise KeyboardInterrupt
            return step(self, *args, **kwargs)

        calls.clear()
        monkeypatch.setattr(Trainer, "training_step", once)

    stop_at(1)
    said = interrupted("train", path)
    assert f"no checkpoint was due yet: `diffmas train {path}` starts again" in said and "Traceback" not in said
    stop_at(3)
    said = interrupted("train", path)
    assert f"`diffmas train {path} --resume` goes on from {tmp_path / 'run' / 'checkpoint-2'}" in said
    assert "3 steps" in call("train", path, "--resume").output


def test_an_interrupted_training_goes_on_from_no_earlier_run(config, tmp_path, monkeypatch):
    path, where = config(), tmp_path / "run" / "checkpoint-3"
    call("train", path)

    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("diffmas.cli.train.trainer_of", stop)
        said = interrupted("train", path, "--overwrite")
    assert where.is_dir() and f"no checkpoint was due yet: `diffmas train {path} --overwrite` starts again" in said
    with monkeypatch.context() as patched:  # its own, of the same name
        patched.setattr("diffmas.cli.commands.train._say_in_the_card", stop)
        said = interrupted("train", path, "--overwrite")
    assert f"`diffmas train {path} --resume` goes on from {where}" in said


def test_an_interrupted_evaluation_keeps_the_methods_that_were_done(config, tmp_path, monkeypatch):
    path, evaluate = config(), evaluation.evaluate

    def once(*args, **kwargs):
        def save(results):
            args[6](results)
            raise KeyboardInterrupt

        return evaluate(*args[:6], save, *args[7:], **kwargs)

    monkeypatch.setattr(evaluation, "evaluate", once)
    said = interrupted("evaluate", path, "--output", tmp_path / "out", "--device", "cpu")
    assert f"interrupted; the methods that were done are in {tmp_path / 'out'}; " in said
    assert len((tmp_path / "out" / "results.csv").read_text().splitlines()) == 2


# By command: its arguments, what it is interrupted in, and what it says then. IN: the test's directory; PORT: a free one.
NOTHING = "nothing is kept: the same command starts again"
INTERRUPTED = {
    "demo": ("--output IN/demo", "diffmas.demo.run", NOTHING),
    "init": ("gsm8k --output IN/new.yaml", "diffmas.evaluation.tasks.task", NOTHING),
    "schema": ("", "diffmas.cli.schema.schema", NOTHING),
    "train": ("IN/config.yaml", "diffmas.cli.train.trainer_of", "no checkpoint was due yet: `diffmas train IN/config.yaml`"),
    "generate": (
        "--adapter IN/team --questions IN/rows.jsonl --output IN/answers.jsonl",
        "diffmas.agents.system.MultiAgentSystem.from_pretrained",
        "what is answered is in IN/answers.jsonl, and the same command goes on",
    ),
    "tasks": ("", "diffmas.cli.commands.measure.console.print", NOTHING),
    "evaluate": ("IN/config.yaml --output IN/out --device cpu", "diffmas.evaluation.evaluate", NOTHING),
    "audit": ("IN/config.yaml --device cpu", "diffmas.evaluation.audit", "an audit keeps nothing: the same command starts"),
    "study": ("facts --output IN/study", "diffmas.cli.study.run", "what is done is in IN/study, and the same command goes on"),
    "view": ("IN/team --question x", "diffmas.agents.system.MultiAgentSystem.from_pretrained", NOTHING),
    "plan": ("--model x --gpus 2", "diffmas.models.load.load_config", NOTHING),
    "serve": ("IN/team --engine own --port PORT", "diffmas.serving.team.Team.load", NOTHING),
    "export": ("IN/team IN/exported", "diffmas.serving.export.export", "nothing is written to IN/exported: the same command"),
    "bench": ("--compare HEAD", "diffmas.benchmarks.compare.compare", NOTHING),
    "env": ("", "diffmas.cli.commands.machine._found", NOTHING),
}  # fmt: skip


def test_every_interrupted_command_says_what_is_kept(config, tmp_path, monkeypatch):
    def stop(*args, **kwargs):
        raise KeyboardInterrupt

    assert {command.name or command.callback.__name__ for command in cli.app.registered_commands} == INTERRUPTED.keys()
    config()
    tiny.system().save_pretrained(tmp_path / "team")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    filled = lambda text: text.replace("IN/", f"{tmp_path}/").replace("PORT", port)
    for name, (arguments, where, says) in INTERRUPTED.items():
        if name == "serve" and importlib.util.find_spec("fastapi") is None:
            continue
        with monkeypatch.context() as patched:
            patched.setattr(where, stop)
            said = interrupted(name, *filled(arguments).split())
        assert f"interrupted; {filled(says)}" in said, (name, said)


def test_an_interrupted_demo_says_where_its_adapter_is(tmp_path, monkeypatch):
    def trained(output, *_):
        (output / "adapter").mkdir(parents=True)
        (output / "adapter" / "agents.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr("diffmas.demo.run", trained)
    assert f"interrupted; the trained adapter is in {tmp_path / 'run' / 'adapter'}: " in interrupted(
        "demo", "--output", tmp_path / "run"
    )  # fmt: skip


# ---- errors, warnings, costs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"system": {"realign": "magic"}}, "realign: expected one of"),
        ({"system": {"last_k": 2}}, "last_k: expected 1 to 3"),
        ({"system": {"temperature": 0.0}}, "temperature: expected a positive number"),
        ({"agents": [AGENTS[0], AGENTS[0]]}, "agents: expected distinct names"),
        ({"agents": [AGENTS[0], {**AGENTS[2], "reads": []}]}, "nobody; it would think in vain"),
        ({"agents": [{**AGENTS[0], "prompt": "{nothing}"}, AGENTS[2]]}, "nothing"),
        ({"evaluation": {"methods": ["text_sft"], "data": "rows.jsonl"}}, "'text_sft' needs --text-sft DIR"),
        ({"training": {"max_step": 3}}, "'max_steps', or another of"),
        ({"generation": {"temperature": -1}}, "generation.temperature: expected 0 or more"),
        ({"lora": {"r": 0}}, "lora.r: expected at least 1, got 0"),
        ({"gradient_report_steps": -3}, "gradient_report_steps: expected 0 or more"),
        ({"evaluation": {"samples": 0}}, "evaluation.samples: expected at least 1, got 0"),
        ({"evaluation": {"match": "exat"}}, "evaluation.match: expected one of"),
        ({"evaluation": {"extract": "boxd"}}, "'boxd'; boxed?"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_a_wrong_config_is_told_before_a_model_is_loaded(config, monkeypatch, changes, says):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    path = config(**changes)
    assert says in call("evaluate", path, "--device", "cpu", code=1).output
    if "text_sft" not in says:
        assert says in call("train", path, code=1).output


@pytest.mark.parametrize(
    "training, says",
    [
        ({"eval_strategy": "steps", "eval_steps": 2, "save_steps": 3}, "save_steps: expected a multiple of eval_steps"),
        ({"eval_steps": 2, "save_steps": 3}, "save_steps: expected a multiple of"),
        ({"report_to": "dvclive"}, "training.report_to: expected some of what is installed"),
        ({"lr_scheduler_type": "foo"}, "training: foo is not a valid SchedulerType"),
    ],
)  # fmt: skip
def test_a_wrong_training_section_is_told_before_a_model_is_loaded(config, monkeypatch, training, says):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    path = config(training={**training, "use_cpu": True}, data={"train": "rows.jsonl", "validation_fraction": 0.5})
    assert says in call("train", path, code=1).output


def test_a_device_that_is_not_here_is_told_before_a_model_is_loaded(config, monkeypatch):
    monkeypatch.setattr(loading, "load_model", lambda *a, **k: pytest.fail("the model was loaded"))
    for name in ("foo", "cuda:99"):
        assert f"--device: expected cpu, cuda or cuda:1, of what is here, got '{name}'" in call(
            "evaluate", config(), "--device", name, code=1
        ).output  # fmt: skip


def test_a_field_that_a_question_lacks_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    tiny.system().save_pretrained(tmp_path)
    monkeypatch.setattr("diffmas.agents.system.MultiAgentSystem.from_pretrained", lambda *a, **k: pytest.fail("loaded"))
    for command in (("generate", "--adapter"), ("view",)):
        output = call(*command, tmp_path, "--field", "where=here", code=1).output
        assert "needs the field {question}, the question has ['where']; --question is the field question, --field" in output


def test_a_directory_of_another_class_is_told_as_such(tmp_path):
    """`Writers` have the field {prompt}, which is not the user's to give."""
    model, tokenizer = loading.load_model(tiny.save_base(tmp_path / "base"))
    evaluation.Writers(patch_model(model), tokenizer, tiny.agents()).save_pretrained(tmp_path / "team")
    for command in (("generate", "--adapter"), ("view",)):
        output = call(*command, tmp_path / "team", "--question", "where is the key", "--device", "cpu", code=1).output
        assert "expected a system of the class diffmas.agents.system.MultiAgentSystem, got one of diffmas.evaluation" in output


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(tmp_path):
    pytest.importorskip("fastapi", reason="diffmas[serve] is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"--port: expected a free one at 127.0.0.1, got {port}" in call("serve", tmp_path, "--port", port, code=1).output


def test_commands_give_no_warnings(config, tmp_path):
    """In a process of their own: pytest has filters for warnings."""
    training = {"max_steps": 2, "save_strategy": "no", "report_to": []}  # use_cpu would turn some of them off
    commands = [
        ["train", str(config(training=training))],
        ["generate", "--adapter", "run", "--question", "where is the key", "--max-new-tokens", "2"],
        ["evaluate", "config.yaml", "--adapter", "run", "--limit", "1"],
    ]
    code = f"from diffmas.cli import app\nfor arguments in {commands}: app(arguments, standalone_mode=False)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert run.returncode == 0 and (tmp_path / "run" / "evaluation" / "results.csv").exists(), run.stderr
    assert "Warning" not in run.stderr and "deprecated" not in run.stderr, run.stderr


# Commands, what they end with and what they say, one after the other in a process of their own.
WITHOUT_TORCH = """
import sys
from importlib.metadata import EntryPoint
from typer.testing import CliRunner
app = EntryPoint("diffmas", "diffmas.cli:app", "console_scripts").load()
for arguments, code, says in (
    ("--help", 0, "evaluate"), ("train --help", 0, "--overwrite"), ("tasks", 0, "gsm8k"), ("schema", 0, "learning_rate"),
    ("init gsm8k", 0, "config.yaml"), ("train wrong.yaml", 1, "learning_rate"), ("audit wrong.yaml", 1, "learning_rate"),
    ("evaluate wrong.yaml", 1, "learning_rate"), ("evaluate --task gsm --model x", 1, "gsm8k"),
    ("generate --adapter x --question y --field z", 1, "--field"), ("view nowhere", 1, "nowhere"),
    ("generate --adapter nowhere --question y", 1, "agents.json"), ("view . --question y", 1, "agents.json"),
    ("export nowhere out", 1, "agents.json"), ("serve nowhere", 1, "agents.json"),
    ("evaluate --task gsm8k --model x --adapter nowhere", 1, "agents.json"),
    ("study fact", 1, "'facts'"), ("study study.yaml", 1, "'methods'"), ("study facts --case none", 1, "'one fact'"),
    ("study facts --set training.learning_rat=1", 1, "learning_rate"), ("study gpqa_diamond", 1, "data.train: expected a file"),
    ("plan --model x --gpus 2 --dtype nonsense", 1, "bfloat16"), ("plan --model ./none --gpus 2", 1, "no such directory"),
):
    result = CliRunner().invoke(app, arguments.split())
    assert result.exit_code == code and says in result.output, (arguments, result.output, result.exception)
    assert not {"torch", "transformers"} & set(sys.modules), arguments
"""


def test_what_needs_no_model_does_not_wait_for_torch(tmp_path):
    """Which is nearly all that it would cost. Wrong options and configs are told before, too."""
    (tmp_path / "wrong.yaml").write_text("{model: nowhere, task: gsm8k, training: {learning_rat: 1}}")
    (tmp_path / "study.yaml").write_text("{about: x, method: [single], config: {model: nowhere, task: gsm8k}}")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", WITHOUT_TORCH], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
