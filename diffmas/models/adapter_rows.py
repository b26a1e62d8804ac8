"""Adapters that have rows of their own: agents with an adapter each, in one forward over their packed tokens.

The weights are read once for all of them, and each adapter takes its part of the rows. PEFT's layers say which adapters they
are (`ByRows`, as their active adapter), the forward pass where the rows of each end (`adapter_ends`). Plain LoRA goes through
the kernels (diffmas.models.linears), what else LoRA does through torch. It rounds as PEFT does: the base layer's output, and
the sum.
"""

import contextlib
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor, nn

from diffmas.models.adapted import is_wrapper
from diffmas.models.linear_parts import Ours, is_hooked, is_lora, is_ours
from diffmas.models.observers import is_compiled
from diffmas.models.parts import causal_lm_of
from diffmas.models.running import rows_here
from diffmas.ops.linear import rows_of

__all__ = ["adapters_by_rows", "in_place", "those_by_rows"]


def adapters_by_rows(module: nn.Module, x: Tensor) -> Tensor:
    """What PEFT's LoRA layer makes of packed tokens x [.., in], with each adapter for its rows; [.., out]."""
    y = module.base_layer(x)
    if module.disable_adapters:
        return y
    names, here = module.active_adapters, rows_here()
    ends = None if here is None else here.work.adapter_ends
    parts = []
    for name, own, part in zip(names, *(rows_of(names, ends, z.reshape(-1, z.shape[-1])) for z in (x, y))):
        if name in module.lora_A and len(own):
            down, up, dropout = (modules[name] for modules in (module.lora_A, module.lora_B, module.lora_dropout))
            if getattr(module, "cast_input_dtype_enabled", True):
                own = own.to(down.weight.dtype)
            part = part + up(down(dropout(own))) * module.scaling[name]
        parts.append(part.to(y.dtype))
    return torch.cat(parts).view(y.shape)


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


def those_by_rows(model: nn.Module, attentions: Iterable[nn.Module], names: set[str]) -> set[str]:
    """The adapters of these that a forward can give rows of their own: if all that PEFT does to the model is LoRA, of linears
    that see all packed tokens in their order, and nobody compiles them, or casts what is between. attentions: the model's."""
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return set()
    inner, found = {id(x) for x in attentions}, [*_around(causal_lm_of(model), [])]
    layers = {id(above[-1]) for module, above in found if id(module) in inner}
    for module, above in found:
        if is_compiled(module):
            return set()
        if is_wrapper(module):
            # In a layer's attention, or in its MLP, as transformers' classes are called: an expert, which is deeper in it,
            # sees some tokens only.
            in_mlp = len(above) > 1 and type(above[-1]).__name__.endswith("MLP") and id(above[-2]) in layers
            if not (in_mlp or id(above[-1]) in inner) or not _is_plain(module):
                return set()
            names = {name for name in names if name not in _variants(module) and not module.use_dora.get(name)}
    return names


def _around(module: nn.Module, above: list[nn.Module]) -> Iterator[tuple[nn.Module, list[nn.Module]]]:
    """The modules in one, and what each is in; not what is in PEFT's."""
    yield module, above
    if not is_wrapper(module):
        for child in module.children():
            yield from _around(child, [*above[-1:], module])


def _variants(module: nn.Module) -> Collection[str]:
    """The adapters that do more than LoRA."""
    return getattr(module, "lora_variant", ())


def _is_plain(module: nn.Module) -> bool:
    """Whether PEFT's layer is LoRA of a linear, as it is."""
    if not is_lora(module) or is_hooked(module) or module.merged_adapters or module.disable_adapters:
        return False
    return "forward" not in vars(module) or is_ours(vars(module)["forward"])
