"""LoRA adapters: making them, and switching to the one that an agent uses.

The active adapter is state of the model, which threads may share: whoever switches it holds the model's lock until it is
switched back, and other threads' forwards wait.
"""

import contextlib
import threading
import weakref

from torch import nn

__all__ = ["ADAPTER_SCOPES", "add_lora", "check_checkpointing", "lora_config", "of_agent", "train_roles", "will_switch"]

ADAPTER_SCOPES = ("shared", "per_role", "final_only")


def lora_config(r: int = 8, alpha: int = 16, dropout: float = 0.0, target_modules="all-linear"):
    """PEFT's LoraConfig, by default with the paper's settings (arXiv 2604.21794): all linear layers of attention and MLP.

    r: rank. alpha: the update is scaled by alpha / r. dropout: probability. target_modules: "all-linear" or names.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )  # fmt: skip


def add_lora(model: nn.Module, agents=(), adapter_scope: str = "shared", config=None) -> nn.Module:
    """A PEFT model around `model`, with one adapter, or with adapter_scope "per_role" one for each agent.

    agents: only needed for "per_role": the adapters get their names. config: a PEFT config, by default `lora_config()`.
    """
    from peft import get_peft_model

    config = config or lora_config()
    if adapter_scope != "per_role":
        return get_peft_model(model, config)
    first, *others = [agent.name for agent in agents]
    model = get_peft_model(model, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    return model


def train_roles(model: nn.Module, names: list[str]) -> None:
    """Makes the adapters of all roles trainable; PEFT makes only the active one so."""
    for name, p in model.named_parameters():
        if any(f".{role}." in name for role in names) and "lora_" in name:
            p.requires_grad_(True)


# By model, for those whose adapters a system switches. As an attribute, a lock would keep the model from being copied.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def will_switch(model: nn.Module) -> None:
    """Gives the model a lock: from now on forwards that need one of its adapters take turns."""
    _LOCKS.setdefault(model, threading.RLock())


@contextlib.contextmanager
def of_agent(system, i: int):
    """Inside, the system's model has the adapter of agent i."""
    model = system.model
    with _LOCKS.get(model) or contextlib.nullcontext():
        if system.adapter_scope == "final_only" and i < len(system.agents) - 1:
            with model.disable_adapter():
                yield
        elif system.adapter_scope == "per_role":
            trainable, before = [p for p in model.parameters() if p.requires_grad], model.active_adapter
            try:
                model.set_adapter(system.agents[i].name)
                yield
            finally:
                model.set_adapter(before)
                for p in trainable:  # set_adapter freezes the others, whose gradients are still to come
                    p.requires_grad_(True)
        else:
            yield


def check_checkpointing(system) -> None:
    """Raises RuntimeError where layers would be recomputed with another agent's adapter."""
    if system.adapter_scope == "shared" or not system.training:
        return
    if any(getattr(m, "gradient_checkpointing", False) for m in system.model.modules()):
        raise RuntimeError(
            f"adapter_scope {system.adapter_scope!r} does not go with activation checkpointing: layers would be "
            "recomputed with another agent's adapter"
        )
