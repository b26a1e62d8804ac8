"""Agents that share one patched model: prompts, latent steps, loss, decoding, files."""

from typing import TYPE_CHECKING

from diffmas.lazy import importing

if TYPE_CHECKING:
    from diffmas.agents.encoder import Encoder
    from diffmas.agents.member import Other
    from diffmas.agents.projector import Fuser, Projector
    from diffmas.agents.system import Agent, MultiAgentSystem, SystemOutput

_WHERE = {
    "Encoder": "diffmas.agents.encoder", "Other": "diffmas.agents.member", "Fuser": "diffmas.agents.projector",
    "Projector": "diffmas.agents.projector", "Agent": "diffmas.agents.system", "MultiAgentSystem": "diffmas.agents.system",
    "SystemOutput": "diffmas.agents.system",
}  # fmt: skip
__getattr__, __dir__ = importing(__name__, _WHERE)

__all__ = ["Agent", "Encoder", "Fuser", "MultiAgentSystem", "Other", "Projector", "SystemOutput"]
