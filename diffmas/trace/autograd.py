"""The autograd of writing and reading a pool.

Rows are written once and never move, so attention saves nothing of K and V: its backward reads the pool again. The order that
this needs is carried by an *order token*, a zero-size tensor that threads through the forward passes of a layer:

    attend(order, q, k, v) -> o, order'

Autograd runs the backward of an attend only after that of everything that used its order', which is every later reader of its
rows. So an attend's backward adds dK and dV of the rows it read to the pass's gradient pools, and then takes out those of the rows
it wrote, which are complete.

A run of latent steps reads the same earlier rows T times, and nobody needs their gradient before the first step has been undone.
So the backward of a step adds dK and dV of the run's own rows only and keeps (do, q, o, lse); a `Flush` that stands before the run
on the order token adds those of the earlier rows in one matrix-shaped pass: the gradient pool is read and written once, not T times.

A node needs the rows of its view until its backward has run: the `Hold` of its forward pass rides on a saved tensor, which
autograd lets go with the others.
"""

import contextlib

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.ops.register import call
from diffmas.trace.pool import DeferredKVGrad, Pool

__all__ = ["attend", "held_by_graph", "inherit", "reposition"]


def held_by_graph(hold) -> Tensor:
    """A tensor that keeps `hold` alive for as long as a graph may need it."""
    tensor = torch.empty(0)
    tensor.hold = hold
    return tensor


def _save(ctx, hold: Tensor | None, *tensors: Tensor | None) -> None:
    ctx.save_for_backward(*tensors, hold)
    if hold is not None and torch._C._autograd._top_saved_tensors_default_hooks(False) is not None:
        ctx.hold = hold  # what the hooks keep in a saved tensor's place need not keep it alive


class Attend(torch.autograd.Function):
    """grad_tail [B]: how many rows at the end of each view get a gradient here, None for all; deferred: who flushes the rest."""

    @staticmethod
    def forward(
        ctx, q, k, v, order, q_weight, k_weight, pool, lineage, tables, kind, view, scale, grad_tail, deferred, backend, hold
    ):
        q_rot, o, lse = _write_and_read(pool, q, k, v, q_weight, k_weight, tables, kind, view, scale, backend)
        normed = q_weight is not None or k_weight is not None
        _save(ctx, hold, q_rot, o, lse, q_weight, k_weight, *((q, k) if normed else (None, None)))
        ctx.pool, ctx.lineage, ctx.tables, ctx.kind, ctx.view = pool, lineage, tables, kind, view
        ctx.scale, ctx.grad_tail, ctx.deferred, ctx.backend, ctx.k_shape = scale, grad_tail, deferred, backend, k.shape
        ctx.set_materialize_grads(False)
        return o, order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, _):
        q_rot, o, lse, q_weight, k_weight, q, k, _ = ctx.saved_tensors
        grads = ctx.pool.grads()
        dk_pool, dv_pool = grads.of(ctx.lineage)
        eps, interleaved = ctx.kind
        if do is None:  # nobody used o, only the rows
            dq_rot = torch.zeros_like(q_rot)
        else:
            dq_rot = call(
                "cross_attention_backward", q_rot, do, None, q_rot, o, lse, grads.k, grads.v, *ctx.view, ctx.scale, True,
                interleaved, dk_pool, dv_pool, ctx.grad_tail, True, backend=ctx.backend,
            )  # fmt: skip
            if ctx.deferred is not None:
                grads.steps(ctx.lineage, ctx.deferred).append((do, q_rot, o, lse))
        if q is None:  # without a norm the backward is linear: q and k only tell shape and dtype
            q, k = dq_rot, dq_rot.new_empty(ctx.k_shape)
        dq, dk, dv, dq_weight, dk_weight = call(
            "inject_backward", q, dq_rot, q, k, *ctx.tables, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool,
            backend=ctx.backend,
        )  # fmt: skip
        weights = (None if w is None else dw.to(w.dtype) for w, dw in ((q_weight, dq_weight), (k_weight, dk_weight)))
        return dq, dk, dv, None, *weights, *(None,) * 10


def _write_and_read(pool: Pool, q, k, v, q_weight, k_weight, tables, kind, view, scale, backend):
    """-> q_rot, o, lse. tables: cos, sin, slots; kind: eps, interleaved; view: as `cross_attention` takes it, causal."""
    with pool.lock:
        q_rot = call("inject", q, q, k, v, *tables, q_weight, k_weight, *kind, *pool.kv, backend=backend)
    o, lse = call("cross_attention", q_rot, q_rot, *pool.kv, *view, scale, True, kind[1], backend=backend)
    return q_rot, o, lse


def _stream(x: Tensor):
    return torch.cuda.current_stream(x.device) if x.is_cuda else None


def _on(stream):
    """For a node that gives nothing but an order token. These lie on the CPU, so autograd would run it on the stream of whoever
    calls backward(), and not on that of its forward, where its neighbours run."""
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


class Flush(torch.autograd.Function):
    """Stands before a run of latent steps: its backward adds dK and dV of the older rows for all steps of the run at once."""

    @staticmethod
    def forward(ctx, order, pool, lineage, deferred, older, scale, interleaved, backend, hold):
        _save(ctx, hold)
        ctx.pool, ctx.lineage, ctx.deferred, ctx.older, ctx.stream = pool, lineage, deferred, older, _stream(pool.k)
        ctx.rest, ctx.backend = (scale, False, interleaved), backend  # every step sees all of the older rows
        return order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        with _on(ctx.stream):
            grads = ctx.pool.grads()
            steps = grads.steps(ctx.lineage, ctx.deferred)
            if steps:
                do, q, o, lse = (torch.stack(x, 1).flatten(0, 1) for x in zip(*steps))  # [B * steps, ...], by sequence
                q_indptr = torch.arange(0, q.shape[0] + 1, len(steps), device=q.device)
                call(
                    "cross_attention_backward", q, do, None, q, o, lse, grads.k, grads.v, q_indptr, *ctx.older, *ctx.rest,
                    *grads.of(ctx.lineage), None, False, backend=ctx.backend,
                )  # fmt: skip
                steps.clear()
        return (None,) * 9


class Reposition(torch.autograd.Function):
    @staticmethod
    def forward(ctx, order, pool, lineage, move, interleaved, backend, hold):
        with pool.lock:
            call("reposition", pool.k, *move, interleaved, *pool.kv, backend=backend)
        _save(ctx, hold)
        ctx.pool, ctx.lineage, ctx.rest, ctx.backend, ctx.stream = pool, lineage, (*move, interleaved), backend, _stream(pool.k)
        return order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        with _on(ctx.stream):
            grads = ctx.pool.grads().of(ctx.lineage)
            call("reposition_backward", grads[0], *ctx.rest, *grads, backend=ctx.backend)
        return (None,) * 7


class Inherit(torch.autograd.Function):
    """Hands the gradient that readers of one lineage left in `rows` on to the lineage of the rows' writers."""

    @staticmethod
    def forward(ctx, order, pool, rows, readers, writers, hold):
        _save(ctx, hold)
        ctx.pool, ctx.rest, ctx.stream = pool, (rows, readers, writers), _stream(pool.k)
        return order.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        rows, readers, writers = ctx.rest
        with _on(ctx.stream):
            grads = ctx.pool.grads()
            for taken, given in zip(grads.of(readers), grads.of(writers)):
                given[rows] += taken[rows]
        return (None,) * 6


def attend(
    pool: Pool, order: Tensor, q: Tensor, k: Tensor, v: Tensor, slots: Tensor, view: tuple, *, scale: float,
    cos: Tensor | None = None, sin: Tensor | None = None, q_weight: Tensor | None = None,
    k_weight: Tensor | None = None, eps: float = 1e-6, interleaved: bool = False, lineage: int = 0, backend: str = "auto",
    grad_tail: Tensor | None = None, deferred: DeferredKVGrad | None = None, older: tuple | None = None,
    shared: tuple[tuple, tuple] | None = None, hold: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Writes n new tokens' K/V into the pool and attends from them over their views; differentiable.

    q [n, Hq, D]; k, v [n, Hkv, D]; slots [n]; view: (q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq) as
    in `diffmas.ops.cross_attention`; the new rows are the newest of each view; lineage: which gradient pools it uses.
    grad_tail [B]: how many rows at the end of each view were written by this call (and, in a run of latent steps, by the run so
    far); deferred, and older with its first step: the views before the run, without q_indptr. shared: the same views as two, the
    rows that neighbouring sequences share, in one pass for all of them, and each sequence's rest; where no gradient is wanted.
    hold: see `held_by_graph`. -> o [n, Hq, D], the next order token.
    """
    tables, kind = (cos, sin, slots), (eps, interleaved)
    if not torch.is_grad_enabled():
        # These rows are constants; readers to come still order themselves behind the earlier writers: the same token.
        if shared is None:
            return _write_and_read(pool, q, k, v, q_weight, k_weight, tables, kind, view, scale, backend)[1], order
        with pool.lock:
            q_rot = call("inject", q, q, k, v, *tables, q_weight, k_weight, *kind, *pool.kv, backend=backend)
        read = lambda view, causal: call(
            "cross_attention", q_rot, q_rot, *pool.kv, *view, scale, causal, interleaved, backend=backend
        )
        prefix, rest = shared
        return call("merge_states", q_rot, *read(prefix, False), *read(rest, True), backend=backend)[0], order
    if older is not None:
        deferred.flushed[pool] = order.requires_grad
        order = Flush.apply(order, pool, lineage, deferred, older, scale, interleaved, backend, hold)
    in_run = deferred is not None and pool in deferred.flushed
    if not in_run and order.requires_grad:
        grad_tail = None  # older rows get their gradient too, and at once
    if not in_run or not deferred.flushed[pool]:
        deferred = None
    return Attend.apply(
        q, k, v, order, q_weight, k_weight, pool, lineage, tables, kind, view, scale, grad_tail, deferred, backend, hold
    )


def reposition(
    pool: Pool, order: Tensor, move: tuple[Tensor, Tensor, Tensor, Tensor], interleaved: bool = False, lineage: int = 0,
    backend: str = "auto", hold: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Copies rows with their keys rotated on; move: src, dst, offset, inv_freq as `diffmas.ops.reposition` takes them.
    Differentiable through the order token that it returns."""
    after = Reposition.apply(order, pool, lineage, move, interleaved, backend, hold)
    return after if torch.is_grad_enabled() else order


def inherit(pool: Pool, order: Tensor, rows: Tensor, readers: int, writers: int, hold: Tensor | None = None) -> Tensor:
    """The order token for readers of lineage `readers` of the distinct `rows` that were written in lineage `writers`."""
    return Inherit.apply(order, pool, rows, readers, writers, hold)
