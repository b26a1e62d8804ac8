"""Metrics against hand-made cases, baselines against the same thing said in another way."""

import csv
import math

import pytest
import tiny_systems as tiny
import torch
import torch.nn.functional as F

from diffmas import Agent, MultiAgentSystem
from diffmas.evaluation import (
    Latent,
    MethodsFailed,
    Scorer,
    TextAgents,
    evaluate,
    latent_mas,
    perplexity,
    plot,
    single_agent,
    table,
    wilson,
    write_answers,
    write_csv,
)  # fmt: skip
from diffmas.evaluation.metrics import boxed, last_number, normalise

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
    monkeypatch.setattr("diffmas.evaluation.metrics.find_spec", lambda name: None)
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


# ---- side by side ----------------------------------------------------------------------------------------------------


def test_results_are_a_table_a_file_and_a_plot(tmp_path):
    system = tiny.system()
    methods = {
        "single": single_agent(system),
        "text": TextAgents(system, 2),
        "latent_mas": latent_mas(system),
        "diffmas": Latent(system),
    }
    ran, rows = [], tiny.rows(4)
    results = evaluate(methods, rows, 2, batch_size=3, progress=ran.append, max_new_tokens=3, temperature=0.6, seed=0)
    assert ran == [r.method for r in results] == list(methods)
    for r in results:
        assert r.questions == 4 and r.samples == 2 and 0 <= r.low <= r.accuracy <= r.high <= 1
        assert r.perplexity == pytest.approx(perplexity(*methods[r.method].loss(QUESTIONS, ANSWERS)), rel=1e-4)
        assert r.tokens >= 8 and r.seconds > 0 and 0 < r.agreement <= 1
    assert table(results).row_count == 4
    with write_csv(results, tmp_path / "new" / "results.csv").open() as file:
        read = list(csv.DictReader(file))
    assert [float(row["perplexity"]) for row in read] == [r.perplexity for r in results] and "texts" not in read[0]
    assert plot(results, tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
    lines = write_answers(results, rows, tmp_path / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 4 and results[0].texts[0][0] in lines[0]


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


def test_an_answer_that_is_right_counts():
    class Oracle:
        def answer(self, questions, samples, batch_size, **_):
            from diffmas.evaluation import Answers

            return Answers([[a] * samples for a in ANSWERS[:-1]] + [["wrong"] * samples], 0, 1.0)

        def loss(self, questions, answers, batch_size):
            return 0.0, 1

    (result,) = evaluate({"oracle": Oracle()}, tiny.rows(4), samples=2)
    assert result.accuracy == result.vote_accuracy == 0.75 and result.agreement == result.perplexity == 1.0
    assert (result.low, result.high) == wilson(0.75, 4)
    for methods, rows, message in (
        ({}, tiny.rows(1), "methods: expected"),
        ({"a": Oracle()}, [], "rows: expected at least one row"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate(methods, rows)
