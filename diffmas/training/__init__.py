"""transformers' Trainer driven by a team of agents: data, checkpoints."""

from diffmas.training.trainer import (
    NonFiniteLoss,
    Trainer,
    add_lora,
    check_checkpoint,
    checkpoints,
    default_arguments,
    last_checkpoint,
    lora_config,
)  # fmt: skip

__all__ = [
    "NonFiniteLoss", "Trainer", "add_lora", "check_checkpoint", "checkpoints", "default_arguments", "last_checkpoint",
    "lora_config",
]  # fmt: skip
