"""Rows that leave a trace as tensors, and rows that come to one as tensors, with their gradients: for what is computed from K
and V outside of a model's layers, such as rows of one model that another one reads.

Both are nodes in the order of forward passes (diffmas.trace.autograd). `Leave` is a reader: it stands behind the rows' writers,
and its backward leaves them their gradient. `Arrive` is a writer: whoever reads its rows stands behind it, and its backward
takes out their gradient, which is complete by then.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from diffmas.trace.autograd import carrier, save_carrier, views_of
from diffmas.trace.pool import Pool
from diffmas.trace.store import Hold
from diffmas.trace.streams import on_stream, stream_of

__all__ = ["arrive", "leave"]


class Leave(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past, carrier, rows, lineage):
        save_carrier(ctx, carrier)
        ctx.rows, ctx.lineage, ctx.views = rows, lineage, views_of(carrier.owned)
        ctx.set_materialize_grads(False)
        ranges = [slice(s.start, s.start + s.length) for view in carrier.owned.views for s in view]
        return tuple(x.to(pool.device) for pool, _ in rows for x in pool.read(ranges))

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads):
        ctx.saved_tensors  # noqa: B018  raises where the rows may be gone
        for (pool, rows), *given in reversed([*zip(ctx.rows, grads[::2], grads[1::2])]):
            if all(dx is None for dx in given):
                continue
            with pool.grads().lend(ctx.lineage, ctx.views) as (_, _, *pools):
                for x, dx in zip(pools, given):
                    if dx is not None:
                        x.index_add_(0, rows, dx.to(x.dtype))
        return (None,) * 4


def leave(past: Tensor, rows: list[tuple[Pool, Tensor]], lineage: int, hold: Hold) -> list[tuple[Tensor, Tensor]]:
    """Copies of K and V [n, Hkv, D] of a view's rows, for each pool. rows [n]: the same, of each pool. hold: of the view."""
    flat = Leave.apply(past, carrier(hold), rows, lineage)
    return [*zip(flat[::2], flat[1::2])]


class Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, past, carrier, pools, first, lineage, *flat):
        save_carrier(ctx, carrier)
        ctx.pools, ctx.lineage = [(pool, stream_of(pool.device)) for pool in pools], lineage
        ctx.rows, ctx.views = slice(first, first + len(flat[0])), views_of(carrier.owned)
        ctx.like = [(x.dtype, x.device) for x in flat]
        return torch.zeros(0)

    @staticmethod
    @once_differentiable
    def backward(ctx, _):
        ctx.saved_tensors  # noqa: B018  raises where the rows may be gone
        grads = []
        for pool, stream in reversed(ctx.pools):
            with on_stream(stream), pool.grads().lend(ctx.lineage, ctx.views) as (_, _, dk, dv):
                grads += [dv[ctx.rows].clone(), dk[ctx.rows].clone()]
        grads = (x.to(device, dtype) for x, (dtype, device) in zip(reversed(grads), ctx.like))
        return None, None, None, None, None, *grads


def arrive(past: Tensor, pools: list[Pool], first: int, kv: list[tuple[Tensor, Tensor]], lineage: int, hold: Hold) -> Tensor:
    """The order token that readers of new rows stand behind. kv: what was written to each pool, from row `first` on, k and v
    [n, Hkv, D]. hold: of these rows."""
    return Arrive.apply(past, carrier(hold), pools, first, lineage, *(x for pair in kv for x in pair))
