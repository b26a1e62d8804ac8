"""Several methods on the same rows: one `Result` each, as tables and CSV files; as a plot: `diffmas.evaluation.picture`."""

import json
import math
import secrets
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

from rich import box
from rich.table import Table

from diffmas.agents.meter import PHASES
from diffmas.evaluation.baselines import Answers, Method
from diffmas.evaluation.files import room_for, write_rows
from diffmas.evaluation.metrics import Difference, agreements, difference_of_rates, pass_at_k, perplexity, wilson
from diffmas.evaluation.scorer import Scorer
from diffmas.trace.views import Size
from diffmas.training.data import question_and_answer

__all__ = [
    "MethodsFailed", "Result", "evaluate", "gap", "narrow_table", "percent", "shares_right", "tables", "write_answers",
    "write_csv", "write_entropy",
]  # fmt: skip

NAN = math.nan


@dataclass
class Result:
    """One method on one data set.

    accuracy: share of right samples; [low, high]: its 95 % Wilson interval over questions. difference: of the accuracy to the
    best baseline's, `best_baseline`, over the same questions, with its interval (`difference_of_rates`); None for that one.
    perplexity: of the gold answers, per token. vote_accuracy, agreement: self-consistency (`Scorer.self_consistency`).
    agree: {"3 of 4": share of questions where that many samples agree, ...} (`metrics.agreements`). pass_at: {k: pass@k}, the
    mean over questions of the unbiased estimate (`metrics.pass_at_k`), for one sample and for all.

    decoded_perplexity, entropy: of the distributions that the answers' tokens were drawn from, at temperature 1: exp of the
    tokens' mean negative log-likelihood; the mean over tokens, in nats. entropy_curve: by the token's place in the answer.

    seconds: wall time of answering, and by phase in `phases`. tokens: decoded by all agents together, for all samples.
    prompt_tokens, latent_steps: forwarded by all agents; samples that share them count once. read: by agent, rows
    that others wrote and it read, and their bytes in all layers, of all questions. trace_bytes: of the largest trace.

    texts, scores: [question][sample] and the share of right samples by question; not in tables.
    """

    method: str
    questions: int
    samples: int
    accuracy: float
    low: float
    high: float
    best_baseline: str | None
    difference: Difference | None
    perplexity: float
    vote_accuracy: float
    agreement: float
    agree: dict[str, float]
    pass_at: dict[int, float]
    decoded_perplexity: float
    entropy: float
    seconds: float
    phases: dict[str, float]
    tokens: int
    prompt_tokens: int
    latent_steps: int
    read: dict[str, Size]
    trace_bytes: int
    entropy_curve: list[float] = field(default_factory=list, repr=False)
    entropy_counts: list[int] = field(default_factory=list, repr=False)
    scores: list[float] = field(default_factory=list, repr=False)
    texts: list[list[str]] = field(default_factory=list, repr=False)

    def row(self) -> dict:
        """The numbers by name, as in the CSV file; those that do not apply are None."""
        gap = self.difference or (None,) * 3
        row = {}
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "difference":
                row |= dict(zip(("difference", "difference_low", "difference_high"), gap))
            elif f.name == "agree":
                row |= {f"agree_{name.replace(' ', '_')}": share for name, share in value.items()}
            elif f.name == "pass_at":
                row |= {f"pass_at_{k}": rate for k, rate in value.items()}
            elif f.name == "phases":
                row |= {f"seconds_{name.replace('-', '_')}": seconds for name, seconds in value.items()}
            elif f.name == "read":
                row |= {f"{what}_read_by_{name}": n for name, size in value.items() for what, n in zip(("rows", "bytes"), size)}
            elif f.name not in ("entropy_curve", "entropy_counts", "scores", "texts"):
                row[f.name] = value
        return row


class MethodsFailed(RuntimeError):
    """Some methods failed. errors: by the method's name; results: of the other methods."""

    def __init__(self, errors: dict[str, Exception], results: list[Result]):
        super().__init__("; ".join(f"{name}: {error}" for name, error in errors.items()))
        self.errors, self.results = errors, results


def evaluate(
    methods: dict[str, Method], rows: list[dict], samples: int = 1, scorer: Scorer | None = None,
    batch_size: int | None = None, progress: Callable[[str], None] | None = None,
    save: Callable[[list[Result]], object] | None = None, baselines: Sequence[str] | None = None, **generation,
) -> list[Result]:  # fmt: skip
    """Answers every row with every method; returns results in the order of `methods`.

    rows: of questions and answers (`diffmas.training.data`). samples: answers per question. scorer: by default `Scorer()`.
    batch_size: questions at once, each with all its samples; by default all. progress: called with each method's name before
    its turn. save: called with all results so far, after each method. baselines: the methods that others are compared with, by
    default all but the last. The best of them on these rows is chosen, which favours it. generation: max_new_tokens,
    temperature, top_p, seed and stop of `MultiAgentSystem.generate`.

    Raises ValueError for no method, no row, a row that does not fit, or a baseline that is none of the methods. A method that
    fails does not stop the others; `MethodsFailed`, with their results, is raised at the end.

        >>> methods = {"one agent": single_agent(system), "system": Latent(system)}
        >>> [result.questions for result in evaluate(methods, rows, max_new_tokens=4, seed=0)]
        [2, 2]
    """
    if not methods:
        raise ValueError("methods: expected at least one, got none")
    if not rows:
        raise ValueError("rows: expected at least one row, got an empty data set")
    baselines = list(methods)[:-1] if baselines is None else list(baselines)
    if unknown := [name for name in baselines if name not in methods]:
        raise ValueError(f"baselines: expected some of {list(methods)}, got {unknown[0]!r}")
    questions, golds = map(list, zip(*(question_and_answer(row, f"rows[{i}]") for i, row in enumerate(rows))))
    if generation.get("seed") is None:
        generation["seed"] = secrets.randbits(30)  # one for the answers and the perplexity, which read the same messages
    scorer, results, errors = scorer or Scorer(), [], {}
    for name, method in methods.items():
        if progress:
            progress(name)
        try:
            answers = method.answer(questions, samples, batch_size, **generation)
            nll = method.loss(questions, golds, batch_size, generation["seed"])
            results.append(_result(name, answers, golds, rows, samples, scorer, perplexity(*nll)))
        except Exception as error:
            errors[name] = error
            continue
        _compare(results, baselines)
        if save:
            save(results)
    if errors:
        raise MethodsFailed(errors, results) from next(iter(errors.values()))
    return results


def _result(name: str, answers: Answers, golds, rows, samples: int, scorer: Scorer, gold_perplexity: float) -> Result:
    texts, cost, decoding = answers.texts, answers.cost, answers.decoding
    scores = shares_right(scorer, texts, golds, rows)
    accuracy = statistics.fmean(scores)
    vote, agreement = scorer.self_consistency(texts, golds, rows)
    curve, counts = decoding.entropy, decoding.counts
    decoded = sum(counts)
    return Result(
        name, len(texts), samples, accuracy, *wilson(accuracy, len(texts)), None, None, gold_perplexity, vote, agreement,
        agreements([scorer.vote(given, row)[1] for given, row in zip(texts, rows)], samples),
        {k: statistics.fmean(pass_at_k(samples, round(s * samples), k) for s in scores) for k in sorted({1, samples})},
        perplexity(decoding.nll, decoded) if decoded else NAN,
        sum(e * n for e, n in zip(curve, counts)) / decoded if decoded else NAN,
        answers.seconds, cost.seconds, answers.tokens, cost.rows["prefill"], cost.rows["latent"], cost.read,
        cost.trace_bytes,
        curve, counts, scores, texts,
    )  # fmt: skip


def shares_right(scorer: Scorer, texts: list[list[str]], golds: list[str], rows: list[dict]) -> list[float]:
    """The share of each question's samples that are right. texts[question][sample]."""
    return [statistics.fmean(right) for right in scorer.verdicts(texts, golds, rows)]


def _compare(results: list[Result], baselines: list[str]) -> None:
    """Fills in the difference of every result to the best baseline so far."""
    best = max((r for r in results if r.method in baselines), key=lambda r: r.accuracy, default=None)
    for r in results:
        r.best_baseline = best and best.method
        r.difference = None if best is None or r is best else difference_of_rates(r.scores, best.scores)


# ---- tables ----------------------------------------------------------------------------------------------------------


def percent(x: float, sign: str = "") -> str:
    return f"{100 * x:{sign}.1f}"


def interval(low: float, high: float, sign: str = "") -> str:
    return f"[{percent(low, sign)}, {percent(high, sign)}]"


def narrow_table(title: str, heads: Sequence[str], rows: list[list[str]], caption: str = "") -> Table:
    """A table that is narrow enough for a terminal of 80 columns: only the first column, of names, is folded, between words
    where that can be."""
    widths = [max(map(len, (*head.split(), *(row[i] for row in rows)))) for i, head in enumerate(heads[1:], start=1)]
    longest = min(18, max((len(word) for row in rows for word in row[0].split()), default=0))
    apart = longest + sum(widths) + 2 * len(heads) <= 80  # two spaces between columns, or one
    padding = (0, int(apart), 0, 0)
    out = Table(title=title or None, caption=caption or None, box=box.SIMPLE_HEAD, padding=padding, show_edge=False)
    out.title_justify = out.caption_justify = "left"
    out.add_column(heads[0], max_width=18, overflow="fold")
    for head, width in zip(heads[1:], widths):
        out.add_column(head, justify="right", width=width)
    for row in rows:
        out.add_row(*row)
    return out


def gap(difference: Difference | None) -> str:
    """A difference of rates in points, with its interval."""
    if difference is None:
        return ""
    return f"{percent(difference.value, '+')} {interval(difference.low, difference.high)}"


def tables(results: list[Result], title: str = "") -> list[Table]:
    """The results as rich tables of at most 80 columns: how good the answers are, how sure and agreed, what they cost."""
    good, sure, cost = [], [], []
    agree = list(results[0].agree) if results else []
    for r in results:
        good.append([r.method, percent(r.accuracy), interval(r.low, r.high), gap(r.difference), percent(r.vote_accuracy)])
        certain = [f"{x:.3g}" for x in (r.perplexity, r.decoded_perplexity, r.entropy)]
        sure.append([r.method, *certain, percent(r.agreement), *(percent(r.agree[name]) for name in agree)])
        counts = [f"{n:,}" if n < 100_000 else f"{n / 1000:,.0f}k" for n in (r.tokens, r.latent_steps, r.prompt_tokens)]
        times = (r.seconds, *(r.phases[name] for name in PHASES[:-1]))
        seconds = [f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:,.0f}" for x in times]
        cost.append([r.method, *counts, *seconds, f"{r.trace_bytes / 1e6:.3g}"])
    best = next((f"; best baseline: {r.best_baseline}" for r in results if r.best_baseline), "")
    asked = f"{results[0].questions} questions, {results[0].samples} sample(s) each{best}" if results else ""
    head = ("method", "right %", "95 % interval", "to best baseline", "majority right %")
    sure_head = ("method", "perplexity gold", "perplexity decoded", "entropy nats", "agree %", *(f"{k} agree %" for k in agree))
    phases = [f"{name.replace('-', ' ')} s" for name in PHASES[:-1]]
    cost_head = ("method", "tokens decoded", "latent steps", "prompt tokens", "all s", *phases, "trace MB")
    return [narrow_table(title, head, good, asked), narrow_table("", sure_head, sure), narrow_table("", cost_head, cost)]


# ---- files -----------------------------------------------------------------------------------------------------------


def write_csv(results: list[Result], path) -> Path:
    """Writes a CSV file with a line per method, and returns its path."""
    return write_rows((r.row() for r in results), path)


def write_entropy(results: list[Result], path) -> Path:
    """Writes the token-entropy curves as CSV, (method, token, nats, tokens): the mean entropy of the distribution that the
    answers' t-th tokens come from, and how many these are; returns its path."""
    return write_rows(
        (
            {"method": r.method, "token": t, "nats": nats, "tokens": tokens}
            for r in results for t, (nats, tokens) in enumerate(zip(r.entropy_curve, r.entropy_counts))
        ),
        path,
    )  # fmt: skip


def write_answers(results: list[Result], rows: list[dict], path) -> Path:
    """Writes a JSON line per row, {"fields", "answer", "given": {method: [samples]}}, and returns the file's path."""
    path = room_for(path)
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            asked, gold = question_and_answer(row)
            given = {r.method: r.texts[i] for r in results}
            file.write(json.dumps({"fields": asked, "answer": gold, "given": given}, ensure_ascii=False) + "\n")
    return path
