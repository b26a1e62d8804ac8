"""What does not fit together in a team, told before anything is built."""

from torch import nn

from diffmas.agents.graph import check_graph
from diffmas.agents.prompts import Agent
from diffmas.models.adapted import check_adapters, check_bare

__all__ = ["check_agents", "check_team"]


def check_agents(agents: list[Agent]) -> None:
    """Raises ValueError for agents that do not fit to each other, whatever their model."""
    if not agents:
        raise ValueError("agents: expected at least one agent, got an empty list")
    names = [agent.name for agent in agents]
    if len(set(names)) != len(names):
        raise ValueError(f"agents: expected distinct names, got {names}")


def check_team(model: nn.Module, agents: list[Agent], adapter_scope: str, trace_content: str, sinks: int) -> None:
    """Raises ValueError naming the argument that does not fit: agents among each other, or their adapters and the model's."""
    check_agents(agents)
    check_graph(agents, trace_content, sinks, model.config.get_text_config().num_hidden_layers)
    check_adapters(model)
    if adapter_scope == "final_only":
        check_bare(model)
    if adapter_scope != "shared" and not hasattr(model, "peft_config"):
        raise ValueError(f"adapter_scope: {adapter_scope!r} needs a PEFT model, got {type(model).__name__}")
    for agent in agents:
        if (other := next((x for x in agents if agent.role == x.name != x.role and x is not agent), None)) is not None:
            raise ValueError(
                f"agent {agent.name!r}: role: expected a name that no agent of another role has, got {agent.role!r}; to "
                f"share an adapter with {other.name!r}, give both one role"
            )
    roles = dict.fromkeys(agent.adapter for agent in agents)
    if adapter_scope == "per_role" and (missing := [n for n in roles if n not in model.peft_config]):
        raise ValueError(f"adapter_scope: 'per_role' needs an adapter for every role, the model has none for {missing}")
