"""Adapters that have rows of their own: agents with an adapter each, in one forward over their packed tokens.

The weights are read once for all of them, and each adapter takes its part of the rows. PEFT's layers say which adapters they
are (`ByRows`, as their active adapter), the forward pass where the rows of each end (`adapter_ends`). Plain LoRA goes through
the kernels (diffmas.models.linears), what else LoRA does through torch. It rounds as PEFT does: the base layer's output, and
the sum.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from diffmas.models.adapted import is_wrapper
from diffmas.models.linear_parts import Ours, is_hooked, is_lora, is_ours
from diffmas.models.observers import is_compiled
from diffmas.models.parts import attention_layers, body_of, causal_lm_of
from diffmas.models.running import forward_pass_here
from diffmas.ops.linear import rows_of

__all__ = ["adapters_by_rows", "can_go_by_rows", "in_place"]


def _rows_of(module: nn.Module, x: Tensor) -> list[tuple[str, slice]]:
    """The rows of x [1, n, length] that each adapter of the module has."""
    names, here = module.active_adapters, forward_pass_here()
    return list(zip(names, rows_of(names, None if here is None else here.work.adapter_ends, x.numel() // x.shape[-1])))


def adapters_by_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What PEFT's LoRA layer makes of x [1, n, in], with each adapter for its rows; [1, n, out]."""
    y, parts = module.base_layer(x), []
    for name, rows in _rows_of(module, x):
        part = y[..., rows, :]
        if name in module.lora_A and part.shape[-2]:
            down, up, dropout = (modules[name] for modules in (module.lora_A, module.lora_B, module.lora_dropout))
            own = x[..., rows, :]
            if getattr(module, "cast_input_dtype_enabled", True):
                own = own.to(down.weight.dtype)
            part = part + up(down(dropout(own))) * module.scaling[name]
        parts.append(part.to(y.dtype))
    return torch.cat(parts, -2)


class AdapterRows(Ours):
    """The forward of PEFT's LoRA layer in a model whose linears run as they are."""

    def forward(self, x: Tensor) -> Tensor:
        return adapters_by_rows(self.module, x)


@contextlib.contextmanager
def in_place(model: nn.Module) -> Iterator[None]:
    """Inside, layers whose forward is PEFT's own give each of their adapters its rows."""
    modules = [m for m in model.modules() if is_wrapper(m) and "forward" not in vars(m)]
    try:
        for module in modules:
            module.forward = AdapterRows(module).forward
        yield
    finally:
        for module in modules:
            del module.forward


def can_go_by_rows(model: nn.Module, name: str) -> bool:
    """Whether a forward can give an adapter rows of its own: if all that PEFT does to the model is LoRA, of linears that see
    all packed tokens in their order, and nobody compiles them, or casts what is between."""
    device = next(model.parameters()).device
    if torch.is_autocast_enabled(device.type):
        return False
    lm = causal_lm_of(model)
    attentions = {id(x) for x in attention_layers(body_of(lm))}
    inside = {id(child): module for module in lm.modules() for child in module.children()}
    layers = {id(inside[x]) for x in attentions}
    for module in lm.modules():
        if is_compiled(module):
            return False
        if not is_wrapper(module):
            continue
        above = inside[id(module)]
        # In a layer's attention, or in its MLP: an expert, which is deeper in it, sees some tokens only.
        in_layer = type(above).__name__.endswith("MLP") and id(inside.get(id(above))) in layers
        placed = id(above) in attentions or in_layer
        if not placed or not _is_plain(module, name):
            return False
    return True


def _is_plain(module: nn.Module, name: str) -> bool:
    """Whether PEFT's layer is LoRA of a linear, and with this adapter adds to it and nothing else."""
    if not is_lora(module) or is_hooked(module) or module.merged_adapters or module.disable_adapters:
        return False
    if "forward" in vars(module) and not is_ours(vars(module)["forward"]):
        return False
    return name not in getattr(module, "lora_variant", ()) and not module.use_dora.get(name)
