"""The clipped gradient of latent steps against the unroll, clipped by hooks; and what it must not depend on."""

import pytest
import torch
from models import assert_close, body, gradients
from systems import AGENTS, ANSWERS, QUESTIONS, system, unroll

from diffmas import Agent
from diffmas.agents.gradient_clip import GradientClip
from diffmas.evaluation.baselines import Stitched

TIMES = 0.3
RAGGED = [Agent("planner", "w5 {question} w6", latent_steps="steps"), *AGENTS[1:]]


def clipped_unroll(s, questions, answers, times, monkeypatch):
    """The unroll's gradients, each dL/dh before a latent step no longer than `times` that of the answer; how many were, of
    how many."""
    count, clipped = sum(len(s.answer_ids(a)) for a in answers), []
    realign = s.realign.forward
    for question, answer in zip(questions, answers):
        found = {}

        def loss(question=question, answer=answer):
            logits = unroll(s, question, answer)
            labels = torch.tensor(s.answer_ids(answer))
            return torch.nn.functional.cross_entropy(logits, labels, reduction="sum") / count

        hook = body(s.model).register_forward_hook(lambda *a, found=found: found.update(h=a[-1].last_hidden_state))
        total = loss()
        hook.remove()
        most = times * torch.autograd.grad(total, found["h"])[0].norm()

        def clip(dh, most=most):
            clipped.append(bool(dh.norm() > most))
            return dh * (most / dh.norm()).clamp(max=1)

        def clipping(h, *args, clip=clip, **options):
            h = h.view_as(h)
            h.register_hook(clip)
            return realign(h, *args, **options)

        with monkeypatch.context() as patched:
            patched.setattr(s.realign, "forward", clipping)
            loss().backward()
    return gradients(s), sum(clipped), len(clipped)


@pytest.mark.parametrize(
    "times, options",
    [(TIMES, {}), (TIMES, dict(trace_content="latent_only", realign="soft_token")), (1.0, dict(agents=RAGGED))],
    ids=["all rows", "soft tokens", "ragged"],
)
def test_gradients_equal_the_clipped_unroll(times, options, monkeypatch):
    s, questions = system(latent_grad_clip=times, **options), QUESTIONS
    if "agents" in options:
        questions = [{"question": q, "steps": n} for q, n in zip(QUESTIONS, (3, 1, 0))]
    s(questions, ANSWERS).loss.backward()
    got = gradients(s)
    want, clipped, steps = clipped_unroll(s, questions, ANSWERS, times, monkeypatch)
    assert 0 < clipped < steps
    assert_close(got, want, 1e-9)
    unclipped = system(**options)
    unclipped(questions, ANSWERS).loss.backward()
    with pytest.raises(AssertionError):
        assert_close(got, gradients(unclipped), 1e-3)


def backward_of(s, loss):
    loss.backward()
    return gradients(s)


def test_neither_the_batch_nor_the_losses_scale_matters():
    s = system(latent_grad_clip=TIMES, trace_content="latent_only")
    want, count = backward_of(s, s(QUESTIONS, ANSWERS).loss), sum(len(s.answer_ids(a)) for a in ANSWERS)
    for question, answer in zip(QUESTIONS, ANSWERS):
        s([question], [answer], num_items_in_batch=count).loss.backward()
    assert_close(gradients(s), want, 1e-9)
    scaled = backward_of(s, 1000 * s(QUESTIONS, ANSWERS).loss)
    assert_close({n: g / 1000 for n, g in scaled.items()}, want, 1e-9)


def test_several_backward_passes_and_episodes():
    s = system(latent_grad_clip=TIMES)
    first, second = s(QUESTIONS[:2], ANSWERS[:2]).loss, s(QUESTIONS[1:], ANSWERS[1:]).loss
    one, two = (
        torch.autograd.grad(x, [p for p in s.parameters() if p.requires_grad], retain_graph=True) for x in (first, second)
    )
    (first + second).backward(retain_graph=True)
    both = [p.grad for p in s.parameters() if p.requires_grad]
    assert_close(dict(enumerate(both)), dict(enumerate(a + b for a, b in zip(one, two))), 1e-9)


def test_answers_to_one_question_are_measured_together():
    """Two answers with a gradient of (3, 0) each reach their question's latent step as (6, 0), of at most (18) ** 0.5."""
    clip, h = GradientClip(1.0), torch.ones(2, 2, requires_grad=True)
    x = clip.step(h, None)
    last = torch.stack([x[0], x[1], x[0]])[None]
    clip.answer([1, 1, 1], [0, 1, 0])(last)
    (last * torch.tensor([[3.0, 0], [1, 0], [3, 0]])).sum().backward()
    torch.testing.assert_close(h.grad, torch.tensor([[18**0.5, 0], [1, 0]]))


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30], ids=["inf", "nan", "norm overflows"])
def test_a_gradient_that_is_not_finite_stays_as_it_is(bad):
    """Scaled by a norm of infinity, it would be NaN and 0, or 0 alone where only the norm is not finite."""
    clip, h = GradientClip(1.0), torch.ones(2, 2, requires_grad=True)
    x = clip.step(h, None)
    last = x[None].clone()
    clip.answer([1, 1], [0, 1])(last)
    (last.sum() + (x * torch.tensor([[bad, 3.0], [3.0, 3.0]])).sum()).backward()
    torch.testing.assert_close(h.grad, torch.tensor([[bad, 4.0], [1.0, 1.0]]), equal_nan=True)


def test_who_shares_nothing_is_clipped_as_before():
    grads = []
    for share in (False, True):
        s = system(latent_grad_clip=TIMES)
        s(QUESTIONS, ANSWERS, share=share).loss.backward()
        grads.append(gradients(s))
    assert grads[0] and all(torch.equal(g, grads[1][n]) for n, g in grads[0].items())


def test_a_loss_without_the_answer_is_not_clipped():
    s, plain = system(latent_grad_clip=1e-6), system()
    found = []
    for x in (s, plain):
        trace = x.communicate(x.fields_of(QUESTIONS))
        found.append(backward_of(x, x(QUESTIONS, ANSWERS, trace=trace).loss))
    assert_close(*found, 1e-12)


def test_text_does_not_depend_on_it():
    results = [x.generate(QUESTIONS, max_new_tokens=4, temperature=0) for x in (system(), system(latent_grad_clip=1.0))]
    assert results[0] == results[1]


def test_branches_that_are_joined():
    """Agents that write independently of each other are clipped too."""
    found = []
    for times in (None, TIMES, 1e12):
        s = system()
        team = Stitched(s.model, s.tokenizer, AGENTS, latent_grad_clip=times)
        team.realign.double()
        found.append(backward_of(team, team(QUESTIONS, ANSWERS).loss))
    assert_close(found[0], found[2], 1e-12)
    with pytest.raises(AssertionError):
        assert_close(found[0], found[1], 1e-3)


@pytest.mark.parametrize("bad", [0, -1.0, True, "1", float("nan")])
def test_bad_values(bad):
    with pytest.raises(ValueError, match="latent_grad_clip: expected a positive number or None, got"):
        system(latent_grad_clip=bad)
