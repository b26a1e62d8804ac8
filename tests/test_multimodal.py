"""Models behind AutoModelForImageTextToText: text takes a trace, what is beside the text is left alone."""

import pytest
import torch
import transformers
from models import BASE, EOS, FAMILIES, assert_close, body, error, gradients, loss_of, pad, randomize, tokens, with_lora
from systems import AGENTS, ANSWERS, QUESTIONS, exact_norms, tokenizer, unrolled_loss
from transformers import AutoConfig, AutoModelForImageTextToText

import diffmas
from diffmas import MultiAgentSystem
from diffmas.models.load import load_base
from diffmas.training import Trainer, add_lora, default_arguments, lora_config

VISION = dict(
    hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=4
)  # fmt: skip
PIXTRAL = dict(model_type="pixtral", head_dim=8, **VISION)
QWEN_VISION = dict(
    depth=2, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=32, patch_size=4, fullatt_block_indexes=[1]
)  # fmt: skip
# name -> (family, its config): fused and generic text families, positions of one and of three axes, masks by layer type
CASES = {
    "ministral3": ("mistral3", dict(
        text_config=dict(model_type="ministral3", **BASE, **FAMILIES["ministral3"]), vision_config=PIXTRAL, image_token_index=2,
    )),
    "mistral3": ("mistral3", dict(
        text_config=dict(model_type="mistral", sliding_window=None, **BASE), vision_config=PIXTRAL, image_token_index=2,
    )),
    "qwen2_5_vl": ("qwen2_5_vl", dict(
        text_config=dict(rope_scaling=dict(type="mrope", mrope_section=[2, 1, 1]), **BASE), vision_config=QWEN_VISION,
        image_token_id=2, video_token_id=3, vision_start_token_id=4,
    )),
    "gemma3": ("gemma3", dict(
        text_config=dict(sliding_window=512, query_pre_attn_scalar=8, **BASE), vision_config=VISION, mm_tokens_per_image=4,
        image_token_index=2,
    )),
}  # fmt: skip
# Gemma's norms are 1 + weight, in float32: `exact_norms` does not know them, and agreement ends where float32 does.
EXACT = {"ministral3": 1e-12, "mistral3": 1e-12, "qwen2_5_vl": 1e-12, "gemma3": 2e-5}
PROMPT, NEW = tokens(6, 4)


def build(name: str, dtype=torch.float64, **text):
    """A tiny random multimodal model; skips where the installed transformers does not have it."""
    family, options = CASES[name]
    options = {**options, "text_config": {**options["text_config"], **text}}
    known = transformers.models.auto.configuration_auto.CONFIG_MAPPING
    for needed in (family, options["text_config"].get("model_type", family)):
        if needed not in known:
            pytest.skip(f"transformers {transformers.__version__} has no {needed}")
    model = randomize(AutoModelForImageTextToText.from_config(AutoConfig.for_model(family, **options)))
    for p in model.parameters():
        p.data = p.data.to(dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, EOS
    return (exact_norms(model) if dtype == torch.float64 and name != "gemma3" else model).eval()


def beside(model) -> dict:
    """The parameters of the vision tower and its projector."""
    return {n: p for n, p in model.named_parameters() if any(x in n for x in ("vision", "visual", "projector"))}


@pytest.mark.parametrize("name", list(CASES))
def test_text_takes_a_trace(name):
    model = build(name)
    ids = torch.cat((PROMPT, NEW))[None]
    want = model(input_ids=ids, use_cache=False).logits
    diffmas.patch_model(model)
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, want)
    trace = diffmas.Trace(model)
    first = model(input_ids=PROMPT[None], past_key_values=trace).logits
    got = torch.cat((first, model(input_ids=NEW[None], past_key_values=trace, attention_mask=torch.ones(1, 10)).logits), 1)
    assert trace.lengths == [10] and {s.kind for s in trace.segments} == {"prompt"}
    assert_close(got, want, EXACT[name])
    loss_of(got).backward()
    grads = gradients(model)
    loss_of(model(input_ids=ids, use_cache=False).logits).backward()
    assert grads and not grads.keys() & beside(model).keys()
    assert_close(grads, gradients(model), EXACT[name])


@pytest.mark.parametrize("name", list(CASES))
def test_generate(name):
    if name == "qwen2_5_vl" and transformers.__version__ < "5":
        pytest.skip("its generate counts positions from a state that only a forward with a cache of transformers' sets")
    model = diffmas.patch_model(build(name))
    rows = tokens(5, 3)
    ids, mask = pad(rows)
    trace = diffmas.Trace(model, 2)
    model(input_ids=torch.stack((PROMPT, PROMPT)), past_key_values=trace)
    texts = model.generate(ids, attention_mask=mask, past_key_values=trace, max_new_tokens=6, do_sample=False)
    for row, text in zip(rows, texts):
        whole = torch.cat((PROMPT, row))
        want = model.generate(whole[None], attention_mask=torch.ones(1, len(whole)), max_new_tokens=6, do_sample=False)
        assert text[5:].tolist() == want[0, len(whole) :].tolist()


@pytest.mark.parametrize("name", ["ministral3", "mistral3", "qwen2_5_vl"])
@pytest.mark.parametrize("options", [{}, dict(trace_content="latent_only", positions="reindex")], ids=["all", "reindexed"])
def test_a_system(name, options):
    """Loss and gradients of agents with latent steps; renumbered rows need to know how the layers rotate their keys."""
    system = MultiAgentSystem(with_lora(build(name)), tokenizer(), AGENTS, **options)
    system.realign.to(torch.float64)
    loss = system(QUESTIONS, ANSWERS).loss
    if options:  # no plain forward has such positions: only that they are served
        assert loss.isfinite()
        return
    loss.backward()
    grads = gradients(system.model)
    want = unrolled_loss(system, QUESTIONS, ANSWERS)
    want.backward()
    assert_close(loss, want, 1e-9)
    assert_close(grads, gradients(system.model), 1e-9)


def test_adapters_leave_what_is_beside_the_text_alone(tmp_path):
    model = build("mistral3", torch.float32)
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base")
    assert type(base) is type(model)
    linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and "language_model" in n}
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        config = lora_config(r=2, target_modules=targets)
        lora = add_lora(load_base(tmp_path / "base"), config=config)
        adapted = {n.removeprefix("base_model.model.").split(".lora_A")[0] for n, _ in lora.named_parameters() if "lora_A" in n}
        assert adapted == {n for n in linear if targets == "all-linear" or n.endswith(tuple(targets))}
        assert not any(p.requires_grad for p in beside(lora).values()) and config.exclude_modules is None
    own = lora_config(r=2, target_modules=["q_proj"])
    own.exclude_modules = ["language_model.layers.0.self_attn.q_proj"]
    lora = add_lora(load_base(tmp_path / "base"), config=own)
    assert any("vision_tower" in n for n, _ in lora.named_parameters() if "lora_A" in n)  # who says so gets it
    system = MultiAgentSystem(add_lora(base), tokenizer(), AGENTS).eval()
    for trained, unused in ((system, False), (MultiAgentSystem(lora, tokenizer(), AGENTS), True)):
        args = default_arguments(tmp_path / "run", report_to=[])
        trainer = Trainer(trained, args, train_dataset=[{"question": "w5", "answer": "w6"}])
        assert trainer.args.ddp_find_unused_parameters is unused  # DDP would wait for the vision tower's gradients
    with torch.no_grad():
        for n, p in system.named_parameters():
            if "lora_B" in n:
                p.normal_()
        want = system(QUESTIONS, ANSWERS).loss
        system.save_pretrained(tmp_path / "out")
        again = MultiAgentSystem.from_pretrained(tmp_path / "out", tokenizer=tokenizer()).eval()
        assert torch.equal(again(QUESTIONS, ANSWERS).loss, want)


def test_images_are_refused():
    model = diffmas.patch_model(build("mistral3"))
    trace = diffmas.Trace(model)
    pixels = torch.zeros(1, 3, 16, 16, dtype=torch.float64)
    with pytest.raises(ValueError, match="pixel_values: expected text alone with a trace"):
        model(input_ids=PROMPT[None], pixel_values=pixels, image_sizes=torch.tensor([[16, 16]]), past_key_values=trace)
    assert trace.lengths == [0]


def test_what_cannot_be_served_is_refused():
    with pytest.raises(diffmas.Unsupported, match="Gemma3Attention.*layer 0.*sliding window 16"):
        diffmas.patch_model(build("gemma3", sliding_window=16))
    with pytest.raises(diffmas.Unsupported, match="MistralAttention.*layer 0.*sliding window 16"):
        diffmas.patch_model(build("mistral3", sliding_window=16))


def test_a_wrapper_that_makes_up_positions_is_refused():
    """No layer shows it: each rotates as it is told."""
    model = build("mistral3")
    forward = type(body(model)).forward

    def renumbered(self, *args, position_ids=None, **kwargs):
        position_ids = None if position_ids is None else position_ids - position_ids[:, :1]
        return forward(self, *args, position_ids=position_ids, **kwargs)

    own = type("Renumbering", (type(body(model)),), {"forward": renumbered})
    body(model).__class__ = own
    with pytest.raises(diffmas.Unsupported, match=r"what enters layer 1 differs from its own forward by .* \[end to end\]"):
        diffmas.patch_model(model)


def test_unpatching_leaves_the_model_as_it_was():
    model = build("qwen2_5_vl")
    want = model(input_ids=PROMPT[None], use_cache=False).logits
    model.model.rope_deltas = None  # this forward sets it
    attributes = lambda: {n: {key: id(x) for key, x in vars(m).items()} for n, m in model.named_modules()}  # noqa: E731
    before = attributes()
    diffmas.patch_model(model)
    assert model.model.rope_deltas is None
    diffmas.unpatch_model(model)
    assert attributes() == before
    assert error(model(input_ids=PROMPT[None], use_cache=False).logits, want) == 0
