"""Teams with messages: files, and who refuses them."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from models import tiny
from systems import ANSWERS, QUESTIONS, system, tokenizer
from test_graph import agent
from test_messages import SHAPES, TEXT

from diffmas import Agent, MultiAgentSystem
from diffmas.agents.card import contents
from diffmas.evaluation.plain_hf import plain_loss
from diffmas.models import head
from diffmas.serving.vllm.teams import check_team
from diffmas.training import sharded
from diffmas.training.sharded import check_engine


def test_they_are_saved_and_loaded(tmp_path):
    agents = [*SHAPES["parallel"][:1], replace(SHAPES["parallel"][1], message_temperature=0.5), SHAPES["parallel"][2]]
    s = system(agents=agents, dtype=torch.float32)
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == agents
    described = json.loads((tmp_path / "agents.json").read_text())
    assert described["agents"][1]["message_temperature"] == 0.5
    assert "### a: T = 0, then writes up to 5 tokens, reads nobody" in contents(described, "team")[1]
    for one in described["agents"]:  # of a version without messages
        del one["max_message_tokens"], one["message_temperature"]
    (tmp_path / "agents.json").write_text(json.dumps(described))
    old = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert old.agents == [replace(a, max_message_tokens=None, message_temperature=None) for a in agents]
    with pytest.raises(ValueError, match="agents.json: expected agents "):
        s.load_weights(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(max_message_tokens=0), "max_message_tokens: expected an integer >= 1 or None, got 0"),
        (dict(max_message_tokens="5"), "max_message_tokens: expected an integer >= 1 or None, got '5'"),
        (dict(message_temperature=1.0), "message_temperature: expected None without max_message_tokens, got 1.0"),
        (dict(message_temperature=-1.0, **TEXT), "message_temperature: expected a number >= 0 or None, got -1.0"),
        (dict(message_temperature=True, **TEXT), "message_temperature: expected a number >= 0 or None, got True"),
    ],
)
def test_messages_that_are_none(options, message):
    with pytest.raises(ValueError, match=f"agent 'a': {message}"):
        Agent("a", "x", **options)


def test_what_is_refused(monkeypatch):
    s = system(agents=SHAPES["chain"])
    with pytest.raises(ValueError, match="system: expected agents that take latent steps alone, got some that write messages"):
        plain_loss(s, QUESTIONS, ANSWERS)
    described = {**s.describe(), "trained_in_base": [], "class": None}
    with pytest.raises(ValueError, match="max_message_tokens of agent 'a': expected None in vLLM, got 5"):
        check_team("team", described)
    for engine in (dict(fsdp_plugin=SimpleNamespace(fsdp_version=2)), dict(deepspeed_plugin=SimpleNamespace(zero_stage=3))):
        with pytest.raises(ValueError, match="agent 'a': max_message_tokens: expected None where processes share the model's"):
            check_engine(s, SimpleNamespace(fsdp="", world_size=1), SimpleNamespace(**engine))
    with monkeypatch.context() as patched, pytest.raises(ValueError, match="each would choose its tokens alone"):
        patched.setattr(sharded, "tensor_parallel", lambda _: True)
        check_engine(s, SimpleNamespace(fsdp="", world_size=getattr(s.model, "tp_size", None)), SimpleNamespace())
    silent = [agent("a", 2, []), agent("solver", 0, [{"agent": "a", "select": {"kind": "text"}}])]
    with pytest.raises(ValueError, match="kind: expected one that leaves rows, got 'text' of an agent which writes no message"):
        system(agents=silent)
    monkeypatch.setattr(head, "logits_of", lambda lm, h: 2 * lm.get_output_embeddings()(h))
    system(agents=silent[:1] + [agent("solver", 0, None)])
    with pytest.raises(ValueError, match="model: expected logits that are its head's of the last hidden states, got others"):
        system(agents=SHAPES["chain"])
