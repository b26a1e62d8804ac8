"""The benchmark of whole models: everybody decodes the same, and llama.cpp is given the model's own weights."""

import dataclasses
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from diffmas.benchmarks import bench_decoding as decoding
from diffmas.benchmarks import systems
from diffmas.benchmarks.llama import Decoder, write_gguf
from diffmas.benchmarks.measure import OURS, Cannot, Contest

SHAPE = dict(hidden_size=288, intermediate_size=256, vocab_size=512)
LLAMA_CPP = [name for name in decoding.PROVIDERS if name.startswith("llama.cpp")]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for module in (decoding, systems):
        monkeypatch.setattr(module, "SMOL", module.SMOL | SHAPE)
    monkeypatch.setattr(decoding, "PREFILL", 16)


def case(phase, N, batch, dtype="float32"):
    found = next(c for c in decoding.CASES if c.phase == phase)
    return dataclasses.replace(found, N=N, batch=batch, dtype=dtype, layers=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("phase, N, batch", [("decode", 8, 1), ("decode", 27, 3), ("prefill", 40, 1)])
def test_everybody_decodes_the_same(phase, N, batch, dtype):
    providers = {name: p for name, p in decoding.PROVIDERS.items() if name not in decoding.SLOW}
    contest = Contest(decoding.problem(case(phase, N, batch, dtype)), providers)
    assert {OURS, "DynamicCache"} <= contest.trials.keys()
    assert all(note.endswith("is not installed") for note in contest.notes.values()), contest.notes
    first = {name: trial.call() for name, trial in contest.trials.items() if trial.reset() is None}
    again = {name: trial.call() for name, trial in contest.trials.items() if trial.reset() is None}
    assert torch.equal(first[OURS], again[OURS])  # a trace that was taken back


def test_compiled():
    contest = Contest(decoding.problem(case("decode", 27, 1)), {OURS: decoding.diffmas, "compiled": decoding.compiled})
    assert "compiled" in contest.trials, contest.notes


def test_a_file_with_the_models_own_weights(tmp_path):
    """As transformers reads it, which knows the order of rows that llama.cpp takes."""
    pytest.importorskip("gguf")
    model = systems.make_smol(case("decode", 8, 1), torch.float32)
    for kind, tolerance in (("F32", 0), ("F16", 2**-11), ("BF16", 2**-8)):
        write_gguf(model, tmp_path / "model.gguf", kind)
        read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
        assert read.config.head_dim == 64 and read.config.rope_parameters["rope_theta"] == 1e5
        for name, weight in model.state_dict().items():
            torch.testing.assert_close(read.state_dict()[name], weight, rtol=tolerance, atol=1e-7 if tolerance else 0)


def test_without_llama_cpp(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    with pytest.raises(Cannot, match="llama_cpp is not installed"):
        Decoder(None, "F32", 1, 8, False)
