"""Rows on disk and in batches; a bad one is named by file and line."""

import json

import pytest
import tiny_systems as tiny

from diffmas.training.data import Collator, read_jsonl, split


def test_rows_in_all_forms_make_the_same_batch():
    collate = Collator(tiny.tokenizer())
    forms = [
        {"question": "where is the key", "facts": "the key", "answer": "garden"},
        {"question": {"question": "where is the key", "facts": "the key"}, "answer": "garden"},
        {"question": "where is the key", "facts": "the key", "other": None, "answer": "garden"},
    ]
    batch = collate(forms)
    assert batch["questions"] == [{"question": "where is the key", "facts": "the key"}] * 3
    assert next(iter(batch)) == "labels" and batch["labels"].shape == (3, 3)
    ragged = collate([{"question": "q", "answer": "garden"}, {"question": "q", "answer": "in the garden"}])["labels"]
    assert (ragged[:, 1:] != -100).sum(1).tolist() == [2, 4] and (ragged[:, 0] == -100).all()


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"question": "a"', r"rows.jsonl:2: expected one JSON object per line, got '{\"question\""),
        ('["a"]', "rows.jsonl:2: expected an object with a question and an answer, got list"),
        ('{"question": "a"}', r"rows.jsonl:2: expected a string 'answer', got only \['question'\]"),
        ('{"question": "a", "answer": 3}', "rows.jsonl:2: expected a string 'answer', got one of type int"),
        ('{"facts": "a", "answer": "b"}', "rows.jsonl:2: agent 'planner': its prompt needs the field {question}"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"question": "a", "answer": "b"}) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=message):
        read_jsonl(path, tiny.agents())


def test_reading_and_splitting(tmp_path):
    path = tiny.write_jsonl(tmp_path / "rows.jsonl", tiny.rows(6))
    path.write_text(path.read_text() + "\n\n")
    assert read_jsonl(path, tiny.agents()) == tiny.rows(6)
    train, held_out = split(list(range(10)), 0.2, seed=3)
    assert sorted(train + held_out) == list(range(10)) and len(held_out) == 2
    assert split(list(range(10)), 0.2, seed=3) == (train, held_out) != split(list(range(10)), 0.2, seed=4)
    assert [len(x) for x in split([1, 2], 0.01)] == [1, 1]
    with pytest.raises(ValueError, match="expected at least two rows"):
        split([1], 0.5)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: expected at least one row, got an empty data set"):
        read_jsonl(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="none.jsonl: expected a file of JSON lines, found none"):
        read_jsonl(tmp_path / "none.jsonl")
