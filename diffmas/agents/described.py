"""What a team's description alone tells, before there is a model; needs no torch."""

from diffmas.agents.agent import Agent

__all__ = ["check_agents", "readings"]


def readings(others) -> dict[str, str]:
    """How the rows of others are read, by name."""
    return {name: other.reading for name, other in others.items()}


def check_agents(agents: list[Agent], others) -> None:
    """Raises ValueError for agents that do not fit to each other, whatever their models. others: names of other models."""
    if not agents:
        raise ValueError("agents: expected at least one agent, got an empty list")
    names = [agent.name for agent in agents]
    if len(set(names)) != len(names):
        raise ValueError(f"agents: expected distinct names, got {names}")
    if len(formats := dict.fromkeys(agent.quantized for agent in agents[:-1] if agent.quantized is not None)) > 1:
        raise ValueError(f"agents: expected one format of quantized rows, got {list(formats)}")
    if agents[-1].low_rank:
        raise ValueError(f"agent {agents[-1].name!r}: low_rank: expected False for who answers, whose rows nobody reads")
    for agent in agents:
        if agent.model is not None and agent.low_rank:
            raise ValueError(f"agent {agent.name!r}: low_rank: expected False with another model, got True")
        if agent.model is not None and agent.model not in others:
            raise ValueError(f"agent {agent.name!r}: model: expected None or one of {sorted(others)}, got {agent.model!r}")
