"""The registered torch ops `torch.ops.diffmas.*`: definition, fakes for torch.compile, the autograd of merge_states.

Raw ops mutate pools, so they carry no autograd of their own and refuse to drop a gradient: `diffmas.trace.autograd` has that of
`inject`, `cross_attention` and `reposition`.
"""

from functools import partial

import torch
from torch import Tensor

from diffmas.ops import reference
from diffmas.ops.backends import implementation
from diffmas.ops.fused import PARTS, Composed
from diffmas.ops.schemas import LEAD, with_backend

__all__ = ["call"]

_library = torch.library.Library("diffmas", "DEF")


def _register(name: str, lead: int) -> None:
    """Defines op `name`; its argument number `lead` decides device, dtype and head size."""

    def run(*args, backend="auto", **work):
        if len(args) > count:  # the dispatcher passes what is not the default by position
            args, (backend, *more) = args[:count], args[count:]
            work |= dict(zip(("work",), more))
        # Off inside autograd.Function, which is where the gradients are taken care of.
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"diffmas.ops.{name} works on K/V pools in place and records no gradient; call it under torch.no_grad(), "
                "or go through a trace (ForwardPass.attend), which is differentiable"
            )
        return implementation(name, args[lead], backend)(*args, **work)

    _library.define(name + with_backend(name))
    count = [x.name for x in getattr(torch.ops.diffmas, name).default._schema.arguments].index("backend")
    _library.impl(name, run, "CompositeExplicitAutograd")


for _name, _lead in LEAD.items():
    _register(_name, _lead)


def call(name: str, lead: Tensor, *args, backend: str = "auto", **work: Tensor):
    """Runs a raw op, or two of them as one (diffmas.ops.fused), on the backend of `lead`, one of its arguments; nothing is
    recorded by autograd. work: the argument of that name that attention may have.

    Straight to the backend, a third of the time that the dispatcher's way takes for one token; through torch.ops.diffmas where
    something wants to see the op: torch.compile, fake tensors, dispatch modes.
    """
    if type(lead) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        find = lambda op: partial(getattr(torch.ops.diffmas, op), backend=backend)
        return (getattr(Composed(find), name) if name in PARTS else find(name))(*args, **work)
    return implementation(name, lead, backend)(*args, **work)


def _fake_states(q, *_, **__):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))


def _fake_dq(do, dlse, q, *rest, **__):
    want_dq = rest[16] if len(rest) > 16 else True
    return q.new_empty(q.shape if want_dq else 0)


def _fake_inject_backward(dq_rot, q, k, cos, sin, slots, q_weight, k_weight, *_, **__):
    acc = reference.accumulator(q.dtype)
    weights = (q.new_empty(0 if w is None else w.shape[0], dtype=acc) for w in (q_weight, k_weight))
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(k.shape), *weights


def _fake_merge_backward(do, dlse, o_a, lse_a, o_b, lse_b, *_, **__):
    return tuple(x.new_empty(x.shape) for x in (o_a, lse_a, o_b, lse_b))


torch.library.register_fake("diffmas::inject", lambda q, *_, **__: q.new_empty(q.shape))
torch.library.register_fake("diffmas::inject_backward", _fake_inject_backward)
torch.library.register_fake("diffmas::cross_attention", _fake_states)
torch.library.register_fake("diffmas::cross_attention_backward", _fake_dq)
torch.library.register_fake("diffmas::cross_attention_quantized", _fake_states)
torch.library.register_fake("diffmas::cross_attention_quantized_backward", lambda do, q, *_, **__: q.new_empty(q.shape))
torch.library.register_fake("diffmas::merge_states", _fake_states)
torch.library.register_fake("diffmas::merge_states_backward", _fake_merge_backward)
torch.library.register_fake("diffmas::reposition", lambda *_, **__: None)
torch.library.register_fake("diffmas::reposition_backward", lambda *_, **__: None)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.backend = inputs[4]


def _merge_backward(ctx, do, dlse):
    return *torch.ops.diffmas.merge_states_backward(do, dlse, *ctx.saved_tensors, ctx.backend), None


torch.library.register_autograd("diffmas::merge_states", _merge_backward, setup_context=_merge_setup)
