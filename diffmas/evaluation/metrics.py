"""Numbers of an evaluation: intervals, paired differences, agreement of samples, perplexity, pass@k.

Samples of one question are not independent, so intervals count questions, not samples.
"""

import math
import statistics
from typing import NamedTuple

__all__ = [
    "Difference", "agreements", "difference_of_means", "difference_of_rates", "pass_at_k", "perplexity", "wilson",
]  # fmt: skip

Z95 = statistics.NormalDist().inv_cdf(0.975)


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
