"""How much the rows that are there matter to the agent that is going to read them, told before its turn.

Both measures run the agent's prompt once more, without gradients and in eval mode, over a view that is dropped afterwards:

similarity   of a row's value and the mean of the prompt's own values, where the prompt has read nothing: the mean over layers
             of the cosine over all heads together. Values know no position.
attention    that the prompt pays to a row when it reads all rows that there are to choose from: the mean over tokens, heads
             and layers.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from diffmas.agents import adapters
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.prompts import is_skipped
from diffmas.agents.selection import Score, lookup
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import Trace
from diffmas.trace.attention_mass import AttentionMass
from diffmas.trace.views import rows_of

__all__ = ["attention_by_head", "attention_by_layer", "question_values", "scores"]


@torch.no_grad()
def scores(system, i: int, questions: list[dict], read: Trace, measures: set[str]) -> list[dict[str, Score]]:
    """How good each row is that agent i may read; of each sequence, by measure. read: all rows that there are to choose
    from."""
    ids = [_prompt(system, i, fields) for fields in questions]
    found: list[dict[str, Score]] = [{} for _ in questions]
    if not any(ids):
        return found
    rows = [rows_of([s for s in read.segments if s.sequence == b]) for b in range(read.batch_size)]
    with evaluating(system), adapters.of_agent(system, i):
        for measure in sorted(measures):
            for b, values in enumerate(MEASURES[measure](system, ids, read)):
                found[b][measure] = lookup(rows[b], values.double().cpu().numpy())
    return found


def _prompt(system, i: int, fields: dict) -> list[int]:
    """None of an agent that has no turn."""
    agent = system.agents[i]
    skipped = i < len(system.agents) - 1 and is_skipped(system, agent) and agent.steps(fields) == 0
    return [] if skipped else system.prompt_ids(agent, fields)


def _run(system, ids: list[list[int]], trace: Trace, watch: Callable = lambda forward_pass: None):
    """The prompts at the end of a trace, which has them then. Returns what `watch` has made of the forward pass, before it
    ran."""
    trace.agent = None
    forward_pass = trace.plan([len(row) for row in ids], "prompt")
    seen = watch(forward_pass)
    forward(patch_of(system.model), trace, forward_pass, input_ids=system.pack(ids))
    return seen


@torch.no_grad()
def question_values(system, i: int, questions: list[dict], read: Trace) -> list[list[torch.Tensor]]:
    """Of each sequence, by layer, the sum of the values of the prompt of agent i, where it has read nothing: [Hkv * D], zeros
    where it has no turn. read: a trace of the model."""
    with evaluating(system), adapters.of_agent(system, i):
        return _values_of(system, [_prompt(system, i, fields) for fields in questions], read)


def _values_of(system, ids: list[list[int]], read: Trace) -> list[list[torch.Tensor]]:
    alone = read.reading([[] for _ in ids])
    if any(ids):
        _run(system, ids, alone)
    layers = range(len(read))
    return [[_wide(alone.keys_values(layer, b)[1].flatten(1)).sum(0) for layer in layers] for b in range(len(ids))]


def _similarity(system, ids: list[list[int]], read: Trace) -> list[torch.Tensor]:
    found = []
    for b, question in enumerate(_values_of(system, ids, read)):
        total = 0.0
        for layer, values in enumerate(question):
            rows = _wide(read.keys_values(layer, b)[1].flatten(1))
            total = total + F.cosine_similarity(rows, values[None]).cpu()
        found.append(total / len(read))
    return found


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _attention(system, ids: list[list[int]], read: Trace) -> list[torch.Tensor]:
    mass = _run(system, ids, read.fork(1)[0], AttentionMass)
    layers = [[row[: len(row) - len(own)].cpu() for row, own in zip(rows, ids)] for rows in mass.by_layer.values()]
    return [torch.stack(of_layers).mean(0) for of_layers in zip(*layers)]


MEASURES = {"similarity": _similarity, "attention": _attention}


@torch.no_grad()
def attention_by_layer(system, questions) -> list[float]:
    """The share of its attention that the last agent's prompt pays, in each layer, to the rows that it reads, without the
    sinks; the mean over heads, tokens and questions. questions: as in `MultiAgentSystem.forward`.

    KVComm (arXiv 2510.03346) hands on the layers of most of it, in a mean with a bell curve over the depth: `Select.layers`.

        >>> share = attention_by_layer(system, ["where is the key"])
        >>> len(share) == system.model.config.num_hidden_layers and 0 <= min(share) <= max(share) <= 1
        True
    """
    return [sum(of_heads) / len(of_heads) for of_heads in attention_by_head(system, questions)]


@torch.no_grad()
def attention_by_head(system, questions) -> list[list[float]]:
    """As `attention_by_layer`, of each K/V head of each layer, the mean over the heads that read it: `Select.heads`.

    >>> share = attention_by_head(system, ["where is the key"])
    >>> [len(of_heads) for of_heads in share] == [system.model.config.num_key_value_heads] * len(share)
    True
    """
    asked, last = system.fields_of(questions), len(system.agents) - 1
    ids = [system.prompt_ids(system.agents[last], fields) for fields in asked]
    with evaluating(system):
        read = system.communicate(asked)
        with adapters.of_agent(system, last):
            mass = _run(system, ids, read.fork(1)[0], AttentionMass)
    shares = [[row[system.sinks : len(row) - len(own)].sum(0) for row, own in zip(rows, ids)]
              for _, rows in sorted(mass.by_head.items())]  # fmt: skip
    return [torch.stack(of_questions).mean(0).tolist() for of_questions in shares]
