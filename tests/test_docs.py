"""The examples in the docstrings of public names give what they say."""

import doctest

import pytest
import tiny_systems as tiny
import torch

import diffmas
from diffmas import Agent, MultiAgentSystem, Trace, Trainer
from diffmas.evaluation import Latent, Scorer, Stitched, Writers, audit, communicates, evaluate, metrics, single_agent
from diffmas.models.generate import generate
from diffmas.training.data import question_and_answer

DOCUMENTED = [
    Agent, MultiAgentSystem, MultiAgentSystem.from_pretrained, MultiAgentSystem.generate, Trace, Trainer,
    diffmas.default_arguments, diffmas.patch_model, diffmas.unpatch_model, generate, diffmas.ops.inject,
    diffmas.ops.cross_attention, diffmas.ops.merge_states, diffmas.ops.reposition, question_and_answer, evaluate, Scorer,
    metrics.boxed, metrics.wilson, metrics.agreements, metrics.difference_of_means, metrics.difference_of_rates, audit,
    Stitched, Writers,
]  # fmt: skip


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda x: x.__qualname__)
def test_examples(documented, tmp_path):
    system = tiny.system()
    names = {x.__name__: x for x in (*DOCUMENTED, Latent, communicates, single_agent)} | {
        "torch": torch, "model": system.model, "tokenizer": system.tokenizer, "system": system, "rows": tiny.rows(2),
        "base_model": tiny.model(), "directory": tmp_path,
    }  # fmt: skip
    test = doctest.DocTestParser().get_doctest(documented.__doc__, names, documented.__qualname__, None, 0)
    assert test.examples
    failed = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failed.append)
    assert not failed, "".join(failed)
