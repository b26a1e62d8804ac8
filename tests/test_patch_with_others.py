"""A patched model in PEFT, in copies and files, and in accelerate's hands."""

import copy
import io
import pickle

import pytest
import torch
from models import SOME, assert_close, body, error, gradients, tiny, tokens, with_lora
from test_patch import PROMPT, plain, through_trace
from torch import nn

import diffmas
from diffmas.agents.realign import Realign

# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["patch first", "PEFT first", "wrapped"])
@pytest.mark.parametrize("family", SOME)
def test_lora(family, order):
    base = plain(tiny(family, patch=False))
    model = tiny(family, patch=False)
    if order == "patch first":
        model = with_lora(diffmas.patch_model(model))
    else:
        model = with_lora(model)
        diffmas.patch_model(model if order == "wrapped" else model.get_base_model())
    want = plain(model)
    assert error(want, base) > 1e-2
    got = through_trace(model)
    assert_close(got, want)
    weights = torch.linspace(-1, 1, got.numel(), dtype=got.dtype).view_as(got)
    (got * weights).sum().backward()
    grads = gradients(model)
    (want * weights).sum().backward()
    assert_close(grads, gradients(model))
    with model.disable_adapter():
        assert_close(through_trace(model), base)
    model.merge_adapter()
    assert_close(through_trace(model), want)
    model.unmerge_adapter()
    assert_close(through_trace(model), want)
    merged = model.merge_and_unload()
    assert_close(through_trace(merged), want)
    diffmas.unpatch_model(merged)
    assert_close(plain(merged), want)


# ---- copies and files ------------------------------------------------------------------------------------------------


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def saved_whole(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved_whole])
@pytest.mark.parametrize("family", SOME)
def test_copies_work_on_their_own_weights(family, duplicate):
    model = tiny(family)
    want = plain(model)
    copied = duplicate(model)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert_close(through_trace(copied), want)
    assert torch.equal(plain(copied), want)
    ids = copied.generate(input_ids=PROMPT[None], past_key_values=diffmas.Trace(copied), max_new_tokens=3, do_sample=False)
    assert ids.shape == (1, 9)
    diffmas.unpatch_model(copied)
    assert torch.equal(plain(copied), want)
    assert not any("diffmas_layer" in m.__dict__ or "forward" in m.__dict__ for m in copied.modules())


@pytest.mark.parametrize("family", SOME)
def test_save_pretrained(family, tmp_path):
    model = tiny(family, torch.float32)
    model.save_pretrained(tmp_path)
    assert "diffmas" not in (tmp_path / "config.json").read_text()
    again = type(model).from_pretrained(tmp_path)
    assert_close(plain(again), plain(model), 1e-6)


def _replace(module, double):
    module.forward = lambda x: double(nn.Linear.forward(module, x))


INTERVENTIONS = {
    "hook": lambda m, double: m.register_forward_hook(lambda m, args, y: double(y)),
    "pre-hook": lambda m, double: m.register_forward_pre_hook(lambda m, args: tuple(map(double, args))),
    "hook of the backward": lambda m, double: m.register_full_backward_hook(lambda m, dx, dy: tuple(map(double, dx))),
    "pre-hook of the backward": lambda m, double: m.register_full_backward_pre_hook(lambda m, dy: tuple(map(double, dy))),
    "replaced": _replace,
}


def test_who_hooks_into_all_modules_is_called():
    """As counters of flops and profilers do."""
    model, called = tiny("llama"), []
    names = {module: name for name, module in body(model).layers[0].self_attn.named_children()}
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(names.get(module)))
    try:
        model(input_ids=PROMPT[None], past_key_values=diffmas.Trace(model))
    finally:
        hook.remove()
    assert [called.count(name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")] == [1, 1, 1, 1]


@pytest.mark.parametrize("name", ["q_proj", "o_proj"])
@pytest.mark.parametrize("intervention", INTERVENTIONS)
def test_who_hooks_into_a_projection_is_called(intervention, name):
    model, calls = tiny("llama"), []
    module = body(model).layers[0].self_attn.get_submodule(name)
    INTERVENTIONS[intervention](module, lambda x: (calls.append(1), 2 * x)[1])
    x = torch.randn(1, 6, 32, dtype=torch.float64, requires_grad=True)
    out = body(model)(inputs_embeds=x, past_key_values=diffmas.Trace(model)).last_hidden_state
    (dx,) = torch.autograd.grad(out.square().sum(), x)
    assert len(calls) == 1
    diffmas.unpatch_model(model)
    want = body(model)(inputs_embeds=x).last_hidden_state
    assert_close(out, want)
    assert_close(dx, torch.autograd.grad(want.square().sum(), x)[0])


# ---- accelerate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SOME)
@pytest.mark.parametrize("first", ["hooks", "patch"])
def test_accelerate_hooks(family, first):
    from accelerate import dispatch_model
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Counting(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            self.calls += 1
            return args, kwargs

    def hook(model):
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
        for layer in body(model).layers:
            add_hook_to_module(layer.self_attn, counting, append=True)

    model, counting = tiny(family, patch=False), Counting()
    want = plain(model)
    for step in (hook, diffmas.patch_model) if first == "hooks" else (diffmas.patch_model, hook):
        step(model)
    counting.calls = 0
    assert_close(through_trace(model), want)
    assert counting.calls == 6
    remove_hook_from_module(model, recurse=True)
    assert_close(through_trace(model), want)
    diffmas.unpatch_model(model)
    assert torch.equal(plain(model), want)
    diffmas.patch_model(model)  # accelerate leaves each module's own forward on the instance
    assert_close(through_trace(model), want)


def test_unpatching_under_accelerate_hooks():
    from accelerate.hooks import ModelHook, add_hook_to_module

    model = tiny("qwen3")
    want = plain(model)
    for layer in body(model).layers:
        add_hook_to_module(layer.self_attn, ModelHook())
    diffmas.unpatch_model(model)
    assert torch.equal(plain(model), want)
    assert_close(through_trace(diffmas.patch_model(model)), want)


def test_offloaded_weights_are_refused():
    from accelerate import cpu_offload

    model = tiny("qwen3", patch=False)
    cpu_offload(model)
    with pytest.raises(diffmas.Unsupported, match="layer 0.*device=meta"):
        diffmas.patch_model(model)
    model = tiny("qwen3")
    cpu_offload(model)
    with pytest.raises(RuntimeError, match="offloaded"):
        through_trace(model)
    model, want = tiny("llama"), plain(tiny("llama"))
    cpu_offload(model)
    assert_close(through_trace(model), want)  # it has no weights but those of its projections


def test_realign_says_that_the_head_is_offloaded():
    from accelerate import cpu_offload

    model = tiny("llama")
    cpu_offload(model.lm_head, execution_device=torch.device("cpu"))
    Realign(model, "norm"), Realign(model, "none")
    for mode in ("ridge", "soft_token", "learned"):
        with pytest.raises(ValueError, match=f"realign: '{mode}' needs the output embeddings in memory, got offloaded ones"):
            Realign(model, mode)
    cpu_offload(model.model.embed_tokens, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="realign: 'none' needs the input embeddings in memory"):
        Realign(model, "none")


@pytest.mark.parametrize("where", ["host", "disk", "host, by layers"])
def test_files_of_a_model_with_offloaded_weights(tmp_path, where):
    """They have the fingerprints of the model itself, whose values are read where accelerate keeps them."""
    from accelerate import cpu_offload, disk_offload

    model, here = (with_lora(tiny("llama", tie_word_embeddings=True)) for _ in range(2))
    if where == "disk":
        disk_offload(model, tmp_path / "weights", execution_device=torch.device("cpu"))
    else:
        whole = ["LlamaDecoderLayer"] if "layers" in where else None
        cpu_offload(model, execution_device=torch.device("cpu"), preload_module_classes=whole)
    assert all(p.is_meta for p in model.parameters())
    trace = diffmas.Trace(model, 1)
    model(tokens(5)[0][None], past_key_values=trace)
    trace.save(tmp_path / "rows")
    assert diffmas.Trace.load(tmp_path / "rows", here).lengths == [5]
    for part, what in (("lora_B", "adapter"), ("up_proj", "model")):
        next(p for name, p in here.named_parameters() if part in name).data[-1] += 1
        with pytest.raises(ValueError, match=f"expected a trace of this {what}"):
            diffmas.Trace.load(tmp_path / "rows", here)
