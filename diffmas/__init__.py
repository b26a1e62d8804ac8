"""diffmas: trainable, fast latent multi-agent systems of language models. See README.md and docs/design.md."""

from diffmas import ops
from diffmas.attention import Unsupported
from diffmas.patch import patch_model, unpatch_model
from diffmas.system import Agent, MultiAgentSystem, SystemOutput
from diffmas.trace import Segment, Trace

__version__ = "0.1.0"

__all__ = ["Agent", "MultiAgentSystem", "Segment", "SystemOutput", "Trace", "Unsupported", "ops", "patch_model", "unpatch_model"]
