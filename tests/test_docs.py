"""The examples in the docstrings of public names give what they say."""

import doctest

import pytest
import tiny_systems as tiny
import torch
from trl import GRPOConfig

import diffmas
from diffmas import Agent, MultiAgentSystem, Trace, Trainer
from diffmas.agents.gradient_report import GradientReport, layer_groups
from diffmas.evaluation import (
    Latent,
    Scorer,
    Stitched,
    Writers,
    audit,
    communicates,
    evaluate,
    mathematics,
    metrics,
    sandbox,
    scorer,
    single_agent,
)  # fmt: skip
from diffmas.evaluation.look import look_at
from diffmas.evaluation.tasks import Task, final, task
from diffmas.models.generate import generate
from diffmas.models.load import load_model
from diffmas.rl import GRPOTrainer, answer_log_probs, scored
from diffmas.serving.export import export
from diffmas.serving.pieces import Pieces
from diffmas.training.data import question_and_answer
from diffmas.training.explosion import Explosion

DOCUMENTED = [
    Agent, MultiAgentSystem, MultiAgentSystem.from_pretrained, MultiAgentSystem.generate, Trace, Trainer,
    diffmas.default_arguments, diffmas.patch_model, diffmas.unpatch_model, generate, diffmas.ops.inject,
    diffmas.ops.cross_attention, diffmas.ops.merge_states, diffmas.ops.reposition, question_and_answer, evaluate, Scorer,
    scorer.boxed, scorer.last_number, metrics.pass_at_k, metrics.wilson, metrics.agreements, metrics.difference_of_means,
    metrics.difference_of_rates, mathematics.equal, sandbox.run, task, Task.rows, final.letter, audit, Stitched, Writers,
    GradientReport, MultiAgentSystem.gradient_report, layer_groups, Explosion, load_model,
    GRPOTrainer, answer_log_probs, scored, MultiAgentSystem.generate_tokens, Pieces, export, look_at,
]  # fmt: skip


@pytest.mark.parametrize("documented", DOCUMENTED, ids=lambda x: x.__qualname__)
def test_examples(documented, tmp_path, request):
    if documented is sandbox.run:
        request.getfixturevalue("programs")
    system = tiny.system()
    published = tiny.write_jsonl(tmp_path / "gsm8k.jsonl", [{"question": "Pens?", "answer": "2*3=<<2*3=6>>6 pens.\n#### 6"}])
    names = {x.__name__: x for x in (*DOCUMENTED, Latent, communicates, single_agent)} | {
        "torch": torch, "GRPOConfig": GRPOConfig, "model": system.model, "tokenizer": system.tokenizer, "system": system,
        "rows": tiny.rows(2), "base_model": tiny.model(), "directory": tmp_path,
        "base_directory": tiny.save_base(tmp_path / "base"), "published": published,
    }  # fmt: skip
    test = doctest.DocTestParser().get_doctest(documented.__doc__, names, documented.__qualname__, None, 0)
    assert test.examples
    failed = []
    doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test, out=failed.append)
    assert not failed, "".join(failed)
