"""Whether something happens in a model's forward and backward that a graph of their kernels would not repeat."""

from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.compiled import CompiledForward
from diffmas.models.plain_layer import hooked_by_others

__all__ = ["hooked", "is_compiled", "observed", "random_state"]


def observed(modules: Collection[nn.Module], own: Collection[int | None] = ()) -> bool:
    """Whether somebody hooks into the modules or their trainable parameters, packs what is saved for backward, checkpoints
    layers or compiles them. own: the ids of hooks that do not count."""
    return (
        hooked(modules, own)
        or torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
        or any(is_compiled(m) or (m.training and getattr(m, "gradient_checkpointing", False)) for m in modules)
        or any(p is not None and p.requires_grad and p._backward_hooks for m in modules for p in m._parameters.values())
    )


def hooked(modules: Iterable[nn.Module], own: Collection[int | None] = ()) -> bool:
    """Whether somebody hooks into the calls of modules. own: as in `observed`."""
    return _has_any_global_hook() or any(hooked_by_others(m, own) for m in modules)


def is_compiled(module: nn.Module) -> bool:
    """Whether somebody compiles its forward."""
    forward = module.__dict__.get("forward")
    ours = isinstance(getattr(forward, "__self__", None), CompiledForward)
    return ours or module._compiled_call_impl is not None or hasattr(forward, "_torchdynamo_orig_callable")


def random_state(device: torch.device) -> tuple[Tensor, ...]:
    """By which it can be told whether random numbers were drawn, on the CPU or a device."""
    return torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
