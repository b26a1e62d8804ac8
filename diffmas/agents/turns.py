"""The turns of a system's agents: who writes, and on which trace.

An agent's turn: the prompts of the batch are packed without padding and go through the model's body in one forward; the last
hidden state of each sequence is realigned and fed back T times, its own T.
"""

import torch

from diffmas.agents import adapters, prompts
from diffmas.agents.jacobi import forwards, latent_passes, one_by_one, rows_written
from diffmas.agents.latent import latent_steps
from diffmas.agents.meter import phase
from diffmas.agents.prompts import Agent, Turn
from diffmas.models.forward import forward
from diffmas.models.patch import patch_of
from diffmas.trace import Trace

__all__ = ["communicate", "think", "trace_for"]


def think(
    system, agent: Agent, questions: list[dict], trace: Trace, turns: list[Turn] | None = None, least_steps: int = 0
) -> Trace:  # fmt: skip
    """See `MultiAgentSystem.think`."""
    if turns is None:
        starts = trace.next_positions
        turns = [prompts.turn_of(system, agent, b, row, starts[b]) for b, row in enumerate(questions)]
    ids, steps = [turn.ids for turn in turns], [turn.steps for turn in turns]
    if not any(ids):
        return trace
    patch = patch_of(system.model)
    trace.agent = agent.name
    forward_pass = trace.plan([len(row) for row in ids], "prompt", reserve=steps)
    with phase("prefill", trace):
        h = forward(patch, trace, forward_pass, input_ids=system.pack(ids)).last_hidden_state[0]
        h = h[forward_pass.last_rows().to(h.device)]  # not always where the embeddings are
    with phase("latent", trace):
        if one_by_one(steps, agent.passes, agent.grad_passes):
            h = latent_steps(patch, system.realign, trace, h, steps, agent.stop_change)
        else:
            latent_passes(patch, system.realign, trace, h, steps, agent.passes, agent.grad_passes)
        if (more := forwards([least_steps], agent.passes) - forwards(steps, agent.passes)) > 0:
            latent_steps(patch, system.realign, trace, h, [more] * len(steps))
            trace.drop_newest([more] * len(steps))
    if system.trace_content == "latent_only":
        with phase("hand-over"):
            trace = trace.keep(kind="latent", positions=system.positions, sinks=system.sinks)
    return trace


def trace_for(system, turns: list[list[Turn]], room: list[int]) -> Trace:
    """An empty trace with enough rows for all prompts, latent steps and room[b] tokens after them."""
    rows = sum(room)
    for i, (agent, row) in enumerate(zip(system.agents, turns)):
        steps = [turn.steps for turn in row]
        learning = torch.is_grad_enabled() and i >= system.agents_without_grad  # else rows that are dropped are written again
        rows += rows_written(steps, agent.passes, agent.grad_passes) if learning else sum(steps)
        rows += sum(len(turn.ids) for turn in row)
    return Trace(system.model, len(room), capacity=max(1, -(-rows // len(room))))


def communicate(system, questions: list[dict], trace: Trace | None = None, turns=None, least_steps=()) -> Trace:
    """See `MultiAgentSystem.communicate`."""
    trace = Trace(system.model, batch_size=len(questions)) if trace is None else trace
    for i, agent in enumerate(system.agents[:-1]):
        needs_grad = torch.is_grad_enabled() and i >= system.agents_without_grad
        with torch.set_grad_enabled(needs_grad), adapters.of_agent(system, i):
            least = least_steps[i] if least_steps else 0
            trace = system.think(agent, questions, trace, None if turns is None else turns[i], least)
    return trace
