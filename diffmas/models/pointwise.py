"""RMSNorm and the gated feed-forward part of a patched model's layers in a forward over a trace: an op each, which keeps its
inputs alone and rounds where transformers' own chain of eight does.

Where a norm's weight is trained, and where anything is not of the common kind, the module runs as it is.
"""

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook

from diffmas.models.joined import feed_forward
from diffmas.models.kinds import is_plain, kind_of
from diffmas.models.linear_parts import Ours
from diffmas.models.rows import rows_of_numbers, unflattened
from diffmas.models.running import forward_pass_here
from diffmas.ops.layer import LayerOps, layer_ops

__all__ = ["GatedForward", "NormForward"]


def _kernels(x: Tensor) -> LayerOps | None:
    if torch.compiler.is_compiling() or (here := forward_pass_here()) is None:
        return None
    found = layer_ops(x, here.work.spec.fused)
    return found if found is not None and found.takes(x) else None


class Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, ops):
        ctx.save_for_backward(x, weight)
        ctx.rest = eps, ops
        return unflattened(ops.norm(rows_of_numbers(x), weight, eps), x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (x, weight), (eps, ops) = ctx.saved_tensors, ctx.rest
        dx = ops.norm_backward(rows_of_numbers(dy), rows_of_numbers(x), weight, eps)
        return dx.view(x.shape), None, None, None


class NormForward(Ours):
    """The forward of an RMSNorm. x [..., hidden] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        norm = self.module
        weight = norm._parameters.get("weight")
        if kind_of(norm) == "RMSNorm" and (kernels := _kernels(x)) is not None and _fits(weight, kernels):
            return Norm.apply(x, weight, norm.variance_epsilon, kernels.ops)
        return type(norm).forward(norm, x)


def _fits(weight, kernels: LayerOps) -> bool:
    if type(weight) is not nn.Parameter or (weight.requires_grad and torch.is_grad_enabled()):
        return False
    return kernels.takes_weight(weight)


class Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, ops):
        ctx.save_for_backward(gate, up)
        ctx.ops = ops
        return unflattened(ops.gate(rows_of_numbers(gate), rows_of_numbers(up)), gate)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = ctx.ops.gate_backward(rows_of_numbers(dy), rows_of_numbers(gate), rows_of_numbers(up))
        return dgate.view(gate.shape), dup.view(up.shape), None


class GatedForward(Ours):
    """The forward of an MLP, down(silu(gate(x)) * up(x)). x [..., hidden] -> the same."""

    def forward(self, x: Tensor) -> Tensor:
        mlp, modules = self.module, self.module._modules
        if kind_of(mlp) != "MLP" or not is_plain(modules["act_fn"], "SiLU") or _has_any_global_hook() or _kernels(x) is None:
            return type(mlp).forward(mlp, x)
        y = feed_forward(modules["gate_proj"], modules["up_proj"], modules["down_proj"], x)
        if y is not None:
            return y
        gate, up = modules["gate_proj"](x), modules["up_proj"](x)
        kernels = _kernels(gate)
        if kernels is None or type(up) is not Tensor or gate.shape != up.shape or not kernels.takes(up):
            return modules["down_proj"](modules["act_fn"](gate) * up)
        return modules["down_proj"](Gate.apply(gate, up, kernels.ops))
