"""A patched model whose linears, norms and gates are Triton's, and its gradients, against the layers as they are: on the GPU
where there is one, else in Triton's interpreter."""

from collections import Counter

import pytest
import torch
from launches import note_launches
from linear_systems import (
    LINEARS,
    T,
    assert_close,
    base,
    counted,
    doubled,
    gradients,
    hooked,
    lora,
    side_by_side,
    system,
    unfused,
)
from models import make_config, randomize
from systems import QUESTIONS, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from diffmas import MultiAgentSystem, Trace, ops, patch_model
from diffmas.agents.latent import latent_steps
from diffmas.agents.realign import Realign
from diffmas.models import attention, pointwise
from diffmas.models.patch import patch_of
from diffmas.ops import layer
from diffmas.trace import lora_run

pytestmark = pytest.mark.skipif(ops.available()["triton"] is not None, reason=str(ops.available()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 3
TOGETHER = {"linears", "linears_backward", "gated_linears", "linear_gate_backward"}  # of few rows
LEARNING = TOGETHER | {"linear", "lora_grad", "norm", "norm_backward"}


@pytest.fixture(scope="module", autouse=True)
def bfloat16():
    if DEVICE == "cuda":
        yield
        return
    from interpreted_bfloat16 import interpreted_bfloat16

    layer.kernels_for.cache_clear()
    with interpreted_bfloat16():
        yield
    layer.kernels_for.cache_clear()


def fused(model):
    """Patched, with Triton's kernels beside attention. In the interpreter attention stays the CPU's, which is faster."""
    patch_model(model, fuse=True)
    patch_of(model).spec.fused = ("triton",)
    return model


@pytest.fixture
def kernels(monkeypatch):
    """-> how often each of Triton's kernels was called from now on."""
    found, calls = ops.BACKENDS["triton"].ops, {}

    def counting(name, kernel):
        def call(*args):
            calls[name] = calls.get(name, 0) + 1
            return kernel(*args)

        return call

    for name in (*TOGETHER, "linear", "add_lora", "lora_grad", "norm", "norm_backward", "gate", "gate_backward"):
        monkeypatch.setattr(found, name, counting(name, getattr(found, name)))
    return calls


def test_a_training_step(kernels):
    made = system(lora(base())).to(DEVICE)
    want = gradients(unfused(made))
    fused(made.model)
    with counted(lora_run.LoraRun, "keep") as steps, counted(lora_run, "lora_grads") as of_runs:
        got = gradients(made)
    assert_close(got, want, 1e-4)  # latent steps amplify the rounding of 3 layers
    assert len(steps) == (T + T - 1) * LINEARS and len(of_runs) == 2 * LINEARS
    assert kernels.keys() == LEARNING


def test_a_training_step_of_agents_with_an_adapter_each(kernels):
    """In one forward: what an adapter adds to its rows is a launch of its own."""
    made = MultiAgentSystem(lora(base(), "per_role"), tokenizer(), side_by_side(), adapter_scope="per_role").train().to(DEVICE)
    want = gradients(unfused(made))
    fused(made.model)
    got = gradients(made)
    assert_close(got, want, 1e-4)
    assert kernels["add_lora"] >= 2 * T * LINEARS and kernels["linear"] > T * LINEARS


def states(model, rows: int, dtype: torch.dtype):
    """The last hidden states of as many rows, a third of them in a second forward, and their gradient to what goes in."""
    x = torch.randn(1, rows, 64, generator=torch.Generator().manual_seed(3)).bfloat16().to(DEVICE, dtype).requires_grad_()
    trace, body = Trace(model, batch_size=1), patch_of(model).body
    y = [body(inputs_embeds=part, past_key_values=trace).last_hidden_state for part in x.split(rows - rows // 3, 1)]
    y = torch.cat(y, 1)
    return y.detach(), *torch.autograd.grad(y.float().pow(2).sum(), x)


@pytest.mark.parametrize("dtype, rows", [(torch.bfloat16, 60), (torch.float16, 7)])
def test_shorter_types_have_no_more_error_than_the_layers_own(dtype, rows, kernels):
    """Against the same weights in float32; two forwards of 40 and 20 rows, or of 5 and 2."""
    model = lora(base(dtype=dtype)).to(DEVICE)
    own = states(patch_model(model, fuse=False), rows, dtype)
    kernels.clear()
    ours = states(fused(model), rows, dtype)
    assert ("add_lora" in kernels) == ("gate" in kernels) == (rows == 60) and kernels.keys() >= LEARNING
    exact = states(patch_model(model.float(), fuse=False), rows, torch.float32)
    for mine, its, want in zip(ours, own, exact):
        assert mine.dtype == its.dtype == dtype
        assert (mine.float() - want).norm() <= 1.2 * (its.float() - want).norm()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_through_patch_model(family, kernels):
    """Attention of the same backend; without biases, and with norms of q and k."""
    model = lora(base(family)).to(DEVICE)
    want = states(patch_model(model, "reference"), 3, torch.float32)
    assert not kernels
    got = states(patch_model(model, "triton", fuse=True), 3, torch.float32)
    assert kernels.keys() == LEARNING
    for mine, its in zip(got, want):
        assert (mine - its).norm() < 1e-4 * its.norm()
    kernels.clear()
    states(patch_model(model, "triton"), 3, torch.float32)
    assert not kernels  # by default it is off


def test_generation(kernels):
    made = system(lora(base())).to(DEVICE)
    run = lambda: made.generate_tokens(QUESTIONS[:2], max_new_tokens=2, temperature=0)
    want = run(), unfused(made) and run()
    fused(made.model)
    kernels.clear()
    assert run() == want[0] == want[1]
    assert kernels.keys() == {"linear", "linears", "gated_linears", "norm"}


def of_two_passes(model):
    """States of three rows, their gradient, and those of the adapters."""
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(3)).bfloat16().to(DEVICE).requires_grad_()
    trace, body = Trace(model, batch_size=1), patch_of(model).body
    y = [body(inputs_embeds=part, past_key_values=trace).last_hidden_state for part in x.split(2, 1)]
    y = torch.cat(y, 1)
    y.float().pow(2).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad(set_to_none=True)
    return [y.detach(), x.grad, *grads]


@pytest.mark.skipif(DEVICE == "cuda", reason="sums are split there")
@pytest.mark.parametrize("options", [{}, {"target_modules": ["q_proj", "v_proj", "up_proj"]}], ids=str)
def test_the_bits_of_one_by_one(options, monkeypatch, kernels):
    """Also where only some linears have adapters; and gradients in the order in which autograd adds them up."""
    model = fused(lora(base("llama", dtype=torch.bfloat16), **options))
    got = of_two_passes(model)
    assert kernels.keys() >= TOGETHER
    kernels.clear()
    with monkeypatch.context() as m:
        m.setattr(attention, "same_rows", lambda *_: None)
        m.setattr(pointwise, "feed_forward", lambda *_: None)
        want = of_two_passes(model)
    assert not kernels.keys() & TOGETHER and len(got) == len(want) > 2
    assert all(map(torch.equal, got, want))


@pytest.mark.parametrize("name, change", [("self_attn.k_proj", doubled), ("mlp.up_proj", hooked), ("mlp.down_proj", doubled)])
def test_what_somebody_else_does_to_a_part(name, change, kernels):
    """Its linears go one by one."""
    model = fused(lora(base("llama")).to(DEVICE))
    change(patch_of(model).body.layers[1].get_submodule(name))
    got = states(model, 3, torch.float32)
    together = {x: kernels[x] for x in TOGETHER}
    want = states(patch_model(model, fuse=False), 3, torch.float32)
    for mine, its in zip(got, want):
        assert (mine - its).norm() < 1e-4 * its.norm()
    attention = "attn" in name
    passes = 2 * (LAYERS if attention else LAYERS - 1), 2 * (LAYERS - 1 if attention else LAYERS)
    assert (together["gated_linears"], together["linears"]) == passes


class Counting(TorchDispatchMode):
    """Torch's ops that are sums or products of tensors."""

    def __init__(self, seen):
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        name = str(op).removeprefix("aten.").split(".")[0]
        if name in ("add", "add_", "mul", "mm", "addmm", "silu", "sum", "pow", "mean", "rsqrt"):
            self.seen.append((name, None))
        return op(*args, **(kwargs or {}))


@pytest.mark.skipif(DEVICE == "cuda", reason="it counts what the interpreter runs")
def test_launches_of_a_layer(monkeypatch):
    """Of a latent step with gradients: 14 forward and 16 backward (docs/kernels.md), LoRA's gradients apart."""
    from diffmas.kernels import cross_attention, inject, linear
    from diffmas.kernels import pointwise as kernels_between

    def run(layers):
        config = make_config("llama", hidden_size=32, intermediate_size=32, num_key_value_heads=4, num_hidden_layers=layers)
        model = patch_model(lora(randomize(AutoModelForCausalLM.from_config(config))), "triton", fuse=True)
        x = torch.randn(1, 32).requires_grad_()
        with monkeypatch.context() as m:
            seen = note_launches(m, cross_attention, inject, linear, kernels_between)
            found = []
            with Counting(seen):
                y = latent_steps(patch_of(model), Realign(model, "none"), Trace(model, 1), x, [1])
                found.append(Counter(name for name, _ in seen))
                seen.clear()
                y.sum().backward()
                found.append(Counter(name for name, _ in seen if name != "lora_grad_kernel"))
        return found

    forward, backward = (two - one for one, two in zip(run(1), run(2)))
    rest = {"linear_kernel_products": 4, "add": 2}
    assert forward == rest | {
        "linear_kernel_finish": 3, "linear_kernel_gate": 1, "norm_fwd_kernel": 2, "inject_fwd_kernel": 1,
        "cross_attention_fwd_kernel": 1,
    }  # fmt: skip
    attention = dict.fromkeys((f"cross_attention_bwd_kernel_{x}" for x in ("delta", "dq", "dkv_tail")), 1)
    assert backward == rest | attention | {
        "linear_kernel_sum": 3, "linear_kernel_gate_backward": 1, "norm_bwd_kernel": 2, "inject_bwd_kernel": 1,
    }  # fmt: skip
    assert (forward.total(), backward.total()) == (14, 16)


def test_what_is_on(monkeypatch):
    """On a GPU nothing, unless it is asked for."""
    monkeypatch.setattr(ops.BACKENDS["triton"], "interpreted", False)
    cpu = ("cpu",) if ops.available()["cpu"] is None else ()
    assert [layer.usable("auto", fuse) for fuse in (None, True, False)] == [cpu, (*cpu, "triton"), ()]
    for backend in ("triton", "cuda"):
        assert [layer.usable(backend, fuse) for fuse in (None, True, False)] == [(), ("triton",), ()]
    assert layer.usable("reference", True) == ()
    monkeypatch.setattr(ops.BACKENDS["triton"], "why_missing", "there is none")
    assert layer.usable("auto", True) == cpu and layer.usable("triton", True) == ()


def test_the_interpreter_is_asked_for_by_name():
    if DEVICE == "cpu":
        assert "triton" not in layer.usable("auto", True)
    assert layer.usable("triton", True) == ("triton",)


def test_what_serves_a_device_and_dtype():
    both, weight = ("cpu", "triton"), torch.zeros(37, 64, device=DEVICE)
    triton = ops.BACKENDS["triton"].ops
    assert layer.layer_ops(weight.half(), ("triton",)).ops is triton
    assert layer.layer_ops(weight.double(), ("triton",)) is None and layer.layer_ops(weight, ()) is None
    assert layer.layer_ops(weight, ("triton",)).takes_weight(weight)
    if DEVICE == "cpu" and ops.available()["cpu"] is None:
        assert layer.layer_ops(weight, both).ops is ops.BACKENDS["cpu"].ops
        assert not layer.layer_ops(weight, both).takes(weight) and layer.layer_ops(weight, both).takes(weight[:32])
    assert not layer.layer_ops(weight, ("triton",)).takes(weight.half())
    assert not layer.layer_ops(weight, ("triton",)).takes_weight(weight.t())
