"""A trained system on disk: a plain PEFT adapter, the tokenizer with its chat template, and `agents.json` beside them with the
agents, the system's class and the adapter's base model.

Only plain data goes in and out: paths, models, dicts. `MultiAgentSystem` writes and builds itself with these functions.
"""

from diffmas.agents.file.description import (
    AGENTS_FILE,
    HEAD,
    check_base,
    check_class,
    check_description,
    check_kinds,
    check_like,
    check_same,
    read_agents,
)
from diffmas.lazy import importing

_READING = (
    "CHOICES_FILE", "CONFIG_FILE", "MAP_FILE", "WEIGHTS_FILE", "adapter_directory", "add_adapter", "load_adapters",
    "load_model", "load_saved_tokenizer", "load_weights", "put_adapters", "read_adapters", "read_choices", "read_map",
    "read_weights",
)  # fmt: skip
_WHERE = dict.fromkeys(_READING, f"{__name__}.reading") | dict.fromkeys(("save", "save_model"), f"{__name__}.writing")
__getattr__, __dir__ = importing(__name__, _WHERE)

__all__ = [
    "AGENTS_FILE", "CHOICES_FILE", "CONFIG_FILE", "HEAD", "MAP_FILE", "WEIGHTS_FILE", "adapter_directory", "add_adapter",
    "check_base", "check_class", "check_description", "check_kinds", "check_like", "check_same", "load_adapters",
    "load_model", "load_saved_tokenizer", "load_weights", "put_adapters", "read_adapters", "read_agents", "read_choices",
    "read_map", "read_weights", "save", "save_model",
]  # fmt: skip
