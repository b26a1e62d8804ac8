"""Weights that are spread over several processes: a process's own part, and the whole.

FSDP2 and tensor parallelism leave DTensors in a model's place; only FSDP2's modules have plain tensors while they run.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

__all__ = ["first_of", "gathers", "is_spread", "local", "reshard", "shared", "spread_like", "whole"]


def is_spread(x: Tensor) -> bool:
    """Whether this process may have a part of it only."""
    return isinstance(x, DTensor)


def shared(model: nn.Module) -> bool:
    """Whether several processes share a model's weights."""
    return any(is_spread(p) or hasattr(p, "ds_id") or gathers(type(m)) for m in model.modules() for p in m.parameters(False))


def first_of(model: nn.Module) -> bool:
    """Whether this process writes a model's files: of those that share its weights, the first."""
    return not shared(model) or dist.get_rank() == 0


def gathers(kind: type) -> bool:
    """Whether FSDP2's hooks bring the weights of modules of this class, forward and backward."""
    return hasattr(kind, "set_reshard_after_forward")


def reshard(model: nn.Module) -> None:
    """Every process has its own part again: a forward without a backward may leave whole weights in their place."""
    for module in model.modules():
        if gathers(type(module)):
            module.reshard()


def local(x: Tensor) -> Tensor:
    """The part of a tensor that this process has, or the tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """A tensor with all of its values. All processes have to ask, in the same order."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def spread_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, spread as `like` is."""
    if not isinstance(like, DTensor):
        return x
    x = x.to(like.device, like.dtype)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
