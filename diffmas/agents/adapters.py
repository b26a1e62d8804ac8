"""Which PEFT adapter an agent runs with.

A model has its adapters once, for everybody: who switches them holds the model's lock for as long as they are switched, so that
another thread's forward waits.
"""

import contextlib
import threading
import weakref

from torch import nn

__all__ = ["ADAPTER_SCOPES", "add_lora", "check_checkpointing", "lora_config", "of_agent", "train_roles", "will_switch"]

ADAPTER_SCOPES = ("shared", "per_role", "final_only")


def lora_config(r: int = 8, alpha: int = 16, dropout: float = 0.0, target_modules="all-linear"):
    """PEFT's LoraConfig with the paper's settings: all linear layers of attention and MLP."""
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )  # fmt: skip


def add_lora(model: nn.Module, agents=(), adapter_scope: str = "shared", config=None) -> nn.Module:
    """A PEFT model around `model`: one adapter, or with adapter_scope "per_role" one for each agent, of its name."""
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
    """Makes every role's adapter trainable; PEFT trains the active one only."""
    for name, p in model.named_parameters():
        if any(f".{role}." in name for role in names) and "lora_" in name:
            p.requires_grad_(True)


# Of the models whose adapters some system switches. A lock on the model itself could not be copied or pickled with it.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()


def will_switch(model: nn.Module) -> None:
    """From now on everybody who runs this model with an adapter takes turns."""
    _LOCKS.setdefault(model, threading.RLock())


@contextlib.contextmanager
def of_agent(system, i: int):
    """The adapter that agent i runs with."""
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
