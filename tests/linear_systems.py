"""Tiny models whose linears are long enough to be fused, with LoRA; teams of them, and their gradients fused and not."""

import contextlib
from dataclasses import replace

import torch
from models import make_config, randomize
from systems import ANSWERS, QUESTIONS, tokenizer
from torch import nn
from transformers import AutoModelForCausalLM

from diffmas import Agent, MultiAgentSystem, patch_model
from diffmas.agents.adapters import add_lora
from diffmas.models import few_rows, linears

T = 4
AGENTS = [Agent("planner", "w5 {question} w6", T), Agent("critic", "w7 w8 {question}", T - 1), Agent("solver", "w9 {question}")]
LINEARS = 3 * 7  # of the model, all with an adapter


def side_by_side(agents=AGENTS):
    """The same agents, of which all but the last read nobody."""
    return [*(replace(a, reads=[]) for a in agents[:-1]), agents[-1]]


def base(family="qwen2", dtype=torch.float32):
    config = make_config(family, hidden_size=64, intermediate_size=96, num_key_value_heads=4)
    model = calm(AutoModelForCausalLM.from_config(config)).to(dtype)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, config.vocab_size - 1
    return model


def calm(model):
    """Weights so small that rounding is not amplified from step to step."""
    for p in randomize(model).parameters():
        if p.dim() == 2:
            p.data *= 0.4
    return model


def lora(model, scope="shared", b=0.05, **options):
    from peft import LoraConfig

    model = add_lora(model, AGENTS, scope, LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | options))
    return with_b(model, b)


def with_b(model, b=0.05):
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data = (b * torch.randn(p.shape, generator=generator)).to(p.dtype)
    return model


def system(model=None, **options) -> MultiAgentSystem:
    made = MultiAgentSystem(lora(base()) if model is None else model, tokenizer(), AGENTS, **options)
    made.train()
    return made


def gradients(made, backward=lambda loss: loss.backward()):
    torch.manual_seed(0)
    loss = made(QUESTIONS, ANSWERS).loss
    backward(loss)
    grads = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
    made.zero_grad(set_to_none=True)
    return {"loss": loss.detach()} | grads


def assert_close(got, want, tolerance=2e-5):
    assert got.keys() == want.keys() and len(want) > 1
    wrong = {n: (got[n] - want[n]).norm() / want[n].norm() for n in want if want[n].norm()}
    assert max(wrong.values()) < tolerance, {n: float(e) for n, e in wrong.items() if e >= tolerance}


@contextlib.contextmanager
def counted(owner, name):
    """How often a function of a module is called, inside."""
    calls, original = [], getattr(owner, name)

    def counting(*args, **kwargs):
        calls.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, counting)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


@contextlib.contextmanager
def learning_at_once():
    """A list of how many layers each node of autograd's for several has."""
    layers, original = [], few_rows.learning_layers

    def counting(*args):
        y = original(*args)
        if y is not None:
            layers.append(len(args[1]))
        return y

    few_rows.learning_layers = counting
    try:
        yield layers
    finally:
        few_rows.learning_layers = original


def with_and_without(made, tolerance=2e-5) -> int:
    """How many linears were fused, alone or with their layer."""
    want = gradients(unfused(made))
    patch_model(made.model)
    with counted(linears, "run") as calls, learning_at_once() as layers:
        assert_close(gradients(made), want, tolerance)
    return len(calls) + 7 * sum(layers)


def unfused(made):
    patch_model(made.model, fuse=False)
    return made


# ---- what somebody else does to a part of a model -------------------------------------------------------------------


def doubled(module):
    forward = type(module).forward
    module.forward = lambda x: 2 * forward(module, x)


def hooked(module):
    module.register_forward_hook(lambda module, args, y: 2 * y)


class Other(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return 2 * self.module(x)
