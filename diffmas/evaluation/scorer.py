"""Whether an answer is right: where the final answer stands in a text, and whether it means what the gold answer does."""

import difflib
import inspect
import re
import statistics
import unicodedata
from collections.abc import Callable
from importlib.util import find_spec

from diffmas.evaluation import mathematics

__all__ = ["EXTRACTORS", "MATCHERS", "Scorer", "boxed", "check_scoring", "last_number", "normalise"]

AROUND = " .,:;?\"'`*$"  # an answer, with "!" where that is no factorial


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
    if str(how).isalpha() and (near := difflib.get_close_matches(how, EXTRACTORS, n=1, cutoff=0.88)):
        raise ValueError(
            f"extract: expected one of {sorted(EXTRACTORS)}, a regular expression or a function, got {how!r}; {near[0]}?"
        )
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


def check_scoring(extract=None, match=None) -> None:
    """Raises ValueError for what no `Scorer` takes; None: not said."""
    if extract is not None:
        _extractor(extract)
    if match is not None and not callable(match) and match not in MATCHERS:
        raise ValueError(f"match: expected one of {sorted(MATCHERS)} or a function, got {match!r}")


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
        check_scoring(extract, match)
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
