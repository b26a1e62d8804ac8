"""Decoder layers of few rows, without gradients, as one op: all of a body, or one of them.

Reading its weights is most of what such a layer has to do; going from module to module takes as long again, and so does looking
at each of them. So layers are looked at once, and `Witness` tells whether all is still as it was. The op rounds where the layer
does. What is not of the common kind, hooked, adapted otherwise than with plain LoRA, or replaced runs as it is.
"""

from collections.abc import Callable
from operator import is_

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.linear_parts import Ours, is_lora, is_ours
from diffmas.models.plain_layer import plain_layer
from diffmas.ops.linear import FEW_ROWS
from diffmas.trace.few_rows import Weights, few_rows_layers
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["few_rows"]

# What of a module, beside its class, its children, its hooks and what LoRA's has in lists and dicts, says how it computes.
WATCHED = ("variance_epsilon", "scaling", "diffmas_layer", "_active_adapter", "_disable_adapters", "cast_input_dtype_enabled")
DROPOUT = ("p", "training")


class Witness:
    """What modules are, with all that is in them, when it is made. Parameters are the same as long as they, and their memory,
    are; their numbers may change."""

    def __init__(self, modules: list[nn.Module]):
        modules = [x for module in modules for x in module.modules()]
        self._modules, self._types = modules, list(map(type, modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = [x.forward for x in self._classes]
        inside = [x for m in modules for x in (m._forward_hooks, m._forward_pre_hooks, m._modules)]
        own = [pair for m in modules if is_lora(m) for pair in vars(m).items()]
        inside += [x for name, x in own if name[0] != "_" and type(x) in (dict, list)]
        self._inside, self._copies = inside, [x.copy() for x in inside]
        self._watched = [(vars(m), name) for m in modules for name in WATCHED if name in vars(m)]
        self._watched += [(vars(m), name) for m in modules if type(m) is nn.Dropout for name in DROPOUT]
        self._watched += [(vars(m), "forward") for m in modules]
        self._values = [x.copy() if type(x) in (dict, list) else x for x in self._looked_up()]
        self._places = [(m._parameters, name) for m in modules for name, x in m._parameters.items() if x is not None]
        self._tensors = [x[name] for x, name in self._places]
        self._pointers = list(map(Tensor.data_ptr, self._tensors))

    def _looked_up(self) -> list:
        return [own.get(name) for own, name in self._watched]

    def holds(self) -> bool:
        """Whether all is still so. Loops over a model's modules in C: 30 layers take as long as one product of theirs."""
        return (
            self._inside == self._copies
            and list(map(type, self._modules)) == self._types
            and self._looked_up() == self._values
            and [x.forward for x in self._classes] == self._forwards
            and all(map(is_, [x.get(name) for x, name in self._places], self._tensors))
            and list(map(Tensor.data_ptr, self._tensors)) == self._pointers
        )


class Plain:
    """Layers of the common kind: their weights as the op takes them, and the attention modules."""

    def __init__(self, attentions: list[nn.Module], weights: Weights, witness: Witness, dtype: torch.dtype):
        self.attentions, self.weights, self.witness, self.dtype = attentions, weights, witness, dtype
        self.specs = [x.diffmas_layer for x in attentions]

    def holds(self, dtype: torch.dtype) -> bool:
        return dtype == self.dtype and self.witness.holds()


def _plain(ours: Ours, layers: list[nn.Module], dtype: torch.dtype) -> Plain | None:
    """None where one of the layers is not, or where they are not alike."""
    for layer in layers:
        hooked = layer._forward_hooks or layer._forward_pre_hooks
        if layer is not ours.module and (hooked or not is_ours(layer.__dict__.get("forward"))):
            return None  # it has to be called
    weights, attentions = Weights(), []
    for layer in layers:
        attention = _add(weights, layer, dtype)
        if attention is None:
            return None
        attentions.append(attention)
    specs = [x.diffmas_layer for x in attentions]
    same = {(x.family, x.rope, x.head_dim) for x in specs}, {x.scaling for x in attentions}, set(weights.head_eps)
    if any(len(x) > 1 for x in same) or None in [x.head_dim for x in specs]:
        return None
    return Plain(attentions, weights, Witness(layers), dtype)


def _add(weights: Weights, layer: nn.Module, dtype: torch.dtype) -> nn.Module | None:
    """Adds a layer's weights; its attention, or None where it is not of the common kind."""
    plain = plain_layer(layer, dtype)
    if plain is None:
        return None
    attention, norms, linears = plain
    heads = _head_norms(attention)
    if heads is None:
        return None
    for parts in linears:
        weights.add_linear(*parts)
    weights.add_norms([*norms, *heads])
    return attention


def _head_norms(attention: nn.Module) -> list[tuple] | None:
    """Weight and eps of those of q and k, where there are some; None where somebody brings their weights, or parts of them."""
    if not attention.diffmas_layer.family.norm:
        return []
    norms = [attention._modules[name] for name in ("q_norm", "k_norm")]
    weights = [x._parameters.get("weight") for x in norms]
    if any("forward" in vars(x) for x in norms) or any(type(w) is not nn.Parameter or not w.is_cpu for w in weights):
        return None
    return [(w, x.variance_epsilon) for w, x in zip(weights, norms)]


def few_rows(
    ours: Ours, layers: list[nn.Module], forward_pass: ForwardPass, x: Tensor,
    tables: Callable[[], tuple[Tensor, Tensor] | None], position_ids: Tensor | None,
) -> Tensor | None:  # fmt: skip
    """What decoder layers, one after the other, make of x [1, n, hidden]; None where they have to do it.

    ours: the one whose forward asks, who keeps what was looked at. tables: gives cos and sin [1, n, Dr].
    """
    if type(x) is not Tensor or not x.is_cpu or x.dim() != 3 or not 0 < x.shape[1] <= FEW_ROWS or not x.is_contiguous():
        return None
    if _has_any_global_hook():
        return None
    plain = ours.__dict__.get("plain")
    if plain is None or not plain.holds(x.dtype):
        plain = ours.plain = _plain(ours, layers, x.dtype)
        if plain is None:
            return None
    first = plain.attentions[0]
    scaled = plain.specs[0].family.query_scale
    if scaled is not None and not bool((scaled(first, position_ids) == 1).all()):
        return None
    if (found := tables()) is None:
        return None
    return few_rows_layers(forward_pass.work, plain.specs, x, plain.weights, *found, first.scaling)
