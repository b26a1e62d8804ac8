"""The turns of a system's agents: who writes, and on which trace.

An agent's turn: the prompts of the batch are packed without padding and go through the model's body in one forward; the last
hidden state of each sequence is realigned and fed back T times, its own T; then, if the agent writes one, comes its message.
"""

import torch

from diffmas.agents import prompts
from diffmas.agents.agent import Agent
from diffmas.agents.jacobi import forwards, latent_passes, one_by_one, rows_written
from diffmas.agents.latent import latent_steps
from diffmas.agents.messages import write_messages
from diffmas.agents.meter import phase
from diffmas.agents.prompts import Turn
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import Trace
from diffmas.trace.views import SAID

__all__ = ["take_turns", "think", "trace_for"]


def think(
    system, agent: Agent, questions: list[dict], trace: Trace, turns: list[Turn] | None = None, least_steps: int = 0,
    seeds: list[int] | None = None,
) -> Trace:  # fmt: skip
    """See `MultiAgentSystem.think`."""
    if turns is None:
        starts = trace.next_positions
        turns = [prompts.turn_of(system, agent, b, row, starts[b]) for b, row in enumerate(questions)]
    trace.agent = agent.name
    take_turns(system, agent, trace, turns, least_steps, seeds)
    if system.trace_content == "latent_only" and any(turn.ids for turn in turns):
        with phase("hand-over"):
            trace = trace.keep(kind=SAID, positions=system.positions, sinks=system.sinks)
    return trace


def take_turns(
    system, agent: Agent, trace: Trace, turns: list[Turn], least_steps: int = 0, seeds: list[int] | None = None
) -> None:  # fmt: skip
    """Appends a turn to each sequence of the trace. agent: how the latent steps are taken and messages chosen, whoever's turns
    they are (`Trace.agent`). seeds: as `write_messages` takes them."""
    ids, steps = [turn.ids for turn in turns], [turn.steps for turn in turns]
    if not any(ids):
        return
    member, reader = system.writer(agent), system.member(agent)
    patch, encoded = patch_of(member.model), reader is not member
    forward_pass = trace.plan([len(row) for row in ids], "latent" if encoded else "prompt", reserve=steps)
    with phase("prefill", trace):
        x = {"inputs_embeds": reader(ids)[None]} if encoded else {"input_ids": member.pack(ids)}
        h = forward(patch, trace, forward_pass, **x).last_hidden_state[0]
        h = h[forward_pass.last_rows().to(h.device)]  # not always where the embeddings are
    with phase("latent", trace):
        if one_by_one(steps, agent.passes, agent.grad_passes):
            h = latent_steps(patch, member.realign, trace, h, steps, agent.stop_change)
        else:
            h = latent_passes(patch, member.realign, trace, h, steps, agent.passes, agent.grad_passes)
        if (more := forwards([least_steps], agent.passes) - forwards(steps, agent.passes)) > 0:
            latent_steps(patch, member.realign, trace, h, [more] * len(steps))
            trace.drop_newest([more] * len(steps))
    write_messages(system, agent, trace, h, [turn.message for turn in turns], seeds)


def trace_for(system, turns: list[list[Turn]], room: list[int], sequences: int) -> Trace:
    """An empty trace of so many sequences, with enough rows for all prompts, latent steps and messages, and for room[b] tokens
    after the last agent's."""
    rows = sum(room)
    for i, (agent, row) in enumerate(zip(system.agents, turns)):
        steps = [turn.steps for turn in row]
        learning = torch.is_grad_enabled() and i >= system.agents_without_grad  # else rows that are dropped are written again
        rows += rows_written(steps, agent.passes, agent.grad_passes) if learning else sum(steps)
        rows += sum(len(turn.ids) + turn.message for turn in row)
    return Trace(system.model, sequences, capacity=max(1, -(-rows // sequences)))
