"""Systems and traces on disk: what is read back, and what is refused."""

import json

import pytest
import torch
from models import assert_close, body, tiny, with_lora
from safetensors import safe_open
from systems import AGENTS, ANSWERS, QUESTIONS, roles_model, system, tokenizer

import diffmas
from diffmas import MultiAgentSystem, Trace


def base_directory(tmp_path, **options):
    model = tiny("qwen3", torch.float32, patch=False, **options)
    model.save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_save_and_load_a_system(tmp_path):
    from transformers import AutoModelForCausalLM

    base = base_directory(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(base)
    s = MultiAgentSystem(with_lora(model), tokenizer(), AGENTS, realign="learned", trace_content="latent_only").eval()
    with torch.no_grad():
        s.realign.weight += 0.1
    want = s(QUESTIONS, ANSWERS).loss
    s.save_pretrained(tmp_path / "out")
    for again in (
        MultiAgentSystem.from_pretrained(tmp_path / "out"),  # the base model is named in the file
        MultiAgentSystem.from_pretrained(tmp_path / "out", AutoModelForCausalLM.from_pretrained(base), tokenizer()),
    ):
        assert torch.equal(again.eval()(QUESTIONS, ANSWERS).loss, want)
    from peft import PeftModel  # and PEFT alone reads the adapter

    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(tmp_path / "out"))


def test_roles_are_saved_and_loaded(tmp_path):
    base = base_directory(tmp_path)
    model = roles_model().float()
    model.get_base_model().config._name_or_path = str(base)
    s = MultiAgentSystem(model, tokenizer(), AGENTS, adapter_scope="per_role").eval()
    with torch.no_grad():
        for i, (name, p) in enumerate(model.named_parameters()):
            if "lora_" in name:
                p += 0.01 * (i % 7)
    want = s(QUESTIONS, ANSWERS).loss
    s.save_pretrained(tmp_path / "out")
    assert torch.equal(MultiAgentSystem.from_pretrained(tmp_path / "out").eval()(QUESTIONS, ANSWERS).loss, want)


def test_files_of_another_model_are_refused(tmp_path):
    s = system(dtype=torch.float32)
    s.save_pretrained(tmp_path)
    other = tiny("qwen3", torch.float32, patch=False, seed=1)
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(tmp_path, other, tokenizer())
    (tmp_path / "agents.json").write_text('{"format": "diffm')
    with pytest.raises(ValueError, match="agents.json: expected whole JSON"):
        MultiAgentSystem.from_pretrained(tmp_path, other, tokenizer())
    with pytest.raises(ValueError, match="expected a directory with agents.json"):
        MultiAgentSystem.from_pretrained(tmp_path / "none", other, tokenizer())


def test_trace_file(tmp_path):
    s = system()
    path = tmp_path / "t.safetensors"
    with torch.no_grad():
        trace = s.communicate(s.fields_of(QUESTIONS))
        latents = trace.keep(kind="latent", positions="reindex")
        for t in (trace, latents):
            t.save(path)
            loaded = Trace.load(path, s.model)
            assert loaded.lengths == t.lengths and loaded.next_positions == t.next_positions
            assert [s_[1:3] for s_ in loaded.segments] == [s_[1:3] for s_ in t.segments]
            ids = torch.tensor([[9, 10]] * 3)
            want = s.model(ids, past_key_values=t.fork(1)[0]).logits
            assert_close(s.model(ids, past_key_values=loaded).logits, want, 1e-12)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match="damaged"):
            Trace.load(path, s.model)
        path.write_bytes(whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:])
        with pytest.raises(ValueError, match="checksum"):
            Trace.load(path, s.model)
        path.write_bytes(whole)
        other = diffmas.patch_model(tiny("qwen3", patch=False, seed=1))
        with pytest.raises(ValueError, match="expected a trace of this model"):
            Trace.load(path, other)
        with pytest.raises(ValueError, match="expected a trace of this adapter"):
            Trace.load(path, diffmas.patch_model(tiny("qwen3", patch=False)))
        with pytest.raises(ValueError, match="is no file"):
            Trace.load(tmp_path / "none", s.model)
    with pytest.raises(ValueError, match="expected one that holds tokens"):
        Trace(s.model).save(path)


@pytest.mark.parametrize("change", ["next", "kind", "length", "batch_size", "checksum", "list"])
def test_a_trace_file_with_a_changed_header_is_refused(tmp_path, change):
    from safetensors.torch import load_file, save_file

    model, path = tiny("qwen3"), tmp_path / "t.safetensors"
    trace = Trace(model, 2)
    model(torch.ones(2, 3, dtype=torch.long), past_key_values=trace)
    trace.save(path)
    with safe_open(path, "pt") as file:
        header = json.loads(file.metadata()["diffmas"])
    if change in ("kind", "length"):
        header["segments"][0][{"kind": 2, "length": 3}[change]] = {"kind": "latent", "length": 2}[change]
    elif change == "checksum":
        del header["checksum"]
    else:
        header[change] = {"next": [0, 0], "batch_size": 1, "list": 0}[change]
    save_file(load_file(path), path, metadata={"diffmas": json.dumps([header] if change == "list" else header)})
    with pytest.raises(ValueError, match="format" if change == "list" else "checksum"):
        Trace.load(path, model)


def test_a_trace_is_of_the_adapter_that_was_active(tmp_path):
    model, path = roles_model(), tmp_path / "t.safetensors"
    diffmas.patch_model(model)
    own = dict(model.named_parameters())
    name = next(n for n in own if ".planner." in n)
    own[name].data += 1
    model.set_adapter("planner")
    trace = Trace(model)
    model(torch.ones(1, 3, dtype=torch.long), past_key_values=trace)
    trace.save(path)
    assert Trace.load(path, model).lengths == [3]
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    layers[-1].scaling["planner"] *= 2
    with pytest.raises(ValueError, match="expected a trace of this adapter"):
        Trace.load(path, model)
    layers[-1].scaling["planner"] /= 2
    model.set_adapter("solver")
    with pytest.raises(ValueError, match="expected a trace of this adapter"):
        Trace.load(path, model)
    own[name.replace("planner", "solver")].data += 1
    assert Trace.load(path, model).lengths == [3]  # the same adapter under another name


def test_a_system_leaves_the_active_adapter_alone():
    s = MultiAgentSystem(roles_model(), tokenizer(), AGENTS, adapter_scope="per_role")
    s.model.set_adapter("critic")
    s(QUESTIONS[:1], ANSWERS[:1])
    assert s.model.active_adapters == ["critic"] and s.model.active_adapter == "critic"


def test_body_is_reached_through_peft():
    s = system()
    assert body(s.model) is diffmas.models.patch.patch_of(s.model).body
