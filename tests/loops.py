"""What a plain loop over one question's agents gives for a batch: its loss and its greedy tokens.

A loop is called with a system and a question; its `logits(ids)` are those of the end of the last agent's prompt and of an
answer's tokens so far, [1 + len(ids), V].
"""

import torch
import torch.nn.functional as F
from models import assert_close, gradients
from systems import ANSWERS, QUESTIONS

__all__ = ["TIGHT", "check_greedy_tokens", "check_loss", "loop_loss"]

TIGHT = 1e-9  # everything is float64


def loop_loss(s, loop, questions=QUESTIONS, answers=ANSWERS):
    total, count = 0.0, 0
    for question, answer in zip(questions, answers):
        ids = s.answer_ids(answer)
        total = total + F.cross_entropy(loop(s, question).logits(ids)[:-1], torch.tensor(ids), reduction="sum")
        count += len(ids)
    return total / count


def check_loss(s, loop):
    """The loss of a batch and all gradients are the loop's. -> output and gradients"""
    out = s(QUESTIONS, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    want = loop_loss(s, loop)
    want.backward()
    assert_close(out.loss, want, TIGHT)
    assert_close(got, gradients(s), TIGHT)
    return out, got


def check_greedy_tokens(s, loop):
    """Those of a batch are the loop's, also in other batches and for several samples."""
    tokens = [row[0] for row in s.generate_tokens(QUESTIONS, max_new_tokens=4, temperature=0)]
    for question, got in zip(QUESTIONS, tokens):
        with torch.no_grad():
            ids = []
            while len(ids) < len(got):
                ids.append(int(loop(s, question).logits(ids)[-1].argmax()))
        assert got == ids
    assert s.generate_tokens(QUESTIONS, max_new_tokens=4, temperature=0, batch_size=2, samples=2) == [[x, x] for x in tokens]
