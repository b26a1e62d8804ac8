"""Agents that share one patched model: prompts, latent steps, loss, decoding, files."""

from diffmas.agents.encoder import Encoder
from diffmas.agents.member import Other
from diffmas.agents.projector import Fuser, Projector
from diffmas.agents.system import Agent, MultiAgentSystem, SystemOutput

__all__ = ["Agent", "Encoder", "Fuser", "MultiAgentSystem", "Other", "Projector", "SystemOutput"]
