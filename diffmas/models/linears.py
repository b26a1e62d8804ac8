"""The linear layers of a patched model in a forward over a trace: each one op, with the LoRA adapter that is active in it.

What is fused: an `nn.Linear` that is frozen or runs without gradients, alone or in PEFT's LoRA layer with no or one active
adapter, or several that have rows of their own (diffmas.models.adapter_rows), if they are plain LoRA, their weights float32 and
without dropout; on the CPU by default, on a GPU where it was asked for
(diffmas.ops.layer). All else, and every forward without a trace, runs as it is. Nothing is decided for good: an adapter that is
switched, merged, hooked or replaced is looked at again in each forward. On the CPU, without gradients, few rows go further, all
layers in one op (diffmas.models.few_rows), and so does the head when it is decoded.
"""

import functools
from types import FunctionType, MethodType

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import _has_any_global_hook
from transformers.modeling_outputs import BaseModelOutputWithPast

from diffmas.models.adapted import ByRows, is_wrapper
from diffmas.models.adapter_rows import adapters_by_rows
from diffmas.models.few_rows import few_rows
from diffmas.models.kinds import kind_of
from diffmas.models.linear_parts import Ours, is_lora, is_ours, learning_of, learns, lora_grads_of, parts_of
from diffmas.models.parts import attention_layers, causal_lm_of, text_stack_of
from diffmas.models.pointwise import GatedForward, NormForward
from diffmas.models.rows import unflattened
from diffmas.models.running import forward_pass_here, running
from diffmas.ops.layer import layer_ops
from diffmas.ops.linear import FEW_ROWS, Adapter, Parts, linear, rows_of
from diffmas.trace.forward_pass import ForwardPass

__all__ = ["fuse_layers", "product", "restore_layers"]


class BodyForward(Ours):
    """The forward of a stack of decoder layers: few rows go through all of them at once."""

    INPUTS = {"input_ids", "inputs_embeds", "attention_mask", "position_ids", "use_cache", "return_dict", "diffmas_trace"}

    def forward(self, *args, **kwargs):
        body = self.module
        if not args and self._serves(kwargs):
            modules, config, forward_pass = body._modules, body.config, kwargs["diffmas_trace"]
            layers = [*modules["layers"]._modules.values()][: config.num_hidden_layers]
            x, position_ids = kwargs.get("inputs_embeds"), kwargs["position_ids"]
            if x is None:
                x = modules["embed_tokens"](kwargs["input_ids"])
            h = few_rows(self, layers, forward_pass, x, lambda: modules["rotary_emb"](x, position_ids), position_ids)
            if h is not None:
                return BaseModelOutputWithPast(last_hidden_state=modules["norm"](h))
            kwargs |= {"input_ids": None, "inputs_embeds": x}  # nobody embeds twice
        return type(body).forward(body, *args, **kwargs)

    def _serves(self, kwargs: dict) -> bool:
        """Whether few rows come alone, for their last hidden states."""
        forward_pass, config = kwargs.get("diffmas_trace"), self.module.config
        if forward_pass is None or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        if torch.is_grad_enabled() and getattr(kwargs.get("inputs_embeds"), "requires_grad", False) is not True:
            return False
        if sum(forward_pass.lengths) > FEW_ROWS or kwargs.get("return_dict") is False or not config.return_dict:
            return False
        if config.output_hidden_states or config.output_attentions or kind_of(self.module) != "Model":
            return False
        if (kwargs.get("input_ids") is None) == (kwargs.get("inputs_embeds") is None) or kwargs.get("position_ids") is None:
            return False
        return not any(x is not None and x is not False for name, x in kwargs.items() if name not in self.INPUTS)


class LayerForward(Ours):
    """The forward of one decoder layer, whose linears learn of its forward pass; also where it is recomputed."""

    def forward(self, *args, **kwargs):
        layer, forward_pass = self.module, kwargs.get("diffmas_trace")
        x = args[0] if args else kwargs["hidden_states"]
        if forward_pass is None or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return type(layer).forward(layer, *args, **kwargs)
        forward = type(layer).forward
        checkpoints = getattr(layer, "gradient_checkpointing", False) and layer.training and torch.is_grad_enabled()
        tables = lambda: kwargs.get("position_embeddings")
        y = few_rows(self, [layer], forward_pass, x, tables, kwargs.get("position_ids"))
        if y is not None:
            return y
        recomputed = _recomputed(forward)
        if recomputed is not forward and checkpoints:
            run = functools.partial(self.run, recomputed, forward_pass, kwargs)
            return layer._gradient_checkpointing_func(run, *args)
        return self.run(forward, forward_pass, kwargs, *args)

    def run(self, forward, forward_pass: ForwardPass, kwargs: dict, *args):
        with running(forward_pass):
            return forward(self.module, *args, **kwargs)


@functools.cache
def _recomputed(forward):
    """What activation checkpointing recomputes of a decoder layer's forward: since transformers 5.24 the class's forward
    checkpoints another one; before, the module's call did."""
    while getattr(getattr(forward, "__code__", None), "co_name", "") == "forward_with_checkpointing":
        forward = forward.__wrapped__
    return forward


class LinearForward(Ours):
    """The forward of one linear, or of PEFT's layer around it."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        module = self.module
        if not torch.compiler.is_compiling() and not args and not kwargs and (here := forward_pass_here()) is not None:
            kernels = layer_ops(x, here.work.spec.fused)
            if kernels is not None and (parts := parts_of(module, kernels)) is not None:
                return run(x, parts, here, kernels.ops)
        if isinstance(module.__dict__.get("_active_adapter"), ByRows):
            return adapters_by_rows(module, x)
        return type(module).forward(module, x, *args, **kwargs)


def run(x: Tensor, parts: Parts, forward_pass: ForwardPass, ops) -> Tensor:
    """x [..., in] -> [..., out]. ops: as `linear` has it."""
    ends = forward_pass.work.adapter_ends
    if not torch.is_grad_enabled() or not (x.requires_grad or learns(parts.adapters)):
        return _of_rows(x, parts, ends, ops)[0]
    inputs, waits = learning_of(parts.adapters, forward_pass, ops)
    return LoraLinear.apply(x, (parts, ends, waits, ops), *inputs)


def _of_rows(x: Tensor, parts: Parts, ends, ops, transposed: bool = False) -> tuple[Tensor, list[Tensor]]:
    """`linear` of x [..., in]: y [..., out], and u [n, r] of each adapter."""
    y, us = linear(x.reshape(-1, x.shape[-1]), parts, ends, transposed, ops)
    return unflattened(y, x), us


class LoraLinear(torch.autograd.Function):
    """inputs: `Learning.inputs` of each adapter, one after the other."""

    @staticmethod
    def forward(ctx, x, rest, *inputs):
        parts, ends, waits, ops = rest
        y, us = _of_rows(x, parts, ends, ops)
        if not any(ctx.needs_input_grad[2:]):
            x, us = None, [None] * len(us)  # as in torch, the gradient to the input needs the weights alone
        ctx.save_for_backward(x, parts.weight, *us, *(w for a, b, _ in parts.adapters for w in (a, b)))
        ctx.rest = [scale for *_, scale in parts.adapters], ends, waits, ops
        return y

    @staticmethod
    def backward(ctx, dy):
        return (_backward_once if torch.is_grad_enabled() else _backward)(ctx, dy)


def _backward(ctx, dy):
    scales, ends, waits, ops = ctx.rest
    x, weight, *kept = ctx.saved_tensors
    us, weights = kept[: len(scales)], kept[len(scales) :]
    adapters = tuple(map(Adapter, weights[::2], weights[1::2], scales))
    dx, vs = None, [None] * len(scales)
    if ctx.needs_input_grad[0]:
        dx, vs = _of_rows(dy, Parts(weight, None, adapters), ends, ops, transposed=True)
    dy, x = dy.reshape(-1, dy.shape[-1]), None if x is None else x.reshape(-1, x.shape[-1])
    xs = [x] * len(scales) if x is None else rows_of(adapters, ends, x)
    found = []
    for i, of_each in enumerate(zip(waits, xs, us, rows_of(adapters, ends, dy), vs, adapters)):
        wait, *tensors, (_, b, scale) = of_each
        found += lora_grads_of(ctx.needs_input_grad[2 + 3 * i : 5 + 3 * i], *wait, *tensors, b, scale, ops)
    return dx, None, *found


_backward_once = once_differentiable(_backward)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, transposed, ops):
        ctx.save_for_backward(weight)
        ctx.rest = transposed, ops
        return linear(x, Parts(weight, None), None, transposed, ops)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (weight,), (transposed, ops) = ctx.saved_tensors, ctx.rest
        return linear(dy, Parts(weight, None), None, not transposed, ops)[0], None, None, None


def product(model: nn.Module, module: nn.Module, x: Tensor, transposed: bool = False) -> Tensor | None:
    """x [n, in] times the frozen weight [out, in] of a module, transposed or not; None where `model` is not to be fused, or
    does not have what the kernels take."""
    patch, weight = getattr(causal_lm_of(model), "diffmas_patch", None), module._parameters.get("weight")
    hooked = module._forward_hooks or module._forward_pre_hooks or _has_any_global_hook()  # which may bring the weight
    if hooked or patch is None or type(weight) is not nn.Parameter or weight.requires_grad:
        return None
    kernels = layer_ops(x, patch.spec.fused)
    if kernels is None or not kernels.takes_weight(weight) or torch.is_autocast_enabled(x.device.type):
        return None
    return Product.apply(x, weight, transposed, kernels.ops)


# ---- putting it in, and taking it out --------------------------------------------------------------------------------


BETWEEN = {"RMSNorm": NormForward, "MLP": GatedForward}  # what stands between a layer's linears


def _is_free(module: nn.Module) -> bool:
    """Whether nobody else has replaced a module's forward."""
    return "forward" not in module.__dict__ and not hasattr(module, "_hf_hook")


def _linears(module: nn.Module):
    """The plain linears in a module, and PEFT's LoRA layers in place of those that they hold."""
    for child in module.children():
        if type(child) is nn.Linear or is_lora(child):
            yield child
        elif not is_wrapper(child):
            yield from _linears(child)


@functools.cache
def _forward_of(layer_class: type):
    """`LayerForward.forward` with code of its own for each class of layers, as the class's own forward has it: torch.compile
    knows a function by its code, compiles one for 8 cases at most, and takes for dynamic what differs between two models."""
    forward = LayerForward.forward
    code = forward.__code__.replace(co_name=f"{layer_class.__name__}_forward")
    return FunctionType(code, forward.__globals__, "forward")


def fuse_layers(body: nn.Module, head: nn.Module | None) -> None:
    """Fuses the linears of a body's decoder layers and the model's head, and the layers' norms and gates, but those whose
    forward is somebody else's."""
    stack = text_stack_of(body)
    if kind_of(stack) == "Model" and _is_free(stack):
        stack.forward = BodyForward(stack).forward
    inside = {id(child): module for module in body.modules() for child in module.children()}
    for layer in {id(x): x for x in (inside[id(attention)] for attention in attention_layers(body))}.values():
        if not _is_free(layer) and not is_ours(layer.__dict__.get("forward")):
            continue
        layer.forward = MethodType(_forward_of(type(layer)), LayerForward(layer))
        ours = [(module, LinearForward) for module in _linears(layer)]
        ours += [(module, BETWEEN[kind]) for module in layer.children() if (kind := kind_of(module)) in BETWEEN]
        for module, forward in ours:
            if _is_free(module):
                module.forward = forward(module).forward
    if type(head) is nn.Linear and _is_free(head):
        head.forward = LinearForward(head).forward


def restore_layers(model: nn.Module) -> None:
    for module in model.modules():
        if is_ours(module.__dict__.get("forward")):
            del module.forward
