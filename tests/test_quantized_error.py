"""The table of what fewer bits do to a model's next tokens, and how far it is from dense attention."""

import csv

import pytest
import torch
from models import tiny
from systems import tokenizer

from diffmas.benchmarks import quantized_error


@pytest.fixture(scope="module")
def rows():
    ids = torch.randint(1, 60, (2, 28), generator=torch.Generator().manual_seed(0))
    found = quantized_error.measure(tiny("llama", torch.float32, patch=False), ids[:, :20], ids[:, 20:])
    return {row["rows"]: row for row in found}


def test_all_formats_equal_dense_attention(rows):
    assert list(rows) == ["float32", "int8", "fp8", "int4"]
    assert all(row["off_dense"] < 2e-5 for row in rows.values())


def test_fewer_bits_are_further_off_and_take_less(rows):
    full, int8, fp8, int4 = rows.values()
    assert full["rms"] == full["kl"] == 0 and full["same_first"] == 1
    assert 0 < int8["rms"] < fp8["rms"] < int4["rms"] and 0 < int8["kl"] < int4["kl"]
    assert full["mb"] > 2 * int8["mb"] and full["file_mb"] > int8["file_mb"] > int4["file_mb"]


def test_a_file_of_the_table(tmp_path):
    model, text, out = tiny("llama", torch.float32, patch=False), tmp_path / "text.txt", tmp_path / "error.csv"
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    text.write_text(" ".join(f"w{i % 50}" for i in range(60)))
    sizes = ["--model", str(tmp_path / "model"), "--text", str(text), "--context", "16", "--next", "8"]
    quantized_error.main([*sizes, "--out", str(out)])
    assert [row["rows"] for row in csv.DictReader(out.open())] == ["float32", "int8", "fp8", "int4"]
    with pytest.raises(SystemExit):
        quantized_error.main([*sizes, "--contexts", "9"])
