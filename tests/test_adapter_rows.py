"""Agents with an adapter each in one forward, where each adapter has its own rows: against the agents one by one, and against a
loop that recomputes all."""

import contextlib
from dataclasses import replace

import pytest
import torch
from linear_systems import (
    QUESTIONS,
    assert_close,
    base,
    counted,
    gradients,
    learning_at_once,
    lora,
    side_by_side,
    unfused,
    with_b,
)
from loops import TIGHT, check_checkpointing, check_greedy_tokens, check_loss
from models import gradients as all_gradients
from models import tiny
from systems import ANSWERS, exact_norms, tokenizer
from test_graph import SHAPES, Loop, agent, exact

from diffmas import Agent, MultiAgentSystem, Trace, patch_model
from diffmas.agents import adapters
from diffmas.agents.board import Board
from diffmas.models import few_rows, linears
from diffmas.models.parts import body_of, causal_lm_of
from diffmas.ops import extension
from diffmas.trace.appending import AdapterOf
from diffmas.training import lora_config

NEEDS_KERNELS = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")
ROLES = side_by_side()


def of_roles(model, agents, adapt=None, b=0.05, **options):
    """An adapter for each role, each of other weights."""
    made = with_b(adapters.add_lora(model, agents, "per_role", adapt or lora_config(r=3, alpha=6)), b)
    return MultiAgentSystem(made, tokenizer(), agents, adapter_scope="per_role", **options)


def float64(shape, **options):
    s = of_roles(exact_norms(tiny("qwen3", torch.float64, patch=False)), SHAPES[shape], b=0.3, **options)
    s.realign.to(torch.float64)
    for p in s.model.parameters():
        p.data = p.data.double()
    return exact(s)


class RolesLoop(Loop):
    """By PEFT itself, agent by agent."""

    def turn(self, i, move):
        with adapters.switched_to(self.s.model, self.s.agents[i].adapter):
            return super().turn(i, move)

    def forward(self, module, *args, **options):
        """The last agent alone needs the whole model."""
        last = adapters.switched_to(self.s.model, self.s.agents[-1].adapter)
        with last if module is self.s.model else contextlib.nullcontext():
            return super().forward(module, *args, **options)


def groups(s):
    return Board(s, Trace(s.model)).groups


@pytest.mark.parametrize("shape, content", [("parallel", "all"), ("diamond", "latent_only"), ("passes", "latent_only")])
def test_loss_and_gradients_equal_the_loop(shape, content):
    s = float64(shape, trace_content=content)
    assert max(map(len, groups(s))) > 1
    check_loss(s, RolesLoop)


def test_generated_tokens():
    check_greedy_tokens(float64("tree", trace_content="latent_only"), RolesLoop)


def test_checkpointed_layers():
    """Which are recomputed when the adapters have been switched back."""
    check_checkpointing(float64("tree", trace_content="latent_only").train())


@NEEDS_KERNELS
@pytest.mark.parametrize("fuse", [None, False])
def test_checkpointed_layers_of_kernels(fuse):
    s = fused().train()
    patch_model(s.model, fuse=fuse)
    want = gradients(s)
    s.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert groups(s) == [[0, 1]]
    assert_close(gradients(s), want, 1e-5)


@pytest.mark.parametrize("shape", ["diamond", "passes"])
def test_one_by_one(shape):
    s = float64(shape, trace_content="latent_only", latent_grad_clip=0.05)
    found = []
    for s.together in (True, False):
        out = s(QUESTIONS, ANSWERS)
        out.loss.backward()
        found.append({"logits": out.logits.detach()} | all_gradients(s))
    assert_close(*found, TIGHT)


# ---- the kernels -----------------------------------------------------------------------------------------------------


def fused(agents=ROLES, dtype=torch.float32, adapt=None, **options):
    return of_roles(base(dtype=dtype), agents, adapt, **options)


@NEEDS_KERNELS
@pytest.mark.parametrize("questions", [QUESTIONS, QUESTIONS * 6], ids=["few rows", "many rows"])
def test_kernels(questions):
    """Layers at once, linears one by one, and no kernels give the same; a forward for both agents."""
    s, answers = fused().train(), ANSWERS * (len(questions) // len(QUESTIONS))
    assert groups(s) == [[0, 1]]

    def learned():
        s(questions, answers).loss.backward()
        return all_gradients(s)

    with counted(linears, "run") as alone, learning_at_once() as layers:
        got = learned()
    assert len(layers) == (4 if len(questions) < 16 else 1) and alone  # steps of both agents, then of the planner alone
    s.together = False
    assert_close(got, learned())
    s.together = True
    assert_close(got, (unfused(s), learned())[1])


@NEEDS_KERNELS
def test_layers_at_once_are_the_linears_one_by_one(monkeypatch):
    """To the bit, also in bfloat16."""
    for dtype in (torch.float32, torch.bfloat16):
        s = fused(dtype=dtype).train()
        with learning_at_once() as layers:
            got = gradients_of(s)
        assert layers
        with monkeypatch.context() as patched:
            patched.setattr(few_rows, "learning_layers", lambda *_: None)
            want = gradients_of(s)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], g) for name, g in want.items())


def gradients_of(s):
    s(QUESTIONS, ANSWERS).loss.backward()
    return all_gradients(s)


@NEEDS_KERNELS
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
def test_without_gradients(dtype, tolerance):
    """Some steps are of one agent alone, with no row for the other's adapter."""
    s = fused(dtype=dtype).eval()
    found = []
    with torch.no_grad():
        for s.together in (True, False):
            with counted(few_rows, "few_rows_layers") as calls:
                trace = s.communicate(s.fields_of(QUESTIONS))
            found.append([torch.cat(trace.keys_values(2, b)).float() for b in range(3)])
            assert len(calls) == (5 if s.together else 4 + 3 + 2)
    for got, want in zip(*found):
        assert (got - want).norm() < tolerance * want.norm()
    board = Board(s, Trace(s.model, 3))
    with torch.no_grad():
        board.write([0, 1], s.fields_of(QUESTIONS))
    assert board.written(0).adapter is None  # whoever goes on with the view has an adapter of its own


@NEEDS_KERNELS
def test_messages():
    """Which end one after the other."""
    agents = [replace(a, max_message_tokens=n) for a, n in zip(ROLES, (2, 5))] + ROLES[2:]
    s = fused(agents)
    assert groups(s) == [[0, 1]]
    tokens, norms = [], []
    for s.together in (True, False):
        tokens.append(s.generate_tokens(QUESTIONS, max_new_tokens=4, temperature=0))
        norms.append(gradients(s))
    assert tokens[0] == tokens[1]
    assert_close(*norms)


def test_dropout_and_adapters_of_some_linears():
    """What kernels do not take goes through torch: with dropout, and where an adapter has a linear that the other one lacks."""
    model = lora(base(), "per_role", target_modules=["q_proj", "down_proj"])
    model.delete_adapter("critic")
    model.add_adapter("critic", lora_config(r=2, target_modules=["q_proj", "v_proj"]))
    s = MultiAgentSystem(with_b(model), tokenizer(), ROLES, adapter_scope="per_role").train()
    assert groups(s) == [[0, 1]]
    found = []
    for s.together in (True, False):
        found.append(gradients(s))
    assert_close(*found)
    s = fused(adapt=lora_config(r=3, dropout=0.5)).train()
    s.together = True
    assert groups(s) == [[0, 1]]
    torch.manual_seed(0)
    first, second = (float(s(QUESTIONS, ANSWERS).loss.detach()) for _ in range(2))
    assert first != second
    s.eval()
    found = [gradients(s) for s.together in (True, False)]
    assert_close(*found)


def test_rounds_of_debaters_with_an_adapter_each():
    """ann@2 and bob@2 share a forward; their gradients are sums over rounds."""
    reads = ["ann", "bob"]
    agents = [Agent(n, "w5 {question}", 2, reads=reads, rounds=2, later_prompt="w6 {question}") for n in reads]
    s = fused([*agents, Agent("judge", "w9 {question}", reads=reads)]).train()
    assert groups(s) == [[0, 1], [2, 3]]
    assert_close(*[gradients(s) for s.together in (True, False)])


def test_one_adapter_for_two_of_three():
    roles = [*(replace(agent(name, 2, []), role="x" if name in "ac" else "y") for name in "abc"), agent("solver", 0, None)]
    s = fused(roles).train()
    assert groups(s) == [[0, 1, 2]]
    assert_close(*[gradients(s) for s.together in (True, False)])


# ---- who goes one by one ---------------------------------------------------------------------------------------------


def test_who_cannot_go_by_rows():
    from peft import LoraConfig

    assert groups(fused()) == [[0, 1]]
    assert groups(fused(adapt=LoraConfig(r=2, use_dora=True, target_modules="all-linear"))) == [[0], [1]]
    assert groups(fused(adapt=LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))) == [[0], [1]]
    s = fused()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert groups(s) == [[0], [1]]
    layer = next(m for n, m in s.model.named_modules() if n.endswith("layers.1"))
    layer.compile()
    assert groups(s) == [[0], [1]]
    s = fused()
    lora_layer = next(m for n, m in s.model.named_modules() if n.endswith("1.mlp.up_proj"))
    handle = lora_layer.register_forward_hook(lambda module, args, y: y)
    assert groups(s) == [[0], [1]]
    handle.remove()
    assert groups(s) == [[0, 1]]
    lora_layer.merge(adapter_names=["planner"])
    assert groups(s) == [[0], [1]]


def test_experts_see_some_tokens_only():
    """A linear of an expert's, or of another module than a layer's attention and MLP."""
    s = fused()
    layer = next(m for n, m in s.model.named_modules() if n.endswith("layers.1"))
    inner = layer.mlp
    layer.mlp = torch.nn.Sequential(inner)
    assert groups(s) == [[0], [1]]
    layer.mlp = inner
    assert groups(s) == [[0, 1]]


@pytest.mark.parametrize("fuse", [None, False])
def test_rows_are_never_guessed(fuse):
    """A forward that does not say which rows are whose is refused, and so are layers that see others."""
    s = fused().eval()
    model, ids = patch_model(s.model, fuse=fuse), torch.tensor([[3, 4, 5]])
    for context in (contextlib.nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with adapters.of_agent(s, 0, 1), context, pytest.raises(RuntimeError, match="2 adapters: expected a forward pass"):
            model(input_ids=ids, past_key_values=Trace(model))
    with adapters.of_agent(s, 0, 1), adapters.switched_off(model):
        model(input_ids=ids, past_key_values=Trace(model))
    assert not any("forward" in vars(m) for m in causal_lm_of(model).modules() if hasattr(m, "lora_A")) or fuse is None
    trace = Trace(model, 3)
    trace.adapter = AdapterOf(2, [0, 0, 1])
    assert trace.plan([2, 0, 1], "prompt").work.adapter_ends == [2, 3]
    trace.batch_select_indices(torch.tensor([2]))
    assert trace.adapter == AdapterOf(2, [1]) and trace.plan([4], "prompt").work.adapter_ends == [0, 4]
    for wrong in ([1, 0], [0], [-1, 0], [1, 2]):
        with pytest.raises(ValueError, match="adapter: expected the number of an adapter, of 2 and in order"):
            AdapterOf(2, wrong).ends([1, 1])


@pytest.mark.parametrize("fuse", [None, False])
def test_autocast_that_somebody_enters_inside(fuse):
    """The body's forward runs under it: adapters have their rows, and no kernel serves."""
    s = fused().eval()
    patch_model(s.model, fuse=fuse)
    stack = body_of(s.model)
    stack.forward = torch.autocast("cpu", dtype=torch.bfloat16)(stack.forward)
    losses = [float(s(QUESTIONS, ANSWERS).loss.detach()) for s.together in (True, False)]
    assert groups(s) == [[0], [1]]
    s.together = True
    assert groups(s) == [[0, 1]] and losses[0] == pytest.approx(losses[1], rel=0.02)


@NEEDS_KERNELS
def test_adapters_that_differ():
    """In rank and scale; and one of them is frozen."""
    model = lora(base(), "per_role", r=2)
    model.delete_adapter("critic")
    model.add_adapter("critic", lora_config(r=5, alpha=20))
    s = MultiAgentSystem(with_b(model), tokenizer(), ROLES, adapter_scope="per_role").train()
    with learning_at_once() as layers:
        got = gradients(s)
    assert layers
    s.together = False
    want = gradients(s)
    assert_close(got, want)
    s.together = True
    for name, p in s.named_parameters():
        p.requires_grad_(p.requires_grad and ".critic." not in name)
    assert_close(gradients(s), {name: g for name, g in want.items() if ".critic." not in name})
