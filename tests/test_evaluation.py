"""Metrics against hand-made cases, baselines against the same thing said in another way."""

import csv
import io
import math

import pytest
import tiny_systems as tiny
import torch
import torch.nn.functional as F
from rich.console import Console

from diffmas import Agent, MultiAgentSystem, Trace
from diffmas.agents import answers as answers_module
from diffmas.agents import meter
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
    tables,
    wilson,
    write_answers,
    write_csv,
    write_entropy,
)  # fmt: skip
from diffmas.evaluation.metrics import difference_of_rates
from diffmas.evaluation.picture import drawn
from diffmas.evaluation.run import narrow_table

QUESTIONS = [r["question"] for r in tiny.rows(4)]
ANSWERS = [r["answer"] for r in tiny.rows(4)]
GREEDY = dict(max_new_tokens=4, temperature=0.0)


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


def test_names_are_folded_between_words():
    """Of the costs in the demo, whose columns leave nine for the names where two spaces are between them."""
    counts = [("text agents", "31,135", "0", "62,770"), ("LatentMAS (untrained)", "2,400", "4,800", "24,800")]
    rows = [[*count, "5.12", "2.31", "0.85", "0.01", "2.07", "51.6"] for count in counts]
    heads = ("method", "tokens decoded", "latent steps", "prompt tokens", "all s", "prefill s", "latent s", "hand over s",
             "decode s", "trace MB")  # fmt: skip
    console = Console(width=80, file=io.StringIO())
    console.print(narrow_table("", heads, rows))
    shown = console.file.getvalue().split()
    assert {"LatentMAS", "(untrained)", "31,135", "62,770", "51.6", "prefill", "decoded"} <= {*shown}


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
