"""What GRPO with a team refuses."""

import subprocess
import sys
from dataclasses import replace

import pytest
import tiny_systems as tiny
from datasets import Dataset
from test_rl import Graded, config, no_leftover_precision, step_of  # noqa: F401

from diffmas import default_arguments
from diffmas.evaluation import Scorer
from diffmas.rl import GRPOTrainer, scored
from diffmas.training import trainer


def test_the_reward_of_a_scorer():
    exact, numbers = scored(), scored(Scorer(extract="number"), answer="gold")
    assert exact(completions=["in the attic", "attic"], answer=["in the attic"] * 2, trainer_state=None) == [1.0, 0.0]
    assert numbers(completions=["so 4", "so 5"], gold=["4", "4"]) == [1.0, 0.0]
    options = scored(Scorer(lambda text, row: row["options"].get(text, text)))
    assert options(completions=["1", "0"], answer=["b", "b"], options=[{"0": "a", "1": "b"}] * 2) == [1.0, 0.0]
    with pytest.raises(ValueError, match=r"answer: expected a column 'answer' in the data set, got \['question'\]"):
        exact(completions=["a"], question=["b"])


def test_rewards_get_the_values_of_rows_as_they_are(tmp_path):
    """Of a list: Arrow would give both dicts both keys, and takes no column of numbers and strings."""
    given = [{"question": "where is the key", "options": {"A": "attic"}, "n": 1}, {"question": "where is the map", "n": "2"}]
    got = []

    def reward(completions, options, n, **_):
        got.extend(zip(n, options))
        return [0.0] * len(completions)

    GRPOTrainer(tiny.system(), reward, config(tmp_path), train_dataset=given).train()
    assert sorted(got, key=str) == [("2", None)] * 4 + [(1, {"A": "attic"})] * 4


def test_several_scored_rewards_have_their_names_in_the_log(tmp_path):
    rewards = [scored(), scored(Scorer(extract=lambda text: text[:3]), name="start")]
    trainer = GRPOTrainer(tiny.system(), rewards, config(tmp_path), train_dataset=tiny.rows(4))
    trainer.train()
    assert {"rewards/right/mean", "rewards/start/mean"} <= trainer.state.log_history[0].keys()


def test_generation_kwargs_go_before_the_other_fields(tmp_path):
    graded, _, _ = step_of(tiny.system(alpha=8), tmp_path, generation_kwargs={"max_new_tokens": 2, "min_new_tokens": 2})
    assert {len(tokens) for tokens in graded.tokens} == {2}


@pytest.mark.parametrize(("options", "text"), [
    ({"temperature": 0.0}, "temperature: expected more than 0, got 0.0"),
    ({"generation_kwargs": {"temperature": 0.5}}, "generation_kwargs: expected it without 'temperature'"),
    ({"generation_kwargs": {"seed": 1}}, "generation_kwargs: expected it without 'seed'"),
    ({"generation_kwargs": {"max_length": 9}}, "max_length: expected max_new_tokens"),
    ({"use_vllm": True}, "use_vllm: expected it to be off for a multi-agent system, got True; a system decodes"),
    ({"sync_ref_model": True, "beta": 0.1}, "sync_ref_model: expected it to be off"),
    ({"neftune_noise_alpha": 1.0}, "neftune_noise_alpha: expected it to be off"),
], ids=lambda x: str(x)[:20])  # fmt: skip
def test_arguments_that_do_not_fit(tmp_path, options, text):
    with pytest.raises(ValueError, match=text):
        GRPOTrainer(tiny.system(), scored(), config(tmp_path, **options), train_dataset=tiny.rows(2))


def test_messages_that_a_loss_would_sample_anew_are_refused(tmp_path):
    system = tiny.system()
    system.agents[0] = replace(system.agents[0], max_message_tokens=4, message_temperature=1.0)
    with pytest.raises(ValueError, match="agent 'planner': message_temperature: expected None or 0 with latents='recompute'"):
        GRPOTrainer(system, scored(), config(tmp_path), train_dataset=tiny.rows(2))
    trainer = GRPOTrainer(system, scored(), config(tmp_path), train_dataset=tiny.rows(4), latents="keep")
    trainer.train()
    assert trainer.state.global_step


def test_a_model_that_processes_share_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(trainer, "engine_of", lambda _: "FSDP")
    with pytest.raises(ValueError, match="args: expected a run of one process or DDP, got FSDP: answers are sampled"):
        GRPOTrainer(tiny.system(), scored(), config(tmp_path), train_dataset=tiny.rows(2))


def test_what_else_does_not_fit(tmp_path):
    def make(args=None, rows=None, system=None, **options):
        rows = tiny.rows(2) if rows is None else rows
        return GRPOTrainer(system or tiny.system(), scored(), args or config(tmp_path), train_dataset=rows, **options)

    with pytest.raises(ValueError, match="args: expected a GRPOConfig, got TrainingArguments"):
        make(default_arguments(tmp_path))
    with pytest.raises(ValueError, match=r"latents: expected one of \('recompute', 'keep'\), got 'cache'"):
        make(latents="cache")
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: agent 'planner': its prompt needs the field {question}"):
        make(rows=[*tiny.rows(1), {"answer": "a", "text": "b"}])
    with pytest.raises(ValueError, match="train_dataset: expected at least one row, got an empty data set"):
        make(rows=[])
    with pytest.raises(ValueError, match="train_dataset: expected at least 2 rows, the questions of one generation, got 1"):
        make(rows=tiny.rows(1))
    with pytest.raises(ValueError, match=r"train_dataset\[1\]: expected an object or a string, got int"):
        make(rows=["where is the key", 1])
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: expected no column 'image', which TRL reads as something else"):
        make(rows=[{**row, "image": "a.png"} for row in tiny.rows(2)])
    with pytest.raises(ValueError, match="beta: expected 0 with realign='learned'"):
        make(config(tmp_path, beta=0.1), system=tiny.system(realign="learned"))
    with pytest.raises(ValueError, match="system: expected agents that choose no rows by 'learned'"):
        make(system=tiny.system(parallel=True, select={"rows": 1, "by": "learned"}))
    with pytest.raises(ValueError, match=r"answers: expected strings or lists of token ids, got a list of something else"):
        tiny.system()(["where is the key"], [[]])


def test_what_was_given_stays_as_it_is(tmp_path):
    """The model's configs, the tokenizer, the arguments; the system's forward; rows as a datasets.Dataset or as strings."""
    system, args = tiny.system(), config(tmp_path, beta=0.1)
    system.model.generation_config.pad_token_id = system.model.config.pad_token_id = None
    model, before = system.model, (system.model.config.to_dict(), system.model.generation_config.to_dict())
    trainer = GRPOTrainer(system, Graded(), args, train_dataset=Dataset.from_list(tiny.rows(4)))
    trainer.train()
    assert (model.config.to_dict(), model.generation_config.to_dict()) == before and args.beta == 0.1
    assert not {"forward", "config", "generation_config", "add_model_tags"} & vars(system).keys()
    assert system(["where is the key"], ["in the attic"]).loss > 0
    length = lambda completions, **_: [len(text) / 10 for text in completions]  # noqa: E731
    asked = ["where is the key", "where is the map"]
    trainer = GRPOTrainer(tiny.system(), [length, length], config(tmp_path), train_dataset=asked)
    trainer.train()
    assert trainer.state.global_step == 1


def test_without_trl_it_says_what_to_install():
    code = "import sys; sys.modules['trl'] = None\nimport importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda name, *a: None if name == 'trl' else find(name, *a)\nimport diffmas.rl"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: diffmas.rl: expected the package trl, found none; pip install 'diffmas[rl]'" in done.stderr
