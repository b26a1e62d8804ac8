"""The last agent's turn: the loss of given answers, or new ones."""

import contextlib

import torch
from torch import Tensor

from diffmas.agents import adapters
from diffmas.agents.decoding import decode, rows_ahead
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.gradient_clip import clipping
from diffmas.agents.output import SystemOutput, output_of
from diffmas.agents.sampling import Sampling
from diffmas.agents.turns import trace_for
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import Trace

__all__ = ["answer_loss", "answer_tokens", "distinct"]


def distinct(questions: list[dict]) -> tuple[list[int], list[int]]:
    """The numbers of the questions that are there for the first time, and for each question which of these it is."""
    firsts: list[int] = []
    of: list[int] = []
    for b, question in enumerate(questions):
        found = next((n for n, first in enumerate(firsts) if questions[first] == question), len(firsts))
        if found == len(firsts):
            firsts.append(b)
        of.append(found)
    return firsts, of


def answer_loss(
    system, questions, answers: list | None, num_items_in_batch, trace: Trace | None, share: bool
) -> SystemOutput:  # fmt: skip
    """See `MultiAgentSystem.forward`."""
    with system.agreement or contextlib.nullcontext():
        questions = system.fields_of(questions)
        if isinstance(answers, str):
            raise ValueError("answers: expected a list, got one str")
        if answers is not None and len(answers) != len(questions):
            raise ValueError(f"answers: expected one for each of {len(questions)} questions, got {len(answers)}")
        targets = [system.answer_ids(a) for a in answers] if answers is not None else [[] for _ in questions]
        what = "its prompt and answer" if answers is not None else "its prompt"
        turns = system.tokenize(questions, [len(t) for t in targets], what, trace)
    least = () if system.agreement is None else system.agreement([max(turn.steps for turn in row) for row in turns])
    clip, of = None, list(range(len(questions)))
    if trace is None:
        firsts, of = distinct(questions) if share else (of, of)
        once = [*([row[b] for b in firsts] for row in turns[:-1]), turns[-1]]
        with system.realign.unchanging(), clipping(system.latent_grad_clip) as clip:
            trace = trace_for(system, once, [len(t) for t in targets], len(firsts))
            trace = system.communicate([questions[b] for b in firsts], trace, once, least)
        if len(firsts) < len(of):
            trace = trace.select(of)
    prompt_rows = [turn.ids for turn in turns[-1]]
    rows = [p + t for p, t in zip(prompt_rows, targets)]
    trace.agent = system.agents[-1].name
    forward_pass = trace.plan([len(r) for r in rows], "prompt")
    if clip is not None:
        forward_pass.ending = clip.answer([len(r) for r in rows], of)
    # A list: it goes to wherever the last hidden states are.
    keep = _predicting([len(p) for p in prompt_rows], [len(t) for t in targets]).tolist()
    with adapters.of_agent(system, len(system.agents) - 1):
        output = forward(
            patch_of(system.model), trace, forward_pass, head=True, input_ids=system.pack(rows), logits_to_keep=keep
        )
    logits = output.logits[0]
    if answers is None:
        return SystemOutput(logits=logits[:, None], trace=trace)
    labels = system.pack(targets)[0].to(logits.device)
    return output_of(logits, labels, [len(t) for t in targets], num_items_in_batch, trace)


def _predicting(prompts: list[int], answers: list[int]) -> Tensor:
    """The packed rows whose next token is an answer token: the last of each prompt and all of the answer but its end. prompts,
    answers: tokens of each."""
    first, rows = 0, []
    for p, t in zip(prompts, answers):
        rows.append(torch.arange(max(t, 1)) + first + p - 1)
        first += p + t
    return torch.cat(rows)


def answer_tokens(
    system, questions, sampling: Sampling, batch_size: int | None, progress: bool, trace: Trace | None, on_token=None
) -> list[list[list[int]]]:  # fmt: skip
    """See `MultiAgentSystem.generate_tokens`."""
    if system.agreement is not None:
        raise ValueError(
            "generate: expected a model that this process has alone, got one whose weights several share; save_pretrained, "
            "and generate with what from_pretrained loads"
        )
    questions = system.fields_of(questions)
    sampling.check_count(len(questions))
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: expected at least 1, got {batch_size}")
    room = [sampling.limit(b) for b in range(len(questions))]
    turns = system.tokenize(questions, room, "its prompt and answer", trace)
    tokens, step = [], batch_size or len(questions)
    with evaluating(system), system.realign.unchanging():
        for first in range(0, len(questions), step):
            batch = [rows[first : first + step] for rows in turns]
            if trace is None:
                read = trace_for(system, batch, [rows_ahead(sampling)] * len(batch[0]), len(batch[0]))
                seeds = [sampling.seed_of(first + b) for b in range(len(batch[0]))]
                read = system.communicate(questions[first : first + step], read, batch, seeds=seeds)
            else:
                read = trace.select(range(first, first + len(batch[0])))
            read.agent = system.agents[-1].name
            with adapters.of_agent(system, len(system.agents) - 1):
                tokens += decode(system, read, [turn.ids for turn in batch[-1]], sampling, first, progress, on_token)
    return tokens
