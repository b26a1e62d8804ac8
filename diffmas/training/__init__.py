"""transformers' Trainer driven by a team of agents: data, settings, checkpoints."""

from typing import TYPE_CHECKING

from diffmas.lazy import importing

if TYPE_CHECKING:
    from diffmas.agents.adapters import add_lora, lora_config
    from diffmas.training.checkpoint import check_checkpoint, checkpoints, last_checkpoint
    from diffmas.training.gradients import plot_gradients
    from diffmas.training.losses import NonFiniteLoss
    from diffmas.training.processes import end_processes
    from diffmas.training.settings import default_arguments
    from diffmas.training.trainer import Trainer

_WHERE = {
    "add_lora": "diffmas.agents.adapters", "lora_config": "diffmas.agents.adapters",
    "check_checkpoint": "diffmas.training.checkpoint", "checkpoints": "diffmas.training.checkpoint",
    "last_checkpoint": "diffmas.training.checkpoint", "plot_gradients": "diffmas.training.gradients",
    "NonFiniteLoss": "diffmas.training.losses", "end_processes": "diffmas.training.processes",
    "default_arguments": "diffmas.training.settings", "Trainer": "diffmas.training.trainer",
}  # fmt: skip
__getattr__, __dir__ = importing(__name__, _WHERE)

__all__ = [
    "NonFiniteLoss", "Trainer", "add_lora", "check_checkpoint", "checkpoints", "default_arguments", "end_processes",
    "last_checkpoint", "lora_config", "plot_gradients",
]  # fmt: skip
