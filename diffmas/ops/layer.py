"""Which kernels a decoder layer runs beside attention: `linear`, `add_lora`, `lora_grad`, `norm`, `gate` and their backwards
(diffmas.ops.schemas). The one place that decides it: by backend, device, dtype and shape.

The CPU's are on by default, being exact and faster than torch's and PEFT's own in every case that was timed. Triton's have run
on no GPU yet: they are there for who asks for them.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from diffmas.ops.backends import AUTO, BACKENDS
from diffmas.ops.checks import FLOATS

__all__ = ["LayerOps", "kernels_for", "layer_ops", "usable"]

# What the backends take: dtypes, and what lengths of rows are multiples of; whether they take linears together (`linears`,
# `gated_linears` and their backwards). The CPU's take whole layers (diffmas.models.few_rows).
KINDS = {"cpu": ((torch.float32, torch.bfloat16), 32, False), "triton": (FLOATS, 1, True)}


class LayerOps(NamedTuple):
    """What serves tensors of a device and dtype. ops: where the kernels are found by their names."""

    ops: object
    device: torch.device
    dtype: torch.dtype
    columns: int
    joins: bool

    def takes(self, x: Tensor) -> bool:
        """x: rows [..., length], or a weight [out, in] or [length]."""
        lengths = x.shape[-1:] if x.dim() != 2 else x.shape
        return x.dtype == self.dtype and x.device == self.device and all(n % self.columns == 0 for n in lengths)

    def takes_weight(self, weight: Tensor) -> bool:
        return self.takes(weight) and weight.is_contiguous()


def usable(backend: str, fuse: bool | None) -> tuple[str, ...]:
    """The backends whose kernels the layers of a model may run that was patched with these arguments."""
    if fuse is False:
        return ()
    name, triton = AUTO if backend == "auto" else backend, BACKENDS["triton"]
    there = ("cpu",) if name in ("auto", "cpu") and BACKENDS["cpu"].why_missing is None else ()
    wanted = name == "triton" or (name in ("auto", "cuda") and not triton.interpreted)
    return (*there, "triton") if fuse and wanted and triton.why_missing is None else there


@functools.cache  # on every call of every linear: looked up, not searched
def kernels_for(names: tuple[str, ...], device: torch.device, dtype: torch.dtype) -> LayerOps | None:
    """Those of the first of these backends that serves a device and dtype."""
    for name in names:
        dtypes, columns, joins = KINDS[name]
        if dtype in dtypes and BACKENDS[name].serves("norm", device.type, dtype, 1):
            return LayerOps(BACKENDS[name].ops, device, dtype, columns, joins)
    return None


def layer_ops(x: Tensor, names: tuple[str, ...]) -> LayerOps | None:
    """The kernels for x and for weights beside it; None where the layer has to run as it is."""
    return kernels_for(names, x.device, x.dtype) if names and type(x) is Tensor else None
