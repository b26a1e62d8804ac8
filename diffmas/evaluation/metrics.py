"""Accuracy with an interval, perplexity, self-consistency of answers and pass@k.

Samples of one question are not independent, so intervals count questions, not samples.
"""

import inspect
import math
import re
import statistics
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

from diffmas.evaluation import mathematics

__all__ = [
    "EXTRACTORS", "MATCHERS", "Difference", "Scorer", "agreements", "boxed", "difference_of_means", "difference_of_rates",
    "last_number", "normalise", "pass_at_k", "perplexity", "wilson",
]  # fmt: skip

Z95 = statistics.NormalDist().inv_cdf(0.975)
AROUND = " .,:;?\"'`*$"  # an answer, with "!" where that is no factorial


# ---- final answers ---------------------------------------------------------------------------------------------------


def normalise(text: str) -> str:
    """A text in the form that is compared: NFKC, lower case, single spaces, no punctuation, quotes or $ around it; the point of
    .5 is none."""
    text = _folded(text).rstrip(AROUND + "!")
    bare = text.lstrip(AROUND + "!")
    before = text[: len(text) - len(bare)]
    point = bare[:1].isdigit() and before.endswith(".") and not before.endswith("..")
    return "." + bare if point else bare


def _folded(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def boxed(text: str) -> str | None:
    r"""The contents of the last complete \boxed{...}, with the braces inside; None if there is none.

    >>> boxed(r"so \boxed{\frac{1}{2}}")
    '\\frac{1}{2}'
    """
    for start in reversed([m.end() for m in re.finditer(r"\\boxed\s*\{", text)]):
        depth = 1
        for end in range(start, len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[start:end]
    return None


def last_number(text: str) -> str | None:
    """The last number or fraction in a text, without thousands separators and $; None if there is none.

    >>> last_number("It costs 5 dollars, so he gets -$1,234.50."), last_number("He eats 1/2 of it.")
    ('-1234.50', '1/2')
    """
    # A fraction is one number, a date is none: 5/18/2024.
    # Of a mixed number, 2 3/4, the last one counts, as for lm-eval: not 3/4.
    whole = r"\d+(?:,\d{3})*"
    pattern = rf"-?\$?(?:(?<![\d/])(?<!\d ){whole}/{whole}(?!\d|[./]\d)|\d[\d,]*(?:\.\d+)?|\.\d+)"
    found = re.findall(pattern, text.replace("\N{MINUS SIGN}", "-"))
    return re.sub("[,$]", "", found[-1]) if found else None


EXTRACTORS: dict[str, Callable[[str], str | None]] = {"all": lambda text: text, "boxed": boxed, "number": last_number}


def _extractor(how) -> Callable[[str], str | None]:
    if callable(how):
        return how
    if how in EXTRACTORS:
        return EXTRACTORS[how]
    try:
        pattern = re.compile(how, re.DOTALL)
    except (re.error, TypeError) as error:
        raise ValueError(
            f"extract: expected one of {sorted(EXTRACTORS)}, a regular expression or a function, got {how!r} ({error})"
        ) from error

    def last_match(text: str) -> str | None:
        matches = list(pattern.finditer(text))
        return matches[-1].group(1 if pattern.groups else 0) if matches else None

    return last_match


def _exact(given: str, gold: str) -> bool:
    return normalise(given) == normalise(gold)


def _contains(given: str, gold: str) -> bool:
    """Whether the words of the gold answer stand somewhere in the text, in a row."""
    words = normalise(gold)
    return bool(words) and re.search(rf"(?<!\w){re.escape(words)}(?!\w)", normalise(given)) is not None


def _math(given: str, gold: str) -> bool:
    if not _exact(given, gold):
        return mathematics.equal(given, gold)
    # 7! is not 7, but 2! is 2.
    return _factorial(given) == _factorial(gold) or mathematics.equal(given.strip(AROUND), gold.strip(AROUND))


def _factorial(text: str) -> str:
    """The exclamation marks of a factorial at the end of an answer: of 7! or n!, not of "Even!"."""
    marks = re.search(r"(?:[\d)}]|\b[a-z])(!+)$", _folded(text).strip(AROUND))
    return marks[1] if marks else ""


MATCHERS: dict[str, Callable[[str, str], bool]] = {"exact": _exact, "contains": _contains, "math": _math}


def _with_row(function: Callable) -> Callable:
    """The function with the row as a last argument, which it gets only if it has a parameter `row`."""
    try:
        takes = "row" in inspect.signature(function).parameters
    except ValueError:  # some builtins have no signature
        takes = False
    return (lambda *args: function(*args[:-1], row=args[-1])) if takes else (lambda *args: function(*args[:-1]))


class Scorer:
    """Judges answers against gold answers.

    extract: where the final answer is in a text: all | boxed | number, a regular expression (its last match, or the first
        group of that), or a function text -> str | None. It also applies to a gold answer, if it finds something there.
    match: exact (after `normalise`) | contains (the gold answer's words stand in the text) | math (equal as mathematics, by
        math-verify), or a function (given, gold) -> bool.
    same: whether two answers are one vote, a function (given, other) -> bool; by default match, or exact with contains.

    A function with a parameter `row` gets the whole row of the question by that name: its options, its tests.

    Raises ValueError for other values, and for "math" if math-verify is not installed.

        >>> Scorer(extract="number").correct("2 + 2 = 4.", "4")
        True
        >>> Scorer("number", "math").vote(["it is 0.50", "so 1", "about .5"])
        ('0.50', 0.6666666666666666)
    """

    def __init__(self, extract="all", match="exact", same: Callable[[str, str], bool] | None = None):
        if not callable(match) and match not in MATCHERS:
            raise ValueError(f"match: expected one of {sorted(MATCHERS)} or a function, got {match!r}")
        if match == "math" and find_spec("math_verify") is None:
            raise ValueError("match: 'math' needs the package math-verify: pip install 'math-verify[antlr4_13_2]'")
        self._extract, self._match = _with_row(_extractor(extract)), _with_row(match if callable(match) else MATCHERS[match])
        self._same = _with_row(same or _exact) if same or match == "contains" else self._match

    def _right(self, given: str | None, gold: str, row) -> bool:
        final = self._extract(gold, row)
        return given is not None and bool(self._match(given, gold if final is None else final, row))

    def correct(self, text: str, gold: str, row: dict | None = None) -> bool:
        """Whether a text's final answer is the gold answer. row: of the question, for functions that ask for it."""
        return self._right(self._extract(text, row), gold, row)

    def accuracy(self, texts: list[list[str]], golds: list[str], rows: list[dict] | None = None) -> float:
        """The mean over questions of the share of right samples, in [0, 1]. texts[question][sample]; rows[question]."""
        return statistics.fmean(map(statistics.fmean, self.verdicts(texts, golds, rows)))

    def verdicts(self, texts: list[list[str]], golds: list[str], rows: list[dict] | None = None) -> list[list[bool]]:
        """Whether each sample is right, [question][sample]."""
        asked = _asked(texts, golds, rows)
        return [[self.correct(t, gold, row) for t in samples] for samples, gold, row in asked]

    def vote(self, samples: list[str], row: dict | None = None) -> tuple[str | None, float]:
        """The final answer that most samples give, and the share of samples that give it; the first one wins a tie.

        An answer counts for the first one that means the same. A sample without a final answer has no vote; (None, 0.0) if
        none has one.
        """
        votes: list[list[str]] = []
        for answer in (self._extract(text, row) for text in samples):
            if answer is not None:
                alike = next((v for v in votes if answer == v[0] or self._same(answer, v[0], row)), None)
                if alike is None:
                    votes.append([answer])
                else:
                    alike.append(answer)
        most = max(votes, key=len, default=None)
        return (most[0], len(most) / len(samples)) if most else (None, 0.0)

    def self_consistency(
        self, texts: list[list[str]], golds: list[str], rows: list[dict] | None = None
    ) -> tuple[float, float]:  # fmt: skip
        """Self-consistency (Wang et al., arXiv 2203.11171): the accuracy of the majority's answer, and the mean share of
        samples that agree with it. texts[question][sample]; rows[question]."""
        asked = _asked(texts, golds, rows)
        votes = [self.vote(samples, row) for samples, _, row in asked]
        right = [self._right(winner, gold, row) for (winner, _), (_, gold, row) in zip(votes, asked)]
        return statistics.fmean(right), statistics.fmean(share for _, share in votes)


def _asked(texts, golds, rows) -> list[tuple]:
    """(samples, gold, row) of every question."""
    if not texts or len(texts) != len(golds):
        raise ValueError(f"texts: expected samples for each of {len(golds)} questions, at least one, got {len(texts)}")
    if rows is not None and len(rows) != len(golds):
        raise ValueError(f"rows: expected one for each of {len(golds)} questions, got {len(rows)}")
    return list(zip(texts, golds, rows or [None] * len(golds)))


# ---- numbers ---------------------------------------------------------------------------------------------------------


def wilson(rate: float, n: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's score interval (JASA 1927) of a rate in [0, 1] over n questions; z: 95 % by default.

    Returns (low, high). Raises ValueError for n < 1 or a rate out of range.

        >>> [round(x, 2) for x in wilson(0.5, 100)]
        [0.4, 0.6]
    """
    if n < 1 or not 0 <= rate <= 1:
        raise ValueError(f"wilson: expected a rate in [0, 1] and n >= 1, got {rate} and {n}")
    centre = (rate + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    # min and max: at rates 0 and 1 rounding must not put the rate outside.
    return min(rate, max(0.0, centre - half)), max(rate, min(1.0, centre + half))


class Difference(NamedTuple):
    """A difference over the same questions, and its 95 % interval."""

    value: float
    low: float
    high: float


def _pairs(a: list[float], b: list[float]) -> int:
    if not a or len(a) != len(b):
        raise ValueError(f"a, b: expected values of the same questions, at least one, got {len(a)} and {len(b)}")
    return len(a)


def difference_of_rates(a: list[float], b: list[float], z: float = Z95) -> Difference:
    """The mean of a less the mean of b; a[i], b[i]: in [0, 1], of question i, such as the share of its samples that are right.

    The interval is Newcombe's for paired proportions (Statistics in Medicine 17, 2635, 1998, method 10): Wilson's intervals of
    both rates, put together by their correlation. For shares other than 0 and 1 it is wider than needed. Raises ValueError for
    no questions, different numbers of them, or values out of range.

        >>> [round(x, 3) for x in difference_of_rates([1, 1] + 19 * [0], [1, 0] + 7 * [1] + 12 * [0])]
        [-0.286, -0.507, -0.026]
    """
    n = _pairs(a, b)
    p, q = statistics.fmean(a), statistics.fmean(b)
    if not (0 <= min(*a, *b) and max(*a, *b) <= 1):
        raise ValueError(f"a, b: expected rates in [0, 1], got {min(*a, *b)} to {max(*a, *b)}")
    covariance = statistics.fmean(x * y for x, y in zip(a, b)) - p * q
    if covariance > 0:  # a continuity correction
        covariance = max(covariance - 0.5 / n, 0.0)
    spread = math.sqrt(p * (1 - p) * q * (1 - q))
    phi = covariance / spread if spread > 0 else 0.0
    (p_low, p_high), (q_low, q_high) = wilson(p, n, z), wilson(q, n, z)

    def half(x: float, y: float) -> float:
        return math.sqrt(max(x * x - 2 * phi * x * y + y * y, 0.0))

    return Difference(p - q, p - q - half(p - p_low, q_high - q), p - q + half(p_high - p, q - q_low))


def difference_of_means(a: list[float], b: list[float]) -> Difference:
    """The mean of a less the mean of b, which may have any values; a[i], b[i]: of question i.

    The interval is Student's of the paired differences; its quantile by Abramowitz and Stegun, 26.7.5. Infinite for one
    question. Raises ValueError for no questions, or different numbers of them.

        >>> [round(x, 2) for x in difference_of_means([1.0, 2.0, 4.0], [0.0, 1.0, 2.0])]
        [1.33, -0.1, 2.77]
    """
    n = _pairs(a, b)
    gaps = [x - y for x, y in zip(a, b)]
    mean = statistics.fmean(gaps)
    if n == 1:
        return Difference(mean, -math.inf, math.inf)
    half = _student(n - 1) * statistics.stdev(gaps) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half)


def _student(freedom: int, z: float = Z95) -> float:
    """Student's quantile that belongs to the normal one; for 1 and 2 degrees of freedom exactly, where the series is bad."""
    if freedom == 1:
        return math.tan(math.pi * (statistics.NormalDist().cdf(z) - 0.5))
    if freedom == 2:
        p = statistics.NormalDist().cdf(z)
        return (2 * p - 1) * math.sqrt(2 / (4 * p * (1 - p)))
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom**i for i, term in enumerate(terms, start=1))


def agreements(shares: list[float], samples: int) -> dict[str, float]:
    """How often samples agree: the share of questions where at least k of n samples give the most frequent final answer.

    shares: of each question's samples that give it (`Scorer.vote`). Returns {"k of n": share} for k = 3 n / 4, rounded up, and
    k = n; nothing for one sample. Raises ValueError for no questions.

        >>> agreements([1.0, 0.75, 0.5], samples=4)
        {'3 of 4': 0.6666666666666666, '4 of 4': 0.3333333333333333}
    """
    if not shares:
        raise ValueError("shares: expected one for each question, at least one, got none")
    least = sorted({-(-3 * samples // 4), samples}) if samples > 1 else []
    return {f"{k} of {samples}": statistics.fmean(round(share * samples) >= k for share in shares) for k in least}


def perplexity(nll: float, tokens: int) -> float:
    """exp(nll / tokens), infinity if that overflows. nll: the sum over answer tokens, in nats. Raises ValueError for none."""
    if tokens < 1:
        raise ValueError(f"perplexity: expected at least one token, got {tokens}")
    try:
        return math.exp(nll / tokens)
    except OverflowError:
        return math.inf


def pass_at_k(samples: int, right: int, k: int) -> float:
    """The chance that at least one of k samples is right, estimated without bias from `right` of `samples` (Chen et al.,
    arXiv 2107.03374, equation 1). Raises ValueError unless 0 <= right <= samples and 1 <= k <= samples.

    >>> round(pass_at_k(10, 3, 2), 4)
    0.5333
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass_at_k: expected 0 <= right <= samples and 1 <= k <= samples, got {right}, {samples} and {k}")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)
