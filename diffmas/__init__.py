"""diffmas: trainable, fast latent multi-agent systems of language models. See README.md and docs/design.md."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmas import ops
    from diffmas.agents import Agent, MultiAgentSystem, SystemOutput
    from diffmas.models import Unsupported, patch_model, unpatch_model
    from diffmas.trace import Segment, Trace
    from diffmas.training import Trainer, default_arguments

__version__ = "0.1.0"

# Imported when first used: torch and transformers take seconds, which `diffmas --help` need not wait for.
_WHERE = {
    "Agent": "diffmas.agents", "MultiAgentSystem": "diffmas.agents", "SystemOutput": "diffmas.agents",
    "Segment": "diffmas.trace", "Trace": "diffmas.trace", "Unsupported": "diffmas.models", "patch_model": "diffmas.models",
    "unpatch_model": "diffmas.models", "Trainer": "diffmas.training", "default_arguments": "diffmas.training",
}  # fmt: skip


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    if name in ("agents", "models", "ops", "trace"):
        return import_module(f"diffmas.{name}")
    raise AttributeError(f"module 'diffmas' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Agent", "MultiAgentSystem", "Segment", "SystemOutput", "Trace", "Trainer", "Unsupported", "default_arguments", "ops",
    "patch_model", "unpatch_model",
]  # fmt: skip
