"""diffmas: trainable, fast latent multi-agent systems of language models. See README.md and docs/design.md."""

from diffmas import ops
from diffmas.agents.system import Agent, MultiAgentSystem, SystemOutput
from diffmas.models import Unsupported, patch_model, unpatch_model
from diffmas.trace import Segment, Trace

__version__ = "0.1.0"

_LAZY = {"Trainer": "diffmas.training", "default_arguments": "diffmas.training"}  # transformers' Trainer is slow to import


def __getattr__(name: str):
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'diffmas' has no attribute {name!r}")


__all__ = [
    "Agent", "MultiAgentSystem", "Segment", "SystemOutput", "Trace", "Trainer", "Unsupported", "default_arguments", "ops",
    "patch_model", "unpatch_model",
]  # fmt: skip
