"""Several methods on the same rows: one `Result` each, as a table, a CSV file and a plot."""

import csv
import json
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

from rich.table import Table

from diffmas.evaluation.baselines import Method
from diffmas.evaluation.metrics import Scorer, perplexity, wilson
from diffmas.training.data import question_and_answer

__all__ = ["MethodsFailed", "Result", "evaluate", "plot", "table", "write_answers", "write_csv"]


@dataclass
class Result:
    """One method on one data set.

    accuracy: share of right samples; [low, high]: its 95 % Wilson interval over questions. perplexity: of the gold answers,
    per token. vote_accuracy, agreement: self-consistency (`Scorer.self_consistency`). seconds: wall time of answering.
    tokens: decoded by all agents together, for all samples.
    """

    method: str
    questions: int
    samples: int
    accuracy: float
    low: float
    high: float
    perplexity: float
    vote_accuracy: float
    agreement: float
    seconds: float
    tokens: int
    texts: list[list[str]] = field(default_factory=list, repr=False)  # [question][sample]; not in tables

    def row(self) -> dict:
        """All but the texts, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "texts"}


class MethodsFailed(RuntimeError):
    """Some methods failed. errors: by the method's name; results: of the other methods."""

    def __init__(self, errors: dict[str, Exception], results: list[Result]):
        super().__init__("; ".join(f"{name}: {error}" for name, error in errors.items()))
        self.errors, self.results = errors, results


def evaluate(
    methods: dict[str, Method], rows: list[dict], samples: int = 1, scorer: Scorer | None = None,
    batch_size: int | None = None, progress: Callable[[str], None] | None = None,
    save: Callable[[list[Result]], object] | None = None, **generation,
) -> list[Result]:  # fmt: skip
    """Answers every row with every method; returns results in the order of `methods`.

    rows: of questions and answers (`diffmas.training.data`). samples: answers per question. scorer: by default `Scorer()`.
    batch_size: questions at once, by default all. progress: called with each method's name before its turn. save: called with
    all results so far, after each method. generation: max_new_tokens, temperature, top_p, seed and stop of
    `MultiAgentSystem.generate`.

    Raises ValueError for no method, no row, or a row that does not fit. A method that fails does not stop the others;
    `MethodsFailed`, with their results, is raised at the end.

        >>> methods = {"one agent": single_agent(system), "system": Latent(system)}
        >>> [result.questions for result in evaluate(methods, rows, max_new_tokens=4, seed=0)]
        [2, 2]
    """
    if not methods:
        raise ValueError("methods: expected at least one, got none")
    if not rows:
        raise ValueError("rows: expected at least one row, got an empty data set")
    questions, golds = map(list, zip(*(question_and_answer(row, f"rows[{i}]") for i, row in enumerate(rows))))
    scorer, results, errors = scorer or Scorer(), [], {}
    for name, method in methods.items():
        if progress:
            progress(name)
        try:
            answers = method.answer(questions, samples, batch_size, **generation)
            nll = method.loss(questions, golds, batch_size)
        except Exception as error:
            errors[name] = error
            continue
        accuracy = scorer.accuracy(answers.texts, golds, rows)
        vote, agreement = scorer.self_consistency(answers.texts, golds, rows)
        results.append(
            Result(
                name, len(rows), samples, accuracy, *wilson(accuracy, len(rows)), perplexity(*nll), vote, agreement,
                answers.seconds, answers.tokens, answers.texts,
            )
        )  # fmt: skip
        if save:
            save(results)
    if errors:
        raise MethodsFailed(errors, results) from next(iter(errors.values()))
    return results


def table(results: list[Result], title: str = "") -> Table:
    """The results as a rich table, rates in percent."""
    out = Table(title=title or None)
    out.add_column("method", no_wrap=True)
    for head in ("accuracy %", "95 % interval", "perplexity", "majority %", "agreement %", "seconds", "tokens decoded"):
        out.add_column(head, justify="right")
    for r in results:
        out.add_row(
            r.method, f"{100 * r.accuracy:.1f}", f"{100 * r.low:.1f} - {100 * r.high:.1f}", f"{r.perplexity:.3g}",
            f"{100 * r.vote_accuracy:.1f}", f"{100 * r.agreement:.1f}", f"{r.seconds:.2f}", str(r.tokens),
        )  # fmt: skip
    if results:
        out.caption = f"{results[0].questions} questions, {results[0].samples} sample(s) each"
    return out


def write_csv(results: list[Result], path) -> Path:
    """Writes a CSV file with a line per method, and returns its path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Result) if f.name != "texts"])
        writer.writeheader()
        writer.writerows(r.row() for r in results)
    return path


def write_answers(results: list[Result], rows: list[dict], path) -> Path:
    """Writes a JSON line per row, {"fields", "answer", "given": {method: [samples]}}, and returns the file's path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        for i, row in enumerate(rows):
            asked, gold = question_and_answer(row)
            given = {r.method: r.texts[i] for r in results}
            file.write(json.dumps({"fields": asked, "answer": gold, "given": given}, ensure_ascii=False) + "\n")
    return path


def plot(results: list[Result], path, title: str = "") -> Path:
    """Writes a PNG of the accuracies with their intervals, and the perplexities beside them; returns its path."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    path, names = Path(path), [r.method for r in results]
    path.parent.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(9, 1.2 + 0.5 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)  # pyplot would need a display and keep global state
    left, right = figure.subplots(1, 2, sharey=True)
    errors = [[100 * (r.accuracy - r.low) for r in results], [100 * (r.high - r.accuracy) for r in results]]
    left.barh(names, [100 * r.accuracy for r in results], xerr=errors, capsize=3, color="tab:blue", alpha=0.8)
    left.set(xlabel="accuracy, % (95 % interval)", xlim=(0, 100))
    left.invert_yaxis()
    right.barh(names, [r.perplexity for r in results], color="tab:orange", alpha=0.8)
    right.set(xlabel="perplexity of the answer per token", xscale="log")
    figure.suptitle(title or f"{results[0].questions} questions, {results[0].samples} sample(s) each")
    figure.savefig(path, dpi=150)
    return path
