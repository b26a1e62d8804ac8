"""Agents that share one patched model: prompts, latent steps, loss, decoding, files."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmas.agents.encoder import Encoder
    from diffmas.agents.member import Other
    from diffmas.agents.projector import Fuser, Projector
    from diffmas.agents.system import Agent, MultiAgentSystem, SystemOutput

# Imported when first used: torch takes seconds, which what is plain data here need not wait for.
_WHERE = {
    "Encoder": "diffmas.agents.encoder", "Other": "diffmas.agents.member", "Fuser": "diffmas.agents.projector",
    "Projector": "diffmas.agents.projector", "Agent": "diffmas.agents.system", "MultiAgentSystem": "diffmas.agents.system",
    "SystemOutput": "diffmas.agents.system",
}  # fmt: skip


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = ["Agent", "Encoder", "Fuser", "MultiAgentSystem", "Other", "Projector", "SystemOutput"]
