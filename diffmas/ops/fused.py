"""A layer's two ops as one call, which for one token halves the host's time. The CPU kernels have ops for it; elsewhere they are
composed of their parts, which may be of two backends."""

from collections.abc import Callable

__all__ = ["PARTS", "Composed"]

PARTS = {
    "inject_attend": ("inject", "cross_attention"),
    "inject_attend_backward": ("cross_attention_backward", "inject_backward"),
}


class Composed:
    """find: the function of an op by its name."""

    def __init__(self, find: Callable[[str], Callable]):
        self.find = find

    def inject_attend(
        self, q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, *tables_and_scale
    ):  # fmt: skip
        """-> q_rot [n, Hq, D]; o [n, Hq, D] and lse [n, Hq] of causal attention."""
        q_rot = self.find("inject")(q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool)
        return q_rot, *self.find("cross_attention")(q_rot, k_pool, v_pool, *tables_and_scale, True, interleaved)

    def inject_attend_backward(
        self, do, q_rot, o, lse, q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, *view
    ):  # fmt: skip
        """q, k: None without a norm. -> dq, dk, dv, dq_weight, dk_weight."""
        *tables_and_scale, dk_pool, dv_pool, grad_tail = view
        dq_rot = self.find("cross_attention_backward")(
            do, None, q_rot, o, lse, k_pool, v_pool, *tables_and_scale, True, interleaved, dk_pool, dv_pool, grad_tail, True
        )
        if q is None:  # the backward is linear: q and k only tell shape and dtype
            q, k = q_rot, q_rot.new_empty((q_rot.shape[0], *k_pool.shape[1:]))
        rope = (cos, sin, slots, q_weight, k_weight, eps, interleaved)
        return self.find("inject_backward")(dq_rot, q, k, *rope, dk_pool, dv_pool)
