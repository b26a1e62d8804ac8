"""What does not fit together in a team, told before anything is built."""

import re

from torch import nn

from diffmas.agents.agent import Agent
from diffmas.agents.alignment import check_tokenizers
from diffmas.agents.chat import check_chat
from diffmas.agents.described import check_agents, readings
from diffmas.agents.encoder import Encoder
from diffmas.agents.eval_mode import evaluating
from diffmas.agents.graph import Graph, check_graph, home
from diffmas.agents.member import Other
from diffmas.agents.options import Options
from diffmas.models.adapted import check_adapters, check_bare
from diffmas.models.head import check_head
from diffmas.models.parts import causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.ops.backends import check_reads

__all__ = ["check_others", "check_patched", "check_team"]


def check_team(
    model: nn.Module, agents: list[Agent], adapter_scope: str, trace_content: str, sinks: int, others: dict[str, Other]
) -> None:  # fmt: skip
    """Raises ValueError naming the argument that does not fit: agents among each other, or their adapters and the model's."""
    for name, other in others.items():
        if not re.fullmatch(r"[\w-]+", name) or hasattr(nn.ModuleDict, name):
            raise ValueError(f"others: expected names of letters, digits, - and _, got {name!r}")
        if not isinstance(other, (Other, Encoder)):
            raise ValueError(f"others: expected {name!r} as an Other or Encoder, got {type(other).__name__}")
    check_agents(agents, others)
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    check_graph(agents, trace_content, sinks, config.num_hidden_layers, heads, readings(others))
    check_adapters(model)
    if adapter_scope == "final_only" or any(agent.low_rank for agent in agents):
        check_bare(model)
    if adapter_scope != "shared" and not hasattr(model, "peft_config"):
        raise ValueError(f"adapter_scope: {adapter_scope!r} needs a PEFT model, got {type(model).__name__}")
    for agent in agents:
        if (other := next((x for x in agents if agent.role == x.name != x.role and x is not agent), None)) is not None:
            raise ValueError(
                f"agent {agent.name!r}: role: expected a name that no agent of another role has, got {agent.role!r}; to "
                f"share an adapter with {other.name!r}, give both one role"
            )
    own = [agent for agent in agents if home(agent, readings(others)) is None and not agent.low_rank]
    roles = dict.fromkeys(agent.adapter for agent in own)
    if adapter_scope == "per_role" and (missing := [n for n in roles if n not in model.peft_config]):
        raise ValueError(f"adapter_scope: 'per_role' needs an adapter for every role, the model has none for {missing}")


def check_patched(model: nn.Module, agents: list[Agent]) -> None:
    """Raises ValueError for what a patched model cannot do of what its agents do: where they write messages and its logits are
    not what their first tokens come from, and where it cannot read quantised rows. For the former, it runs over one token."""
    spec = patch_of(model).spec
    if any(agent.quantized is not None for agent in agents[:-1]):
        check_reads(spec.backend)
        if spec.offload is not None:
            raise ValueError("offload: expected rows on the device with quantized agents, got rows on the host")
    if any(agent.max_message_tokens is not None for agent in agents[:-1]):
        with evaluating(model):
            check_head(causal_lm_of(model), patch_of(model).body)


def check_others(model: nn.Module, tokenizer, agents: list[Agent], others: dict[str, Other], options: Options) -> None:
    """Raises ValueError naming what of a team's other models does not fit."""
    for name, other in others.items():
        try:
            if causal_lm_of(other.model) is causal_lm_of(model):
                raise ValueError("model: expected another than the system's, got the same")
            other.check(model)
            mine = [agent for agent in agents if agent.model == name]
            check_chat(other.tokenizer, other.chat_template, other.chat_options or {}, mine)
            if other.reading == "fused":
                check_tokenizers(tokenizer, other.tokenizer)
        except ValueError as error:
            raise ValueError(f"others, {name!r}: {error}") from error
        for agent in mine:
            if agent.max_rows is not None or any(read.select is not None for read in agent.reads or ()):
                raise ValueError(f"agent {agent.name!r}: expected no select and no max_rows with another model, got some")
            for option in ("max_message_tokens", "quantized"):
                if (found := getattr(agent, option)) is not None:
                    raise ValueError(f"agent {agent.name!r}: {option}: expected None with another model, got {found!r}")
        if not mine:
            raise ValueError(f"others: expected an agent whose model is {name!r}, got none")
    if agents[-1].model is not None:
        raise ValueError(f"agent {agents[-1].name!r}: model: expected None for who answers, got {agents[-1].model!r}")
    for i, j in Graph.of(agents, beside=readings(others)).fuses.items():
        _check_fused(agents[i], agents[j], i == len(agents) - 1, options)


def _check_fused(agent: Agent, sharer: Agent, last: bool, options: Options) -> None:
    """Raises ValueError for an agent whose rows cannot be fused with those of another model's."""
    where = f"agent {agent.name!r}, whose rows are fused with those of {sharer.name!r}"
    if last:
        raise ValueError(f"{where}: expected another agent that reads it and answers, got the last agent")
    if agent.latent_steps != 0:
        raise ValueError(f"{where}: latent_steps: expected 0, got {agent.latent_steps!r}; who reads it can take some")
    for name in ("max_message_tokens", "quantized"):
        if (found := getattr(agent, name)) is not None:
            raise ValueError(f"{where}: {name}: expected None, got {found!r}; who reads it can have it")
    for name, wanted in (("trace_content", "all"), ("no_latents", "prompt")):
        if (found := getattr(options, name)) != wanted:
            raise ValueError(f"{where}: {name}: expected {wanted!r}, got {found!r}")
