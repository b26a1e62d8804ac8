"""Modules of transformers' decoder layers that are known to do the same in several families, and are what they seem to be."""

import functools

from torch import nn

from diffmas.models.linear_parts import is_hooked, is_ours

__all__ = ["is_plain", "kind_of"]

FAMILIES = ("Llama", "Mistral", "Ministral", "Ministral3", "Qwen2", "Qwen3")
KINDS = {f"{family}{kind}": kind for family in FAMILIES for kind in ("Model", "DecoderLayer", "RMSNorm", "MLP")}
KINDS |= {"SiLU": "SiLU", "SiLUActivation": "SiLU"}


@functools.cache
def _kind(module_class: type, forward) -> str | None:
    """forward: the class's, which may be somebody else's."""
    own = module_class.__module__.startswith(("transformers.", "torch.nn."))
    while own and forward is not None:  # what wraps a function takes over its names, but not its globals
        own = getattr(forward, "__globals__", {}).get("__name__", "").startswith(("transformers.", "torch."))
        forward = getattr(forward, "__wrapped__", None)
    return KINDS.get(module_class.__name__) if own else None


def kind_of(module: nn.Module) -> str | None:
    """Model, DecoderLayer, RMSNorm, MLP or SiLU, where its class is one of transformers' or torch's and does what these do."""
    module_class = type(module)
    return _kind(module_class, module_class.forward)


def is_plain(module: nn.Module, kind: str) -> bool:
    """Whether it is of a kind, and nobody hooks into it or has replaced its forward."""
    if kind_of(module) != kind or is_hooked(module):
        return False
    forward = module.__dict__.get("forward")
    return forward is None or is_ours(forward)
