"""What a plain loop over one question's agents gives for a batch: its loss and its greedy tokens; what single questions give,
and activation checkpointing.

A loop is called with a system and a question; its `logits(ids)` are those of the end of the last agent's prompt and of an
answer's tokens so far, [1 + len(ids), V].
"""

import torch
import torch.nn.functional as F
from models import assert_close, gradients
from systems import ANSWERS, QUESTIONS

from diffmas import Trace
from diffmas.agents.board import Board

__all__ = ["TIGHT", "check_checkpointing", "check_greedy_tokens", "check_loss", "check_ragged", "loop_loss"]

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


def check_ragged(s, rows):
    """The loss of a batch, its gradients and tokens are those of its questions alone; also of who leaves between two turns."""
    out = s(rows, ANSWERS)
    out.loss.backward()
    got = gradients(s)
    alone = [s([row], [answer], num_items_in_batch=1).loss for row, answer in zip(rows, ANSWERS)]
    (sum(alone) / int((out.labels != -100).sum())).backward()
    assert_close(got, gradients(s), TIGHT)
    tokens = s.generate_tokens(rows, max_new_tokens=3, temperature=0)
    assert tokens == s.generate_tokens(rows, max_new_tokens=3, temperature=0, batch_size=1)
    with torch.no_grad():
        board = Board(s, Trace(s.model, 3))
        for group in board.groups:
            board.write(group, s.fields_of(rows))
        board.select([2, 0])
        left = board.read(2, [rows[2], rows[0]])
        whole = s.communicate(s.fields_of(rows)).select([2, 0])
    for b in range(2):
        for mine, its in zip(left.keys_values(2, b), whole.keys_values(2, b)):
            assert_close(mine, its, 1e-12)


def check_checkpointing(s):
    """s: in train mode."""
    s(QUESTIONS, ANSWERS).loss.backward()
    want = gradients(s)
    s.model.get_base_model().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    s(QUESTIONS, ANSWERS).loss.backward()
    assert_close(gradients(s), want, TIGHT)
