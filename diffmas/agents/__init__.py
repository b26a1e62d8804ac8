"""Agents that share one patched model: prompts, latent steps, loss, decoding, files."""

from diffmas.agents.system import Agent, MultiAgentSystem, SystemOutput

__all__ = ["Agent", "MultiAgentSystem", "SystemOutput"]
