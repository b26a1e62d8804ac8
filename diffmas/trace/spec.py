"""What a trace needs to know of its model, and nothing of transformers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["LayerSpec", "ModelSpec", "check_offload", "spec_of"]

ATTRIBUTE = "diffmas_spec"  # where `patch_model` leaves it on the causal LM; PEFT's wrappers pass attributes on


@dataclass
class LayerSpec:
    """One attention layer. rope: how it rotates its keys: half | interleaved | none | unknown (they cannot be moved).
    head_dim: where q, k and v come as projections leave them (diffmas.ops.fused)."""

    index: int
    rope: str
    head_dim: int | None = field(default=None, init=False, compare=False)
    records: bool = field(
        default=False, init=False, compare=False
    )  # a gradient was recorded in it once: below the first trained weight never

    def __post_init__(self):
        self.number = torch.tensor(self.index)  # for compiled graphs, which specialize on an int


@dataclass
class ModelSpec:
    """layers: by index. backend: of the ops. max_length, why: the most tokens a sequence may hold, and what sets that limit.
    inv_freq: rotary frequencies on a device, [Dr / 2] float32. device: where a layer's rows live. fingerprint: what a file
    of this model's rows depends on, as plain data. anchored: backward goes through all of a forward pass, with zeros where
    nobody used its last hidden state: of tensor parallelism, whose ops on parts of a tensor take no missing gradient. offload:
    where the rows of its traces wait, None (on the device) or "cpu" (diffmas.trace.offload). fused: the backends whose
    kernels its layers may run beside attention (diffmas.ops.layer)."""

    layers: list[LayerSpec]
    backend: str = "auto"
    max_length: int | None = None
    why: str = ""
    inv_freq: Callable[[torch.device], Tensor] | None = None
    device: Callable[[int], torch.device] | None = None
    fingerprint: Callable[[], dict] | None = None
    anchored: bool = False
    offload: str | None = None
    fused: tuple[str, ...] = ()

    def frequencies(self, layer: LayerSpec, device: torch.device) -> Tensor:
        """What turns a layer's keys; raises ValueError where it is not known."""
        if layer.rope not in ("half", "interleaved"):
            raise ValueError(f"layer {layer.index}: cannot move keys: how it rotates them ({layer.rope}) is not known")
        return self.inv_freq(device)


def check_offload(offload: str | None) -> None:
    if offload not in (None, "cpu"):
        raise ValueError(f"offload: expected None or 'cpu', got {offload!r}")


def spec_of(model) -> ModelSpec:
    """The spec of a patched model, or `model` if it is one; raises ValueError for a model that is not patched."""
    spec = model if isinstance(model, ModelSpec) else getattr(model, ATTRIBUTE, None)
    if spec is None:
        raise ValueError(f"model: expected a patched model, got a plain {type(model).__name__}; call diffmas.patch_model first")
    return spec
