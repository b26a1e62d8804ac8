"""PEFT adapters: making them, and switching to the one that an agent uses.

The active adapter is state of the model, which threads may share: whoever switches it holds the model's lock until it is
switched back, and other threads' forwards wait. A layer that activation checkpointing recomputes in backward, when the adapter
has been switched back, takes the adapter of its forward again.
"""

import contextlib
import copy
import functools
import re
import sys
import threading
import traceback
import warnings
import weakref

import torch
from torch import nn

from diffmas.models.adapted import ByRows, check_adapter, check_bare, is_wrapper
from diffmas.models.adapter_rows import in_place, those_by_rows
from diffmas.models.local import say_features
from diffmas.models.parts import beside_the_text, causal_lm_of
from diffmas.models.patch import patch_of
from diffmas.models.running import rows_here, running

__all__ = [
    "ADAPTER_SCOPES", "add_lora", "by_rows", "is_bare", "lora_config", "name_of", "of_agent", "peft_wraps", "sharing",
    "switched_off", "switched_to", "train_roles", "will_switch",
]  # fmt: skip

ADAPTER_SCOPES = ("shared", "per_role", "final_only")


@contextlib.contextmanager
def peft_wraps():
    """While PEFT puts a model into its own: for that, it asks transformers 5.24 for a name that goes with version 6."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".is_gradient_checkpointing. is deprecated", FutureWarning)
        yield


def lora_config(r: int = 8, alpha: int = 16, dropout: float = 0.0, target_modules="all-linear"):
    """PEFT's LoraConfig. r and alpha are by default those of the DiffMAS paper (arXiv 2604.21794), which does not say which
    layers its LoRA adapts.

    r: rank. alpha: the update is scaled by alpha / r. dropout: probability. target_modules: "all-linear" (of attention and MLP,
    our choice, as no dropout is) or names.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, task_type="CAUSAL_LM"
    )  # fmt: skip


@peft_wraps()
def add_lora(model: nn.Module, agents=(), adapter_scope: str = "shared", config=None) -> nn.Module:
    """A PEFT model around `model`, with one adapter, or with adapter_scope "per_role" one for each role.

    agents: only needed for "per_role", those whose rows the model writes, not an `Other`: the adapters get their roles' names
    (`Agent.adapter`), but with low_rank they have none. config: a PEFT config of any kind that works in the model's layers, by
    default `lora_config()`. In a multimodal model, what text does not go through (vision tower, projector) gets no adapter,
    unless the config has exclude_modules of its own. Raises Unsupported for a kind that works elsewhere, such as prompt tuning.
    """
    from peft import get_peft_model

    config = config or lora_config()
    check_adapter(config, "config")
    beside = beside_the_text(model)
    if beside and not getattr(config, "exclude_modules", None):
        config = copy.copy(config)
        config.exclude_modules = rf"({'|'.join(map(re.escape, beside))})(\..*)?"
    if adapter_scope != "per_role":
        return say_features(get_peft_model(model, config))
    first, *others = dict.fromkeys(agent.adapter for agent in agents if not agent.low_rank)
    model = get_peft_model(model, config, adapter_name=first)
    for name in others:
        model.add_adapter(name, config)
    return say_features(model)


def train_roles(model: nn.Module, names: list[str]) -> None:
    """Makes the adapters of all roles trainable, but those that were loaded frozen; PEFT makes only the active one so."""
    trained = [name for name in names if not model.peft_config[name].inference_mode]
    for wrapper in filter(is_wrapper, model.modules()):
        wrapper.set_requires_grad(trained)


class AdapterLock:
    """A re-entrant lock. Backward takes it in autograd's own threads, one for each GPU, for which whoever called it waits: if
    that is who holds it, they would wait for each other for ever, and it raises RuntimeError instead."""

    PATIENCE = 0.5  # seconds between two looks at what the holder does

    def __init__(self):
        self._lock, self._holders = threading.RLock(), []

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            engine = torch.autograd.graph._engine_run_backward.__code__
            mine = sys._current_frames()[threading.get_ident()]
            # Whoever has called backward itself is no thread of autograd's, and nobody waits for it.
            called = any(frame.f_code is engine for frame, _ in traceback.walk_stack(mine))
            while not self._lock.acquire(timeout=self.PATIENCE):
                holder = sys._current_frames().get(next(iter(self._holders), None))
                if not called and holder is not None and holder.f_code is engine:
                    raise RuntimeError(
                        "backward: expected it outside of switched_to and switched_off, where the layers that activation "
                        "checkpointing recomputes on a GPU wait for the adapters that they hold"
                    )
        self._holders.append(threading.get_ident())

    def __exit__(self, *error) -> None:
        self._holders.pop()
        self._lock.release()


# By causal LM, for those whose adapters somebody switches. As an attribute, a lock would keep the model from being copied.
_LOCKS: weakref.WeakKeyDictionary[nn.Module, AdapterLock] = weakref.WeakKeyDictionary()
_LOCKS_LOCK = threading.Lock()


def will_switch(model: nn.Module) -> AdapterLock:
    """Gives the model a lock, and returns it: from now on forwards that need one of its adapters take turns."""
    with _LOCKS_LOCK:
        return _LOCKS.setdefault(causal_lm_of(model), AdapterLock())


def is_bare(system, i: int) -> bool:
    """Whether agent i, of the system's model, takes its turn without an adapter."""
    return system.agents[i].low_rank or (system.adapter_scope == "final_only" and i < len(system.agents) - 1)


def name_of(system, i: int) -> str | None:
    """The adapter that agent i, of the system's model, takes its turn with; None: the bare model. Raises ValueError where it is
    several at once."""
    if is_bare(system, i):
        return None
    if system.adapter_scope == "per_role":
        return system.agents[i].adapter
    active = next((list(m.active_adapters) for m in system.model.modules() if is_wrapper(m)), [])
    if len(active) > 1:
        raise ValueError(f"model: expected one active adapter, got {active}")
    return active[0] if active else None


def by_rows(system, group: list[int]) -> bool:
    """Whether agents that share a forward have several adapters."""
    own = system.adapter_scope == "per_role" and system.writer(system.agents[group[0]]) is system
    return own and len({system.agents[i].adapter for i in group}) > 1


def sharing(system, levels: list[list[int]]) -> set[str]:
    """The adapters that can have a part of a forward's rows, of agents on a level with those of other adapters."""
    if system.adapter_scope != "per_role" or not system.together:
        return set()
    own = lambda i: system.writer(system.agents[i]) is system and not is_bare(system, i)
    names = [{system.agents[i].adapter for i in level if own(i)} for level in levels]
    names = set().union(*(some for some in names if len(some) > 1))
    return those_by_rows(system.model, patch_of(system.model).attentions, names) if names else names


@contextlib.contextmanager
def of_agent(system, i: int, *others: int):
    """Inside, the model of agent i has that agent's adapter, or by rows those of agent i and of others that share its forward
    (diffmas.models.adapter_rows). Another model than the system's has one for all its agents."""
    model = system.writer(system.agents[i]).model
    own = model is system.model
    if own and is_bare(system, i):
        with switched_off(system.model):
            yield
    elif own and system.adapter_scope == "per_role":
        names = [system.agents[k].adapter for k in (i, *others)]
        with _switched(system.model, _active_adapter=ByRows(names) if by_rows(system, [i, *others]) else names[:1]):
            yield
    else:
        with _LOCKS_LOCK:
            lock = _LOCKS.get(causal_lm_of(model))
        with lock or contextlib.nullcontext():
            yield


def switched_off(model: nn.Module):
    """Inside, the model runs without its adapters, and no other thread runs it: call backward outside. Raises ValueError if it
    is not the base model then."""
    check_bare(model)
    return _switched(model, _disable_adapters=True)


def switched_to(model: nn.Module, adapter: str):
    """Inside, the model runs with the adapter of this name, and no other thread runs it: call backward outside."""
    return _switched(model, _active_adapter=[adapter], _disable_adapters=False)


@contextlib.contextmanager
def _switched(model: nn.Module, **state):
    """Inside, PEFT's layers are in another state, and later in each layer that is recomputed."""
    lock = will_switch(model)
    with lock, contextlib.ExitStack() as stack:
        stack.enter_context(_put(model, state))
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                stack.enter_context(_recomputed_with(module, state, lock))
        yield


@contextlib.contextmanager
def _put(module: nn.Module, state: dict):
    """Inside, PEFT's layers in a module are in another state.

    Not by its set_adapter and disable_adapter: these freeze every adapter that is not active, and autograd adds no gradient
    to a parameter that is frozen when another thread's backward gets there; and they make the active one trainable.
    """
    before = [(m, {name: getattr(m, name) for name in state}) for m in module.modules() if is_wrapper(m)]
    try:
        for m, _ in before:
            if "_active_adapter" in state and getattr(m, "merged", False):
                m.unmerge()  # what is merged runs whichever adapter is active
            vars(m).update(state)
        with in_place(module) if isinstance(state.get("_active_adapter"), ByRows) else contextlib.nullcontext():
            yield
    finally:
        for m, values in before:
            vars(m).update(values)


@contextlib.contextmanager
def _recomputed_with(module: nn.Module, state: dict, lock):
    """Inside, what activation checkpointing keeps of the module to be recomputed, it recomputes with PEFT's layers in this
    state."""
    checkpoint = module._gradient_checkpointing_func
    given = getattr(checkpoint, "keywords", {}).get("context_fn")

    def contexts():
        forward, again = given() if given else (contextlib.nullcontext(), contextlib.nullcontext())
        return forward, Again(module, state, lock, again, running(rows_here(), kernels=False))

    module._gradient_checkpointing_func = functools.partial(checkpoint, context_fn=contexts)
    try:
        yield
    finally:
        module._gradient_checkpointing_func = checkpoint


class Again:
    """A context for each recomputation of a module's layers: the lock, PEFT's layers in their state, and other contexts."""

    def __init__(self, module: nn.Module, state: dict, lock, *others):
        self.module, self.state, self.lock, self.others = module, state, lock, others
        self.entered: list[contextlib.ExitStack] = []

    def __enter__(self) -> None:
        with contextlib.ExitStack() as stack:
            for context in (self.lock, _put(self.module, self.state), *self.others):
                stack.enter_context(context)
            self.entered.append(stack.pop_all())

    def __exit__(self, *error):
        return self.entered.pop().__exit__(*error)
