"""A layer's two ops as one call, which for one token halves the host's time. The CPU kernels have ops for it; elsewhere they
are composed of their parts, which may be of two backends.

q, k, v, o and their gradients are [n, heads, D] or [1, n, heads * D], as projections give and take them; cos and sin [n, Dr] or
[1, n, Dr]."""

from collections.abc import Callable

from torch import Tensor

__all__ = ["PARTS", "Composed", "in_layout_of", "packed_table", "with_heads"]

PARTS = {
    "inject_attend": ("inject", "cross_attention"),
    "inject_attend_backward": ("cross_attention_backward", "inject_backward"),
}


def with_heads(x: Tensor, n: int, head_dim: int) -> Tensor:
    """Either layout as [n, heads, D]."""
    return x.view(n, -1, head_dim)


def in_layout_of(like: Tensor, x: Tensor) -> Tensor:
    """[n, heads, D] in the layout of `like`."""
    n = x.shape[0]
    return x.view(1, n, -1) if like.shape[:2] == (1, n) else x


def packed_table(x: Tensor | None) -> Tensor | None:
    return x[0] if x is not None and x.dim() == 3 else x


class Composed:
    """find: the function of an op by its name."""

    def __init__(self, find: Callable[[str], Callable]):
        self.find = find

    def inject_attend(
        self, q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, *tables_and_scale,
        **work,
    ):  # fmt: skip
        """-> q_rot [n, Hq, D]; o, in the layout of q, and lse [n, Hq] of causal attention. work: as `cross_attention` takes it
        where it is not the CPU's."""
        heads = (with_heads(x, slots.shape[0], k_pool.shape[2]) for x in (q, k, v))
        rope = (packed_table(cos), packed_table(sin), slots, q_weight, k_weight, eps, interleaved)
        q_rot = self.find("inject")(*heads, *rope, k_pool, v_pool)
        o, lse = self.find("cross_attention")(q_rot, k_pool, v_pool, *tables_and_scale, True, interleaved, **work)
        return q_rot, in_layout_of(q, o), lse

    def inject_attend_backward(
        self, do, q_rot, o, lse, q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, *view,
        **work,
    ):  # fmt: skip
        """q, k: None without a norm. -> dq, dk, dv, in the layout of do, dq_weight, dk_weight, which may be missing unless
        weight_grads."""
        *tables_and_scale, dk_pool, dv_pool, grad_tail, _ = view
        states = do.reshape(q_rot.shape), None, q_rot, o.view(q_rot.shape), lse
        dq_rot = self.find("cross_attention_backward")(
            *states, k_pool, v_pool, *tables_and_scale, True, interleaved, dk_pool, dv_pool, grad_tail, True, **work
        )
        if q is None:  # the backward is linear: q and k only tell shape and dtype
            q, k = q_rot, q_rot.new_empty((q_rot.shape[0], *k_pool.shape[1:]))
        n, _, D = q_rot.shape
        q, k = with_heads(q, n, D), with_heads(k, n, D)
        rope = (packed_table(cos), packed_table(sin), slots, q_weight, k_weight, eps, interleaved)
        *rows, dq_weight, dk_weight = self.find("inject_backward")(dq_rot, q, k, *rope, dk_pool, dv_pool)
        return *(in_layout_of(do, x) for x in rows), dq_weight, dk_weight
