"""Latent tokens in fewer forwards than steps: equal to plain loops over whole contexts, and to steps where all are final."""

import json
from dataclasses import replace

import pytest
import torch
from loops import check_checkpointing, check_compiled
from models import assert_close, gradients, tiny, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, system, tokenizer, unroll, unrolled_loss
from test_ragged import planned, rows_of

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents import turns
from diffmas.agents.card import contents
from diffmas.agents.jacobi import latent_passes, rows_written
from diffmas.agents.latent import latent_steps
from diffmas.evaluation.plain_hf import plain_generate, plain_loss
from diffmas.models.patch import patch_of

TIGHT = 1e-9  # everything is float64
STEPS = [(6, 1), (0, 5), (3, 4)]  # of the planner and of the critic
ROWS = [{"question": q, "plan": a, "critique": b} for q, (a, b) in zip(QUESTIONS, STEPS)]


def team(passes, grad_passes=None, **options):
    """Two thinkers whose T is the question's; their passes are as many."""
    first, second, last = AGENTS
    thinks = dict(passes=passes, grad_passes=grad_passes)
    agents = [replace(first, latent_steps="plan", **thinks), replace(second, latent_steps="critique", **thinks), last]
    return system(agents=agents, **options)


OPTIONS = [
    {},
    dict(trace_content="latent_only"),
    dict(trace_content="latent_only", positions="reindex", sinks=0, no_latents="skip"),
    dict(realign="none"),
    dict(realign="soft_token", trace_content="latent_only"),
    dict(realign="learned"),
]


# ---- against loops over whole contexts -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [o for o in OPTIONS if "positions" not in o], ids=str)
@pytest.mark.parametrize("passes, grad_passes", [(1, None), (3, None), (4, 1), (4, 2), (4, 4), (9, 2)])
def test_loss_and_gradients_equal_the_unroll(passes, grad_passes, options):
    s = team(passes, grad_passes, **options)
    out = s(ROWS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = unrolled_loss(s, ROWS, ANSWERS)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    assert_close(got, gradients(s), TIGHT)
    assert max(g.abs().max() for g in got.values()) > 1e-3


@pytest.mark.parametrize("family", ["phi3", "cohere"])
def test_other_families(family):
    s = team(3, family=family)
    s(ROWS, ANSWERS).loss.backward()
    got = gradients(s)
    unrolled_loss(s, ROWS, ANSWERS).backward()
    assert_close(got, gradients(s), 1e-6 if family == "cohere" else TIGHT)  # Cohere rotates in float32


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("passes, grad_passes", [(2, None), (4, 2)])
def test_plain_hugging_face_agrees(passes, grad_passes, options):
    s = team(passes, grad_passes, **options)
    s(ROWS, ANSWERS).loss.backward()
    got = gradients(s)
    want = plain_loss(s, ROWS, ANSWERS)
    want.backward()
    # transformers computes the angles of moved keys in float32
    assert_close(got, gradients(s), 1e-6 if options.get("positions") == "reindex" else TIGHT)


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_generated_tokens(options):
    s = team(2, **options)
    want = plain_generate(s, ROWS, 6)
    assert [row[0] for row in s.generate_tokens(ROWS, max_new_tokens=6, temperature=0)] == want
    assert want != plain_generate(team(None, **options), ROWS, 6)
    if "positions" not in options:
        ids = []
        while len(ids) < len(want[0]):
            with torch.no_grad():
                ids.append(int(unroll(s, ROWS[0], generated=ids).argmax()))
        assert ids == want[0]


# ---- against steps one by one ----------------------------------------------------------------------------------------


def rows_and_gradients(s, think):
    """The latent rows that `think` writes behind ragged prompts, and the gradient of a sum over a reader's logits."""
    s.zero_grad()
    trace = s.think(Agent("reader", "w5 {question} w6"), s.fields_of(QUESTIONS), Trace(s.model, 3))
    h = torch.linspace(-1, 1, 3 * 32, dtype=torch.float64).view(3, 32).requires_grad_()
    trace.agent = "thinker"
    think(patch_of(s.model), s.realign, trace, h)
    found = [trace.keys_values(layer, b) for layer in range(3) for b in range(3)]
    for b, positions in enumerate(map(trace.positions, range(3))):
        assert positions.tolist() == list(range(trace.lengths[b]))
    s(QUESTIONS, ANSWERS, trace=trace).loss.backward()
    return found, {**gradients(s), "h": h.grad}, trace


@pytest.mark.parametrize("T", [[5, 5, 5], [5, 0, 2]])
@pytest.mark.parametrize("realign", ["norm", "soft_token"])
def test_as_many_passes_as_steps_are_the_steps(T, realign):
    """Rows and gradients; more passes change nothing."""
    s = system(realign=realign)
    want, want_grads, _ = rows_and_gradients(s, lambda *args: latent_steps(*args, T))
    for passes, grad_passes in ((5, None), (7, None), (7, 5)):
        got, grads, trace = rows_and_gradients(s, lambda *args: latent_passes(*args, T, passes, grad_passes))  # noqa: B023
        for pair, of_steps in zip(got, want):
            for x, y in zip(pair, of_steps):
                assert_close(x, y, 1e-12)
        assert_close(grads, want_grads, TIGHT)
    assert [sum(x.length for x in trace.segments if x.agent == "thinker" and x.sequence == b) for b in range(3)] == T


def test_the_first_j_tokens_are_final_after_j_passes():
    s, T = system(), 6
    want, _, _ = rows_and_gradients(s, lambda *args: latent_steps(*args, [T] * 3))
    for passes in range(1, T):
        got, _, _ = rows_and_gradients(s, lambda *args: latent_passes(*args, [T] * 3, passes))  # noqa: B023
        for x, y in zip(got, want):
            for mine, steps in zip(x, y):
                last = len(mine) - T + passes
                assert_close(mine[:last], steps[:last], 1e-12)
                assert not torch.allclose(mine[last:], steps[last:], atol=1e-3)


def test_steps_go_one_by_one_where_that_is_the_same(monkeypatch):
    runs = {J: team(J) for J in (None, 6, 5)}
    passes = planned(monkeypatch)
    counts = {}
    for J, s in runs.items():
        passes.clear()
        with torch.no_grad():
            s(ROWS, ANSWERS)
        counts[J] = [n for n, _ in passes]
    assert counts[6] == counts[None] == [2, 2, 2, 1, 1, 1, 3, 2, 2, 2, 1]
    # All tokens of the planner's turn, then those that are not final; the critic's T is at most 5.
    assert counts[5] == [9, 7, 5, 3, 2] + counts[None][6:]


# ---- batches, rows, memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
@pytest.mark.parametrize("passes, grad_passes", [(2, None), (5, 2)])
def test_ragged_batches_equal_single_runs(passes, grad_passes, options):
    s = team(passes, grad_passes, **options)
    out = s(ROWS, ANSWERS)
    out.loss.backward()
    got, total = gradients(s), 0.0
    for b, (row, answer) in enumerate(zip(ROWS, ANSWERS)):
        alone = s([row], [answer], num_items_in_batch=1)
        total = total + alone.loss
        assert rows_of(out.trace, b) == rows_of(alone.trace, 0)
        assert out.trace.next_positions[b] == alone.trace.next_positions[0]
        for layer in range(len(out.trace)):
            for x, y in zip(out.trace.keys_values(layer, b), alone.trace.keys_values(layer, 0)):
                assert_close(x, y, 1e-12)
    (total / int((out.labels != -100).sum())).backward()
    assert_close(got, gradients(s), TIGHT)


def test_rows_that_are_dropped_are_gone():
    """Without gradients at once; with them when backward has run, and the pools have had room for all from the start."""
    for passes, grad_passes in ((None, None), (1, None), (3, None), (5, 2)):
        s = team(passes, grad_passes)
        with torch.no_grad():
            trace = s(ROWS, ANSWERS).trace
        assert trace.rows == sum(trace.lengths)
        learning = s(ROWS, ANSWERS)
        store = learning.trace._store
        dropped = sum(
            rows_written([pair[i] for pair in STEPS], passes, grad_passes) - sum(pair[i] for pair in STEPS) for i in (0, 1)
        )
        assert learning.trace.rows == sum(trace.lengths) + dropped == store.top
        assert all(0 <= p.rows - store.top < 3 + 15 for p in store.pools)
        learning.loss.backward()
        assert learning.trace.rows == sum(trace.lengths)


@pytest.mark.parametrize("options", [{}, dict(latent_grad_clip=0.5)], ids=str)
def test_checkpointing_gives_the_same_gradients(options):
    check_checkpointing(team(3, 2, **options).train(), ROWS)


def test_compiled_layers_give_the_same_gradients():
    check_compiled(team(3, 2), ROWS)


def test_the_gradient_of_each_token_is_clipped(monkeypatch):
    """As that of the steps where these are the same; and not where it is small."""
    s = system()
    monkeypatch.setattr(turns, "one_by_one", lambda steps, passes, grad_passes: passes is None)
    T, found = [5, 2, 5], {}
    for clip in (0.05, 1e9, None):
        s.latent_grad_clip = clip
        for name, agent in (("steps", dict()), ("passes", dict(passes=7, grad_passes=5))):
            agents = [replace(AGENTS[0], latent_steps="plan", **agent), AGENTS[2]]
            s.agents = agents
            s.zero_grad()
            s([{**row, "plan": n} for row, n in zip(ROWS, T)], ANSWERS).loss.backward()
            found[name, clip] = gradients(s)
        assert_close(found["passes", clip], found["steps", clip], TIGHT)
    assert_close(found["passes", 1e9], found["passes", None], 1e-12)
    assert any((found["passes", 0.05][n] - g).abs().max() > 1e-3 * g.abs().max() for n, g in found["passes", None].items())


def test_a_gradient_report_tells_passes_apart():
    s = team(3)
    report = s.gradient_report(ROWS, ANSWERS)
    steps = [(p.agent, p.step) for p in report.passes if p.kind == "latent"]
    assert steps == [(name, j) for name in ("planner", "critic") for j in (1, 2, 3)]
    s(ROWS, ANSWERS).loss.backward()
    whole = sum(float(g.square().sum()) for g in gradients(s).values()) ** 0.5
    assert report.norm == pytest.approx(whole)


# ---- descriptions ----------------------------------------------------------------------------------------------------


def test_passes_are_saved_and_loaded(tmp_path):
    agents = [replace(AGENTS[0], passes=2, grad_passes=1), *AGENTS[1:]]
    s = system(agents=agents)
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == agents
    described = json.loads((tmp_path / "agents.json").read_text())
    assert f"### planner: T = {AGENTS[0].latent_steps} in 2 passes" in contents(described, "team")[1]
    one_by_one = MultiAgentSystem(with_lora(tiny("qwen3", patch=False)), tokenizer(), AGENTS)
    with pytest.raises(ValueError, match="agents.json: expected agents "):
        one_by_one.load_weights(tmp_path)
    for agent in described["agents"]:
        del agent["passes"], agent["grad_passes"]  # as a directory from before there were any
    (tmp_path / "agents.json").write_text(json.dumps(described))
    assert MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer()).agents == AGENTS


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(passes=0), "passes: expected an integer >= 1 or None, got 0"),
        (dict(passes=True), "passes: expected an integer >= 1 or None, got True"),
        (dict(passes=1.5), "passes: expected an integer >= 1 or None, got 1.5"),
        (dict(passes=2, stop_change=0.1), "stop_change: expected None with passes, got 0.1"),
        (dict(grad_passes=1), "grad_passes: expected None without passes, got 1"),
        (dict(passes=2, grad_passes=3), "grad_passes: expected 1 to 2 passes or None, got 3"),
        (dict(passes=2, grad_passes=0), "grad_passes: expected 1 to 2 passes or None, got 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=f"agent 'a': {message}"):
        Agent("a", "x", 4, **options)
