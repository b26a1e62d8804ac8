"""What a saved system says of itself, and who may load it."""

import json
import shutil
from dataclasses import asdict

import pytest
import tiny_systems as tiny
import torch
from test_training import TEMPLATE, arguments, no_leftover_precision, without  # noqa: F401
from transformers import AutoModelForCausalLM

from diffmas import MultiAgentSystem
from diffmas.agents.file import check_same, read_agents
from diffmas.evaluation import Stitched, Writers
from diffmas.training import Trainer, add_lora


class Shouting(MultiAgentSystem):
    """Another system, whose class must not get lost."""

    def prompt_ids(self, agent, fields):
        return super().prompt_ids(agent, fields)[::-1]


@pytest.mark.parametrize("where", ["saved", "checkpoint-1"])
def test_a_directory_holds_the_tokenizer_and_the_chat_template(tmp_path, where):
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["new"])
    tokenizer.chat_template = TEMPLATE
    base = tiny.model()
    base.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    base.save_pretrained(tmp_path / "base")
    tiny.tokenizer().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    system = MultiAgentSystem(add_lora(base), tokenizer, tiny.agents())
    trainer = Trainer(system, arguments(tmp_path, max_steps=1, save_strategy="steps", save_steps=1), train_dataset=tiny.rows(4))
    trainer.train()
    system.save_pretrained(tmp_path / "saved")
    again = MultiAgentSystem.from_pretrained(tmp_path / where)
    fields = {"question": "where is the new key"}
    assert again.tokenizer.chat_template == TEMPLATE
    assert again.prompt_ids(again.agents[0], fields) == system.prompt_ids(system.agents[0], fields)
    assert again.answer_ids("new")[:-1] == [len(tiny.VOCAB)]
    plain = MultiAgentSystem.from_pretrained(tmp_path / where, tokenizer=tokenizer)
    assert plain.tokenizer is tokenizer
    file = tmp_path / where / "tokenizer.json"
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match=f"{where}: expected the whole files of a tokenizer, got damaged ones"):
        MultiAgentSystem.from_pretrained(tmp_path / where)


def test_a_subclass_is_loaded_as_what_it_is(tmp_path):
    system = tiny.system()
    other = Shouting(system.model, system.tokenizer, system.agents)
    other.save_pretrained(tmp_path)
    name = rf"{Shouting.__module__}\.Shouting"
    with pytest.raises(
        ValueError, match=rf"expected a system of the class diffmas\.agents.*, got one of {name}; load it by that"
    ):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    with pytest.raises(ValueError, match=rf"got one of {name}"):
        tiny.system().load_weights(tmp_path)
    assert type(Shouting.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())) is Shouting
    tiny.system().save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError, match=rf"expected a system of the class {name}, got one of diffmas\.agents.*MultiAgentSystem"
    ):
        Shouting.from_pretrained(tmp_path / "base", tiny.model(), tiny.tokenizer())


def test_stitched_agents_and_writers_are_loaded_as_they_were(tmp_path):
    system = tiny.system()
    Stitched(system.model, system.tokenizer, system.agents, join="keep").save_pretrained(tmp_path / "stitched")
    with pytest.raises(ValueError, match="got one of diffmas.evaluation.baselines.Stitched"):
        MultiAgentSystem.from_pretrained(tmp_path / "stitched", tiny.model(), tiny.tokenizer())
    assert Stitched.from_pretrained(tmp_path / "stitched", tiny.model(), tiny.tokenizer()).join == "keep"
    with pytest.raises(ValueError, match="expected own_options {'join': 'shift'}, got {'join': 'keep'}"):
        Stitched(system.model, system.tokenizer, system.agents).load_weights(tmp_path / "stitched")
    Writers(system.model, system.tokenizer, system.agents).save_pretrained(tmp_path / "writers")
    writers = Writers.from_pretrained(tmp_path / "writers", tiny.model(), tiny.tokenizer())
    assert list(writers.roles) == ["planner", "critic", "solver"]
    with pytest.raises(ValueError, match="agent: expected one of"):
        writers([{"agent": "nobody", "prompt": "plan"}], ["garden"])
    file = tmp_path / "writers" / "agents.json"
    older = json.loads(file.read_text())
    for agent in older["own_options"]["roles"] + older["agents"]:
        del agent["role"]
    del older["latent_grad_clip"]
    file.write_text(json.dumps(older))
    Writers(system.model, system.tokenizer, system.agents).load_weights(tmp_path / "writers")


def test_roles_are_compared_where_they_mean_something(tmp_path):
    tiny.system().save_pretrained(tmp_path / "shared")
    tiny.system(adapter_scope="per_role").save_pretrained(tmp_path / "roles")
    agents = [asdict(agent) | {"role": "team"} for agent in tiny.agents()]
    check_same(tmp_path, read_agents(tmp_path / "shared"), {"agents": agents})
    with pytest.raises(ValueError, match="expected role 'team' of agent 'planner', got None"):
        check_same(tmp_path, read_agents(tmp_path / "roles"), {"agents": agents})
    agents[0]["prompt"] = "another"
    with pytest.raises(ValueError, match="expected prompt 'another' of agent 'planner'"):
        check_same(tmp_path, read_agents(tmp_path / "shared"), {"agents": agents})


def test_a_directory_that_does_not_say_its_class_is_loaded(tmp_path):
    """As older versions wrote them."""
    tiny.system().save_pretrained(tmp_path)
    file = tmp_path / "agents.json"
    described = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("class", "own_options")}
    file.write_text(json.dumps(described))
    for kind in (MultiAgentSystem, Stitched):
        assert type(kind.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())) is kind
    tiny.system().load_weights(tmp_path)


@pytest.mark.parametrize("scope", ["shared", "per_role"])
def test_a_loaded_adapter_is_trained_on_if_asked(tmp_path, scope):
    tiny.system(adapter_scope=scope).save_pretrained(tmp_path)
    frozen = MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    assert scope == "per_role" or not tiny.trainable(frozen)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer(), trainable=True)
    before = tiny.trainable(loaded)
    Trainer(loaded, arguments(tmp_path / "out", max_steps=1, save_strategy="no"), train_dataset=tiny.rows(4)).train()
    assert before and all(not torch.equal(before[name], p) for name, p in tiny.trainable(loaded).items())


@pytest.mark.parametrize("scope, gone", [("shared", "adapter_config.json"), ("per_role", "critic/adapter_model.safetensors")])
def test_a_missing_adapter_is_not_the_untrained_model(tmp_path, scope, gone):
    tiny.system(adapter_scope=scope).save_pretrained(tmp_path)
    assert MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer()).adapter_scope == scope
    (tmp_path / gone).unlink()
    with pytest.raises(ValueError, match=f"{gone}: expected .*found none"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    if scope == "per_role":
        shutil.rmtree(tmp_path / "critic")
        with pytest.raises(ValueError, match="critic/adapter_config.json: expected this file, found none"):
            MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())


def test_an_adapter_of_another_scale_is_refused(tmp_path):
    tiny.system(alpha=4).save_pretrained(tmp_path)
    other = tiny.system(alpha=400)
    before = tiny.trainable(other)
    with pytest.raises(ValueError, match="agents.json: expected adapters .*'lora_alpha': 400.*, got .*'lora_alpha': 4,"):
        other.load_weights(tmp_path)
    assert all(torch.equal(before[n], p) for n, p in tiny.trainable(other).items())
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "lora_alpha": 400}))
    with pytest.raises(ValueError, match="adapter_config.json: expected the adapter of agents.json.*got .*'lora_alpha': 400"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())
    with pytest.raises(ValueError, match=r"model: expected a base model without adapters, got one with \['default'\]"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.system().model, tiny.tokenizer())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: without(d, "realign"), r"expected the keys .*got none of \['realign'\]"),
        (lambda d: without(d, "adapters"), r"got none of \['adapters'\]"),
        (lambda d: {**d, "colour": 1}, r"an unknown \['colour'\]"),
        (lambda d: {**d, "last_k": "two"}, r"expected last_k of kind int \| None, got 'two'"),
        (lambda d: {**d, "agents": ["a"]}, r"agents\[0\]: expected an object, got str"),
        (lambda d: {**d, "agents": [without(d["agents"][0], "latent_steps")]}, r"agents\[0\]: .*none of \['latent_steps'\]"),
        (lambda d: {**d, "realign": "magic"}, "realign: expected one of .*'magic'"),
        (lambda d: {**d, "agents": []}, "agents: expected at least one agent"),
        (lambda d: [d], "expected format diffmas-agents-2, got list"),
    ],
)
def test_what_agents_json_may_not_hold(tmp_path, change, message):
    tiny.system().save_pretrained(tmp_path)
    file = tmp_path / "agents.json"
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ValueError, match=f"agents.json: {message}|agents.json: .*{message}"):
        MultiAgentSystem.from_pretrained(tmp_path, tiny.model(), tiny.tokenizer())


def test_what_cannot_be_trained_is_refused(tmp_path):
    args = arguments(tmp_path)
    with pytest.raises(ValueError, match="train_dataset: expected at least one row, got an empty data set"):
        Trainer(tiny.system(), args, train_dataset=[])
    with pytest.raises(ValueError, match="eval_dataset: expected at least one row"):
        Trainer(tiny.system(), args, train_dataset=tiny.rows(2), eval_dataset=[])
    with pytest.raises(ValueError, match=r"train_dataset\[0\]: expected a string 'answer', got only \['question'\]"):
        Trainer(tiny.system(), args, train_dataset=[{"question": "x"}])
    with pytest.raises(ValueError, match=r"train_dataset\[4\]: agent 'planner': its prompt needs the field {question}"):
        Trainer(tiny.system(), args, train_dataset=[*tiny.rows(4), {"facts": "x", "answer": "y"}])
    with pytest.raises(ValueError, match=r"eval_dataset\['b'\]\[2\]: expected a string 'answer'"):
        sets = {"a": tiny.rows(2), "b": [*tiny.rows(2), {"question": "x", "answer": None}]}
        Trainer(tiny.system(), args, train_dataset=tiny.rows(2), eval_dataset=sets)
    with pytest.raises(ValueError, match="label_smoothing_factor: expected it to be off"):
        Trainer(tiny.system(), arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=tiny.rows(2))
    with pytest.raises(ValueError, match="system: expected a MultiAgentSystem, got Qwen3ForCausalLM"):
        Trainer(tiny.model(), args, train_dataset=tiny.rows(2))
    frozen = tiny.system()
    frozen.requires_grad_(False)
    with pytest.raises(ValueError, match="expected trainable parameters"):
        Trainer(frozen, args, train_dataset=tiny.rows(2))
