"""Decoder layers of few rows as one op, or one node of autograd's: all of a body, or one of them.

Reading its weights is most of what such a layer has to do; going from module to module takes as long again, and so does looking
at each of them. So layers are looked at once, and `Witness` tells whether all is still as it was, which is also what keeps
deleted adapters' weights until the next look. The op rounds where the layer
does. What is not of the common kind, hooked, adapted otherwise than with plain LoRA, or replaced runs as it is.
"""

from collections.abc import Callable, Iterator
from operator import is_
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

from diffmas.models.linear_parts import Ours, is_ours, learns
from diffmas.models.plain_layer import hooked_by_others, plain_layer
from diffmas.ops.layer import LayerOps, layer_ops
from diffmas.ops.linear import CPU, FEW_ROWS, Parts
from diffmas.trace.few_rows import Weights, few_rows_layers, ready
from diffmas.trace.few_rows_learning import learning_layers
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["few_rows"]

# What of a module, beside its class and its parameters, says how it computes; looked up by name, since others may stand there.
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
SOME = (
    "variance_epsilon", "scaling", "diffmas_layer", "_active_adapter", "_disable_adapters", "cast_input_dtype_enabled",
    "merged_adapters", "use_dora", "lora_variant",
)  # fmt: skip
DROPOUT = ("p", "training")
LEARNING = ("_backward_hooks", "_backward_pre_hooks")  # with gradients, too
OF_LAYERS = ("gradient_checkpointing", "training")  # the same
UNREAD = ("lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")  # of LoRA's layer of a linear


def _inside(module: nn.Module) -> Iterator[nn.Module]:
    yield module
    for name, child in module._modules.items():
        if child is not None and name not in UNREAD:
            yield from _inside(child)


class Witness:
    """What modules are, with all that is in them, when it is made. Parameters are the same as long as they, and their memory,
    are; their numbers may change."""

    def __init__(self, layers: list[nn.Module], learning: bool = False):
        self._registered = RemovableHandle.next_id  # before hooks are looked at
        modules, hooks = [x for layer in layers for x in _inside(layer)], HOOKS + (LEARNING if learning else ())
        self._modules, self._types = modules, list(map(type, modules))
        self._classes = list(dict.fromkeys(self._types))
        self._forwards = [x.forward for x in self._classes]
        called = [vars(m) for m in modules if type(m) is not nn.ModuleDict]
        hooks = [(own, name) for own in called for name in hooks]
        self._hooks, self._hook_values = [*zip(*hooks)], [dict(own.get(name) or ()) for own, name in hooks]
        self._watched = [(own, "forward") for own in called]
        self._watched += [(own, name) for own, name in hooks if own.get(name)]  # which may be removed
        self._watched += [(vars(m), "_modules") for m in modules if m._modules]
        self._watched += [(vars(m), name) for m in modules for name in SOME if name in vars(m)]
        self._watched += [(vars(m), name) for m in modules if type(m) is nn.Dropout for name in DROPOUT]
        self._watched += [(vars(m), name) for m in layers if learning for name in OF_LAYERS]
        self._watched = [*zip(*self._watched)]
        self._values = [x.copy() if isinstance(x, (dict, list)) else x for x in self._looked_up()]
        self._places = [*zip(*((m._parameters, name) for m in modules for name in m._parameters))]
        self._parameters = self._those_there()
        self._tensors = [x for x in self._parameters if x is not None]
        self._learning, self._memory = learning, []
        self._memory = self._in_memory()

    def _looked_up(self) -> list:
        return list(map(dict.get, *self._watched))

    def _those_there(self) -> list:
        return list(map(dict.get, *self._places))

    def _in_memory(self) -> list:
        found = [*map(Tensor.data_ptr, self._tensors), *map(Tensor.is_contiguous, self._tensors)]
        return found + [*map(needs_grad, self._tensors)] if self._learning else found

    def _hooks_hold(self) -> bool:
        """Half of what there is to look at: hooks are compared when one was registered since, of any tensor or module. Those
        that somebody puts into a module's dictionaries without a handle are not seen before."""
        registered = RemovableHandle.next_id
        if registered != self._registered:
            if list(map(dict.get, *self._hooks)) != self._hook_values:
                return False
            self._registered = registered
        return True

    def holds(self) -> bool:
        """Whether all is still so. Loops in C, as far as there are some (docs/log.md has what it takes)."""
        return (
            list(map(type, self._modules)) == self._types
            and self._looked_up() == self._values
            and self._hooks_hold()
            and [x.forward for x in self._classes] == self._forwards
            and all(map(is_, self._those_there(), self._parameters))
            and self._in_memory() == self._memory
        )


needs_grad = Tensor.requires_grad.__get__


class Plain(NamedTuple):
    """Layers of the common kind: the attention modules, and their weights as the op takes them."""

    attentions: list[nn.Module]
    weights: Weights


class Looked(NamedTuple):
    """What layers were when they were looked at. plain: None where one of them is not, or where they are not alike."""

    layers: list[nn.Module]
    dtype: torch.dtype
    witness: Witness
    plain: Plain | None

    def holds(self, layers: list[nn.Module], dtype: torch.dtype) -> bool:
        same = dtype == self.dtype and len(layers) == len(self.layers) and all(map(is_, layers, self.layers))
        return same and self.witness.holds()


def _look(ours: Ours, layers: list[nn.Module], kernels: LayerOps, learning: bool) -> Looked:
    # First: what another thread changes meanwhile is seen, at the latest by the next forward.
    witness = Witness(layers, learning)
    return Looked(list(layers), kernels.dtype, witness, _plain(ours, layers, kernels, learning))


def _forget(layer: nn.Module) -> None:
    """What a layer saw of itself when it went alone, and its weights."""
    forward = layer.__dict__.get("forward")
    if is_ours(forward):
        forward.__self__.__dict__.pop("looked", None)


def _plain(ours: Ours, layers: list[nn.Module], kernels: LayerOps, learning: bool) -> Plain | None:
    for layer in layers:
        if layer is not ours.module and (hooked_by_others(layer) or not is_ours(layer.__dict__.get("forward"))):
            return None  # it has to be called
        if learning and layer.training and getattr(layer, "gradient_checkpointing", False):
            return None
    found, heads = [], []
    for layer in layers:
        plain = plain_layer(layer, kernels)
        norms = None if plain is None else _head_norms(plain.attention)
        if norms is None or (learning and not _waits(plain.linears, norms)):
            return None
        found.append(plain)
        heads.append(norms)
    specs = [x.attention.diffmas_layer for x in found]
    alike = [
        {(spec.family, spec.rope, spec.head_dim, x.attention.scaling) for spec, x in zip(specs, found)},
        {eps for norms in heads for _, eps in norms},
        {x.linears[0].weight.shape[0] for x in found},
        {x.linears[1].weight.shape[0] for x in found},
    ]
    if any(len(x) > 1 for x in alike) or specs[0].head_dim is None:
        return None
    weights = Weights(alike[-1].pop(), max([1, *(len(part.adapters) for x in found for part in x.linears)]))
    for plain, norms in zip(found, heads):
        weights.add(plain.linears, [*plain.norms, *norms], learning)
    return Plain([x.attention for x in found], weights)


def _waits(linears: list[Parts], norms: list[tuple]) -> bool:
    """Whether all that a layer trains are adapters whose gradients can wait for the end of a run: not where autograd gives them
    to aliases that tell one step's from another's (diffmas.agents.gradients, diffmas.agents.learning)."""
    if any(weight.requires_grad for weight, _ in norms):
        return False
    learn = [part.adapters for part in linears if learns(part.adapters)]
    return all(x.requires_grad and x.is_leaf for adapters in learn for a, b, _ in adapters for x in (a, b))


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
    kernels = layer_ops(x, forward_pass.work.spec.fused)
    if kernels is None or kernels.ops is not CPU or x.dim() != 3 or not 0 < x.shape[1] <= FEW_ROWS or not x.is_contiguous():
        return None
    learning = torch.is_grad_enabled()
    if _has_any_global_hook() or (learning and not x.requires_grad):
        return None
    known = ours.__dict__.setdefault("looked", {})
    looked = known.get(learning)
    if looked is None or not looked.holds(layers, x.dtype):
        ours.looked = known = {k: x for k, x in known.items() if x.holds(x.layers, x.dtype)}  # whose adapters may be gone
        for layer in layers if len(layers) > 1 else ():
            _forget(layer)
        looked = known[learning] = _look(ours, layers, kernels, learning)
    if looked.plain is None:
        return None
    attentions, weights = looked.plain
    if weights.adapters > 1 and len(forward_pass.work.adapter_ends or ()) != weights.adapters:
        return None  # the linears tell what is wrong
    first, specs = attentions[0], [x.diffmas_layer for x in attentions]
    scaled = specs[0].family.query_scale
    if scaled is not None and not bool((scaled(first, position_ids) == 1).all()):
        return None
    if (found := tables()) is None:
        return None
    if learning:
        return learning_layers(forward_pass, specs, x, weights, *found, first.scaling)
    if not ready(forward_pass.work, specs, x.device):
        return None
    return few_rows_layers(forward_pass.work, specs, x, weights, *found, first.scaling)[0]
