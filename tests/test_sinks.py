"""The first tokens of a sequence, which a pretrained model needs as attention sink, stay with what latent_only hands on."""

import json

import pytest
import torch
from models import assert_close, gradients, tiny, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, system, tokenizer, unroll, unrolled_loss

from diffmas import Agent, MultiAgentSystem
from diffmas.agents import prompts
from diffmas.agents.file import read_agents
from diffmas.evaluation.baselines import latent_mas
from diffmas.evaluation.plain_hf import plain_generate, plain_loss

TIGHT = 1e-9  # everything is float64
FOUR = [*AGENTS[:2], Agent("refiner", "w8 {question} w4", latent_steps=1), AGENTS[2]]
TEAMS = {"one writer": [AGENTS[0], AGENTS[2]], "two": AGENTS, "three": FOUR}
SHORT = [Agent("a", "{question}", latent_steps=1), *AGENTS[1:]]  # w16 alone: its sinks are rows of three agents


@pytest.mark.parametrize("sinks", [0, 1, 4, 9])
@pytest.mark.parametrize("agents", [*TEAMS.values(), SHORT], ids=[*TEAMS, "short"])
def test_sinks_equal_one_long_context(agents, sinks):
    s = system(agents=agents, trace_content="latent_only", sinks=sinks)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = unrolled_loss(s, QUESTIONS, ANSWERS)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    assert_close(got, gradients(s), TIGHT)


@pytest.mark.parametrize("positions", ["keep", "reindex"])
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("agents", TEAMS.values(), ids=TEAMS)
def test_plain_hugging_face_keeps_the_same(agents, sinks, positions):
    s = system(agents=agents, trace_content="latent_only", sinks=sinks, positions=positions)
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = plain_loss(s, QUESTIONS, ANSWERS)
    want.backward()
    tolerance = TIGHT if positions == "keep" else 1e-6  # transformers computes the angles of moved keys in float32
    assert_close(out.loss, want, tolerance)
    assert_close(got, gradients(s), tolerance)


def test_generation_with_sinks():
    for positions in ("keep", "reindex"):
        s = system(trace_content="latent_only", positions=positions)
        tokens = [row[0] for row in s.generate_tokens(QUESTIONS, max_new_tokens=6, temperature=0)]
        assert tokens == plain_generate(s, QUESTIONS, 6)
    with torch.no_grad():
        logits = [s(QUESTIONS).logits for s in (system(trace_content="latent_only", sinks=n) for n in (0, 4))]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("detached", [False, True])
def test_gradients_through_sinks(detached):
    """A writer without latent steps hands on its sinks alone, and learns through them; or not, where the trace is detached."""
    agents = [Agent("a", "w5 {question} w6"), AGENTS[2]]
    for sinks, learns in ((4, not detached), (0, False)):
        s = system(
            agents=agents, trace_content="latent_only", sinks=sinks, grad_scope="detach_trace" if detached else "full"
        )  # fmt: skip
        embedding = s.model.get_input_embeddings().weight.requires_grad_()
        s(QUESTIONS, ANSWERS).loss.backward()
        assert bool(embedding.grad[5].any()) is learns  # w5 is of the first agent's prompt alone
        assert embedding.grad[9].any()


@pytest.mark.parametrize("positions, sinks", [("keep", 4), ("reindex", 0), ("reindex", 2), ("reindex", 9)])
def test_what_is_checked_is_where_agents_end_up(positions, sinks, monkeypatch):
    starts, prompt = [], prompts.prompt_that_fits
    monkeypatch.setattr(prompts, "prompt_that_fits", lambda *args: starts.append(args[4]) or prompt(*args))
    for agents in (*TEAMS.values(), SHORT):
        s = system(agents=agents, trace_content="latent_only", positions=positions, sinks=sinks)
        trace = s.communicate(s.fields_of(QUESTIONS))
        starts.clear()
        s.tokenize(s.fields_of(QUESTIONS), [0] * 3)
        assert starts[len(agents) - 1 :: len(agents)] == trace.next_positions
        if positions == "reindex":
            assert all(trace.positions(b).tolist() == list(range(n)) for b, n in enumerate(trace.lengths))


def test_room_for_a_prompt_is_counted_with_sinks():
    """The solver's prompt takes the last position there is: one sink more, and it does not fit."""
    agents = [Agent("a", "w5 w5 w5 w5 w5 {question}", latent_steps=2), Agent("solver", "{words}")]
    question = {"question": "w10", "words": "w11 " * (512 - 2 - 3)}
    for sinks, fits in ((3, True), (4, False)):
        s = system(agents=agents, trace_content="latent_only", positions="reindex", sinks=sinks)
        if fits:
            assert s([question]).trace.next_positions == [512]
        else:
            with pytest.raises(ValueError, match="expected its prompt to fit in the context of 512 positions, got 6 before it"):
                s([question])


# ---- options and files -----------------------------------------------------------------------------------------------


def test_baselines_keep_the_same_sinks():
    for sinks in (0, 2):
        s = system(trace_content="latent_only", sinks=sinks)
        assert latent_mas(s).system.sinks == sinks


def test_sinks_are_saved_and_loaded(tmp_path):
    system(trace_content="latent_only", sinks=2).save_pretrained(tmp_path)
    load = lambda: MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())  # noqa: E731
    assert load().sinks == 2
    with pytest.raises(ValueError, match="agents.json: expected sinks 4, got 2"):
        system(trace_content="latent_only").load_weights(tmp_path)
    for bad in (-1, None, 1.5):
        with pytest.raises(ValueError, match=f"sinks: expected an integer >= 0, got {bad}"):
            system(sinks=bad)


@pytest.mark.parametrize("trace_content", ["all", "latent_only"])
def test_a_directory_from_before_there_were_sinks(trace_content, tmp_path):
    """It does what it did, and a run that it changes nothing for goes on from it."""
    old = system(trace_content=trace_content, sinks=0)
    old.save_pretrained(tmp_path)
    file = tmp_path / "agents.json"
    described = json.loads(file.read_text())
    del described["sinks"]
    for agent in described["agents"]:
        del agent["stop_change"]
    file.write_text(json.dumps(described))
    assert read_agents(tmp_path)["agents"][0]["stop_change"] is None
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert trace_content == "all" or loaded.sinks == 0
    with torch.no_grad():
        assert_close(loaded(QUESTIONS).logits, old(QUESTIONS).logits, 1e-3)  # the norms of `old` are float64
    new = MultiAgentSystem(with_lora(tiny("qwen3", patch=False)), tokenizer(), AGENTS, trace_content=trace_content)
    if trace_content == "all":
        new.load_weights(tmp_path)
    else:
        with pytest.raises(ValueError, match="agents.json: expected sinks 4, got 0"):
            new.load_weights(tmp_path)


def test_unroll_without_sinks_is_another_function():
    """The oracle of these tests is sensitive to them."""
    a, b = (unroll(system(trace_content="latent_only", sinks=n), QUESTIONS[1], ANSWERS[1]) for n in (0, 4))
    assert (a - b).abs().max() > 1e-3
