"""The audit's conditions against the same thing said in another way, and its verdict where it is known."""

import csv
import io
import statistics

import pytest
import systems
import tiny_systems as tiny
import torch
from rich.console import Console

from diffmas import Agent, MultiAgentSystem
from diffmas.demo import experiment
from diffmas.evaluation import audit, audit_table, communicates, plot_audit, single_agent, write_audit
from diffmas.evaluation import audit as audit_function
from diffmas.evaluation.causal_audit import batches, conditions_of
from diffmas.evaluation.tasks import facts

CLOSE = 1e-4  # a row read elsewhere is rotated by float32 tables
QUESTIONS = [
    {"facts": "w10 w11", "question": "w30"}, {"facts": "w12 w13 w14 w15", "question": "w31 w32"},
    {"facts": "w16", "question": "w33"}, {"facts": "w17 w18", "question": "w34"},
]  # fmt: skip
ROWS = [{**q, "answer": a} for q, a in zip(QUESTIONS, ("w20 w21 w22", "w23", "w24 w25", "w26"))]
READER, SECOND = Agent("reader", "w5 {facts} w6", 3), Agent("second", "w7 {question}", 2)
SOLVER = Agent("solver", "w9 {question}")


def of(conditions, change, agent=None):
    return next(c for c in conditions if (c.change, c.agent) == (change, agent))


def nlls(system, rows):
    """Of the answer to each row."""
    return [float(system([row], [row["answer"]], num_items_in_batch=1).loss) for row in rows]


def system(*agents, **options):
    return systems.system(agents=[*agents, SOLVER], **{"sinks": 0, **options}).eval()


# ---- who gets whose message ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [None, 1, 2, 5])
@pytest.mark.parametrize("golds", ["abcd", "abcde", "aaaaabbbbb", "aab"])
def test_partners_do_not_depend_on_the_batch(size, golds):
    whose, seen = {}, []
    for batch, partners in batches(list(golds), 3, size):
        assert len(batch) <= max(size or 99, 3)
        seen += batch
        whose |= {i: batch[p] for i, p in zip(batch, partners)}
    assert sorted(seen) == sorted(set(whose.values())) == list(range(len(golds)))
    assert all(i != j for i, j in whose.items())
    (whole,) = batches(list(golds), 3, None)
    assert whose == {i: whole[0][p] for i, p in zip(*whole)}
    if golds != "aab":  # more than half alike
        assert sum(golds[i] == golds[j] for i, j in whose.items()) <= len(golds) % 2


# ---- conditions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["all", "latent_only"])
@torch.no_grad()
def test_another_questions_message_is_what_it_would_have_been_told(content):
    """One reader, whose prompts differ in length: the last agent at the same distance behind it."""
    s = system(READER, trace_content=content)
    conditions = audit(s, ROWS, max_new_tokens=3, temperature=0.0)
    ((batch, partners),) = batches([row["answer"] for row in ROWS], 0, None)
    told = {batch[i]: batch[p] for i, p in enumerate(partners)}
    swapped = [{**row, "facts": ROWS[told[i]]["facts"]} for i, row in enumerate(ROWS)]
    assert [(c.change, c.agent) for c in conditions] == [(c, None) for c in ("own", "none", "other", "noise")]
    assert of(conditions, "own").nlls == pytest.approx(nlls(s, ROWS), rel=1e-6)
    assert of(conditions, "own").texts == s.generate(ROWS, max_new_tokens=3, temperature=0)
    assert of(conditions, "other").nlls == pytest.approx(nlls(s, swapped), rel=CLOSE)
    assert of(conditions, "other").nlls != pytest.approx(nlls(s, ROWS), rel=CLOSE)
    assert of(conditions, "other").texts == s.generate(swapped, max_new_tokens=3, temperature=0)


@torch.no_grad()
def test_no_message_is_a_single_agent():
    s = system(READER, SECOND)
    conditions = audit(s, ROWS, 2, max_new_tokens=3, temperature=0.0)
    alone = single_agent(s, adapter=True).system
    assert of(conditions, "none").nlls == pytest.approx(nlls(alone, ROWS), rel=CLOSE)
    assert of(conditions, "none").texts == alone.generate(ROWS, max_new_tokens=3, temperature=0, samples=2)


@torch.no_grad()
def test_one_agents_message_alone():
    """The second agent has read the first: its rows stay as they were. The first one's are not affected by the second."""
    s = system(READER, SECOND)
    conditions = audit(s, ROWS, max_new_tokens=2)
    assert [(c.change, c.agent) for c in conditions[4:]] == [
        (change, agent) for agent in ("reader", "second") for change in ("none", "other", "noise")
    ]
    for row, nll in zip(ROWS, of(conditions, "none", "second").nlls):
        left = s.communicate([row]).keep(agent="reader")  # the next position stays
        assert nll == pytest.approx(float(s([row], [row["answer"]], 1, left).loss), rel=1e-6)
    base = of(conditions, "own").nlls
    changed = [tuple(c.nlls) for c in conditions]
    assert len(set(changed)) == len(changed) and all(c.nlls != pytest.approx(base, rel=1e-3) for c in conditions[1:])
    for c in conditions[1:]:
        assert c.saved.value == pytest.approx(statistics.fmean(c.nlls) - statistics.fmean(base), rel=1e-6)
        assert c.nll == pytest.approx(statistics.fmean(c.nlls))


@pytest.mark.parametrize("kind, sinks", [(None, 0), (None, 2), ("latent", 0), ("latent", 7)])
@torch.no_grad()
def test_what_is_a_message(kind, sinks):
    """Rows of a kind, behind the attention sink; noise in their place has the norms of each row's heads."""
    s = system(READER, SECOND)
    asked = s.fields_of(QUESTIONS)
    trace = s.communicate(asked)
    partners = [1, 0, 3, 2]
    views = dict(conditions_of(trace, partners, kind, sinks, 0, [0, 1, 2, 3]))
    for b in range(4):
        own = [s for s in trace.segments if s.sequence == b]
        kinds = [s.kind for s in own for _ in range(s.length)]
        mine = torch.tensor([i >= sinks and kind in (None, k) for i, k in enumerate(kinds)])
        by_reader = torch.tensor([s.agent == "reader" for s in own for _ in range(s.length)])
        for agent, message in ((None, mine), ("reader", mine & by_reader)):
            none, noise = views["none", agent], views["noise", agent]
            assert none.positions(b).tolist() == trace.positions(b)[~message].tolist()
            assert noise.positions(b).tolist() == trace.positions(b).tolist()
            assert none.next_positions == noise.next_positions == views["other", agent].next_positions == trace.next_positions
            for layer in range(len(trace)):
                for x, y, z in zip(*(v.keys_values(layer, b) for v in (trace, noise, none))):
                    assert torch.equal(x[~message], y[~message]) and torch.equal(x[~message], z)
                    torch.testing.assert_close(x[message].norm(dim=-1), y[message].norm(dim=-1), rtol=1e-5, atol=1e-8)
                    cosine = torch.cosine_similarity(x[message], y[message], dim=-1).flatten()
                    assert all(abs(c) < 1 - 1e-4 for c in cosine.tolist()) and abs(sum(cosine.tolist())) <= 0.5 * len(cosine)
        if kind == "latent" and sinks == 0:  # of one length: exactly in the place of the own ones
            assert views["other", None].positions(b).tolist() == trace.positions(b).tolist()
    (first,) = {tuple(views["noise", None].keys_values(0, b)[0].flatten().tolist()) for b in [1]}
    alone = dict(conditions_of(trace.select([1, 0]), [1, 0], kind, sinks, 0, [1, 0]))["noise", None]
    assert tuple(alone.keys_values(0, 0)[0].flatten().tolist()) == first  # the noise of a question is its own


@torch.no_grad()
def test_an_audit_does_not_depend_on_its_batches_and_writes_messages_once(monkeypatch):
    s, wrote = tiny.system(trace_content="latent_only"), []
    think = MultiAgentSystem.think
    monkeypatch.setattr(MultiAgentSystem, "think", lambda self, *a: wrote.append(len(a[1])) or think(self, *a))
    rows, options = tiny.rows(5), dict(max_new_tokens=4, temperature=1.0, seed=2)
    whole = audit(s, rows, 2, **options)
    assert wrote == [5, 5] and s.training
    parts = audit(s, rows, 2, batch_size=2, **options)
    assert wrote[2:] == [2, 2, 3, 3]
    for a, b in zip(whole, parts):
        assert (a.change, a.agent, a.texts) == (b.change, b.agent, b.texts) and a.nlls == pytest.approx(b.nlls, rel=1e-4)


def test_what_cannot_be_audited():
    s = tiny.system()
    with pytest.raises(ValueError, match="rows: expected at least two.*got 1"):
        audit(s, tiny.rows(1))
    with pytest.raises(ValueError, match="expected agents that hand on rows, got none"):
        audit(single_agent(s).system, tiny.rows(2), max_new_tokens=2)
    with pytest.raises(ValueError, match="expected agents that hand on rows of kind 'text', got none"):
        audit(s, tiny.rows(2), max_new_tokens=2, kind="text")
    with pytest.raises(ValueError, match=r"questions\[0\].*expected its prompt and answer to fit"):
        audit(s, tiny.rows(2), max_new_tokens=200)
    conditions = audit(s, tiny.rows(2), max_new_tokens=2)
    with pytest.raises(ValueError, match=r"agent: expected None or one of \['critic', 'planner'\], got 'solver'"):
        communicates(conditions, "solver")
    assert audit_function is audit


# ---- the verdict -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def known():
    """The demo's base model answers from facts in its context: a reader's prompt on the trace is such a context. The other
    agent knows nothing."""
    base, tokenizer = experiment.load(None)
    crew = [Agent("reader", "Facts: {facts}"), Agent("idle", "Write notes."), Agent("solver", facts.SOLVER_PROMPT)]
    return MultiAgentSystem(base, tokenizer, crew), facts.make_rows(24, seed=5)


@pytest.fixture(scope="module")
def told(known):
    torch.set_num_threads(1)
    return audit(*known, max_new_tokens=4, temperature=0.0, batch_size=12)


def test_who_communicates_is_found(told):
    assert communicates(told) and communicates(told, "reader") and not communicates(told, "idle")
    own, other = of(told, "own"), of(told, "other")
    assert own.accuracy >= 0.95 and other.accuracy <= 0.3 and of(told, "none").accuracy <= 0.3
    assert other.gain.value == pytest.approx(own.accuracy - other.accuracy) and other.gain.low > 0.3
    assert other.saved.low > 1 and of(told, "other", "idle").accuracy >= 0.95
    assert own.gain is own.saved is None


def test_latent_steps_that_nobody_trained_do_not_communicate(known):
    trained, rows = known
    crew = [Agent("reader", "Facts: {facts} Write notes.", 4), trained.agents[-1]]
    untrained = MultiAgentSystem(trained.model, trained.tokenizer, crew, realign="norm", trace_content="latent_only")
    conditions = audit(untrained, rows, max_new_tokens=4, temperature=0.0)
    assert not communicates(conditions) and of(conditions, "own").accuracy < 0.4


def test_messages_that_all_say_the_same_are_no_evidence(known):
    """A solver that answers right by itself, or from what every message says, does not prove that anything was told."""
    trained, rows = known
    same = [{**row, "facts": rows[0]["facts"], "question": rows[0]["question"], "answer": rows[0]["answer"]} for row in rows]
    conditions = audit(trained, same[:8], max_new_tokens=4, temperature=0.0)
    assert of(conditions, "own").accuracy == of(conditions, "other").accuracy == 1.0
    assert of(conditions, "none").accuracy < 1 and not communicates(conditions)


def test_an_audit_is_a_table_a_file_and_a_plot(told, tmp_path):
    console = Console(width=80, file=io.StringIO())
    table = audit_table(told, "title")
    assert table.row_count == len(told) == 10 and console.measure(table).maximum <= 80
    console.print(table)
    said = console.file.getvalue()
    assert "the team communicates" in said and "no evidence that idle communicates" in said and "\u2026" not in said
    with write_audit(told, tmp_path / "new" / "audit.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [row["communicates"] for row in read if row["message"] == "other"] == ["True", "True", "False"]
    assert [float(row["accuracy"]) for row in read] == [c.accuracy for c in told] and read[0]["gain"] == ""
    assert float(read[2]["gain_low"]) == told[2].gain.low and float(read[2]["saved_high"]) == told[2].saved.high
    assert plot_audit(told, tmp_path / "audit.png").read_bytes().startswith(b"\x89PNG")
