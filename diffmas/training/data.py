"""Rows of questions and answers: JSON lines on disk, and the batches of training and evaluation.

A row is {"question": "...", "answer": "..."}; or with several fields for the agents' prompts, nested as in
{"question": {"question": "...", "facts": "..."}, "answer": "..."} or flat, every column but the answer being a field.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch.utils.data import random_split

from diffmas.agents.system import MultiAgentSystem

__all__ = ["Collator", "check_fields", "check_row", "fields_of_row", "question_and_answer", "read_jsonl", "split"]

ANSWER = "answer"


def question_and_answer(row, where: str = "row") -> tuple[dict, str]:
    """The prompt fields and the answer of a row in any form; raises ValueError that starts with `where` if it has none.

    >>> question_and_answer({"facts": "the key is here", "question": "where", "answer": "here"})
    ({'facts': 'the key is here', 'question': 'where'}, 'here')
    """
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected an object with a question and an answer, got {type(row).__name__}")
    answer = row.get(ANSWER)
    if not isinstance(answer, str):
        found = f"one of type {type(answer).__name__}" if ANSWER in row else f"only {sorted(row)}"
        raise ValueError(f"{where}: expected a string {ANSWER!r}, got {found}")
    return fields_of_row(row, where), answer


def fields_of_row(row: dict, where: str = "row") -> dict:
    """The prompt fields of a row, which may lack an answer."""
    # A datasets.Dataset fills columns that a row lacks with None.
    fields = {k: v for k, v in row.items() if k != ANSWER and v is not None}
    if isinstance(fields.get("question"), dict):
        nested = {k: v for k, v in fields.pop("question").items() if v is not None}
        fields = {**fields, **nested}
    if not fields:
        raise ValueError(f"{where}: expected a question or other fields of the agents' prompts, got only the answer")
    return fields


def check_row(row, where: str, agents=()) -> None:
    """Raises ValueError that starts with `where` if a row lacks the answer or a field of the agents, or one does not fit."""
    check_fields(question_and_answer(row, where)[0], where, agents)


def check_fields(fields: dict, where: str, agents=()) -> None:
    """Raises ValueError that starts with `where` if fields of the agents are not there, or one does not fit."""
    for agent in agents:
        try:
            agent.check(fields)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def read_jsonl(path, agents=(), answers: bool = True) -> list[dict]:
    """The rows of a JSON-lines file; blank lines are skipped.

    agents: every row must have the fields of their prompts. answers: and an answer. Raises ValueError naming file and line of
    a row that does not fit, or the file if it has no rows; FileNotFoundError if there is no file.
    """
    path, rows = Path(path), []
    if not path.is_file():
        raise FileNotFoundError(f"{path}: expected a file of JSON lines, found none")
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: expected one JSON object per line, got {line.strip()[:60]!r} ({error})") from error
            if answers or not isinstance(row, dict):
                check_row(row, where, agents)
            else:
                check_fields(fields_of_row(row, where), where, agents)
            rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected at least one row, got an empty data set")
    return rows


def split(rows: list, fraction: float, seed: int = 0) -> tuple[list, list]:
    """Training and validation rows, drawn at random.

    fraction: of the rows, for validation, in (0, 1); both parts get at least one row. Raises ValueError for a fraction out of
    range or fewer than two rows.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"validation_fraction: expected a number between 0 and 1, got {fraction}")
    if len(rows) < 2:
        raise ValueError(f"validation_fraction: expected at least two rows to split, got {len(rows)}")
    held_out = min(max(round(len(rows) * fraction), 1), len(rows) - 1)
    parts = random_split(rows, [len(rows) - held_out, held_out], generator=torch.Generator().manual_seed(seed))
    return list(parts[0]), list(parts[1])


class Collator:
    """Makes a batch of rows: {"labels": int64 [B, 1 + A], "questions": [B], "answers": [B]}.

    transformers' Trainer counts the labels that are not -100, without the first column, as num_items_in_batch. They come first
    in the batch because accelerate takes the batch size from the first value.

    tokenize: of a `MultiAgentSystem`, for batches that also have what its Trainer counts, and shows to metrics, as inputs:
    "input_ids" [B, L], of a row the tokens of all prompts in the order of turns and of the answer, padded with -100; and
    "attention_mask" [B, L], 0 at the padding.
    """

    answer_ids = MultiAgentSystem.answer_ids  # needs the tokenizer only, so that workers of a DataLoader get no model

    def __init__(self, tokenizer, tokenize: Callable | None = None):
        self.tokenizer, self.tokenize = tokenizer, tokenize

    def __call__(self, rows: list) -> dict:
        questions, answers = map(list, zip(*(question_and_answer(row) for row in rows)))
        ids = [self.answer_ids(answer) for answer in answers]
        batch = {"labels": _padded([[-100, *row] for row in ids]), "questions": questions, "answers": answers}
        if self.tokenize is not None:
            turns = zip(*self.tokenize(questions, [len(row) for row in ids]))
            read = _padded([[t for turn in of_row for t in turn.ids] + row for of_row, row in zip(turns, ids)])
            batch |= {"input_ids": read, "attention_mask": (read != -100).long()}
        return batch


def _padded(rows: list[list[int]]) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)
