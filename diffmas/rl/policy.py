"""A team as a policy: answers that are sampled from it, and their log-probabilities, through which every agent learns."""

from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.agents.answers import distinct
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.system import MultiAgentSystem
from diffmas.trace import Trace

__all__ = ["Sample", "answer_log_probs", "rollout"]


class Sample(NamedTuple):
    """A sampled answer. question: its prompt fields. answer: token ids. trace, sequence: where the other agents' rows are that
    it was sampled from, if they were kept."""

    question: dict
    answer: list[int]
    trace: Trace | None = None
    sequence: int = 0


def answer_log_probs(
    system, questions, answers: list[list[int]], temperature: float = 1.0, trace: Trace | None = None
) -> tuple[Tensor, Tensor]:
    """The log-probability of each token of the answers, and the entropy of what it was chosen from, in nats, both [B, A].

    system: a `MultiAgentSystem`, or what wraps one. questions, trace: as in its `forward`. answers: token ids, as
    `MultiAgentSystem.generate_tokens` returns them. temperature: logits are divided by it. Behind shorter answers both are 0.
    Gradients go back through all agents' latent steps, or with a trace into the last agent only. Of a question that is there
    several times the other agents take their turns once.

        >>> tokens = system.generate_tokens(["where is the key"], max_new_tokens=4, seed=0)[0]
        >>> log_probs, entropy = answer_log_probs(system, ["where is the key"], tokens)
        >>> log_probs.sum().backward()
    """
    output = system(questions, answers, trace=trace, share=True)
    logits, labels = output.logits, output.labels
    given = labels != -100
    log_p = ((logits if logits.dtype == torch.float64 else logits.float()) / temperature).log_softmax(-1)
    chosen = log_p.gather(-1, labels.clamp_min(0)[..., None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    return torch.where(given, chosen, 0), torch.where(given, entropy, 0)


def rollout(system: MultiAgentSystem, questions: list[dict], keep: bool, **options) -> list[Sample]:
    """Samples an answer for each of the questions; the answers of one that is there several times share what is read before.

    keep: whether the other agents' rows are kept. options: of `MultiAgentSystem.generate_tokens`.
    """
    firsts, reads = distinct(questions)
    once, trace = [questions[b] for b in firsts], None
    if keep:
        with torch.no_grad(), evaluating(system):
            trace = system.communicate(once)
    if len({reads.count(i) for i in reads}) == 1:
        samples = len(reads) // len(once)
        tokens = [iter(answers) for answers in system.generate_tokens(once, samples=samples, trace=trace, **options)]
        answers = [next(tokens[i]) for i in reads]
    else:  # a group that processes share
        read = None if trace is None else trace.select(reads)
        answers = [row for (row,) in system.generate_tokens(questions, samples=1, trace=read, **options)]
    return [Sample(*sample, trace, i) for *sample, i in zip(questions, answers, reads)]
