"""A generation by latent agents, greedy: prompts, latent steps, decoding; against the plain Hugging Face way on each cache.

The "LatentMAS way" is the plain way with the whole model called for every token: all logits, hidden states of all layers.

Its row counts only if both give the same tokens.
"""

from functools import partial

import torch
from transformers import StaticCache

from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.systems import Stopwatch, eager_attention, end_to_end, make_system

__all__ = ["CASES", "PROVIDERS", "problem"]

NEW_TOKENS = 32


def _case(N, T, agents=3, batch=1, **more) -> Case:
    return end_to_end("generation", "ragged agents" if batch > 1 else "agents", "step", N=N, T=T, agents=agents, n=NEW_TOKENS,
                      batch=batch, **more)  # fmt: skip


CASES = [
    *(_case(N, 10, quick=N == 1024) for N in (1024, 4096)),
    _case(1024, 40),
    _case(512, 10, batch=8),
    _case(2048, 10, model="0.6B", layers=2),
    _case(512, 4, model="8B", layers=1),
]


def problem(case: Case) -> Problem:
    from diffmas.evaluation.plain_hf import plain_generate

    system, questions, _ = make_system(case, lora=False)
    answer = lambda dtype: {"tokens": _tokens(plain_generate(system, questions, NEW_TOKENS))}
    return Problem(case, (system, questions), answer, tolerance=0.0)


def _tokens(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor([row + [-1] * (NEW_TOKENS - len(row)) for row in rows]).float()


def _way(generate):
    def provider(p: Problem) -> Trial:
        system, questions = p.inputs
        watch = Stopwatch(system, p.case.batch)
        call = lambda: watch.measure(handoff=lambda _: generate(system, questions))
        return Trial(call, lambda rows: {"tokens": _tokens(rows)}, seconds=watch.seconds)

    return provider


def _plain(system, questions, **options):
    from diffmas.evaluation.plain_hf import plain_generate

    return plain_generate(system, questions, NEW_TOKENS, **options)


def _eager(system, questions):
    with eager_attention(system):
        return _plain(system, questions)


def _ours(system, questions):
    return [samples[0] for samples in system.generate_tokens(questions, NEW_TOKENS, temperature=0)]


PROVIDERS = {
    OURS: _way(_ours),
    "DynamicCache": _way(_plain),
    "DynamicCache, eager": _way(_eager),
    "StaticCache": _way(partial(_plain, cache=StaticCache)),
    "LatentMAS way": _way(partial(_plain, every_logit=True)),
}
SLOW = {"DynamicCache, eager", "LatentMAS way"}


def test_generation(bench, case):
    bench(case, problem, PROVIDERS)
