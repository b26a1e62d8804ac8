"""What is shown of teams whose rows readers do not have as they were written, and of agents of other models.

Attention's weights are measured by the lse that the kernel gives, of all rows that it read: they sum to 1 where keys, positions
and all rows are those of the kernel, and nowhere else. Whose rows they are is checked against transformers' eager attention."""

from dataclasses import replace

import pytest
import test_encoder
import test_low_rank_agents
import test_other_models
import test_quantized_agents
import torch
from models import body
from systems import ANSWERS, QUESTIONS, system
from test_look import eager
from transformers import DynamicCache

from diffmas import Agent
from diffmas.agents.projector import Fuser
from diffmas.evaluation.look import look_at, page, plot
from diffmas.evaluation.look import team as look_team

QUESTION = QUESTIONS[1]


def looked_at(team, answer=None, **options):
    look = look_at(team.eval(), QUESTION, answer, max_new_tokens=2, **options)
    assert float((look.attention.nansum(-1) - (~look.attention[..., 0].isnan()).float()).abs().max()) < 1e-5
    assert float((look.rows.sum(-1) - 1).abs().max()) < 1e-5
    return look, {(look.lanes[b.agent].name, b.kind): b for b in look.blocks}


def lanes(look, reader: str) -> dict[str, float]:
    """Whose rows a lane attends to while it speaks, the first row apart."""
    names = [lane.name for lane in look.lanes]
    return dict(zip(names, look.between_lanes()[names.index(reader)][1:].tolist()))


def test_quantised_agents():
    agents = test_quantized_agents.SHAPES["diamond"]
    look, blocks = looked_at(system(agents=agents, dtype=torch.float32), ANSWERS[1], text_agents=True)
    assert dict(look.facts)["quantised rows"].startswith("of b in int8, c in int8") and blocks["b", "latent"].gradient
    plain, _ = looked_at(system(agents=[replace(a, quantized=None) for a in agents], dtype=torch.float32))
    units = look.first_units()[-2]  # all but the answer, which may be another
    assert 0 < float((look.rows[:units] - plain.rows[:units]).abs().max()) < 0.0002
    assert lanes(look, "b")["c"] == 0 and min(lanes(look, "solver").values()) > 0


def dense(team, quantized: str | None) -> torch.Tensor:
    """Attention of the last agent's prompt to each row, the mean over layers, heads and its tokens, of two agents in turn."""
    (model, cache), fields = (body(eager(team)), DynamicCache()), {"question": QUESTION}
    first, last = (torch.tensor([team.prompt_ids(agent, fields)]) for agent in team.agents)
    out = model(input_ids=first, past_key_values=cache, use_cache=True)
    for _ in range(team.agents[0].latent_steps):
        x = team.realign(out.last_hidden_state[0, -1:])[None]
        out = model(inputs_embeds=x, past_key_values=cache, use_cache=True)
    for layer in cache.layers if quantized else ():
        for x in (layer.keys, layer.values):  # all but the sinks
            x[:, :, team.sinks :] = test_quantized_agents.rounded(x[:, :, team.sinks :].double(), quantized)
    out = model(input_ids=last, past_key_values=cache, use_cache=True, output_attentions=True)
    return torch.stack([a[0].mean((0, 1)) for a in out.attentions]).mean(0)


@pytest.mark.parametrize("quantized", [None, "int8", "fp8", "int4"])
@torch.no_grad()
def test_attention_to_each_quantised_row_against_eager_attention(quantized):
    a, _, _, solver = test_quantized_agents.SHAPES["chain"]
    team = system(agents=[replace(a, quantized=quantized), solver], dtype=torch.float32).eval()
    look, blocks = looked_at(team)
    want, plain = dense(team, quantized), dense(team, None)
    by_row = look.rows[look.first_units()[2]]  # of the solver's prompt
    assert look.blocks[2] is blocks["solver", "prompt"] and not by_row[len(want) :].any()
    torch.testing.assert_close(by_row[: len(want)], want, rtol=0, atol=5e-6)
    assert quantized is None or float((plain - want).abs().max()) > 5e-5


def test_attention_to_rows_that_nobody_wrote_is_refused(monkeypatch):
    known = look_team._blocks
    monkeypatch.setattr(look_team, "_blocks", lambda *args: [x[1:] for x in known(*args)])  # without the first block
    with pytest.raises(RuntimeError, match="rows that .* reads: expected those of the watched passes, got others"):
        look_at(system().eval(), QUESTION, max_new_tokens=2)


def test_agents_with_low_rank(tmp_path):
    """Their readers have other rows: with the codes left out, shares do not sum to 1."""
    team = test_low_rank_agents.team(test_low_rank_agents.SHAPES["chain"], dtype=torch.float32)
    look, blocks = looked_at(team)
    assert dict(look.facts)["low-rank rows"].startswith("of doc:") and blocks["doc", "latent"].steps[0].nearest
    assert all(lanes(look, reader)["doc"] > 0 for reader in ("a", "b", "solver"))
    assert page(look, tmp_path / "look.html").stat().st_size > 10_000


def test_agents_of_another_model(tmp_path):
    """They speak by their own tokenizer and head; their model has two layers, the system's three."""
    team = test_other_models.team(test_other_models.SHAPES["two and an own"])
    look, blocks = looked_at(team, ANSWERS[1])
    other, agent = team.others["small"], team.agents[0]
    ids = other.prompt_ids(agent, {"question": QUESTION})
    assert "".join(blocks["a", "prompt"].texts) == other.tokenizer.decode(ids)
    with torch.no_grad():
        best = other.model(torch.tensor([ids]), use_cache=False).logits[0, -1].softmax(-1).topk(8)
    first = blocks["a", "latent"].steps[0]
    assert [text for text, _ in first.nearest] == [other.tokenizer.decode([int(i)]) for i in best.indices]
    torch.testing.assert_close(torch.tensor([p for _, p in first.nearest]), best.values.float(), rtol=1e-3, atol=0)
    assert lanes(look, "own")["a"] == 0 and min(lanes(look, "own")["b"], *lanes(look, "solver").values()) > 0
    own = [len(layers) for layers in look.to_dict()["attention"]]
    of_lane = [look.lanes[b.agent].name for b in look.blocks for _ in range(b.units)]
    assert look.layers == 3 and own == [2 if name in "ab" else 3 for name in of_lane]
    assert look.between_blocks(2)[0].isnan().all() and not look.between_blocks().isnan().any()
    facts = dict(look.facts)
    assert "a, b: small; " in facts["other model"] and "its 2 layers" in facts["other model"]
    assert "nats" in facts["its loss"] and facts["gradient norm"].startswith("not shown") and not blocks["a", "latent"].gradient
    assert plot(look, tmp_path / "look.png", layer=2).stat().st_size > 1000


def test_rows_that_are_fused():
    agents = [
        Agent("expert", "w5 {question}", 0, model="small"), Agent("receiver", "w5 {question}", reads=["expert"]),
        Agent("solver", "w9 {question}", reads=["receiver"]),
    ]  # fmt: skip
    look, _ = looked_at(test_other_models.team(agents, projector={"kind": Fuser}))
    assert "shown at receiver" in dict(look.facts)["fused rows"]
    assert lanes(look, "solver")["expert"] == 0 and lanes(look, "solver")["receiver"] > 0


def test_what_an_encoder_has_made():
    team = test_encoder.team(test_encoder.SHAPES["thinks on"])
    look, blocks = looked_at(team)
    assert "".join(blocks["reader", "prompt"].texts) == team.others["bert"].tokenizer.decode(
        team.prompt_ids(team.agents[1], {"question": QUESTION})
    )  # fmt: skip
    assert len(blocks["reader", "latent"].steps) == 2 and not blocks["reader", "prompt"].steps
    assert "reader: bert" in dict(look.facts)["encoder"]
