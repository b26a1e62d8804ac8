"""What an agent says in text: tokens that are decoded behind its prompt and latent steps, and stay on the trace as rows.

Tokens are chosen without gradients, in eval mode, on a view of the trace that is dropped. Then all of them go through the model
in one forward, as a prompt does: its rows are what the next agents read, and in training their K and V have a gradient. None
goes through the choice: a loss teaches how a message is written to the trace and read, not which words it has.

A message ends as an answer does: with an end-of-sequence token, which stays, or after `Agent.max_message_tokens`. Its first
token comes from the hidden state behind the last latent step (or the prompt), by the model's own head.
"""

import zlib

import torch
from torch import Tensor

from diffmas.agents.decoding import decode_behind
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.meter import phase
from diffmas.agents.sampling import Sampling
from diffmas.models.forward import forward
from diffmas.models.head import logits_of
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.trace import Trace

__all__ = ["write_messages"]


def write_messages(system, agent, trace: Trace, h: Tensor, most: list[int], seeds: list[int] | None = None) -> None:
    """Appends a message of at most most[b] tokens to sequence b of the trace; none where that is 0.

    h [B, hidden]: the last hidden state of each sequence. agent: its message_temperature says how tokens are chosen. seeds: of
    each sequence, from which the random streams follow; None: drawn from torch's random numbers, where they are needed.
    """
    going = [b for b, n in enumerate(most) if n]
    if not going:
        return
    with phase("decode", trace):
        ids: list[list[int]] = [[] for _ in most]
        for b, row in zip(going, _chosen(system, agent, trace, h.detach()[going], most, going, seeds)):
            ids[b] = row
        forward_pass = trace.plan([len(row) for row in ids], "text")
        forward(patch_of(system.model), trace, forward_pass, input_ids=system.pack(ids))


@torch.no_grad()
def _chosen(system, agent, trace: Trace, h: Tensor, most: list[int], going: list[int], seeds) -> list[list[int]]:
    """The token ids of the messages of some sequences. h [len(going), hidden]: theirs."""
    temperature = agent.message_temperature or 0.0
    if seeds is None:
        seeds = torch.randint(2**31, (len(most),)).tolist() if temperature else [0] * len(most)
    # Of agents that share a question's seed, each has its own, by its name.
    names = trace.agent if isinstance(trace.agent, list) else [trace.agent] * len(most)
    own = [seeds[b] * 1_000_033 + zlib.crc32((names[b] or "").encode()) for b in going]
    with evaluating(system):
        sampling = Sampling.of(system, [most[b] for b in going], temperature, seed=own, stop=[], samples=1, num_beams=1)
        view = trace.select(going).detach()
        view.agent = None  # whoever watches an agent's turn is told of the rows that stay
        return decode_behind(system, view, logits_of(causal_lm_of(system.model), h), sampling)
