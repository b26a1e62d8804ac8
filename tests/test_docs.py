"""The examples in the docstrings of public names give what they say."""

import doctest

import pytest
import tiny_systems as tiny
import torch

import diffmas
from diffmas import Agent, MultiAgentSystem, Trace, Trainer
from diffmas.models.generate import generate

DOCUMENTED = [
    Agent, MultiAgentSystem, MultiAgentSystem.from_pretrained, MultiAgentSystem.generate, Trainer, diffmas.default_arguments,
    diffmas.patch_model, diffmas.unpatch_model, generate, diffmas.ops.inject, diffmas.ops.cross_attention,
    diffmas.ops.merge_states, diffmas.ops.reposition,
]  # fmt: skip


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda x: x.__qualname__)
def test_examples(documented, tmp_path):
    system = tiny.system()
    names = {
        "torch": torch, "Agent": Agent, "MultiAgentSystem": MultiAgentSystem, "Trace": Trace, "Trainer": Trainer,
        "default_arguments": diffmas.default_arguments, "patch_model": diffmas.patch_model,
        "unpatch_model": diffmas.unpatch_model, **{name: getattr(diffmas.ops, name) for name in diffmas.ops.__all__},
        "model": system.model, "tokenizer": system.tokenizer, "system": system, "rows": tiny.rows(2),
        "base_model": tiny.model(), "directory": tmp_path,
    }  # fmt: skip
    test = doctest.DocTestParser().get_doctest(documented.__doc__, names, documented.__qualname__, None, 0)
    assert test.examples
    failed = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failed.append)
    assert not failed, "".join(failed)
