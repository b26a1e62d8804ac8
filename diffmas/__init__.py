"""diffmas: trainable, fast latent multi-agent systems of language models. See README.md and docs/design.md."""

from typing import TYPE_CHECKING

from diffmas.lazy import importing

if TYPE_CHECKING:
    from diffmas import ops
    from diffmas.agents import Agent, MultiAgentSystem, SystemOutput
    from diffmas.models import Unsupported, patch_model, unpatch_model
    from diffmas.trace import Segment, Trace
    from diffmas.training import Trainer, default_arguments

__version__ = "0.1.0"

_WHERE = {
    "Agent": "diffmas.agents", "MultiAgentSystem": "diffmas.agents", "SystemOutput": "diffmas.agents",
    "Segment": "diffmas.trace", "Trace": "diffmas.trace", "Unsupported": "diffmas.models", "patch_model": "diffmas.models",
    "unpatch_model": "diffmas.models", "Trainer": "diffmas.training", "default_arguments": "diffmas.training",
}  # fmt: skip
__getattr__, __dir__ = importing(__name__, _WHERE, ("agents", "models", "ops", "trace"))

__all__ = [
    "Agent", "MultiAgentSystem", "Segment", "SystemOutput", "Trace", "Trainer", "Unsupported", "default_arguments", "ops",
    "patch_model", "unpatch_model",
]  # fmt: skip
