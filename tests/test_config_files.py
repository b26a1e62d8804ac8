"""What writes a config for a user, and tells an editor what it may hold: diffmas init, diffmas schema, --version."""

import dataclasses
import json
import typing

import jsonschema
import pytest
import yaml
from transformers import TrainingArguments
from typer.testing import CliRunner

import diffmas
from diffmas.cli import config
from diffmas.cli import main as cli
from diffmas.cli.schema import schema
from diffmas.cli.training_section import OF_SCRIPTS, training_kinds
from diffmas.evaluation.tasks import TASKS


def call(*arguments, code: int = 0):
    result = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert result.exit_code == code, result.output
    return result.output


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_config_for_a_task_is_one(name, tmp_path):
    file = tmp_path / "new" / "config.yaml"
    call("init", name, "--model", "some/model: 4B", "--output", file)
    settings = config.load(file)
    found = TASKS[name]
    assert settings.model == "some/model: 4B" and settings.task == name and settings.agents == found.agents()
    assert ("train" in found.splits) == (settings.data.train is None)
    jsonschema.validate(yaml.safe_load(file.read_text()), schema())
    assert "limit: 512" in file.read_text() or found.kind != "facts"  # whose rows are made, and no file is read
    if settings.data.train is not None:  # as the comment says
        lines = [line for line in file.read_text().splitlines() if "train: FILE" not in line]
        other = file.with_name("other.yaml")
        other.write_text("\n".join(lines).replace("  # task:", "  task:"))
        like = TASKS[config.load(other).training_task]
        assert like.kind == found.kind and "train" in like.splits
    before = file.read_text()
    assert f"diffmas evaluate {file} --adapter {settings.output_dir}" in before  # from where it was called
    assert f"--output: expected no file, found {file}" in call("init", name, "--output", file, code=1).replace("\n", "")
    assert file.read_text() == before


def test_unknown_task(tmp_path):
    assert "gsm8k" in call("init", "gsm", "--output", tmp_path / "x.yaml", code=1) and not list(tmp_path.iterdir())


BASE = {"model": "x", "task": "gsm8k"}


@pytest.mark.parametrize(
    "change, fits",
    [
        ({}, True),
        ({"training": {"learning_rate": "5e-5", "num_train_epochs": 2, "report_to": ["wandb"]}}, True),
        ({"agents": [{"name": "a", "prompt": "b", "latent_steps": "steps"}], "system": {"last_k": None}}, True),
        ({"lora": {"target_modules": ["q_proj"]}}, True),
        ({"modle": "x"}, False),
        ({"lora": {"rank": 4}}, False),
        ({"lora": {"r": "many"}}, False),
        ({"agents": [{"name": "a"}]}, False),
        ({"training": {"learning_rat": 1}}, False),
        ({"training": {"output_dir": "x"}}, False),
        ({"generation": {"stop": "x"}}, False),
        ({"system": {"realign": "rige"}}, False),
        ({"dtype": "bf16"}, False),
        ({"recipe": "papr"}, False),
        ({"task": "gsm9k"}, False),
        ({"data": {"task": "mbpp", "part": "validation"}}, True),
        ({"data": {"task": "mbp"}}, False),
        ({"data": {"part": "dev"}}, False),
        ({"evaluation": {"methods": ["singel"]}}, False),
        ({"evaluation": {"match": "exat"}}, False),
    ],
)
def test_the_schema_and_the_reader_agree(change, fits, tmp_path):
    data = BASE | change if "agents" not in change else {"model": "x"} | change
    valid = jsonschema.Draft202012Validator(schema()).is_valid(data)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(data))
    try:
        config.load(file)
        read = True
    except ValueError:
        read = False
    assert valid == read == fits


def test_the_command_prints_the_schema_and_the_version():
    assert json.loads(call("schema")) == json.loads(json.dumps(schema()))
    assert call("--version") == f"diffmas {diffmas.__version__}\n"
    assert "--install-completion" in call("--help")
    asked = {"_DIFFMAS_COMPLETE": "complete_bash", "COMP_WORDS": "diffmas train --res", "COMP_CWORD": "2"}
    assert CliRunner().invoke(cli.app, [], prog_name="diffmas", env=asked).output == "--resume\n"


def test_fields_of_training_are_those_of_transformers():
    """They are read from its source; its own types are told by themselves."""
    kinds = typing.get_type_hints(TrainingArguments)
    theirs = {f.name: kinds[f.name] for f in dataclasses.fields(TrainingArguments) if f.init}
    found = training_kinds()
    assert found.keys() == theirs.keys() - {"output_dir", *OF_SCRIPTS}
    assert {theirs[name] for name in found} > {bool, int, float, str}
    for name, kind in found.items():
        own = "OwnKind" in str(kind) or "ForwardRef" in str(kind)
        assert own != (kind == theirs[name]), (name, kind, theirs[name])
