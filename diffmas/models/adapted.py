"""What of a model is PEFT's: the base's weights under their own names, the active adapters' tensors, and what is refused.

PEFT replaces a module by a wrapper that holds it, as `base_layer` of a tuner's layer or `original_module` of a module that is
trained as a whole. Whatever else a wrapper holds is an adapter's, of whichever kind.
"""

from collections.abc import Iterator
from operator import attrgetter

from torch import Tensor, nn

from diffmas.models.parts import causal_lm_of
from diffmas.models.support import Unsupported

__all__ = [
    "ByRows", "adapter_state", "adapter_tensors", "base_weights", "check_adapter", "check_adapters", "check_bare", "check_held",
    "check_one_adapter", "is_wrapper", "trained_in_base",
]  # fmt: skip

# Of LoRA's ways to start, those that take the start out of the base model's weight.
RESIDUAL = ("corda", "loftq", "lora_ga", "olora", "pissa")
# PEFT's kinds that need more than their layers: PEFT's own forward, which a forward over a trace does not go through.
OUTSIDE = {
    "POLY": "its task_ids",
    "SHADOW": "a second model beside the layers",
    "XLORA": "a forward of its own that weighs the adapters",
}


class ByRows(tuple):
    """As the active adapter of PEFT's layers: the names of adapters, of which each has a part of a forward's rows, in order
    (diffmas.models.adapter_rows). One may be named several times."""


def is_wrapper(module: nn.Module) -> bool:
    """Whether a module is PEFT's, around one of the base model's."""
    return hasattr(type(module), "adapter_layer_names")


def _wrapped(wrapper: nn.Module) -> tuple[str, nn.Module]:
    """The base model's module inside a wrapper, and its name in there."""
    inner, path = wrapper, []
    while is_wrapper(inner):  # a wrapper of tokens holds a layer that holds the embedding
        modules = dict(inner.named_children())
        path.append(next(name for name in ("base_layer", "original_module", "token_adapter") if name in modules))
        inner = modules[path[-1]]
    return ".".join(path), inner


def _base_modules(module: nn.Module, path: str = "", name: str = "") -> Iterator[tuple[str, str, nn.Module]]:
    """(path in this model, name in the model without adapters, module) of each module of the base; both end in a dot."""
    if is_wrapper(module):
        inside, module = _wrapped(module)
        path += inside + "."
    yield path, name, module
    for child_name, child in module.named_children():
        yield from _base_modules(child, f"{path}{child_name}.", f"{name}{child_name}.")


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and saved buffers of the base model, under the names that they have without adapters."""
    causal_lm = causal_lm_of(model)
    stored, found = causal_lm.state_dict(keep_vars=True), {}
    for path, name, module in _base_modules(causal_lm):
        for key in [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]:
            if path + key in stored:
                found[name + key] = stored[path + key]
    return found


def trained_in_base(model: nn.Module) -> set[str]:
    """The names of the base's weights that an adapter trains where they are (biases), and that its file holds."""
    from peft import get_peft_model_state_dict

    configs = getattr(model, "peft_config", {})
    names = [name for name, config in configs.items() if getattr(config, "bias", "none") != "none"]
    held = set()
    for name in names:
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
        held |= {x.data_ptr() for x in state.values()}
    return {name for name, x in base_weights(model).items() if x.data_ptr() in held} if names else set()


def adapter_state(module: nn.Module) -> tuple:
    """Which adapters the wrappers in a module run: what their output depends on, other than tensors."""
    wrappers = [m for m in module.modules() if is_wrapper(m)]
    return tuple((m.disable_adapters, *_active(m), *_scaling(m), tuple(m.merged_adapters)) for m in wrappers)


def _active(wrapper: nn.Module) -> list[str]:
    return list(wrapper.active_adapters)


def _scaling(wrapper: nn.Module) -> list:
    scaling = vars(wrapper).get("scaling") or {}
    return [scaling.get(name) for name in _active(wrapper)] if isinstance(scaling, dict) else []


def adapter_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the active adapters, each under a name that says where, which in order, and how it is scaled."""
    for name, module in causal_lm_of(model).named_modules():
        if not is_wrapper(module) or module.disable_adapters:
            continue
        inside, _ = _wrapped(module)
        containers = [attrgetter(names)(module) for names in module.adapter_layer_names]
        others = {key for container in containers for key in container.keys()} - set(_active(module))
        scaling = dict(zip(_active(module), _scaling(module)))
        for key, x in [*module.named_parameters(), *module.named_buffers()]:
            parts = key.split(".")
            if key.startswith(inside + ".") or others.intersection(parts):
                continue
            scale = next((scaling[part] for part in parts if part in scaling), None)
            key = ".".join(f"#{_active(module).index(part)}" if part in _active(module) else part for part in parts)
            yield f"{name}.{key}*{scale}", x


def check_adapters(model: nn.Module) -> None:
    """Raises Unsupported for an adapter that a forward over a trace does not run as PEFT does, or that no file holds."""
    for name, config in getattr(model, "peft_config", {}).items():
        check_adapter(config, f"model: adapter {name!r}")


def check_adapter(config, what: str) -> None:
    """`check_adapters` for one PEFT config; what: it is called so."""
    kind = getattr(config.peft_type, "value", config.peft_type)
    if config.is_prompt_learning:
        why = f"{kind} puts virtual tokens or K/V rows of its own into PEFT's forward, which a trace does not go through"
    elif getattr(config, "is_adaption_prompt", False):
        why = f"{kind} puts attention modules of its own in the place of the model's"
    elif kind in OUTSIDE:
        why = f"{kind} needs {OUTSIDE[kind]}, which a forward over a trace does not have"
    elif getattr(config, "alora_invocation_tokens", None):
        why = "alora_invocation_tokens are looked for in PEFT's forward, which a trace does not go through"
    elif getattr(config, "layer_replication", None):
        why = "layer_replication gives several layers the index of one"
    elif (start := str(getattr(config, "init_lora_weights", ""))).lower().startswith(RESIDUAL):
        why = f"init_lora_weights={start!r} takes the adapter's start out of the base's weights, which no adapter's file holds"
    else:
        return
    raise Unsupported(f"{what}: {why}; use plain LoRA, or another kind that works in the model's layers alone")


def check_bare(model: nn.Module) -> None:
    """Raises ValueError if the model without its adapters is not the base model, since they have trained its biases."""
    for name, config in getattr(model, "peft_config", {}).items():
        if getattr(config, "bias", "none") != "none":
            raise ValueError(
                f"model: adapter {name!r}: expected bias='none' where agents run without it, got {config.bias!r}: it trains "
                "biases of the base model where they are"
            )


def check_held(model: nn.Module) -> None:
    """Raises ValueError for a trainable weight of the base model that no adapter's file would hold."""
    for name in sorted(name for name, x in base_weights(model).items() if x.requires_grad):
        if name not in trained_in_base(model):
            raise ValueError(
                f"system: expected trainable parameters that an adapter's file holds, got {name} of the base model; freeze it, "
                "or name its module in the adapter's modules_to_save"
            )


def _choosing_hooks(module: nn.Module) -> list[int]:
    """The hooks by which PEFT hands `adapter_names` to its layers."""
    return [number for number, hook in module._forward_pre_hooks.items() if "adapter_names" in getattr(hook, "keywords", {})]


def check_one_adapter(causal_lm: nn.Module, batch: int) -> None:
    """Raises ValueError if PEFT was told to use adapters by sequence (`adapter_names`), since packed tokens are one row."""
    if batch == 1 or not getattr(causal_lm, "peft_config", None):
        return
    wrapper = next((m for m in causal_lm.modules() if is_wrapper(m)), None)
    if wrapper is not None and _choosing_hooks(wrapper):
        for module in causal_lm.modules():  # PEFT takes its hooks away after a forward, but not after one that raises
            for hook in _choosing_hooks(module):
                module._forward_pre_hooks.pop(hook)
                module._forward_pre_hooks_with_kwargs.pop(hook)
        raise ValueError(
            "adapter_names: expected one adapter for all sequences of a trace, got one for each: their tokens are packed into "
            "one row; use set_adapter, and a trace for each adapter"
        )
