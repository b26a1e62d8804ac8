"""Realign of embeddings as they are."""

import copy

import pytest
import tiny_systems as tiny
import torch
from models import assert_close, make_config, randomize
from peft import get_peft_model
from test_adapters import ANSWERS, QUESTIONS, TARGETS, base, kind, logits, team, trained
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM

from diffmas import MultiAgentSystem
from diffmas.agents import realign
from diffmas.agents.adapters import of_agent, switched_off
from diffmas.agents.realign import REALIGN, Realign
from diffmas.training import add_lora

SOLVED = [mode for mode in REALIGN if mode not in ("none", "learned")]

EMBEDDINGS = {
    "saved": dict(modules_to_save=["embed_tokens", "lm_head"]),
    "lora": dict(targets=[*TARGETS, "embed_tokens", "lm_head"]),
    "tokens": dict(trainable_token_indices=[3, 4, 5]),
}


@pytest.mark.parametrize("changed", EMBEDDINGS)
@pytest.mark.parametrize("mode", SOLVED)
def test_realign_follows_trained_embeddings(mode, changed, tmp_path):
    """Training, a new system around the trained model, and a reloaded one: all have the same realign."""
    system = team(kind(**EMBEDDINGS[changed]), realign=mode)
    before = logits(system)
    trained(system)
    after = logits(system)
    h = torch.randn(5, 16)
    fixed = Realign(base(), mode)(h)
    assert (system.realign(h) - fixed).abs().max() > 1e-3  # it is not the realign of the base model
    assert torch.equal(logits(team(model=system.model, realign=mode)), after) and not torch.equal(before, after)
    system.save_pretrained(tmp_path)
    again = MultiAgentSystem.from_pretrained(tmp_path, base(), tiny.tokenizer()).eval()
    assert torch.equal(logits(again), after)


@pytest.mark.parametrize("mode", SOLVED)
def test_realign_follows_writes_that_no_version_counts(mode):
    """Some optimizers write to `.data`, and evaluation comes after."""
    system = trained(team(kind(**EMBEDDINGS[next(iter(EMBEDDINGS))]), realign=mode)).eval()
    before = logits(system)
    for p in system.model.parameters():
        if p.requires_grad:
            p.data.mul_(1.5)
    after = logits(system)
    assert not torch.equal(after, before)
    assert torch.equal(after, logits(team(model=system.model, realign=mode)))


@pytest.mark.parametrize("mode", SOLVED)
def test_realign_follows_weights_that_are_loaded_and_resized(mode):
    system, other = team(realign=mode), base(seed=1)
    assert not torch.equal(logits(system), logits(team(model=other, realign=mode)))
    system.model.load_state_dict(other.state_dict())
    assert torch.equal(logits(system), logits(team(model=other, realign=mode)))
    system.model.resize_token_embeddings(len(tiny.VOCAB) + 7, mean_resizing=False)
    assert torch.equal(logits(system), logits(team(model=system.model, realign=mode)))
    twin = copy.deepcopy(system)
    trained(twin)
    assert torch.equal(logits(twin), logits(team(model=twin.model, realign=mode)))


def test_w_is_solved_once_a_change(monkeypatch):
    solves, solve = [], Realign._solve
    monkeypatch.setattr(Realign, "_solve", lambda self: solves.append(1) or solve(self))
    system = team(kind(**EMBEDDINGS["saved"]))
    assert not solves  # not before it is needed
    logits(system), logits(system)
    assert len(solves) == 1
    trained(system)
    logits(system), logits(system)
    assert len(solves) == 2
    system.train()
    logits(system), logits(system)
    assert len(solves) == 2
    for p in system.model.get_input_embeddings().parameters():
        if p.requires_grad:
            p.data.mul_(1.1)  # as optimizers with kernels of their own write
    logits(system)
    assert len(solves) == 3


def test_trained_embeddings_are_read_once_a_call(monkeypatch):
    """Between calls somebody may train; a pass over their memory at each turn is not free."""
    state_of = realign.state_of
    monkeypatch.setattr(realign, "state_of", lambda x, read: reads.append(read) or state_of(x, read))
    for tied in (False, True):
        model = base(tie_word_embeddings=tied)
        system, reads = team(model=model), []
        system.model.get_input_embeddings().weight.requires_grad_()
        system.model.get_output_embeddings().weight.requires_grad_()
        logits(system)
        assert reads == [True] * (1 if tied else 2)
        system.generate(QUESTIONS, 2, batch_size=1)
        assert reads == [True] * (2 if tied else 4)
    assert not system.realign._settled


def test_roles_have_their_own_embeddings(monkeypatch):
    model = add_lora(base(), tiny.agents(), "per_role", kind(**EMBEDDINGS["saved"]))
    system, found = trained(team(model=model, adapter_scope="per_role", realign="ridge")), []
    logits(system)  # now each role's has been solved
    with monkeypatch.context() as patch:
        patch.setattr(Realign, "_solve", None)
        for i in range(2):
            with of_agent(system, i):
                found.append(system.realign.solved().weight)
    assert not torch.equal(*found)
    for weight, agent in zip(found, system.agents):
        model.set_adapter(agent.name)
        assert torch.equal(weight, Realign(model, "ridge").solved().weight)


@pytest.mark.parametrize("mode", SOLVED)
def test_adapted_embeddings_are_read_with_their_delta(mode):
    system = trained(team(kind(**EMBEDDINGS["lora"]), realign=mode))
    h = torch.randn(5, 16)
    got = system.realign(h)
    merged = copy.deepcopy(system.model).merge_and_unload()
    assert_close(got, Realign(merged, mode)(h), 1e-4)
    with switched_off(system.model):
        assert torch.equal(system.realign(h), Realign(base(), mode)(h))


def test_soft_token_trains_adapted_embeddings():
    """The same gradient as through the merged weights."""
    model = base()
    model.model.embed_tokens.padding_idx = None  # whose row gets no gradient where it is looked up
    model = trained(get_peft_model(model, kind(targets=["embed_tokens", "lm_head"])))
    h, g = torch.randn(5, 16), torch.randn(5, 16)
    (Realign(model, "soft_token")(h) * g).sum().backward()
    got = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    e_in, e_out = model.get_input_embeddings(), model.get_output_embeddings()
    table = e_in.base_layer.weight + (e_in.lora_embedding_B["default"] @ e_in.lora_embedding_A["default"]).T  # alpha is r
    head = e_out.base_layer.weight + e_out.lora_B["default"].weight @ e_out.lora_A["default"].weight
    (((h @ head.T).softmax(-1) @ table) * g).sum().backward()
    assert_close(got, {n: p.grad for n, p in model.named_parameters() if p.requires_grad}, 1e-4)


def test_dropout_of_an_adapter_does_not_reach_w():
    model = trained(get_peft_model(base(), kind(**EMBEDDINGS["lora"], lora_dropout=0.5))).train()
    a, b = Realign(model, "ridge").solved(), Realign(model, "ridge").solved()
    assert torch.equal(a.weight, b.weight) and torch.equal(a.norm, b.norm)
    assert all(m.training for m in model.modules())


def test_what_is_solved_in_inference_mode_can_be_trained_with():
    system = team(kind(**EMBEDDINGS["saved"]))
    with torch.inference_mode():
        want = system(QUESTIONS, ANSWERS).loss
    loss = system(QUESTIONS, ANSWERS).loss
    loss.backward()
    assert_close(loss, want, 1e-5)


def test_embeddings_that_are_scaled_in_their_module():
    """Gemma 3 multiplies in the module: latents are as long as what comes out of it."""
    model = randomize(AutoModelForCausalLM.from_config(make_config("gemma3_text", layer_types=["full_attention"] * 3)))
    embed, h = model.get_input_embeddings(), torch.randn(5, 32)
    rows = embed(torch.arange(len(embed.weight)))
    assert not torch.allclose(rows, embed.weight)
    for mode in ("norm", "ridge"):
        assert_close(Realign(model, mode)(h).norm(dim=-1), rows.norm(dim=-1).mean().expand(5), 1e-5)
    likeliest = model.get_output_embeddings()(h).argmax(-1)
    assert_close(Realign(model, "soft_token", temperature=1e-4)(h), embed(likeliest), 1e-4)
    ridge, gram = Realign(model, "ridge").solved().weight, embed.weight.double().T @ embed.weight.double()
    gram.diagonal().add_(1e-3 * gram.diagonal().mean())
    assert_close(ridge.double(), torch.linalg.solve(gram, embed.weight.double().T @ rows.double()), 1e-5)


class Largest(TorchDispatchMode):
    """The largest float64 tensor that an op made; or with a dtype, of that."""

    numel = 0

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.dtype = dtype

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.dtype == self.dtype and not is_view(op):
                self.numel = max(self.numel, x.numel())
        return result


def is_view(op) -> bool:
    return any(x.alias_info is not None for x in op._schema.returns)


class Normed(torch.nn.Embedding):
    """A mean of its rows is not the row of a mean."""

    def forward(self, ids):
        return torch.nn.functional.layer_norm(super().forward(ids), (self.embedding_dim,))


class Scaled(torch.nn.Embedding):
    """As Gemma's."""

    def forward(self, ids):
        return super().forward(ids) * 4.0


@pytest.mark.parametrize("how", ["plain", "scaled", "lora", "saved", "tokens", "normed"])
def test_soft_token_makes_no_table_where_it_needs_none(how):
    model = base(vocab_size=1000)
    if how in ("scaled", "normed"):
        kinds = {"scaled": Scaled, "normed": Normed}
        model.model.embed_tokens.__class__ = kinds[how]
    elif how != "plain":
        model = trained(get_peft_model(model, kind(**EMBEDDINGS[how])))
    realign, h = Realign(model, "soft_token"), torch.randn(5, 16)
    p = model.get_output_embeddings()(h).softmax(-1).detach()
    want = p @ model.get_input_embeddings()(torch.arange(1000)).detach()
    for _ in range(2):
        with Largest(torch.float32) as largest, torch.no_grad():
            assert_close(realign(h), want, 1e-5)
        assert (largest.numel < 1000 * 16) == (how not in ("tokens", "normed"))


@pytest.mark.parametrize("adapted", [False, True])
def test_ridge_makes_no_wide_copy_of_the_embeddings(adapted, monkeypatch):
    model = base(vocab_size=1000)
    model = trained(get_peft_model(model, kind(**EMBEDDINGS["lora"]))) if adapted else model
    want = Realign(model, "ridge").solved().weight
    monkeypatch.setattr(realign, "CHUNK", 100)
    with Largest() as largest:
        got = Realign(model, "ridge").solved().weight
    assert_close(got, want, 1e-5)
    assert largest.numel == 100 * 16
