"""A training step of latent agents: forward through all of them, backward, optimizer; against the plain Hugging Face way.

The peer is `diffmas.evaluation.plain_hf`: DynamicCache, torch.cat, autograd, correct masks. The "LatentMAS way" is the same
with the whole model called for every agent: logits of all tokens, hidden states of all layers. LoRA r = 8 on all linear layers;
"PEFT's linears": ours with these unfused.
The learning rate is 0, so that every step does the same work on the same weights. Loss and each parameter's gradient are
compared with the plain way's; a bfloat16 model's with those of its weights in float32, by the error that the plain way has
there.
"""

import contextlib
from collections.abc import Iterator
from functools import cache, partial

import torch

from diffmas import patch_model
from diffmas.benchmarks.measure import OURS, Case, Problem, Senseless, Trial
from diffmas.benchmarks.systems import Stopwatch, eager_attention, end_to_end, make_system

__all__ = ["CASES", "PROVIDERS", "problem"]


def _case(N, T, agents=3, batch=1, **more) -> Case:
    return end_to_end("training_step", "ragged agents" if batch > 1 else "agents", "step", N=N, T=T, agents=agents,
                      batch=batch, **more)  # fmt: skip


def _smol(N, T, batch, dtype) -> Case:
    options = dict(agents=3, dtype=dtype, note="random weights, vocabulary 49152")
    return end_to_end("training_step", "SmolLM2's shape", "step", "135M", 30, N=N, T=T, batch=batch, **options)


# Minutes each, so only where they are asked for: `diffmas bench --only SmolLM2 --missing` measures those that are not stored.
# 710, 2144, 3386 and 3506 rows in all.
LONG = [
    _smol(*shape, dtype)
    for dtype in ("bfloat16", "float32")
    for shape in ((355, 10, 2), (268, 10, 8), (1693, 10, 2), (1753, 40, 2))
]
CASES = [
    *(_case(N, 16, quick=N <= 1024) for N in (512, 1024, 2048, 4096, 8192)),
    *(_case(4096, T) for T in (0, 10, 40)),
    *(_case(1024, T) for T in (0, 40)),
    *(_case(2048, 16, agents=agents) for agents in (2, 4)),
    *(_case(N, 16, batch=8) for N in (512, 2048, 4096)),
    _case(2048, 10, model="0.6B", layers=2),
    _case(512, 4, model="8B", layers=1),
]


def problem(case: Case) -> Problem:
    from diffmas.evaluation.plain_hf import plain_loss

    system, questions, answers = make_system(case, lora=True)
    system.train()

    @cache
    def answer(dtype: torch.dtype) -> dict:  # in float32 at most: in float64 it would take minutes and gigabytes
        with _precision(system.model, torch.float32 if dtype == torch.float64 else dtype):
            loss = plain_loss(system, questions, answers)
            loss.backward()
            return _outputs(system, loss.detach())

    # Latent feedback amplifies rounding: two float32 ways of attention differ by up to 5e-5 in a parameter.
    return Problem(case, (system, questions, answers), answer, tolerance=3e-4 if case.dtype == "float32" else None)


@contextlib.contextmanager
def _precision(model: torch.nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Inside, frozen weights have this dtype; adapters are float32 as ever."""
    before = {p: p.dtype for p in model.parameters() if not p.requires_grad and p.dtype != dtype}
    for p in before:
        p.data = p.data.to(dtype)
    yield
    for p, own in before.items():
        p.data = p.data.to(own)


def _outputs(system, loss) -> dict:
    grads = {name: p.grad for name, p in system.named_parameters() if p.grad is not None}
    system.zero_grad(set_to_none=True)
    return {"loss": loss[None]} | grads


def _way(loss_of):
    def provider(p: Problem) -> Trial:
        system, questions, answers = p.inputs
        optimizer = torch.optim.AdamW([w for w in system.parameters() if w.requires_grad], lr=0.0)
        watch = Stopwatch(system, p.case.batch)

        def backward(loss):
            loss.backward()
            return loss.detach()

        def step(loss):
            optimizer.step()
            return loss

        def call():
            system.zero_grad(set_to_none=True)
            return watch.measure(handoff=lambda _: loss_of(system, questions, answers), backward=backward, optimizer=step)

        return Trial(call, lambda loss: _outputs(system, loss), seconds=watch.seconds)

    return provider


def _plain(*args, **options):
    from diffmas.evaluation.plain_hf import plain_loss

    return plain_loss(*args, **options)


def _own_linears(system, questions, answers):
    patch_model(system.model, fuse=False)
    try:
        return system(questions, answers).loss
    finally:
        patch_model(system.model)


def _eager(system, *args):
    with eager_attention(system):
        return _plain(system, *args)


def where(fits, provider):
    """For the cases that fit: elsewhere it takes minutes and teaches nothing more."""

    def limited(p: Problem) -> Trial:
        if not fits(p.case):
            raise Senseless
        return provider(p)

    return limited


PROVIDERS = {
    OURS: _way(lambda system, questions, answers: system(questions, answers).loss),
    "PEFT's linears": where(lambda c: c.model != "135M" and c.N * c.batch <= 4096, _way(_own_linears)),
    "DynamicCache": _way(_plain),
    "DynamicCache, eager": where(lambda c: c.model == "small" and c.N * c.batch <= 1024, _way(_eager)),
    "LatentMAS way": where(
        lambda c: c.model != "135M" and c.N * c.batch <= 4096 and c.T not in (0, 40), _way(partial(_plain, every_logit=True))
    ),
}
SLOW = {"DynamicCache, eager", "LatentMAS way"}


def test_training(bench, case):
    bench(case, problem, PROVIDERS)
