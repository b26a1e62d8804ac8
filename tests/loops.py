"""What a plain loop over one question's agents gives for a batch: its loss and its greedy tokens; what single questions give,
activation checkpointing, and compiled layers.

A loop is called with a system and a question; its `logits(ids)` are those of the end of the last agent's prompt and of an
answer's tokens so far, [1 + len(ids), V].
"""

import torch
import torch.nn.functional as F
from models import assert_close, body, gradients
from systems import ANSWERS, QUESTIONS
from torch._dynamo.utils import counters

from diffmas import Trace
from diffmas.agents.board import Board

__all__ = ["TIGHT", "check_checkpointing", "check_compiled", "check_greedy_tokens", "check_loss", "check_ragged", "loop_loss"]

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
        left = board.read(len(s.agents) - 1, [rows[2], rows[0]])
        whole = s.communicate(s.fields_of(rows)).select([2, 0])
    for b in range(2):
        for mine, its in zip(left.keys_values(2, b), whole.keys_values(2, b)):
            assert_close(mine, its, 1e-12)


def loss_and_gradients(s, rows):
    """Chance, where there is some, is the same every time."""
    torch.manual_seed(0)
    loss = s(rows, ANSWERS).loss
    loss.backward()
    return {"loss": loss.detach(), **gradients(s)}


def check_checkpointing(s, rows=QUESTIONS):
    """Of the layers of all models. s: in train mode."""
    want = loss_and_gradients(s, rows)
    for model in models_of(s):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_close(loss_and_gradients(s, rows), want, TIGHT)


def check_compiled(s, rows=QUESTIONS):
    """Layers that are compiled, of all models, give the same loss, gradients and tokens; a second time without compiling."""
    answer = lambda: s.generate_tokens(rows, max_new_tokens=3, temperature=0)  # noqa: E731
    want, tokens = loss_and_gradients(s, rows), answer()
    torch._dynamo.reset()
    counters.clear()
    for model in models_of(s):
        for layer in body(model).layers:
            layer.compile(fullgraph=True, backend="eager")
    try:
        for stance in ("default", "fail_on_recompile"):
            with torch.compiler.set_stance(stance):
                assert_close(loss_and_gradients(s, rows), want, TIGHT)
                assert answer() == tokens
        assert counters["stats"]["unique_graphs"] and not counters["graph_break"]
    finally:
        torch._dynamo.reset()


def models_of(s):
    """The bare ones of all whose layers read traces."""
    others = [other.model for other in s.others.values() if other.reading != "embeddings"]
    return [model.get_base_model() if hasattr(model, "get_base_model") else model for model in (s.model, *others)]
