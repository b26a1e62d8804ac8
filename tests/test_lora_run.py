"""LoRA's gradients of a run of latent steps: one product for each linear, whatever asks for them."""

import pytest
import torch
from linear_systems import (
    LINEARS,
    T,
    assert_close,
    base,
    counted,
    gradients,
    lora,
    system,
    unfused,
)  # fmt: skip
from systems import ANSWERS, QUESTIONS
from torch import nn

from diffmas.models import few_rows, linear_parts, linears
from diffmas.ops import extension
from diffmas.trace import few_rows_learning, lora_run

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")


def test_a_run_has_one_product_for_each_linear(monkeypatch):
    made = system()
    with counted(lora_run, "lora_grads") as of_runs, counted(linear_parts, "lora_grads") as of_passes:
        monkeypatch.setattr(few_rows, "learning_layers", lambda *_: None)
        gradients(made)
    assert len(of_runs) == 2 * LINEARS
    assert len(of_passes) == (3 - 1) * LINEARS + LINEARS
    rows = {len(args[0]) for args in of_runs}
    assert rows == {T * len(QUESTIONS), (T - 1) * len(QUESTIONS)}


def test_a_run_of_layers_at_once_has_one_op_for_all_of_them():
    made = system()
    with counted(few_rows_learning, "_lora_grads") as of_runs, counted(lora_run.LoraRun, "keep") as steps:
        gradients(made)
    assert len(of_runs) == 2 and len(steps) == T + T - 1


def test_backward_twice_through_one_graph():
    made = system()
    want = gradients(made)

    def twice(loss):
        loss.backward(retain_graph=True)
        made.zero_grad(set_to_none=True)
        loss.backward()

    got = gradients(made, twice)
    assert all(torch.equal(got[n], want[n]) for n in want)


def test_a_backward_that_asks_for_some_only():
    made = system()
    want = gradients(made)
    name, p = next((n, p) for n, p in made.named_parameters() if "layers.1" in n and "up_proj.lora_A" in n)
    found = {}
    gradients_of_one = lambda loss: found.update({name: torch.autograd.grad(loss, p)[0]})
    gradients(made, gradients_of_one)
    assert torch.equal(found[name], want[name])


def test_a_second_order_is_refused():
    made = system()
    weights = [p for p in made.parameters() if p.requires_grad]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        loss = made(QUESTIONS, ANSWERS).loss
        sum(g.sum() for g in torch.autograd.grad(loss, weights, create_graph=True)).backward()


@pytest.mark.parametrize("scope", ["shared", "per_role"])
def test_checkpointed_layers(scope):
    made = system(lora(base(), scope), adapter_scope=scope)
    want = gradients(made)
    made.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with counted(lora_run, "lora_grads") as of_runs, counted(linears, "run") as calls:
        got = gradients(made)
    passes = 2 + T + T - 1 + 1
    assert len(of_runs) == 2 * LINEARS and len(calls) == 2 * passes * LINEARS  # forward, and again
    assert_close(got, want, 1e-5)


def test_the_report_tells_passes_apart():
    made = system()
    fused = made.gradient_report(QUESTIONS, ANSWERS)
    own = unfused(made).gradient_report(QUESTIONS, ANSWERS)
    assert len(fused.passes) == len(own.passes)
    for x, y in zip(fused.passes, own.passes):
        assert x.parameters == pytest.approx(y.parameters, rel=1e-4, abs=1e-7)
    assert fused.parameters == pytest.approx(own.parameters, rel=1e-4)


def test_hooks_on_parameters_see_the_whole_gradient_once():
    made, seen = system(), []
    p = next(p for n, p in made.named_parameters() if "lora_A" in n)
    p.register_hook(lambda g: seen.append(g.clone()))
    p.register_post_accumulate_grad_hook(lambda q: seen.append(q.grad.clone()))
    gradients(made)
    assert len(seen) == 2 and torch.equal(*seen)


def test_distributed_data_parallel(tmp_path):
    import torch.distributed as dist

    made = system()
    want = gradients(made)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(made)
        loss = wrapped(QUESTIONS, ANSWERS).loss
        loss.backward()
        got = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        assert_close({"loss": loss.detach()} | got, want, 1e-6)
    finally:
        dist.destroy_process_group()
