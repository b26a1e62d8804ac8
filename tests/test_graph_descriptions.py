"""Who reads whom: baselines, and descriptions that are refused."""

import json
from dataclasses import replace

import pytest
import torch
from models import assert_close, tiny, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, system, tokenizer
from test_graph import CONTENTS, SHAPES, at

from diffmas import Agent, MultiAgentSystem
from diffmas.agents.card import contents
from diffmas.agents.graph import Graph, Read
from diffmas.evaluation.baselines import Stitched, TextAgents, single_agent
from diffmas.evaluation.plain_hf import plain_loss

# ---- baselines -------------------------------------------------------------------------------------------------------


def test_stitched_agents_are_such_a_team():
    parallel = [*(replace(a, reads=[]) for a in AGENTS[:-1]), replace(AGENTS[-1], reads=[a.name for a in AGENTS[:-1]])]
    for options in CONTENTS:
        team = system(agents=parallel, **options)
        stitched = Stitched(team.model, team.tokenizer, AGENTS, **options)
        assert stitched.graph == team.graph
        with torch.no_grad():
            assert_close(stitched(QUESTIONS).logits, team(QUESTIONS).logits, 1e-12)
    for positions, join in (("keep", "nowhere"), ("reindex", "keep")):
        with pytest.raises(ValueError, match=f"join: expected one of .* with positions='{positions}', got '{join}'"):
            Stitched(team.model, team.tokenizer, AGENTS, join=join, positions=positions)


def test_text_agents_read_the_same_agents():
    s = system(agents=SHAPES["tree"])
    (_, _, _, d, solver), answers = TextAgents(s, 3).write(QUESTIONS, max_new_tokens=3, temperature=0)
    assert all([f"{n}:" in p for n in "abcd"] == [True, True, False, False] for p in d.prompts)
    assert all([f"{n}:" in p for n in "abcd"] == [False, False, True, True] for p in solver.prompts)
    assert all(p.index("b:") < p.index("a:") for p in d.prompts)
    assert len(answers.texts) == 3 and single_agent(s).answer(QUESTIONS, max_new_tokens=1).tokens == 3
    with pytest.raises(ValueError, match="system: expected agents that each read all before them.* got reads of agent 'a'"):
        plain_loss(s, QUESTIONS, ANSWERS)


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_a_graph_is_saved_and_loaded(tmp_path):
    agents = SHAPES["each its own place"]
    s = system(agents=agents, dtype=torch.float32)
    s.save_pretrained(tmp_path)
    described = json.loads((tmp_path / "agents.json").read_text())
    assert described["agents"][2]["reads"] == [{"agent": "a", "positions": "same_branch"}]
    assert "### solver: answers, reads c (reindex), b (keep), a (shift)" in contents(described, "team")[1]
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == agents and loaded.agents[2].reads == (Read("a", "same_branch"),)
    s.load_weights(tmp_path)
    chain = MultiAgentSystem(with_lora(tiny("qwen3", patch=False)), tokenizer(), [replace(a, reads=None) for a in agents])
    with pytest.raises(ValueError, match="agents.json: expected agents "):
        chain.load_weights(tmp_path)
    assert Graph.of(agents).levels == [[0, 1], [2]] and Graph.of(AGENTS).levels == [[0], [1]] and Graph.of(AGENTS).chain


@pytest.mark.parametrize(
    "agents, message",
    [
        ([("a", []), ("solver", ["b"])], r"agent 'solver': reads: expected some of \['a'\], each once, got 'b', no agent"),
        (
            [("a", ["b"]), ("b", ["a"]), ("solver", None)],
            "agent 'a': reads: expected .*got 'b', which is not before it",
        ),
        ([("a", ["a"]), ("solver", None)], "agent 'a': reads: expected some of .*got 'a', which is not before it"),
        ([("a", []), ("solver", ["a", "a"])], "agent 'solver': reads: expected some of .*got 'a', a second time"),
        ([("a", []), ("b", []), ("solver", ["b"])], "agents: expected somebody who reads 'a', got nobody"),
    ],
)
def test_shapes_that_are_refused(agents, message):
    with pytest.raises(ValueError, match=message):
        system(agents=[Agent(name, "w5 {question}", 1, reads=reads) for name, reads in agents])


@pytest.mark.parametrize(
    "reads, message",
    [
        ("a", "reads: expected a list of agents' names or None, got 'a'"),
        ([3], "reads: expected a name, or a dict of agent, positions, select and round, got 3"),
        ([{"name": "a"}], "reads: expected a name, or a dict of agent, positions, select and round, got {'name': 'a'}"),
        ([at("a", "there")], "reads: expected positions of .*'same_branch'.*, got 'there'"),
    ],
)
def test_reads_that_are_none(reads, message):
    with pytest.raises(ValueError, match=f"agent 'b': {message}"):
        Agent("b", "x", reads=reads)
