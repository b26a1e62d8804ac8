"""What a linear layer of a model is made of, where it and its adapter are of the kind that the kernels take.

Looked at in each forward: adapters are switched, merged, hooked and replaced.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.adapted import ByRows
from diffmas.ops.layer import LayerOps
from diffmas.ops.linear import Adapter, Parts, lora_grads
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.lora_run import LoraRun

__all__ = [
    "Learning", "Ours", "is_hooked", "is_lora", "is_ours", "learning", "learning_of", "learns", "lora_grads_of", "parts_of",
    "unseen_parts",
]  # fmt: skip


class Ours:
    """Whoever has a method in the place of a module's forward."""

    def __init__(self, module: nn.Module):
        self.module = module

    def __getstate__(self) -> dict:
        return {"module": self.module}  # a copy finds out for itself what it keeps beside it


def is_ours(forward) -> bool:
    """Whether a forward that was found on a module is such a method."""
    return isinstance(getattr(forward, "__self__", None), Ours)


def is_hooked(module: nn.Module) -> bool:
    """Whether anybody hooks into it."""
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def is_lora(module: nn.Module) -> bool:
    """Whether it is PEFT's LoRA layer of a linear."""
    kind = type(module)
    return kind.__name__ == "Linear" and kind.__module__ == "peft.tuners.lora.layer"


def _bare(module: nn.Module) -> bool:
    """Whether a module is a plain Linear that nobody hooks into."""
    forward = module.__dict__.get("forward")
    return type(module) is nn.Linear and not is_hooked(module) and (forward is None or is_ours(forward))


def parts_of(module: nn.Module, kernels: LayerOps) -> Parts | None:
    """A linear's; None where the module must run as it is. Its class may have changed: torch's parametrizations do that."""
    if type(module) is nn.Linear:
        return _plain_parts(module, kernels)
    return _lora_parts(module, kernels) if is_lora(module) else None


def unseen_parts(module: nn.Module, kernels: LayerOps) -> Parts | None:
    """The same, None too where anybody sees what goes in and comes out, or has a forward of their own there."""
    return None if is_hooked(module) or not is_ours(module.__dict__.get("forward")) else parts_of(module, kernels)


def _plain_parts(module: nn.Module, kernels: LayerOps) -> Parts | None:
    """The same of a linear."""
    weight, bias = module._parameters.get("weight"), module._parameters["bias"]  # None: torch's weight_norm has taken it away
    if type(weight) is not nn.Parameter or (weight.requires_grad and torch.is_grad_enabled()):
        return None
    if not kernels.takes_weight(weight):
        return None
    if bias is not None and ((bias.requires_grad and torch.is_grad_enabled()) or not kernels.takes_weight(bias)):
        return None
    return Parts(weight, bias)


def _lora_parts(module: nn.Module, kernels: LayerOps) -> Parts | None:
    """The same of PEFT's LoRA layer."""
    modules = module._modules
    base = modules["base_layer"]
    if module.merged_adapters or not _bare(base) or _has_any_global_hook():
        return None
    parts = _plain_parts(base, kernels)
    if parts is None or module.disable_adapters:
        return parts
    active = module.active_adapters
    names = [name for name in active if name in modules["lora_A"]._modules]
    if not names:
        return parts
    if not isinstance(active, ByRows):
        adapter = _adapter(module, names[0], kernels) if len(names) == 1 else None
        return None if adapter is None else Parts(parts[0], parts[1], (adapter,))
    adapters = [_adapter(module, name, kernels) for name in names] if len(names) == len(active) else [None]
    return None if any(x is None for x in adapters) else Parts(parts[0], parts[1], tuple(adapters))


def _adapter(module: nn.Module, name: str, kernels: LayerOps) -> Adapter | None:
    """One of the adapters of PEFT's LoRA layer; None where it is not plain LoRA."""
    modules = module._modules
    if name in getattr(module, "lora_variant", ()) or module.use_dora.get(name):
        return None
    a_module, b_module, dropout = (modules[kind]._modules[name] for kind in ("lora_A", "lora_B", "lora_dropout"))
    if not _bare(a_module) or not _bare(b_module) or b_module._parameters["bias"] is not None:
        return None
    if dropout._forward_hooks or dropout._forward_pre_hooks:
        return None
    if type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or (dropout.p and dropout.training)):
        return None
    a, b = a_module._parameters["weight"], b_module._parameters["weight"]
    if a.dtype != torch.float32 or b.dtype != torch.float32 or not getattr(module, "cast_input_dtype_enabled", True):
        return None
    if a.device != kernels.device or b.device != kernels.device or not a.is_contiguous() or not b.is_contiguous():
        return None
    return Adapter(a, b, module.scaling[name])


class Learning(NamedTuple):
    """How an adapter's weights get their gradients. inputs: those of a node, a token of the run that they wait for the end of,
    or a and b, where they are trained; run, number: where a run keeps what gradients are made of, and under which number."""

    inputs: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
    run: LoraRun | None = None
    number: int = 0


def learns(adapters: Sequence[Adapter]) -> bool:
    return any(a.requires_grad or b.requires_grad for a, b, _ in adapters)


def learning(adapter: Adapter, forward_pass: ForwardPass, ops) -> Learning:
    """ops: for `lora_grads`. Gradients do not wait outside of a run, nor where autograd gives them to aliases that tell one
    step's from another's, not to the parameters alone (diffmas.agents.gradients, diffmas.agents.learning)."""
    a, b, scale = adapter
    deferred = forward_pass.work.deferred
    trained = a.requires_grad and b.requires_grad and a.is_leaf and b.is_leaf
    if not trained or deferred is None or not forward_pass.order.requires_grad:
        # a torch function, which whoever gives aliases of parameters sees
        return Learning((None, *(w.view_as(w) if w.requires_grad else None for w in (a, b))))
    if deferred.lora is None:
        deferred.lora = LoraRun()
    token, number = deferred.lora.token(a, b, scale, ops)
    return Learning((token, None, None), deferred.lora, number)


def learning_of(adapters: Sequence[Adapter], forward_pass: ForwardPass, ops) -> tuple[list, list[tuple]]:
    """Of all adapters one after the other `Learning.inputs`; and run and number of each."""
    found = [learning(adapter, forward_pass, ops) for adapter in adapters]
    return [x for one in found for x in one.inputs], [one[1:] for one in found]


def lora_grads_of(wanted, run: LoraRun | None, number: int, x, u, dy, v, b, scale: float, ops) -> tuple:
    """The gradients to `Learning.inputs`. wanted: which of them are; x [.., in], u and dy [.., out] as `linear` has them; v:
    dy b, or None where nobody needed it yet."""
    if not any(wanted):
        return None, None, None
    x, dy = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    if v is None:
        with torch.autocast(dy.device.type, enabled=False):  # which the forward was not under either
            v = dy.to(b.dtype) @ b
    if wanted[0]:
        run.keep(number, x, u, dy, v)
        return None, None, None
    da, db = lora_grads(x, u, dy, v, scale, ops)
    return None, da if wanted[1] else None, db if wanted[2] else None
