"""Rewards in the form of TRL's reward functions."""

from diffmas.evaluation.scorer import Scorer

__all__ = ["scored"]


def scored(scorer: Scorer | None = None, answer: str = "answer", name: str = "right"):
    """A reward function: 1 for a right answer, else 0.

    scorer: says what is right; by default the whole text must be the gold answer. answer: the column of gold answers.
    name: in TRL's log, which has one line for rewards of one name.

        >>> exact = scored(Scorer(extract="number"))
        >>> exact(completions=["it is 4", "it is 5"], answer=["4", "4"])
        [1.0, 0.0]
    """
    scorer = scorer or Scorer()

    def right(completions: list[str], **columns) -> list[float]:
        if answer not in columns:
            raise ValueError(f"answer: expected a column {answer!r} in the data set, got {sorted(columns)}")
        of_rows = {name: values for name, values in columns.items() if isinstance(values, list)}
        rows = [dict(zip(of_rows, values)) for values in zip(*of_rows.values())]
        return [float(scorer.correct(text, row[answer], row)) for text, row in zip(completions, rows)]

    right.__name__ = name
    return right
