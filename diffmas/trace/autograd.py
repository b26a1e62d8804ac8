"""The autograd graph of a trace: in which order the backward of its forward passes runs.

A row's gradient is complete when everybody who read it has run backward. So the backward of a pass must wait for that of all
later passes over its rows; autograd does not know that, as no tensor of K and V goes from one to the other. *Order tokens* tell
it, zero-size tensors, one for each pass:

    order = Begin(past);   every layer: o = attend(order, q, k, v);   after = end(last hidden state)

The next pass's `past` is this one's `after`. A pass's layers wait for each other by the hidden states, the last hidden state
waits for `end`, and `end` for the `Begin` of every later pass, which waits for the attends that took its token.

`Begin` also owns the work of its pass in the graph: on a saved tensor, which autograd lets go when backward has run. Then the
rows that it held are free (diffmas.trace.store).
"""

import weakref

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.ops import reference
from diffmas.ops.register import call
from diffmas.trace.layer_work import LayerWork, work_of
from diffmas.trace.low_rank import Coding
from diffmas.trace.pool import Pool
from diffmas.trace.store import Hold
from diffmas.trace.streams import on_stream, stream_of
from diffmas.trace.views import KVRange

__all__ = ["attend", "begin", "carrier", "end", "inherit", "node", "reposition", "save_carrier", "views_of"]


def carrier(owned) -> Tensor:
    """A tensor to save, that keeps what it carries alive until backward lets go of it."""
    tensor = torch.empty(0)
    tensor.owned = owned
    return tensor


def save_carrier(ctx, carrier: Tensor) -> None:
    ctx.save_for_backward(carrier)
    if torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        ctx.owned = carrier.owned  # what hooks keep in the saved tensor's place does not carry it


def node(function: type[torch.autograd.Function]):
    """Its apply without what functorch's transforms would need, two thirds of it."""
    return super(torch.autograd.Function, function).apply


class Begin(torch.autograd.Function):
    @staticmethod
    def forward(ctx, carrier, leaf, past):
        save_carrier(ctx, carrier)
        ctx.work = weakref.ref(carrier.owned)
        return torch.zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        ctx.saved_tensors  # noqa: B018  raises after the backward that let go of the work
        ctx.work().flush()
        return None, None, None


_leaf = torch.zeros(0, requires_grad=True)  # gets no gradient: backward gives None


def begin(work: LayerWork, past: Tensor) -> Tensor:
    """The order token of a pass, which stands behind `past`. It always needs a gradient, so that a graph compiled for one pass
    serves all; a layer that records nothing does not take it."""
    return node(Begin)(carrier(work), _leaf, past)


class Anchor(torch.autograd.Function):
    """Gives h a gradient of exact zeros, whatever h holds, where others tell only the order."""

    @staticmethod
    def forward(ctx, h):
        ctx.like = h.shape, h.dtype, h.device
        return torch.zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        shape, dtype, device = ctx.like
        return torch.zeros(shape, dtype=dtype, device=device)


def end(h: Tensor, anchored: bool = False) -> Tensor:
    """What the next pass stands behind; h: the last hidden state of this one. A copy, since a view would keep h. anchored: see
    `ModelSpec`."""
    return node(Anchor)(h) if anchored else h.narrow(-1, 0, 0).to("cpu", torch.float32, copy=True)


# ---- a layer ---------------------------------------------------------------------------------------------------------


class Attend(torch.autograd.Function):
    """The attention of a pass's layer, where it is recorded; arguments: see `ForwardPass.attend`. rest: one argument, since
    autograd looks at each in Python."""

    @staticmethod
    def forward(ctx, q, k, v, order, q_weight, k_weight, rest):
        work, layer, cos, sin, eps, scale = rest
        if order is None:
            raise RuntimeError("this forward pass was planned without gradients, and its layers run with them")
        o, q_rot, lse = work.attend(layer, q, k, v, cos, sin, q_weight, k_weight, eps, scale, True)
        if q_weight is None and k_weight is None:
            q = k = None
        ctx.save_for_backward(q_rot, o, lse, q, k, q_weight, k_weight)
        ctx.rest = work.ref, layer, cos, sin, eps, scale
        ctx.set_materialize_grads(False)
        return o

    @staticmethod
    def backward(ctx, do):
        # Where nobody differentiates twice, the guard against it is skipped: it takes as long as all else here.
        return (_attend_backward_once if torch.is_grad_enabled() else _attend_backward)(ctx, do)


def _attend_backward(ctx, do):
    q_rot, o, lse, q, k, q_weight, k_weight = ctx.saved_tensors
    work, layer, cos, sin, eps, scale = ctx.rest
    *_, q_weight_grad, k_weight_grad, _ = ctx.needs_input_grad
    dq, dk, dv, dq_weight, dk_weight = work().attend_backward(
        layer, do, q_rot, o, lse, q, k, cos, sin, q_weight, k_weight, eps, scale, q_weight_grad or k_weight_grad
    )
    dq_weight = dq_weight.to(q_weight.dtype) if q_weight_grad else None
    dk_weight = dk_weight.to(k_weight.dtype) if k_weight_grad else None
    return dq, dk, dv, None, dq_weight, dk_weight, None


_attend_backward_once = once_differentiable(_attend_backward)
attend = node(Attend)


# ---- the same as an op, for torch.compile -----------------------------------------------------------------------------

_library = torch.library.Library("diffmas", "FRAGMENT")
_TABLES = "Tensor? cos, Tensor? sin, Tensor? q_weight, Tensor? k_weight, float eps, float scale, Tensor ticket, Tensor layer"
_library.define(f"attend(Tensor q, Tensor k, Tensor v, Tensor? order, {_TABLES}) -> (Tensor, Tensor, Tensor)")
_library.define(
    f"attend_backward(Tensor do, Tensor q_rot, Tensor o, Tensor lse, Tensor? q, Tensor? k, {_TABLES}, SymInt kv_heads)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _attend_op(q, k, v, order, cos, sin, q_weight, k_weight, eps, scale, ticket, layer):
    work = work_of(ticket)
    layer = work.spec.layers[layer.item()]
    o, q_rot, lse = work.attend(layer, q, k, v, cos, sin, q_weight, k_weight, eps, scale, order is not None)
    # An op's output must not be its input, which it is where nothing rotates.
    return o.contiguous(), q_rot.clone() if q_rot.data_ptr() == q.data_ptr() else q_rot.contiguous(), lse.contiguous()


def _attend_backward_op(do, q_rot, o, lse, q, k, cos, sin, q_weight, k_weight, eps, scale, ticket, layer, kv_heads):
    work = work_of(ticket)
    layer = work.spec.layers[layer.item()]
    # Inductor uses the memory of do and of saved tensors again: what outlives the op is a copy.
    dq, dk, dv, *weights = work.attend_backward(
        layer, do, q_rot, o, lse, q, k, cos, sin, q_weight, k_weight, eps, scale, copy=True
    )
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), *weights, torch.zeros(0)


def _attend_fake(q, *_):
    return q.new_empty(q.shape), q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))


def _attend_backward_fake(do, q_rot, o, lse, q, k, cos, sin, q_weight, k_weight, eps, scale, ticket, layer, kv_heads):
    acc, kv = reference.accumulator(q_rot.dtype), (q_rot.shape[0], kv_heads, q_rot.shape[2])
    weights = (do.new_empty(0 if w is None else w.shape, dtype=acc) for w in (q_weight, k_weight))
    return do.new_empty(q_rot.shape), do.new_empty(kv), do.new_empty(kv), *weights, ticket.new_empty(0, dtype=torch.float32)


def _attend_setup(ctx, inputs, output):
    q, k, _, _, cos, sin, q_weight, k_weight, eps, scale, ticket, layer = inputs
    o, q_rot, lse = output
    q, ctx.kv_heads = (q, k) if q_weight is not None or k_weight is not None else (None, None), k.shape[1]
    ctx.save_for_backward(q_rot, o, lse, *q, cos, sin, q_weight, k_weight, ticket, layer)
    ctx.rest = eps, scale
    ctx.mark_non_differentiable(q_rot, lse)


def _attend_op_backward(ctx, do, *_):
    *tensors, ticket, layer = ctx.saved_tensors
    dq, dk, dv, dq_weight, dk_weight, dorder = torch.ops.diffmas.attend_backward(
        do.contiguous(), *tensors, *ctx.rest, ticket, layer, ctx.kv_heads
    )
    weights = [None if w is None else dw.to(w.dtype) for w, dw in zip(tensors[7:9], (dq_weight, dk_weight))]
    return dq, dk, dv, dorder, None, None, *weights, None, None, None, None


_library.impl("attend", _attend_op, "CompositeExplicitAutograd")
_library.impl("attend_backward", _attend_backward_op, "CompositeExplicitAutograd")
torch.library.register_fake("diffmas::attend", _attend_fake)
torch.library.register_fake("diffmas::attend_backward", _attend_backward_fake)
torch.library.register_autograd("diffmas::attend", _attend_op_backward, setup_context=_attend_setup)


# ---- between passes ---------------------------------------------------------------------------------------------------


def views_of(hold: Hold) -> list:
    """The rows that it has read, and those that it claimed."""
    return [*hold.views, [KVRange(first, after - first, 0) for first, after in hold.claimed]]


class Reposition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past, carrier, moves, lineage, backend):
        save_carrier(ctx, carrier)
        ctx.moves, ctx.lineage, ctx.backend = [(pool, move, stream_of(pool.device)) for pool, move in moves], lineage, backend
        ctx.views = views_of(carrier.owned)
        return torch.zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        ctx.saved_tensors  # noqa: B018  raises where the rows may be gone
        for pool, move, stream in reversed(ctx.moves):
            with on_stream(stream), pool.grads().lend(ctx.lineage, ctx.views) as (_, _, dk, dv):
                call("reposition_backward", dk, *move, dk, dv, backend=ctx.backend)
        return (None,) * 5


def reposition(past: Tensor, moves: list[tuple[Pool, tuple]], lineage: int, backend: str, hold: Hold) -> Tensor:
    """Copies rows with their keys rotated on, in each layer; differentiable through the order token that it returns.

    moves: a pool, and (src, dst, offset, inv_freq, interleaved) as the op takes them. hold: of all rows that take part.
    """
    written = np.concatenate([np.arange(first, after) for first, after in hold.claimed] or [np.zeros(0, dtype=np.int64)])
    for pool, move in moves:
        with pool.writing(written, hold.views) as kv:
            call("reposition", kv[0], *move, *kv, backend=backend)
    return Reposition.apply(past, carrier(hold), moves, lineage, backend) if torch.is_grad_enabled() else past


class Inherit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past, carrier, rows, codings, readers, writers):
        save_carrier(ctx, carrier)
        ctx.rows, ctx.readers, ctx.writers = [(pool, x, stream_of(pool.device)) for pool, x in rows], readers, writers
        ctx.codings = codings
        return torch.zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        ctx.saved_tensors  # noqa: B018  raises where the rows may be gone
        for pool, rows, stream in ctx.rows:
            with on_stream(stream):
                pool.grads().hand_on(rows, ctx.readers, ctx.writers)
        for coding in ctx.codings:
            coding.grads().hand_on(ctx.readers, ctx.writers)
        return (None,) * 6


def inherit(
    past: Tensor, rows: list[tuple[Pool, Tensor]], codings: list[Coding], readers: int, writers: int, hold: Hold
) -> Tensor:  # fmt: skip
    """The order token for readers of lineage `readers` of rows that were written in lineage `writers`: hands the gradient that
    they leave on to that of the writers. rows: of each pool, distinct. codings: that were made in lineage `writers`."""
    return Inherit.apply(past, carrier(hold), rows, codings, readers, writers)
