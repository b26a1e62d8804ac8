"""Sequences of a batch that take different numbers of latent steps: each is as it would be alone."""

import json
import random

import pytest
import torch
from models import assert_close, gradients, tiny
from systems import AGENTS, ANSWERS, QUESTIONS, system, tokenizer, unroll, unrolled_loss

from diffmas import Agent, MultiAgentSystem, Trainer, default_arguments
from diffmas.agents import latent, prompts
from diffmas.evaluation.plain_hf import plain_generate, plain_loss
from diffmas.trace import Trace, views

TIGHT = 1e-9  # everything is float64
STEPS = [(3, 1), (0, 5), (7, 1)]  # of the planner and of the critic
ROWS = [{"question": q, "plan": a, "critique": b} for q, (a, b) in zip(QUESTIONS, STEPS)]
FIELDS = [
    Agent("planner", "w5 {question} w6", latent_steps="plan"),
    Agent("critic", "w7 w8 {question}", latent_steps=lambda fields: fields["critique"]),
    Agent("solver", "w9 {question}"),
]
CONTENTS = [
    {}, dict(trace_content="latent_only"), dict(trace_content="latent_only", no_latents="skip", realign="soft_token")
]  # fmt: skip


def stopping(stop_change: float, T: int = 6):
    return [Agent(a.name, a.prompt, T if a.latent_steps else 0, stop_change=stop_change) for a in AGENTS]


# Such that the sequences of QUESTIONS stop after different steps.
STOPPING = stopping(0.55)


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("agents, questions", [(FIELDS, ROWS), (STOPPING, QUESTIONS)], ids=["fields", "stop"])
def test_loss_and_gradients_equal_one_long_context(agents, questions, options):
    s = system(agents=agents, **options)
    out = s(questions, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = unrolled_loss(s, questions, ANSWERS)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    assert_close(got, gradients(s), TIGHT)


def rows_of(trace, b: int):
    """(agent, kind, position) of every token of a sequence."""
    writers = [(x.agent, x.kind) for x in trace.segments if x.sequence == b for _ in range(x.length)]
    return [(*writer, at) for writer, at in zip(writers, trace.positions(b).tolist())]


@pytest.mark.parametrize("options", [*CONTENTS, dict(trace_content="latent_only", positions="reindex")], ids=str)
@pytest.mark.parametrize("agents, questions", [(FIELDS, ROWS), (STOPPING, QUESTIONS)], ids=["fields", "stop"])
def test_rows_loss_and_gradients_equal_single_runs(agents, questions, options):
    s = system(agents=agents, **options)
    out = s(questions, ANSWERS)
    out.loss.backward()
    got, total, labels = gradients(s), 0.0, 0
    for b, (question, answer) in enumerate(zip(questions, ANSWERS)):
        alone = s([question], [answer])
        n = alone.labels.numel()
        total, labels = total + alone.loss * n, labels + n
        assert rows_of(out.trace, b) == rows_of(alone.trace, 0)
        assert out.trace.next_positions[b] == alone.trace.next_positions[0]
        for layer in range(len(out.trace)):
            for x, y in zip(out.trace.keys_values(layer, b), alone.trace.keys_values(layer, 0)):
                assert_close(x, y, 1e-12)
    (total / labels).backward()
    assert_close(out.loss, total / labels, 1e-12)
    assert_close(got, gradients(s), TIGHT)


@pytest.mark.parametrize("options", CONTENTS, ids=str)
@pytest.mark.parametrize("agents, questions", [(FIELDS, ROWS), (STOPPING, QUESTIONS)], ids=["fields", "stop"])
def test_plain_hugging_face_takes_the_same_steps(agents, questions, options):
    s = system(agents=agents, **options)
    assert_close(s(questions, ANSWERS).loss, plain_loss(s, questions, ANSWERS), TIGHT)


def test_generation_of_questions_with_their_own_steps():
    s = system(agents=FIELDS)
    want = plain_generate(s, ROWS, 5)
    assert [row[0] for row in s.generate_tokens(ROWS, max_new_tokens=5, temperature=0)] == want
    assert s.generate_tokens(ROWS, max_new_tokens=5, temperature=0, batch_size=2, samples=2) == [[x, x] for x in want]


# ---- which steps are taken -------------------------------------------------------------------------------------------


def planned(monkeypatch):
    """[new tokens, step of its run] of every latent forward pass."""
    passes, plan = [], Trace.plan

    def watched(self, lengths, kind, *args, **kwargs):
        made = plan(self, lengths, kind, *args, **kwargs)
        if kind == "latent":
            passes.append((sum(lengths), made.work.step))
        return made

    monkeypatch.setattr(Trace, "plan", watched)
    return passes


def test_steps_are_forwards_over_the_sequences_that_have_some_left(monkeypatch):
    """And each set of sequences defers the gradients of older rows, as a whole batch does."""
    ragged, even = system(agents=FIELDS), system()  # patching plans passes too
    passes = planned(monkeypatch)
    ragged(ROWS, ANSWERS).loss.backward()
    planner = [(2, 1), (2, 2), (2, 3), (1, 1), (1, 2), (1, 3), (1, 4)]
    critic = [(3, 1), (1, 1), (1, 2), (1, 3), (1, 4)]
    assert passes == planner + critic
    passes.clear()
    even(QUESTIONS, ANSWERS).loss.backward()
    assert passes == [(3, 1), (3, 2), (3, 3), (3, 1), (3, 2)]


def test_a_sequence_stops_when_its_hidden_state_hardly_changes(monkeypatch):
    """After the first such step, not before, and each at its own."""
    s = system(agents=STOPPING)

    def taken(agents):
        """[sequence][agent]"""
        with torch.no_grad():
            trace = system(agents=agents).communicate(s.fields_of(QUESTIONS))
        of = lambda b, a: sum(x.length for x in trace.segments if (x.sequence, x.agent, x.kind) == (b, a.name, "latent"))  # noqa: E731
        return [[of(b, a) for a in agents[:-1]] for b in range(3)]

    assert taken(STOPPING) == [[1, 6], [6, 6], [2, 2]]
    assert taken(stopping(1e9)) == [[1, 1]] * 3 and taken(stopping(1e-9)) == [[6, 6]] * 3
    monkeypatch.setattr(latent, "_changes", None)  # nobody waits for the device where the option is not used
    with torch.no_grad():
        system().communicate(s.fields_of(QUESTIONS))


@pytest.mark.parametrize("shared", [False, True])
def test_ragged_steps_that_repeat(repeating, shared, monkeypatch):
    """Each run of steps that the same sequences take repeats on the device; also where sequences read the same rows."""
    agents = [Agent("reader", "w5 w6 w7"), Agent("a", "w5 {question}", "T"), Agent("b", "w9 {question}")]
    if shared:
        monkeypatch.setattr(views, "SAVED_ROWS", 1)
    rows = [{"question": q, "T": T} for q, T in zip([*QUESTIONS, "w16"], (12, 0, 5, 17))]
    s = system(agents=agents, no_latents="prompt")

    def steps():
        trace = s.think(agents[0], s.fields_of([rows[0]]), Trace(s.model)).select([0] * 4)
        return s.think(agents[1], s.fields_of(rows), trace)

    with torch.no_grad():
        got = steps()
        assert len(repeating) == 3  # the steps that three, two and one of them take
        monkeypatch.undo()
        want = steps()
    assert got.segments == want.segments and got.next_positions == want.next_positions
    for layer in range(len(got)):
        for b in range(4):
            for x, y in zip(got.keys_values(layer, b), want.keys_values(layer, b)):
                assert_close(x, y, 1e-10)


def test_random_ragged_runs():
    """A larger batch and a longer chain, with gradients through what others wrote."""
    rng = random.Random(0)
    for options in ({}, dict(trace_content="latent_only", positions="reindex", no_latents="skip")):
        s = system(agents=[*FIELDS[:2], Agent("refiner", "w3 {question}", "plan"), FIELDS[2]], **options)
        rows = [{"question": q, "plan": rng.randint(0, 3), "critique": rng.randint(0, 3)} for q in QUESTIONS * 2]
        out = s(rows, ANSWERS * 2)
        out.loss.backward()
        got, total = gradients(s), 0.0
        for row, answer in zip(rows, ANSWERS * 2):
            total = total + s([row], [answer], num_items_in_batch=1).loss
        (total / int((out.labels != -100).sum())).backward()
        assert_close(got, gradients(s), TIGHT)


def test_a_skipped_turn_is_of_a_question(monkeypatch):
    """Where its T is 0, the prompt of a question is not written, and not asked for fields; the others have their turn."""
    s = system(agents=FIELDS, no_latents="skip")
    trace = s(ROWS, ANSWERS).trace
    assert [x.agent for x in trace.segments if x.sequence == 1] == ["critic", "critic", "solver"]
    assert [x.agent for x in trace.segments if x.sequence == 0][:2] == ["planner", "planner"]
    prompt = [Agent("a", "{other}", latent_steps="T"), Agent("solver", "w9 {question}")]
    s = system(agents=prompt, no_latents="skip")
    assert s([{"question": "w10", "T": 0}, {"question": "w11", "T": 1, "other": "w12"}]).trace.lengths == [2, 2 + 2]
    assert s([{"question": "w10", "T": 0}]).trace.lengths == [2]


@pytest.mark.parametrize("options", CONTENTS + [dict(trace_content="latent_only", positions="reindex")], ids=str)
def test_what_is_checked_is_where_agents_end_up(options, monkeypatch):
    s = system(agents=FIELDS, **options)
    starts, prompt = [], prompts.prompt_that_fits
    with monkeypatch.context() as patched:
        patched.setattr(prompts, "prompt_that_fits", lambda *args: starts.append(args[4:]) or prompt(*args))
        s.tokenize(s.fields_of(ROWS), [0] * 3)
    trace = s.communicate(s.fields_of(ROWS))
    assert [at for at, _, what in starts if what == "its prompt"] == trace.next_positions
    assert [room for _, room, what in starts if what != "its prompt"] == [
        n for pair in STEPS for n in pair if n or s.no_latents == "prompt"
    ]


# ---- options, data and files -----------------------------------------------------------------------------------------


def test_steps_and_stop_are_saved_and_loaded(tmp_path):
    agents = [Agent("planner", "w5 {question}", "steps", stop_change=1), Agent("solver", "w9 {question}")]
    s = system(agents=agents)
    s.save_pretrained(tmp_path)
    loaded = MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())
    assert loaded.agents == agents
    s.load_weights(tmp_path)
    described = json.loads((tmp_path / "agents.json").read_text())
    for key, bad in (("latent_steps", 1.5), ("latent_steps", None), ("stop_change", "no")):
        changed = {**described, "agents": [{**described["agents"][0], key: bad}, described["agents"][1]]}
        (tmp_path / "agents.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=rf"agents\[0\]: expected {key} of kind .*got {bad!r}"):
            MultiAgentSystem.from_pretrained(tmp_path, tiny("qwen3", patch=False), tokenizer())


def test_a_function_cannot_be_saved(tmp_path):
    """Which is said before anything is written, and before a training that would end at its first checkpoint."""
    s, message = system(agents=FIELDS), "agent 'critic': latent_steps: expected an integer or the name of a field.*a function"
    for call in (s.save_pretrained, s.load_weights):
        with pytest.raises(ValueError, match=message):
            call(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    rows = [{**row, "answer": a} for row, a in zip(ROWS, ANSWERS)]
    arguments = dict(max_steps=1, report_to=[], use_cpu=True)
    with pytest.raises(ValueError, match=message):
        Trainer(s, default_arguments(tmp_path, save_strategy="steps", **arguments), train_dataset=rows)
    s = system(agents=FIELDS, dtype=torch.float32)
    assert Trainer(s, default_arguments(tmp_path, save_strategy="no", **arguments), train_dataset=rows).train().global_step == 1


@pytest.mark.parametrize(
    "T, fields, message",
    [
        ("steps", {}, r"agent 'a': latent_steps: expected a field 'steps', the question has \['question'\]"),
        ("steps", {"steps": -1}, "latent_steps: expected an integer >= 0 in the field 'steps', got -1"),
        ("steps", {"steps": True}, "latent_steps: expected an integer >= 0 in the field 'steps', got True"),
        ("steps", {"steps": 1.5}, "latent_steps: expected an integer >= 0 in the field 'steps', got 1.5"),
        ("steps", {"steps": "many"}, "latent_steps: expected an integer >= 0 in the field 'steps', got 'many'"),
        (lambda fields: None, {}, "latent_steps: expected an integer >= 0 from its function, got None"),
        ("steps", {"steps": 600}, "agent 'a': expected its prompt and 600 latent steps to fit in the context of 512"),
    ],
)
def test_steps_that_do_not_fit(T, fields, message, tmp_path):
    s = system(agents=[Agent("a", "w5 {question}", T), Agent("b", "w9 {question}")])
    good = {"question": "w10", "steps": 2} if isinstance(T, str) else None
    questions = [good, {"question": "w10", **fields}] if good else [{"question": "w10", **fields}]
    where = rf"questions\[{len(questions) - 1}\], "
    with pytest.raises(ValueError, match=where + ".*" + message if message[0] == "l" else where + message):
        s(questions, ["w20"] * len(questions))
    if "context" not in message:  # rows too long are found when they are reached
        rows = [{**q, "answer": "w20"} for q in questions]
        with pytest.raises(ValueError, match=rf"train_dataset\[{len(rows) - 1}\]: .*{message}"):
            Trainer(s, default_arguments(tmp_path, save_strategy="no"), train_dataset=rows)


def test_bad_options():
    for bad in (-1, None, 1.5, ""):
        with pytest.raises(ValueError, match=f"agent 'a': latent_steps: expected an integer >= 0, the name .*got {bad!r}"):
            Agent("a", "x", latent_steps=bad)
    for bad in (0, -0.5, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="agent 'a': stop_change: expected a number > 0 or None, got"):
            Agent("a", "x", 3, stop_change=bad)
    # As a command line has it.
    assert Agent("a", "x", "steps").steps({"steps": "3"}) == 3


def test_the_oracle_takes_the_steps_of_the_question():
    s = system(agents=FIELDS)
    a, b = (unroll(s, {**ROWS[0], "plan": T}, ANSWERS[0]) for T in (2, 3))
    assert (a - b).abs().max() > 1e-4
