"""transformers' Trainer driven by a team of agents: data, settings, checkpoints."""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffmas.agents.adapters import add_lora, lora_config
    from diffmas.training.checkpoint import check_checkpoint, checkpoints, last_checkpoint
    from diffmas.training.gradients import plot_gradients
    from diffmas.training.losses import NonFiniteLoss
    from diffmas.training.processes import end_processes
    from diffmas.training.settings import default_arguments
    from diffmas.training.trainer import Trainer

# Imported when first used: torch takes seconds, which what is plain data here need not wait for.
_WHERE = {
    "add_lora": "diffmas.agents.adapters", "lora_config": "diffmas.agents.adapters",
    "check_checkpoint": "diffmas.training.checkpoint", "checkpoints": "diffmas.training.checkpoint",
    "last_checkpoint": "diffmas.training.checkpoint", "plot_gradients": "diffmas.training.gradients",
    "NonFiniteLoss": "diffmas.training.losses", "end_processes": "diffmas.training.processes",
    "default_arguments": "diffmas.training.settings", "Trainer": "diffmas.training.trainer",
}  # fmt: skip


def __getattr__(name: str):
    if name in _WHERE:
        return getattr(import_module(_WHERE[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "NonFiniteLoss", "Trainer", "add_lora", "check_checkpoint", "checkpoints", "default_arguments", "end_processes",
    "last_checkpoint", "lora_config", "plot_gradients",
]  # fmt: skip
