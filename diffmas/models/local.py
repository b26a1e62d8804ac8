"""Weights that are spread over several processes: a process's own part, and the whole.

FSDP2 and transformers' tensor parallelism put DTensors in the place of weights. FSDP2's modules have whole, plain tensors while
they run; with tensor parallelism each process computes with its part, and modules have a forward that adds up or joins what
comes of it. DeepSpeed's ZeRO-3 leaves Parameters, which are empty while nobody runs their module.
"""

import contextlib
import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, distribute_tensor

__all__ = [
    "failing_together", "first_of", "for_all", "gathered", "gathers", "is_part", "is_spread", "local", "local_copy",
    "of_all_heads", "reshard", "say_features", "shape_of", "shared", "spread_like", "whole",
]  # fmt: skip


def is_part(x: Tensor) -> bool:
    """Whether it is one of torch's own tensors of several processes."""
    return isinstance(x, DTensor)


def is_zero3(x: Tensor) -> bool:
    """Whether DeepSpeed has taken a weight apart; it stays a Parameter, that is empty while nobody runs its module."""
    return hasattr(x, "ds_tensor")


def is_spread(x: Tensor) -> bool:
    """Whether this process may have a part of it only."""
    return isinstance(x, DTensor) or is_zero3(x)


def shared(model: nn.Module) -> bool:
    """Whether several processes share a model's weights."""
    return any(is_spread(p) or gathers(type(m)) for m in model.modules() for p in m.parameters(False))


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
    return x.to_local() if isinstance(x, DTensor) else x.ds_tensor if is_zero3(x) else x


def shape_of(x: Tensor) -> tuple[int, ...]:
    """The shape of the whole tensor."""
    return tuple(x.ds_shape if is_zero3(x) else x.shape)


@torch.no_grad()
def whole(x: Tensor) -> Tensor:
    """A tensor with all of its values, without a graph. All processes have to ask, in the same order."""
    if is_zero3(x):
        with gathered([x]):
            return x.detach().clone()
    x = x.detach()
    return x.full_tensor() if isinstance(x, DTensor) else x


def gathered(weights: list[Tensor], write: bool = False):
    """Inside, what DeepSpeed has taken apart is whole in all processes. write: what the first one writes to it stays."""
    weights = [x for x in weights if is_zero3(x)]
    if not weights:
        return contextlib.nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(weights, modifier_rank=0 if write else None)


def is_parallel(module: nn.Module) -> bool:
    """Whether tensor parallelism has put a forward of its own in the place of the module's."""
    return getattr(module.__dict__.get("forward"), "__module__", "").startswith("transformers.")


def local_copy(module: nn.Module) -> nn.Module:
    """A deep copy, of this process's part where there are others: it computes with that alone, and asks no other process."""
    memo = {}
    for x in [*module.parameters(), *(value for m in module.modules() for value in vars(m).values())]:
        if is_spread(x):
            mine = x.detach() if is_zero3(x) else local(x.detach())  # ZeRO-3's are `gathered` meanwhile
            memo[id(x)] = nn.Parameter(mine.clone(), x.requires_grad)
        elif isinstance(x, DeviceMesh):
            memo[id(x)] = x
    copied = copy.deepcopy(module, memo)
    for m in copied.modules():
        if is_parallel(m):
            del m.forward
    return copied


def say_features(model: nn.Module) -> nn.Module:
    """Gives the Linears of a tensor-parallel model the sizes of their whole weights, which transformers goes by: PEFT's say
    those of this process's part."""
    for module in model.modules():
        if isinstance(module, nn.Linear) and isinstance(module.weight, DTensor):
            module.out_features, module.in_features = module.weight.shape
    return model


class _SumGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def of_all_heads(weight: Tensor, beside: nn.Module) -> Tensor:
    """A norm's weight, which all heads have in common, for this process's heads: its gradient is the sum over all processes.

    beside: a module with weights of these heads alone.
    """
    if is_part(weight):
        return weight.to_local(grad_placements=[Partial()])
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    mesh = next((p.device_mesh for p in beside.parameters() if is_part(p)), None)
    if mesh is None:
        return weight
    return _SumGrad.apply(weight, mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp"))


@contextlib.contextmanager
def failing_together(model: nn.Module, kind: type[Exception]):
    """Where processes compute with a model together, an error in one of them is raised in all, as `kind` in the others."""
    if not any(map(is_part, model.parameters())):
        yield
        return
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    found = [None] * dist.get_world_size()
    dist.all_gather_object(found, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for rank, said in enumerate(found):
        if said is not None:
            raise kind(f"process {rank}: {said}")


def for_all(x: Tensor, beside: Tensor) -> Tensor:
    """A tensor that all processes have, as one of torch's own of several processes, where `beside` is."""
    if not isinstance(beside, DTensor):
        return x
    mesh = beside.device_mesh
    return DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)


def spread_like(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor that every process has, spread as `like` is."""
    if not isinstance(like, DTensor):
        return x
    x = x.to(like.device, like.dtype)
    return distribute_tensor(x, like.device_mesh, like.placements, src_data_rank=None)
