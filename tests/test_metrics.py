"""Metrics of an evaluation."""

import math
import random

import pytest
import torch

from diffmas.evaluation import Scorer, perplexity, wilson
from diffmas.evaluation.metrics import agreements, difference_of_means, difference_of_rates
from diffmas.evaluation.scorer import boxed, last_number, normalise


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
