"""Metrics against hand-made cases, baselines against the same thing said in another way."""

import csv
import io
import math
import random

import pytest
import systems
import tiny_systems as tiny
import torch
import torch.nn.functional as F
from models import assert_close, gradients
from rich.console import Console
from transformers import TrainingArguments

from diffmas import Agent, MultiAgentSystem, Trace, Trainer
from diffmas.agents import answers as answers_module
from diffmas.agents import meter
from diffmas.agents.file import add_adapter
from diffmas.evaluation import (
    Latent,
    MethodsFailed,
    Scorer,
    Stitched,
    TextAgents,
    Writers,
    evaluate,
    latent_mas,
    perplexity,
    plot,
    right_turns,
    single_agent,
    stitch,
    tables,
    wilson,
    write_answers,
    write_csv,
    write_entropy,
)  # fmt: skip
from diffmas.evaluation.metrics import agreements, difference_of_means, difference_of_rates
from diffmas.evaluation.picture import drawn
from diffmas.evaluation.scorer import boxed, last_number, normalise

QUESTIONS = [r["question"] for r in tiny.rows(4)]
ANSWERS = [r["answer"] for r in tiny.rows(4)]
GREEDY = dict(max_new_tokens=4, temperature=0.0)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_final_answers():
    assert normalise("  The  Garden. ") == "the garden" and normalise("$42$") == "42"
    assert boxed(r"a \boxed{1} b \boxed{\frac{1}{2}} c") == r"\frac{1}{2}" and boxed(r"\boxed{1} \boxed{2") == "1"
    assert boxed("none") is None and last_number("no") is None
    assert last_number("from 3 to 1,234.5.") == "1234.5" and last_number("x = -7") == "-7"
    assert Scorer().correct("Garden.", "garden") and not Scorer().correct("in the garden", "garden")
    assert Scorer("number").correct("so it is 42", "42") and not Scorer("number").correct("no idea", "42")
    assert Scorer("boxed").correct(r"so \boxed{42}", r"\boxed{42}") and Scorer("boxed").correct(r"\boxed{42}", "42")
    by_pattern = Scorer(r"Answer: (\w+)")
    assert by_pattern.correct("Answer: attic\nAnswer: garden", "garden") and not by_pattern.correct("garden", "garden")
    inside = Scorer(match="contains")
    assert inside.correct("It is in the Garden, I think.", "in the garden.") and inside.correct("garden", "garden")
    assert not inside.correct("in the gardens", "garden") and not inside.correct("anything", "?!")
    assert inside.vote(["the garden", "garden", "a garden"])[1] == 1 / 3, "what contains another is not the same answer"
    assert Scorer(str.upper, lambda given, gold: given == gold).correct("a", "A")
    with pytest.raises(ValueError, match="extract: expected one of .*got '\\('"):
        Scorer("(")
    with pytest.raises(ValueError, match="match: expected one of .*got 'fuzzy'"):
        Scorer(match="fuzzy")


def test_mathematics_is_compared_as_mathematics():
    pytest.importorskip("math_verify")
    scorer = Scorer("boxed", "math")
    assert scorer.correct(r"\boxed{\frac{1}{2}}", "0.5") and not scorer.correct(r"\boxed{\frac{1}{3}}", "0.5")


def test_without_math_verify_the_error_says_so(monkeypatch):
    monkeypatch.setattr("diffmas.evaluation.scorer.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'math' needs the package math-verify"):
        Scorer(match="math")


def test_accuracy_and_votes():
    texts = [["a", "a", "b"], ["b", "c", "c"], ["x", "y", "z"]]
    scorer, golds = Scorer(), ["a", "b", "x"]
    assert scorer.accuracy(texts, golds) == pytest.approx((2 / 3 + 1 / 3 + 1 / 3) / 3)
    voted, agreement = scorer.self_consistency(texts, golds)
    assert voted == pytest.approx(2 / 3)  # a tie goes to the first answer
    assert agreement == pytest.approx((2 / 3 + 2 / 3 + 1 / 3) / 3)
    assert Scorer("number").vote(["none", "1", "none"]) == ("1", pytest.approx(1 / 3))
    assert Scorer("number").vote(["none"]) == (None, 0.0)
    with pytest.raises(ValueError, match="expected samples for each of 2 questions"):
        scorer.accuracy([["a"]], ["a", "b"])


@pytest.mark.parametrize(
    "right, n, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662)],  # Newcombe 1998
)
def test_wilson(right, n, low, high):
    assert wilson(right / n, n) == pytest.approx((low, high), abs=1e-4)


def test_wilson_holds_the_rate():
    """At 0 and 1 too, where rounding would leave it outside: error bars must not be negative."""
    assert all(wilson(0.0, n)[0] == 0 and wilson(1.0, n)[1] == 1 for n in range(1, 500))


def test_perplexity():
    assert perplexity(4 * math.log(7), 4) == pytest.approx(7)
    assert perplexity(1e6, 1) == math.inf
    with pytest.raises(ValueError, match="expected at least one token"):
        perplexity(0.0, 0)


def test_a_difference_of_paired_rates():
    """Against the interval that Fagerland, Lydersen and Laake (2014) give for 1, 1, 7 and 12 pairs, and by its coverage."""
    before, after = [1, 1] + [0] * 19, [1, 0] + [1] * 7 + [0] * 12
    assert difference_of_rates(before, after) == pytest.approx((-6 / 21, -0.507, -0.026), abs=5e-4)
    assert difference_of_rates(after, before) == pytest.approx((6 / 21, 0.026, 0.507), abs=5e-4)
    value, low, high = difference_of_rates([1, 0, 1], [1, 0, 1])
    assert value == 0 and low == pytest.approx(-high) and high > 0
    assert difference_of_rates([1], [0]).low < 0  # one question says nothing
    rng, held, narrow = random.Random(0), 0, 0
    for _ in range(400):
        easy = [rng.random() for _ in range(40)]  # what both find easy
        a, b = ([float(e < rate + 0.2 * rng.random()) for e in easy] for rate in (0.6, 0.4))
        _, low, high = difference_of_rates(a, b)
        held, narrow = held + (low <= 0.2 <= high), narrow + (high - low < 0.36)
    assert 0.93 <= held / 400 <= 0.995 and narrow > 390  # 0.43 for rates that are not paired
    for a, b, message in (([], [], "at least one"), ([1], [1, 0], "got 1 and 2"), ([2.0], [0.0], "in \\[0, 1\\]")):
        with pytest.raises(ValueError, match=message):
            difference_of_rates(a, b)


@pytest.mark.parametrize("n, quantile", [(2, 12.706), (3, 4.303), (4, 3.182), (6, 2.571), (11, 2.228), (31, 2.042)])
def test_a_difference_of_paired_means(n, quantile):
    """Against the table of Student's distribution."""
    a, b = [float(i * i) for i in range(n)], [float(i % 2) for i in range(n)]
    gaps = torch.tensor([x - y for x, y in zip(a, b)])
    mean, half = float(gaps.mean()), quantile * float(gaps.std()) / math.sqrt(n)
    assert difference_of_means(a, b) == pytest.approx((mean, mean - half, mean + half), rel=3e-3)
    assert difference_of_means([1.0], [0.0]) == (1.0, -math.inf, math.inf)


def test_agreements():
    assert agreements([1.0, 0.75, 0.5, 0.0], 4) == {"3 of 4": 0.5, "4 of 4": 0.25}
    assert agreements([2 / 3, 1.0], 3) == {"3 of 3": 0.5} and agreements([1.0], 1) == {}
    assert list(agreements([1.0], 16)) == ["12 of 16", "16 of 16"]
    with pytest.raises(ValueError, match="expected one for each question"):
        agreements([], 4)


# ---- what it costs ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_an_answer_costs():
    system = tiny.system(latent_steps=3).eval()
    with meter.measuring(system.device) as outer:
        answers = Latent(system).answer(QUESTIONS, 3, batch_size=3, max_new_tokens=4, temperature=1.0, seed=0)
    cost = answers.cost
    prompts = [system.prompt_ids(agent, {"question": q}) for agent in system.agents for q in QUESTIONS]
    assert cost.rows["prefill"] == sum(map(len, prompts)) and cost.rows["latent"] == 2 * 3 * len(QUESTIONS)
    assert all(cost.seconds[name] > 0 for name in ("prefill", "latent", "decode", "other"))
    assert answers.seconds == sum(cost.seconds.values()) and cost.seconds["hand-over"] == 0  # nothing to do for it
    trace = Trace(system.model, 3)  # the largest batch: 3 questions
    want = system.communicate(system.fields_of(QUESTIONS[:3]), trace).memory()
    assert cost.trace_bytes >= want
    assert outer.cost.rows["prefill"] == 0 and outer.cost.total >= answers.seconds  # who answers measures for itself
    handing = Latent(tiny.system(trace_content="latent_only")).answer(QUESTIONS, **GREEDY).cost
    assert handing.seconds["hand-over"] > 0


def test_a_phase_within_a_phase_counts_once(monkeypatch):
    now = iter([1.0, 2.0, 4.0, 7.0, 11.0, 16.0, 22.0, 29.0])
    monkeypatch.setattr(meter.time, "perf_counter", lambda: next(now))
    with meter.measuring(torch.device("cpu")) as m:
        with meter.phase("decode"):
            with meter.phase("prefill"):
                pass
            meter.decoded(0, torch.zeros(1, 4), [2])
    assert m.cost.seconds == {"prefill": 3.0, "latent": 0.0, "hand-over": 0.0, "decode": 2.0 + 4.0 + 6.0, "other": 1.0 + 7.0}
    assert m.decoding.nll == pytest.approx(math.log(4)) and m.decoding.entropy == pytest.approx([math.log(4)])
    with meter.phase("decode"):  # nobody measures
        meter.decoded(0, torch.zeros(1, 4), [2])
    assert m.decoding.counts == [1]


@torch.no_grad()
def test_how_sure_a_decoding_is():
    """Against the plain model over prompts and decoded tokens, whatever the temperature they were drawn at."""
    model, system = tiny.model().eval(), tiny.system().eval()
    method = single_agent(system)
    options = dict(max_new_tokens=5, temperature=2.0, top_p=0.9, seed=3)
    answers = method.answer(QUESTIONS, 2, batch_size=3, **options)
    with method.switched():
        decoded = method.system.generate_tokens(QUESTIONS, samples=2, **options)
    nll, entropies = 0.0, {}
    for question, samples in zip(QUESTIONS, decoded):
        ids = system.prompt_ids(system.agents[-1], {"question": question})
        for new in samples:
            logp = model(torch.tensor([ids + new])).logits[0, len(ids) - 1 : -1].log_softmax(-1)
            nll -= float(logp.gather(1, torch.tensor(new)[:, None]).sum())
            for t, entropy in enumerate(-(logp.exp() * logp).sum(-1)):
                entropies.setdefault(t, []).append(float(entropy))
    assert answers.decoding.nll == pytest.approx(nll, rel=1e-4)
    assert answers.decoding.counts == [len(entropies[t]) for t in range(len(entropies))]
    assert answers.decoding.entropy == pytest.approx([sum(e) / len(e) for e in entropies.values()], rel=1e-4)


# ---- methods ---------------------------------------------------------------------------------------------------------


def plain_nll(model, ids: list[int], answer: list[int]) -> float:
    logits = model(torch.tensor([ids + answer])).logits[0, len(ids) - 1 : -1]
    return float(F.cross_entropy(logits, torch.tensor(answer), reduction="sum"))


@torch.no_grad()
def test_a_system_is_what_it_answers():
    system = tiny.system()
    method = Latent(system)
    answers = method.answer(QUESTIONS, 2, batch_size=3, **GREEDY)
    assert answers.texts == system.generate(QUESTIONS, samples=2, **GREEDY)
    decoded = system.generate_tokens(QUESTIONS, samples=2, **GREEDY)
    assert answers.tokens == sum(len(t) for row in decoded for t in row) and answers.seconds > 0
    whole, parts = method.loss(QUESTIONS, ANSWERS), method.loss(QUESTIONS, ANSWERS, batch_size=3)
    assert whole[1] == parts[1] == sum(len(system.answer_ids(a)) for a in ANSWERS)
    assert whole[0] == pytest.approx(parts[0], rel=1e-5)
    assert whole[0] / whole[1] == pytest.approx(float(system(QUESTIONS, ANSWERS).loss), rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"adapter_scope": "per_role"}, {"trace_content": "latent_only"}])
@torch.no_grad()
def test_latent_mas_is_the_system_without_its_adapter(options):
    system = tiny.system(**options).eval()
    bare = {k: v for k, v in options.items() if k != "adapter_scope"}
    untrained = MultiAgentSystem(tiny.model().eval(), tiny.tokenizer(), tiny.agents(), **bare)
    method = latent_mas(system)
    assert method.loss(QUESTIONS, ANSWERS)[0] == pytest.approx(Latent(untrained).loss(QUESTIONS, ANSWERS)[0], rel=1e-5)
    assert method.loss(QUESTIONS, ANSWERS)[0] != pytest.approx(Latent(system).loss(QUESTIONS, ANSWERS)[0], rel=1e-3)
    assert method.answer(QUESTIONS, **GREEDY).texts == Latent(untrained).answer(QUESTIONS, **GREEDY).texts


@torch.no_grad()
def test_a_single_agent_is_the_plain_model():
    system, model = tiny.system().eval(), tiny.model().eval()
    method = single_agent(system)
    prompts = [system.prompt_ids(system.agents[-1], {"question": q}) for q in QUESTIONS]
    want = sum(plain_nll(model, p, system.answer_ids(a)) for p, a in zip(prompts, ANSWERS))
    assert method.loss(QUESTIONS, ANSWERS)[0] == pytest.approx(want, rel=1e-5)
    trained = single_agent(system, adapter=True)
    want = sum(plain_nll(system.model, p, system.answer_ids(a)) for p, a in zip(prompts, ANSWERS))
    assert trained.loss(QUESTIONS, ANSWERS)[0] == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("field", [True, False])
@torch.no_grad()
def test_text_agents_read_all_that_was_written(field):
    """Against a loop over plain prompts, one question at a time."""
    model, tokenizer = tiny.model().eval(), tiny.tokenizer()
    prompts = ["plan : {question}", "notes : {question}", "question : {question} answer :"]
    if field:
        prompts = [prompts[0], "notes : {messages} {question}", "{question} {messages} answer :"]
    crew = [Agent(name, prompt=p) for name, p in zip(("planner", "critic", "solver"), prompts)]
    system = MultiAgentSystem(model, tokenizer, crew)
    method = TextAgents(system, max_message_tokens=3)

    texts, nll, decoded = [], 0.0, 0
    for question, gold in zip(QUESTIONS, ANSWERS):
        messages = ""
        for agent in crew:
            prompt = agent.prompt.replace("{question}", question).replace("{messages}", messages)
            if messages and not field:
                prompt = f"{messages}\n\n{prompt}"
            ids = tokenizer(prompt)["input_ids"]
            last = agent is crew[-1]
            out = model.generate(torch.tensor([ids]), max_new_tokens=4 if last else 3, do_sample=False)[0, len(ids) :].tolist()
            decoded += len(out)
            text = tokenizer.decode(out, skip_special_tokens=True)
            messages = f"{messages}\n\n{agent.name}: {text.strip()}".strip() if not last else messages
        texts.append([text])
        nll += plain_nll(model, ids, system.answer_ids(gold))

    got = method.answer(QUESTIONS, batch_size=3, **GREEDY)
    assert got.texts == texts and got.tokens == decoded
    assert method.loss(QUESTIONS, ANSWERS, batch_size=3)[0] == pytest.approx(nll, rel=1e-5)


def test_samples_of_text_agents_differ_and_repeat():
    method = TextAgents(tiny.system(), max_message_tokens=4)
    options = dict(max_new_tokens=6, temperature=1.5, top_p=1.0)
    first, again = (method.answer(QUESTIONS[:2], 3, seed=1, **options).texts for _ in range(2))
    assert first == again != method.answer(QUESTIONS[:2], 3, seed=2, **options).texts
    assert [len(row) for row in first] == [3, 3] and len(set(first[0])) > 1
    with pytest.raises(ValueError, match="max_message_tokens: expected at least 1, got 0"):
        TextAgents(tiny.system(), max_message_tokens=0)


@pytest.mark.parametrize("batch_size", [None, 1, 3])
def test_samples_of_text_agents_are_batched_and_share_what_they_read(batch_size, monkeypatch):
    """As if every sample of a question were a question of its own, as the seeds go; but a batch is of questions."""
    system, sizes = tiny.system(), []
    decode = answers_module.decode
    monkeypatch.setattr(
        answers_module, "decode", lambda s, t, prompts, *a: sizes.append(len(prompts)) or decode(s, t, prompts, *a)
    )
    options = dict(max_new_tokens=4, temperature=1.5, top_p=1.0, seed=5)
    method = TextAgents(system, max_message_tokens=3)
    got = method.answer(QUESTIONS, 3, batch_size, **options)
    assert max(sizes) == 3 * (batch_size or len(QUESTIONS))
    apart = method.answer([q for q in QUESTIONS for _ in range(3)], 1, 2, **options)
    assert got.texts == [[text for (text,) in apart.texts[i : i + 3]] for i in range(0, 3 * len(QUESTIONS), 3)]
    first = [len(system.prompt_ids(system.agents[0], {"question": q})) for q in QUESTIONS]
    turns, again = method.write(QUESTIONS, 3, batch_size, **options)
    whole = sum(len(tiny.tokenizer()(p)["input_ids"]) for turn in turns[1:] for p in turn.prompts)
    assert again.texts == got.texts
    # Of samples that wrote the same message, the next prompt is shared too.
    assert sum(first) < got.cost.rows["prefill"] <= sum(first) + whole < 3 * sum(first) + whole
    assert got.tokens == sum(sum(turn.lengths) for turn in turns)
    assert sum(got.decoding.counts) == sum(turns[-1].lengths)  # of the answers, not of the messages
    with pytest.raises(ValueError, match="samples: expected at least 1, got 0"):
        method.answer(QUESTIONS, 0)


# ---- stitched agents -------------------------------------------------------------------------------------------------


def stitched_logits(system, question, answer):
    """The logits of the answer's tokens [A, V] without a trace: one context, in which an agent sees its own tokens alone and
    the last one all that was handed on. Moving an agent's block moves nothing in it, for RoPE is relative."""
    base, model, fields = systems.body(system.model), system.model, {"question": question}
    embed, blocks = base.get_input_embeddings(), []
    for agent in system.agents[:-1]:
        x = embed(torch.tensor(system.prompt_ids(agent, fields)))
        prompt = len(x)
        for _ in range(agent.latent_steps):
            h = base(inputs_embeds=x[None], use_cache=False).last_hidden_state[0, -1:]
            x = torch.cat((x, system.realign(h)))
        blocks.append((x, prompt))
    target = system.answer_ids(answer)
    blocks.append((embed(torch.tensor(system.prompt_ids(system.agents[-1], fields) + target)), 0))
    x = torch.cat([block for block, _ in blocks])
    owner = torch.tensor([i for i, (block, _) in enumerate(blocks) for _ in block])
    only_latent = system.trace_content == "latent_only"
    handed = torch.tensor([not only_latent or t >= prompt for block, prompt in blocks for t in range(len(block))])
    last = owner == len(blocks) - 1
    sees = ((owner[:, None] == owner) | (last[:, None] & handed)).tril()
    mask = torch.zeros(len(x), len(x), dtype=x.dtype).masked_fill(~sees, torch.finfo(x.dtype).min)
    where, positions = 0, []  # of what is handed on, without gaps; a prompt that is not stands before its latent steps
    for block, prompt in blocks:
        kept = prompt if only_latent else 0
        positions += range(where - kept, where - kept + len(block))
        where += len(block) - kept
    positions = torch.tensor(positions)
    logits = model(
        inputs_embeds=x[None], attention_mask=mask[None, None], position_ids=positions[None] + 100, use_cache=False
    ).logits[0]  # fmt: skip
    return logits[-len(target) - 1 : -1]


@pytest.mark.parametrize("content", ["all", "latent_only"])
def test_stitched_agents_equal_one_masked_context(content):
    from systems import ANSWERS, QUESTIONS

    s = systems.system(trace_content=content, sinks=0)
    method = stitch(s, adapter=True)
    team = method.system
    out = team(QUESTIONS, ANSWERS)
    total, count = 0.0, 0
    for b, (question, answer) in enumerate(zip(QUESTIONS, ANSWERS)):
        want = stitched_logits(team, question, answer)
        assert_close(out.logits[b, : len(want)], want)
        total = total + F.cross_entropy(want, torch.tensor(team.answer_ids(answer)), reduction="sum")
        count += len(want)
    assert abs((out.loss - systems.unrolled_loss(s, QUESTIONS, ANSWERS)).item()) > 1e-4  # agents that read each other
    out.loss.backward()
    got = gradients(team)
    (total / count).backward()
    assert_close(got, gradients(team))
    assert method.loss(QUESTIONS, ANSWERS)[0] == pytest.approx(total.item(), rel=1e-5)
    generated = team.generate_tokens(QUESTIONS, max_new_tokens=3, temperature=0)
    assert [row[0][0] for row in generated] == [int(team([q]).logits[0, 0].argmax()) for q in QUESTIONS]


def test_stitched_agents_are_trained_as_others_are(tmp_path):
    system = tiny.system()
    team = Stitched(system.model, system.tokenizer, system.agents)
    before = tiny.trainable(team)
    arguments = TrainingArguments(str(tmp_path), max_steps=2, learning_rate=1e-2, report_to=[], use_cpu=True, disable_tqdm=True)
    Trainer(team, arguments, train_dataset=tiny.rows(4)).train()
    assert all(not torch.equal(before[name], p) for name, p in tiny.trainable(team).items())
    alone = Stitched(system.model, system.tokenizer, system.agents[-1:])
    assert alone(QUESTIONS, ANSWERS).loss.isfinite()  # nobody to be joined


# ---- text agents that are trained ------------------------------------------------------------------------------------


def test_right_turns_are_what_right_samples_wrote():
    system = tiny.system()
    team, scorer = TextAgents(system, 25), Scorer("(kitchen|cellar|garden|attic|garage)")
    options = dict(max_new_tokens=25, temperature=5.0, top_p=1.0, seed=1)
    rows = right_turns(team, tiny.rows(4), 40, scorer, batch_size=2, **options)
    turns, answers = team.write(QUESTIONS, 40, **options)
    want = []
    for i, text in enumerate(text for texts in answers.texts for text in texts):
        if scorer.correct(text, ANSWERS[i // 40]) and all(turn.lengths[i] < 25 for turn in turns):
            want += [{"agent": t.agent.name, "prompt": t.prompts[i], "answer": t.texts[i]} for t in turns]
    assert rows == want and [row["agent"] for row in rows[:3]] == ["planner", "critic", "solver"]
    with pytest.raises(ValueError, match="got 0 right and [1-9][0-9]* that ended by themselves of 160"):
        right_turns(team, [{**row, "answer": "nowhere"} for row in tiny.rows(4)], 40, **options)
    with pytest.raises(ValueError, match="and 0 that ended by themselves"):
        right_turns(TextAgents(system, 1), tiny.rows(4), 40, scorer, **options)


def test_text_agents_learn_from_their_right_turns(tmp_path):
    """What a role is trained on is what it reads: each with its own system message. Then the team has the adapter by name."""
    crew = [Agent("planner", "plan : {question}", system="notes"), Agent("solver", "question : {question} answer :")]
    system = MultiAgentSystem(tiny.model(), tiny.tokenizer(), crew)
    rows = [
        {"agent": "planner", "prompt": "plan : where is the key", "answer": "in the garden"},
        {"agent": "solver", "prompt": "planner: in the garden\n\nquestion : where is the key answer :", "answer": "the attic"},
    ]
    writers = Writers(system.model, system.tokenizer, crew)
    reads = MultiAgentSystem(system.model, system.tokenizer, crew[:1]).prompt_ids(crew[0], {"question": "where is the key"})
    assert writers.prompt_ids(writers.agents[0], rows[0]) == reads != system.tokenizer(rows[0]["prompt"])["input_ids"]
    with pytest.raises(ValueError, match=r"questions\[0\], agent: expected one of \['planner', 'solver'\], got 'critic'"):
        writers([{**rows[0], "agent": "critic"}], ["in the garden"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=60, learning_rate=3e-2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no",
        logging_strategy="no",
    )  # fmt: skip
    Trainer(writers, arguments, train_dataset=rows).train()
    writers.save_pretrained(tmp_path / "sft")

    other = tiny.system()  # with an adapter of its own
    team = MultiAgentSystem(add_adapter(tmp_path / "sft", other.model, "sft"), tiny.tokenizer(), crew)
    own = Latent(other).loss(QUESTIONS, ANSWERS)
    trained = TextAgents(team, 6, adapter="sft").answer(["where is the key"], **GREEDY)
    assert trained.texts == [["the attic"]]
    assert TextAgents(team, 6).answer(["where is the key"], **GREEDY).texts != trained.texts
    assert Latent(other).loss(QUESTIONS, ANSWERS) == own  # the first adapter is still the active one
    with pytest.raises(ValueError, match=r"adapter: expected True, False or one of \['default', 'sft'\], got 'sftt'"):
        TextAgents(team, 6, adapter="sftt")
    bare = add_adapter(tmp_path / "sft", tiny.model(), "sft")
    alone = MultiAgentSystem(bare, tiny.tokenizer(), crew)
    assert TextAgents(alone, 6, adapter="sft").answer(["where is the key"], **GREEDY).texts == trained.texts
    with pytest.raises(ValueError, match="expected agents of this base model"):
        add_adapter(tmp_path / "sft", tiny.model(seed=9), "sft")
    tiny.system(adapter_scope="per_role").save_pretrained(tmp_path / "roles")
    with pytest.raises(ValueError, match="expected one adapter that all agents share, got .*'critic'"):
        add_adapter(tmp_path / "roles", tiny.model(), "roles")


# ---- side by side ----------------------------------------------------------------------------------------------------


def test_results_are_tables_files_and_a_plot(tmp_path):
    system = tiny.system()
    methods = {
        "single": single_agent(system),
        "text": TextAgents(system, 2),
        "a name that is much too long for a column": latent_mas(system),
        "diffmas": Latent(system),
    }
    ran, rows = [], tiny.rows(4)
    options = dict(batch_size=3, max_new_tokens=3, temperature=0.6, seed=0)
    results = evaluate(methods, rows, 4, progress=ran.append, **options)
    assert ran == [r.method for r in results] == list(methods)
    for r in results:
        assert r.questions == r.samples == 4 and 0 <= r.low <= r.accuracy <= r.high <= 1
        assert r.perplexity == pytest.approx(perplexity(*methods[r.method].loss(QUESTIONS, ANSWERS)), rel=1e-4)
        decoding = methods[r.method].answer(QUESTIONS, 4, **options).decoding
        assert r.decoded_perplexity == pytest.approx(math.exp(decoding.nll / sum(decoding.counts)), rel=1e-4)
        assert r.entropy_curve == pytest.approx(decoding.entropy, rel=1e-4) and 0 < r.entropy <= max(r.entropy_curve)
        assert r.tokens >= 16 and r.seconds > 0 and 0 < r.agreement <= 1 and r.trace_bytes > 0 < r.prompt_tokens
        assert set(r.agree) == {"3 of 4", "4 of 4"} and r.agree["4 of 4"] <= r.agree["3 of 4"]
    assert [r.latent_steps > 0 for r in results] == [False, False, True, True]
    for table in tables(results, "title"):
        assert table.row_count == 4
        console = Console(width=80, file=io.StringIO())
        assert console.measure(table).maximum <= 80
        console.print(table)
        assert "\u2026" not in console.file.getvalue()  # nothing is cut
    with write_csv(results, tmp_path / "new" / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in read] == [r.perplexity for r in results] and "texts" not in read[0]
    assert [float(row["agree_3_of_4"]) for row in read] == [r.agree["3 of 4"] for r in results]
    assert [float(row["seconds_hand_over"]) for row in read] == [r.phases["hand-over"] for r in results]
    with write_entropy(results, tmp_path / "entropy.csv").open() as file:
        curve = [(float(row["nats"]), int(row["tokens"])) for row in csv.DictReader(file) if row["method"] == "text"]
    assert curve == list(zip(results[1].entropy_curve, results[1].entropy_counts))
    assert plot(results, tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    lines = write_answers(results, rows, tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 4 and results[0].texts[0][0] in lines[0]


def test_the_plot_has_what_the_tables_have():
    methods = {"single": single_agent(tiny.system()), "diffmas": Latent(tiny.system())}
    results = evaluate(methods, tiny.rows(2), 4, max_new_tokens=3, temperature=0.6, seed=0)
    axes = drawn(results).axes
    bars = {
        (a.get_xlabel(), group.get_label()): [bar.get_width() for bar in group] for a in axes for group in a.containers
        if hasattr(group, "patches") and group.patches
    }  # fmt: skip
    found = {label: values for (_, label), values in bars.items() if not label.startswith("_")}
    assert found["gold answer"] == [r.perplexity for r in results]
    assert found["decoded answer"] == [r.decoded_perplexity for r in results]
    for name in ("3 of 4", "4 of 4"):
        assert found[f"{name} agree"] == [100 * r.agree[name] for r in results]
    assert found["tokens decoded"] == [r.tokens for r in results] and found["decode"] == [r.phases["decode"] for r in results]
    assert found["latent steps"] == [0, results[1].latent_steps] and found["prompt tokens"] == [
        r.prompt_tokens for r in results
    ]
    assert any(values == [r.trace_bytes / 1e6 for r in results] for values in bars.values())
    assert any("less the best baseline (single)" in a.get_xlabel() for a in axes)
    (curve,) = [a for a in axes if "entropy" in a.get_ylabel()]
    assert [list(line.get_ydata()) for line in curve.lines] == [r.entropy_curve for r in results]


class Fixed:
    """Answers with given texts."""

    def __init__(self, texts):
        self.texts = texts

    def answer(self, questions, samples, batch_size, **_):
        from diffmas.evaluation import Answers

        return Answers([[text] * samples for text in self.texts], 0, 1.0)

    def loss(self, questions, answers, batch_size, seed):
        return 0.0, 1


def test_methods_are_compared_with_the_best_baseline():
    right = [Fixed([a if i < n else "wrong" for i, a in enumerate(ANSWERS)]) for n in (1, 3, 4)]
    methods = dict(zip(("weak", "strong", "ours"), right))
    saved = []
    weak, strong, ours = evaluate(methods, tiny.rows(4), save=lambda rs: saved.append([r.best_baseline for r in rs]))
    assert saved == [["weak"], ["strong"] * 2, ["strong"] * 3]
    assert strong.difference is None and ours.difference == difference_of_rates([1, 1, 1, 1], [1, 1, 1, 0])
    assert weak.difference.value == -0.5 and weak.row()["difference_low"] == weak.difference.low
    assert strong.row()["difference"] is None and strong.row()["best_baseline"] == "strong"
    assert [r.best_baseline for r in evaluate(methods, tiny.rows(4), baselines=["weak"])] == ["weak"] * 3
    (alone,) = evaluate({"ours": right[0]}, tiny.rows(4))
    assert alone.best_baseline is None and alone.difference is None and math.isnan(alone.decoded_perplexity)
    with pytest.raises(ValueError, match="baselines: expected some of .*'ours'.*got 'best'"):
        evaluate(methods, tiny.rows(4), baselines=["best"])


def test_a_method_that_fails_does_not_lose_the_others():
    class Failing:
        def answer(self, *_, **__):
            raise ValueError("questions[0]: too long")

    system, saved = tiny.system(), []
    methods = {"first": single_agent(system), "text": Failing(), "last": Latent(system)}
    with pytest.raises(MethodsFailed, match=r"^text: questions\[0\]: too long$") as failure:
        evaluate(methods, tiny.rows(2), save=lambda results: saved.append([r.method for r in results]), **GREEDY)
    assert saved == [["first"], ["first", "last"]]
    assert [r.method for r in failure.value.results] == ["first", "last"] and isinstance(failure.value.__cause__, ValueError)


def test_a_scorer_that_fails_does_not_lose_the_others():
    class Judge(Scorer):
        def verdicts(self, texts, golds, rows):
            if texts[0] == ["broken"]:
                raise RuntimeError("no verdict")
            return super().verdicts(texts, golds, rows)

    methods = {"bad": Fixed(["broken"] * 2), "good": Fixed(ANSWERS[:2])}
    with pytest.raises(MethodsFailed, match="^bad: no verdict$") as failure:
        evaluate(methods, tiny.rows(2), scorer=Judge())
    assert [(r.method, r.accuracy) for r in failure.value.results] == [("good", 1.0)]


def test_an_answer_that_is_right_counts():
    oracle = Fixed([*ANSWERS[:-1], "wrong"])
    (result,) = evaluate({"oracle": oracle}, tiny.rows(4), samples=2)
    assert result.accuracy == result.vote_accuracy == 0.75 and result.agreement == result.perplexity == 1.0
    assert (result.low, result.high) == wilson(0.75, 4)
    for methods, rows, message in (
        ({}, tiny.rows(1), "methods: expected"),
        ({"a": oracle}, [], "rows: expected at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(methods, rows)
