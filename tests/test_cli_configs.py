"""What the commands take from a config."""

import pytest
import tiny_systems as tiny
import yaml
from test_cli import AGENTS

from diffmas.cli import build, config


@pytest.mark.parametrize(
    "change, message",
    [
        ({"modle": "x"}, "modle: expected 'model', or another of"),
        (
            {"lora": {"rank": 4}},
            r"lora.rank: expected one of \['alpha', 'dropout', 'r', 'target_modules'\], got an unknown key",
        ),
        ({"lora": {"r": "many"}}, "lora.r: expected int, got 'many'"),
        ({"lora": {"r": True}}, "lora.r: expected int, got True"),
        ({"lora": 3}, "lora: expected a mapping, got 3"),
        ({"agents": []}, "agents: expected at least one agent"),
        ({"agents": [{"name": "a"}]}, r"agents\[0\].prompt: expected a value, got none"),
        (
            {"agents": [{"name": "a", "prompt": "b", "latent_steps": -1}]},
            "agent 'a': latent_steps: expected an integer >= 0, the name of a field or a function, got -1",
        ),
        ({"agents": [{"name": "a", "prompt": "b", "steps": 1}]}, r"agents\[0\].steps: expected one of .*unknown key"),
        ({"system": {"last_k": "two"}}, "system.last_k: expected int or null, got 'two'"),
        ({"system": {"positions": "shift"}}, r"positions: expected one of \('keep', 'reindex'\), got 'shift'"),
        (
            {"training": {"learning_rat": 1}},
            "training.learning_rat: expected 'learning_rate', or another of .*got an unknown key",
        ),
        ({"training": {"learning_rate": "fast"}}, "training.learning_rate: expected float, got 'fast'"),
        ({"training": {"output_dir": "x"}}, "training.output_dir: expected it at the top level"),
        (
            {"training": {"resume_from_checkpoint": "x"}},
            "training.resume_from_checkpoint: expected none.*`diffmas train --resume`",
        ),
        ({"training": {"do_eval": True}}, "training.do_eval: expected none, since it would have no effect, got True"),
        (
            {"data": {"train": "a", "validation": "b", "validation_fraction": 0.1}},
            "data.validation_fraction: expected it alone",
        ),
        ({"data": {"train": "a", "limit": 0}}, "data.limit: expected at least 1, got 0"),
        ({"evaluation": {"limit": -1}}, "evaluation.limit: expected at least 1, got -1"),
        ({"evaluation": {"methods": ["magic"]}}, "evaluation.methods: expected some of .*got 'magic'"),
        ({"early_stopping_patience": 2}, "early_stopping_patience: expected data.validation"),
        ({"dtype": "int8"}, "dtype: expected one of .*got 'int8'"),
    ],
)
def test_what_a_config_may_not_hold(tmp_path, change, message):
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump({"model": "m", "agents": AGENTS, "data": {"train": "a"}, **change}))
    with pytest.raises(ValueError, match=f"config.yaml: {message}"):
        config.load(path)


def test_what_a_config_may_hold(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: m\nagents: [{name: a, prompt: '{question}'}]\ntraining: {learning_rate: 5e-5, max_steps: 3, bf16: false}\n"
    )
    settings = config.load(path)
    assert settings.agents == [tiny.Agent("a", prompt="{question}")] and settings.lora.r == 8
    assert settings.output_dir == str(tmp_path / "diffmas-output")
    arguments = build.training_arguments(settings)
    assert (arguments.learning_rate, arguments.max_steps, arguments.gradient_accumulation_steps) == (5e-5, 3, 4)
    assert str(getattr(arguments.eval_strategy, "value", arguments.eval_strategy)) == "no"
    settings.recipe = "paper"
    assert build.training_arguments(settings).gradient_accumulation_steps == 64
    settings.data.validation_fraction = 0.1
    arguments = build.training_arguments(settings)
    assert arguments.load_best_model_at_end and arguments.metric_for_best_model == "eval_loss"


def test_the_example_is_a_config(pytestconfig):

    settings = config.load(pytestconfig.rootpath / "examples" / "train.yaml")
    train, held_out = build.training_rows(settings)
    assert len(train) == 8 and len(held_out) == 2 and len(settings.agents) == 4
    settings.data.limit = 5
    train, held_out = build.training_rows(settings)
    assert len(train) == 4 and len(held_out) == 1
    arguments = build.training_arguments(settings)  # also without a GPU
    assert not arguments.bf16 and arguments.gradient_accumulation_steps == 64
