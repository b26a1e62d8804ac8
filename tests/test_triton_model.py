"""A patched model whose linears, norms and gates are Triton's, and its gradients, against the layers as they are: on the GPU
where there is one, else in Triton's interpreter."""

import pytest
import torch
from linear_systems import LINEARS, T, assert_close, base, counted, gradients, lora, system, unfused
from systems import QUESTIONS

from diffmas import Trace, ops, patch_model
from diffmas.models.patch import patch_of
from diffmas.ops import layer
from diffmas.trace import lora_run

pytestmark = pytest.mark.skipif(ops.available()["triton"] is not None, reason=str(ops.available()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 3


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

    for name in ("linear", "add_lora", "lora_grad", "norm", "norm_backward", "gate", "gate_backward"):
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
    assert kernels.keys() == {"linear", "lora_grad", "norm", "norm_backward", "gate", "gate_backward"}


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
    assert ("add_lora" in kernels) == (rows == 60) and "linear" in kernels and "norm_backward" in kernels
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
    assert kernels.keys() == {"linear", "lora_grad", "norm", "norm_backward", "gate", "gate_backward"}
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
    assert kernels.keys() == {"linear", "norm", "gate"}


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
