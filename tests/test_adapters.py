"""Adapters of all kinds: what realign reads of embeddings that they change, what files hold of them, what fingerprints see."""

import copy
import json
import warnings

import peft
import pytest
import tiny_systems as tiny
import torch
from models import assert_close, make_config, randomize
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import diffmas
from diffmas import MultiAgentSystem, Trace, Trainer, Unsupported, default_arguments
from diffmas.agents.adapters import switched_off
from diffmas.models import identity
from diffmas.models.adapted import base_weights
from diffmas.models.identity import adapter_fingerprint, model_fingerprint, sampled_fingerprint
from diffmas.training import add_lora

TARGETS = ["q_proj", "v_proj", "gate_proj"]
ROWS = tiny.rows(4)
QUESTIONS, ANSWERS = [row["question"] for row in ROWS], [row["answer"] for row in ROWS]


def base(seed: int = 0, **changes):
    """As big as the tiny systems', with biases in its attention."""
    options = dict(vocab_size=len(tiny.VOCAB), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
                   num_attention_heads=2, eos_token_id=2, attention_bias=True)  # fmt: skip
    config = make_config("qwen3", **{**options, **changes})
    return randomize(AutoModelForCausalLM.from_config(config), seed).float()


def kind(name: str = "Lora", targets=TARGETS, **options):
    return getattr(peft, f"{name}Config")(task_type="CAUSAL_LM", target_modules=targets, **options)


def team(config=None, model=None, **options) -> MultiAgentSystem:
    model = base() if model is None else model
    model = model if config is None else get_peft_model(model, config)
    return MultiAgentSystem(model, tiny.tokenizer(), tiny.agents(), **options).eval()


@torch.no_grad()
def logits(system):
    return system(QUESTIONS, ANSWERS).logits


def trained(module, by: float = 0.1):
    """As if a few optimizer steps had changed all that is trained."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn(p.shape, generator=generator))
    return module


# ---- kinds of adapters -----------------------------------------------------------------------------------------------

KINDS = {
    "bias": kind(bias="lora_only"),
    "saved": kind(modules_to_save=["embed_tokens", "lm_head"]),
    "tokens": kind(trainable_token_indices=[3, 4, 5]),
    "IA3": kind("IA3", feedforward_modules=["gate_proj"]),
    "VeRA": kind("Vera", ["q_proj"], r=4),
    "OFT": kind("OFT", oft_block_size=4),
    "LoHa": kind("LoHa", r=2),
    "LoKr": kind("LoKr", r=2),
    "AdaLoRA": kind("AdaLora", init_r=4, target_r=2, total_step=10),
    "LN": kind("LNTuning", ["input_layernorm", "norm"]),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_kind_trains_saves_loads_and_resumes(name, tmp_path):
    config = copy.deepcopy(KINDS[name])
    system = team(config).train()
    fingerprints = model_fingerprint(system.model), adapter_fingerprint(system.model)
    args = default_arguments(
        tmp_path, max_steps=2, learning_rate=5e-2, report_to=[], save_strategy="steps", save_steps=1, eval_strategy="steps",
        eval_steps=1, load_best_model_at_end=True, disable_tqdm=True, logging_strategy="no", per_device_train_batch_size=2,
    )  # fmt: skip
    before = logits(system.eval())
    Trainer(system.train(), args, train_dataset=ROWS, eval_dataset=ROWS).train()  # which ends with the best checkpoint
    want = logits(system.eval())
    assert (want - before).abs().max() > 1e-4
    assert adapter_fingerprint(system.model) != fingerprints[1]
    if "bias" not in name:  # these change the base model where it is
        assert model_fingerprint(system.model) == fingerprints[0] == model_fingerprint(base())
    system.save_pretrained(tmp_path / "out")
    assert torch.equal(logits(MultiAgentSystem.from_pretrained(tmp_path / "out", base(), tiny.tokenizer()).eval()), want)
    trained(system)
    system.load_weights(tmp_path / "out")
    assert torch.equal(logits(system), want)
    resumed = MultiAgentSystem.from_pretrained(tmp_path / "checkpoint-1", base(), tiny.tokenizer(), trainable=True)
    Trainer(resumed, args, train_dataset=ROWS, eval_dataset=ROWS).train(resume_from_checkpoint=tmp_path / "checkpoint-1")
    assert torch.equal(logits(resumed.eval()), want)
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(tmp_path / "out", base(seed=1), tiny.tokenizer())


@pytest.mark.parametrize("name", ["IA3", "LoKr", "tokens", "saved"])
def test_a_trace_is_of_the_adapter_of_any_kind(name, tmp_path):
    model, path = diffmas.patch_model(get_peft_model(base(), copy.deepcopy(KINDS[name]))), tmp_path / "t.safetensors"
    trace = Trace(model)
    model(torch.ones(1, 3, dtype=torch.long), past_key_values=trace)
    trace.save(path)
    assert Trace.load(path, model).lengths == [3]
    trained(model)
    with pytest.raises(ValueError, match="expected a trace of this adapter"):
        Trace.load(path, model)


REFUSED = {
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "p-tuning": peft.PromptEncoderConfig(num_virtual_tokens=3, encoder_hidden_size=8, task_type="CAUSAL_LM"),
    "prefix": peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "poly": kind("Poly", ["q_proj"], r=2, n_tasks=2, n_splits=2),
    "pissa": kind(init_lora_weights="pissa"),
    "alora": kind(alora_invocation_tokens=[3]),
    "replicated": kind(layer_replication=[[0, 2], [1, 2]]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_kind_that_works_outside_of_the_layers_is_refused(name):
    config = REFUSED[name]
    with pytest.raises(Unsupported, match="config: .*; use plain LoRA"):
        add_lora(base(), config=copy.deepcopy(config))
    patched_first = diffmas.patch_model(base())
    model = get_peft_model(base(), copy.deepcopy(config))
    with pytest.raises(Unsupported, match="adapter 'default': .*; use plain LoRA"):
        diffmas.patch_model(model)
    with pytest.raises(Unsupported, match="adapter 'default': .*; use plain LoRA"):
        team(copy.deepcopy(config), patched_first)


def test_trained_biases_are_refused_where_agents_run_the_bare_model():
    system = team(kind(bias="all"))
    with pytest.raises(ValueError, match="expected bias='none' where agents run without it"):
        switched_off(system.model)
    with pytest.raises(ValueError, match="expected bias='none' where agents run without it"):
        team(model=system.model, adapter_scope="final_only")


def test_weights_that_no_file_would_hold_are_not_trained(tmp_path):
    system = team(kind())
    system.model.get_base_model().model.norm.weight.requires_grad_()
    with pytest.raises(ValueError, match="got model.norm.weight of the base model; freeze it, or name its module"):
        Trainer(system, default_arguments(tmp_path, report_to=[]), train_dataset=ROWS)


# ---- roles -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["saved", "tokens", "IA3"])
def test_all_of_every_role_is_trained(name, tmp_path):
    model = add_lora(base(), tiny.agents(), "per_role", copy.deepcopy(KINDS[name]))
    system = trained(team(model=model, adapter_scope="per_role", realign="none")).train()  # LoRA begins with B = 0
    system(QUESTIONS, ANSWERS).loss.backward()
    roles = [agent.name for agent in system.agents]
    adapters = {n: p for n, p in model.named_parameters() if any(f".{role}" in n for role in roles)}
    without = {n for n, p in adapters.items() if p.grad is None or not p.grad.any()}
    # Only the last one's head is asked for logits.
    assert not {n for n in without if "lm_head" not in n or roles[-1] in n}
    assert all(p.requires_grad for p in adapters.values()) and len(adapters) % len(roles) == 0
    system.save_pretrained(tmp_path)
    for trainable in (False, True):
        again = MultiAgentSystem.from_pretrained(tmp_path, base(), tiny.tokenizer(), trainable=trainable)
        assert {p.requires_grad for n, p in again.model.named_parameters() if n in adapters} == {trainable}


def test_adapters_by_sequence_are_refused():
    model = diffmas.patch_model(add_lora(base(), tiny.agents(), "per_role", kind())).eval()
    ids, names = torch.tensor([[3, 4, 5], [6, 7, 8]]), ["planner", "critic"]
    trace = Trace(model, 2)
    with pytest.raises(ValueError, match="adapter_names: expected one adapter for all sequences of a trace"):
        model(ids, past_key_values=trace, adapter_names=names)
    assert trace.lengths == [0, 0]
    model.set_adapter("critic")
    want = model(ids[1:]).logits
    model.set_adapter("planner")
    assert_close(model(ids, adapter_names=names).logits[1:], want, 1e-5)  # without a trace PEFT's own
    assert_close(model(ids[1:], past_key_values=Trace(model), adapter_names=names[1:]).logits, want, 1e-5)


# ---- fingerprints ----------------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_every_value():
    model = base(vocab_size=500)
    model.model.norm.register_buffer("offset", torch.ones(16))
    fingerprints = {model_fingerprint(model)}
    for x in base_weights(model).values():
        where = torch.unravel_index(torch.tensor(7 * x.numel() // 9), x.shape)
        with torch.no_grad():
            x[where] += 0.5
        fingerprints.add(model_fingerprint(model))
        x.detach()[where] -= 0.5
    with torch.no_grad():  # rows that change places
        model.lm_head.weight[[3, 4]] = model.lm_head.weight[[4, 3]]
    fingerprints.add(model_fingerprint(model))
    assert len(fingerprints) == len(base_weights(model)) + 2


def test_the_same_model_has_one_fingerprint():
    plain = base()
    want = model_fingerprint(plain)
    assert want == model_fingerprint(base()) == model_fingerprint(base().bfloat16())
    assert len(base_weights(plain)) == len(plain.state_dict())
    for name in KINDS:
        model = get_peft_model(base(), copy.deepcopy(KINDS[name]))
        assert model_fingerprint(model) == want and base_weights(model).keys() == plain.state_dict().keys(), name
        assert sampled_fingerprint(model) == sampled_fingerprint(plain)


def test_a_tensor_is_hashed_once_until_it_changes(monkeypatch):
    model, hashed, values = get_peft_model(base(), kind()), [], identity._bytes
    trained(model)
    want = model_fingerprint(model)
    monkeypatch.setattr(identity, "_bytes", lambda x: hashed.append(x.numel()) or values(x))
    assert model_fingerprint(model) == want and not hashed
    model.merge_adapter()  # PEFT writes to .data
    assert model_fingerprint(model) != want
    assert len(hashed) == 2 * len(TARGETS)
    want, head = model_fingerprint(model), model.get_output_embeddings().weight
    head.data.copy_(head.data.flip(0))  # rows that change places, which no version counts
    assert model_fingerprint(model) != want
    monkeypatch.setattr(identity, "CHUNK", 10)
    assert model_fingerprint(trained(base(), 0.0)) == model_fingerprint(base())


def test_what_changes_places_is_seen():
    """Nearby, far away, and at the end, where nothing counts versions; whatever is put back is as it was."""
    x = torch.randn(2 * identity.WORDS + 150_001, generator=torch.Generator().manual_seed(0))
    before = identity.state_of(x, read=True)
    for a, b in ((0, 1), (2, 4), (3, 2 * identity.WORDS + 3), (9, 200_000), (len(x) - 1, len(x) - 2), (len(x) - 1, 0)):
        for same in (False, True):
            x.data[[a, b]] = x.data[[b, a]]
            assert (identity.state_of(x, read=True) == before) == same, (a, b)


def test_directories_with_a_sampled_fingerprint_load(tmp_path):
    system = trained(team(kind()))
    system.save_pretrained(tmp_path)
    file = tmp_path / "agents.json"
    described = json.loads(file.read_text())
    del described["trained_in_base"]
    described |= {"format": "diffmas-agents-1", "base_fingerprint": sampled_fingerprint(base())}
    file.write_text(json.dumps(described))
    assert torch.equal(logits(MultiAgentSystem.from_pretrained(tmp_path, base(), tiny.tokenizer()).eval()), logits(system))
    with pytest.raises(ValueError, match="expected agents of this base model"):
        MultiAgentSystem.from_pretrained(tmp_path, base(seed=1), tiny.tokenizer())


@pytest.mark.parametrize("scope", ["shared", "per_role"])
def test_adapters_come_without_warnings(scope, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        system = MultiAgentSystem(
            add_lora(base(), tiny.agents(), scope), tiny.tokenizer(), tiny.agents(), realign="none", adapter_scope=scope
        )
        system.save_pretrained(tmp_path)
        MultiAgentSystem.from_pretrained(tmp_path, base(), tiny.tokenizer())
