"""transformers' Trainer driven by a team of agents: data, settings, checkpoints."""

from diffmas.agents.adapters import add_lora, lora_config
from diffmas.training.checkpoint import check_checkpoint, checkpoints, last_checkpoint
from diffmas.training.gradients import plot_gradients
from diffmas.training.losses import NonFiniteLoss
from diffmas.training.processes import end_processes
from diffmas.training.settings import default_arguments
from diffmas.training.trainer import Trainer

__all__ = [
    "NonFiniteLoss", "Trainer", "add_lora", "check_checkpoint", "checkpoints", "default_arguments", "end_processes",
    "last_checkpoint", "lora_config", "plot_gradients",
]  # fmt: skip
