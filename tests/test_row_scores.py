"""What rows are worth to a reader: similarity, attention."""

import numpy as np
import pytest
import torch
from models import assert_close, gradients, tiny, with_lora
from systems import ANSWERS, QUESTIONS, roles_model, system, tokenizer
from test_graph import exact
from test_selection import FIRST, LATENT, REINDEX, SHAPES, Choosing, of, solver

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents import prompts
from diffmas.agents.board import Board
from diffmas.agents.scores import attention_by_layer, scores
from diffmas.agents.selection import MEASURED
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace.attention_mass import AttentionMass
from diffmas.trace.views import rows_of


def test_attention_mass_of_more_sequences_than_a_head_has_lanes():
    """All see the same rows, and their prompts are not the same: each has its own mass, which is that of it alone."""
    s = system()
    with torch.no_grad():
        trace = s.think(Agent("memory", "w30 w31 {question}", 2), s.fields_of(QUESTIONS[:1]), Trace(s.model, 1))
        lanes = trace.keys_values(0, 0)[0].shape[2]
        prompts = [[5 + b % 40, *range(7, 8 + b % 3)] for b in range(lanes + 2)]

        def mass(prompts):
            reader = trace.select([0] * len(prompts))
            forward_pass = reader.plan(list(map(len, prompts)), "prompt")
            found = AttentionMass(forward_pass)
            forward(patch_of(s.model), reader, forward_pass, input_ids=s.pack(prompts))
            return found.by_layer

        together = mass(prompts)
        for b in (0, 1, lanes - 1, lanes, lanes + 1):
            for layer, rows in mass(prompts[b : b + 1]).items():
                assert_close(together[layer][b], rows[0], 1e-12)
                assert float(rows[0].sum()) == pytest.approx(1) and (rows[0] > 0).all()


@pytest.mark.parametrize("options", [{}, LATENT], ids=str)
def test_attention_by_layer(options):
    s = exact(system(agents=SHAPES["last"], **options))
    want = torch.zeros(3, dtype=torch.float64)
    for question in QUESTIONS:
        loop = Choosing(s, question)
        layout, by_layer = loop.attentions(2)
        want += torch.stack([x[s.sinks : len(layout)].sum() for x in by_layer]) / 3
    got = attention_by_layer(s, QUESTIONS)
    assert_close(torch.tensor(got, dtype=torch.float64), want, 1e-6)  # eager softmax is in float32
    assert 0 < min(got) and max(got) < 1 and len(set(got)) == 3


def test_a_choice_does_not_depend_on_dropout():
    """Nor draws random numbers; and the model is in its mode again."""
    chosen = []
    for mode in (True, False):
        agents = [*FIRST, solver(of("a", rows=2, by="attention"), of("b", rows=2, by="similarity"))]
        s = MultiAgentSystem(with_lora(tiny("qwen3", patch=False), lora_dropout=0.9), tokenizer(), agents)
        with torch.no_grad():
            turns = Board(s, Trace(s.model, 3))
            turns.write(turns.groups[0], s.fields_of(QUESTIONS))  # in eval mode
            s.train(mode)
            state = torch.get_rng_state()
            chosen.append(turns.read(2, s.fields_of(QUESTIONS)).segments)
        assert torch.equal(torch.get_rng_state(), state) and s.model.training is mode
    assert chosen[0] == chosen[1]


def test_a_choice_is_by_the_readers_adapter():
    agents = [FIRST[0], solver(of("a", rows=1, by="similarity"))]
    s = MultiAgentSystem(roles_model(("a", "solver")), tokenizer(), agents, adapter_scope="per_role")
    read, values = Trace(s.model, 3), {}
    with torch.no_grad():
        s.think(agents[0], s.fields_of(QUESTIONS), read)
        for name in ("nobody", "a", "solver"):
            for n, p in s.named_parameters():
                if f"lora_B.{name}." in n:
                    p.mul_(-30)
            found, *_ = scores(s, 1, s.fields_of(QUESTIONS), read, {"similarity"})
            values[name] = found["similarity"](rows_of([x for x in read.segments if x.sequence == 0]))
    assert np.allclose(values["a"], values["nobody"], atol=0, rtol=1e-12)
    assert not np.allclose(values["solver"], values["nobody"], atol=1e-3)


def test_a_gradient_report_does_not_know_of_it():
    s = system(agents=SHAPES["attended"])
    report = s.gradient_report(QUESTIONS, ANSWERS)
    assert [(p.agent, p.kind) for p in report.passes if p.kind != "latent"] == [
        ("a", "prompt"), ("b", "prompt"), ("solver", "answer")
    ]  # fmt: skip
    s(QUESTIONS, ANSWERS).loss.backward()
    assert report.norm == pytest.approx(sum(float(g.square().sum()) for g in gradients(s).values()) ** 0.5)


@pytest.mark.parametrize("options", [{}, LATENT, REINDEX], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_checked_is_no_less_than_where_agents_end_up(shape, options, monkeypatch):
    """And just that where nothing is measured, or gaps are closed."""
    agents = SHAPES[shape] if shape != "latent" else SHAPES["last"]
    s, asked, checked = system(agents=agents, **options), None, {}
    asked, fits = s.fields_of(QUESTIONS), prompts.prompt_that_fits
    monkeypatch.setattr(prompts, "prompt_that_fits", lambda system, agent, b, fields, at, *rest: (
        checked.setdefault((agent.name, b), at), fits(system, agent, b, fields, at, *rest))[1])  # fmt: skip
    s.tokenize(asked, [0] * 3)
    turns, found = Board(s, Trace(s.model, 3)), {}
    with torch.no_grad():
        for group in [*turns.groups, [len(agents) - 1]]:
            found |= {(agents[i].name, b): at for i in group for b, at in enumerate(turns.read(i, asked).next_positions)}
            if group != [len(agents) - 1]:
                turns.write(group, asked)
    assert found.keys() == checked.keys() and all(checked[key] >= at for key, at in found.items())
    if not any(measure in str(agents) for measure in MEASURED):
        assert checked == found
