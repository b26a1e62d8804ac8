"""The options of a system, in one place: their names, defaults and values."""

import json
from dataclasses import dataclass

from diffmas.trace.views import SINKS

__all__ = ["Options"]

CHOICES = {
    "realign": ("none", "norm", "ridge", "soft_token", "learned"),
    "grad_scope": ("full", "detach_trace", "last_k"),
    "trace_content": ("all", "latent_only"),
    "adapter_scope": ("shared", "per_role", "final_only"),
    "no_latents": ("prompt", "skip"),
    "positions": ("keep", "reindex"),
}


@dataclass(frozen=True)
class Options:
    """How agents communicate and which of them are trained; see `MultiAgentSystem` for each field.

    Also the keys of agents.json and of the section `system` in config.yaml. Raises ValueError naming a field whose value is
    not one of its choices; `temperature` is checked by `diffmas.agents.realign`, `chat_options` against the template by
    `diffmas.agents.chat`.
    """

    realign: str = "ridge"
    grad_scope: str = "full"
    trace_content: str = "all"
    last_k: int | None = None
    adapter_scope: str = "shared"
    no_latents: str = "prompt"
    positions: str = "keep"
    chat_template: bool | None = None
    temperature: float = 1.0
    sinks: int = SINKS
    chat_options: dict | None = None
    latent_grad_clip: float | None = None

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}: expected one of {choices}, got {value!r}")
        if not isinstance(self.sinks, int) or isinstance(self.sinks, bool) or self.sinks < 0:
            raise ValueError(f"sinks: expected an integer >= 0, got {self.sinks!r}")
        clip = self.latent_grad_clip
        if clip is not None and (isinstance(clip, bool) or not isinstance(clip, (int, float)) or not clip > 0):
            raise ValueError(f"latent_grad_clip: expected a positive number or None, got {clip!r}")
        if self.chat_options is not None and not _plain(self.chat_options):
            raise ValueError(f"chat_options: expected a dict of what JSON can hold, got {self.chat_options!r}")

    def agents_without_grad(self, agents: int) -> int:
        """How many of the first agents run without gradients; raises ValueError if last_k does not fit to that many agents."""
        fits = self.last_k is None if self.grad_scope != "last_k" else self.last_k is not None and 1 <= self.last_k <= agents
        if not fits:
            raise ValueError(f"last_k: expected 1 to {agents} with grad_scope='last_k' and None otherwise, got {self.last_k!r}")
        return {"full": 0, "detach_trace": agents - 1}.get(self.grad_scope, agents - (self.last_k or 0))


def _plain(options) -> bool:
    """Whether `options` is a dict that agents.json gives back as it was."""
    try:
        return isinstance(options, dict) and json.loads(json.dumps(options)) == options
    except (TypeError, ValueError):
        return False
