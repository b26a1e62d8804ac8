"""The backward of what a forward pass does in its layers.

Rows are written once and never move, so attention saves nothing of K and V: its backward reads the pool again, adds dK and dV
of the rows that it read to the gradient pools of the backward pass, and takes out those of the rows that this pass wrote, which
are complete by then (diffmas.trace.autograd says why).

A run of latent steps reads the same earlier rows T times, and nobody needs their gradient before the first step has been
undone. So the backward of a step adds dK and dV of the run's own rows only and keeps (do, q, o, lse), and a `flush` before the
run adds those of the earlier rows for all steps in one matrix-shaped pass: the gradient pool is read and written once instead
of T times.
"""

import torch
from torch import Tensor

from diffmas.ops.fused import in_layout_of, packed_table, with_heads
from diffmas.ops.register import call
from diffmas.trace.attention_parts import composed
from diffmas.trace.spec import LayerSpec
from diffmas.trace.streams import on_stream

__all__ = ["LayerBackward"]


class LayerBackward:
    """What a `LayerWork` does in backward."""

    def attend_backward(
        self, layer: LayerSpec, do, q_rot, o, lse, q, k, cos, sin, q_weight, k_weight, eps: float, scale: float,
        weight_grads: bool = True, copy: bool = False,
    ):  # fmt: skip
        """-> dq, dk, dv in the layout of o; dq_weight, dk_weight, needed if weight_grads. do: None where nobody used o, only
        the rows. q, k: None without a norm. copy: what is kept for the flush is a copy; the caller's memory is used again."""
        i, interleaved, backend = layer.index, layer.rope == "interleaved", self.spec.backend
        borrowed, tables = self.borrowed, self.on(q_rot.device, i)
        grads = self.store.pools[i].grads() if borrowed is None else borrowed.grads[i]
        own_rows_only, deferred = self.choices[i]
        rope = (cos, sin, tables.slots, q_weight, k_weight, eps, interleaved)
        newest = self.grad_tail if own_rows_only else None
        with grads.lend(self.lineage, self.views, newest) as (k_pool, v_pool, dk_pool, dv_pool):
            run = call if self.watch is None else self._watched(i, dk_pool, dv_pool, tables.slots)
            if do is None:
                if q is None:  # the backward is linear: q and k only tell shape and dtype
                    q, k = q_rot, q_rot.new_empty((q_rot.shape[0], *dk_pool.shape[1:]))
                n, _, D = q_rot.shape
                q, k = with_heads(q, n, D), with_heads(k, n, D)
                rope = (packed_table(cos), packed_table(sin), *rope[2:])
                *rows, dq_weight, dk_weight = run(
                    "inject_backward", q_rot, torch.zeros_like(q_rot), q, k, *rope, dk_pool, dv_pool, backend=backend
                )
                return *(in_layout_of(o, x) for x in rows), dq_weight, dk_weight
            if deferred is not None:
                kept = (do, q_rot, o, lse)
                if borrowed is not None:
                    borrowed.kept[i] = kept
                else:
                    grads.steps(self.lineage, deferred).append(tuple(x.clone() for x in kept) if copy else kept)
            parts, n = self._parts(layer, q_rot.device, k_pool.shape[1]), q_rot.shape[0]
            views, found = parts[0].views, {}
            if len(parts) > 1 or views["shared"] is not None or views["frozen"] is not None:
                run = self._attention(layer, n, scale).backward(parts, run, own_rows_only)
            else:
                found = tables.work.of(
                    "dq", i, n, "all", q_rot, views["all"], True, k_pool=k_pool, scale=scale, backend=backend
                )
            if self.coded is not None:
                states = do.reshape(q_rot.shape), q_rot, o.view(q_rot.shape), lse
                pools = (k_pool, v_pool), (dk_pool, dv_pool)
                where = i, self._sights and self._sights[i], states, *pools, views["all"][5], scale
                run = self._with_coded(run, where)
            return run(
                "inject_attend_backward", q_rot, do, q_rot, o, lse, q, k, *rope, k_pool, v_pool, *views["all"], scale, dk_pool,
                dv_pool, tables.grad_tail if own_rows_only else None, weight_grads, backend=backend, **found,
            )  # fmt: skip

    def _with_coded(self, run, where: tuple):
        """`run`, but attention's dq gets what rows with codes add to it, which leave theirs. where: as `CodedReads.backward`
        takes it."""

        def with_more(name: str, *args, **how):
            dq = run(name, *args, **how)
            if name != "cross_attention_backward":
                return dq
            return dq + self.coded.backward(*where, self.spec.backend, self.lineage, self.older_needs_grad)

        return composed(with_more)

    def _watched(self, i: int, dk_pool: Tensor, dv_pool: Tensor, slots: Tensor):
        """`call`, but the two parts of attention's backward run one by one: between them the rows' gradient is in the pool."""

        def run(name: str, like: Tensor, *args, **how):
            if name == "inject_backward":
                self.watch(i, dk_pool[slots], dv_pool[slots])
            return call(name, like, *args, **how)

        return composed(run)

    def flush(self) -> None:
        """Adds dK and dV of the rows before a run of latent steps, for all steps that this backward pass has been through."""
        for pool, parts, scale, interleaved, stream in reversed(self._flushes.values()):
            with on_stream(stream):
                grads = pool.grads()
                steps = grads.steps(self.lineage, self.deferred)
                if steps:
                    B = len(self.slots)  # a token of each sequence that takes the steps
                    do, q, o, lse = (torch.stack(x, 1 if x[0].shape[0] == B else 2) for x in zip(*steps))  # by sequence
                    q, lse = q.flatten(0, 1), lse.flatten(0, 1)
                    do, o = do.view(q.shape), o.view(q.shape)
                    with grads.lend(self.lineage, self.older) as (k, v, dk, dv):
                        for part in parts:
                            *states, of_lse = part.queries(q.shape[1] // k.shape[1], do, q, o, lse)
                            states, mine, grads_of = (*states, of_lse.contiguous()), part.rows((k, v)), part.rows((dk, dv))
                            for sequences, *view in part.views["older"]:
                                call(  # every step sees all of the older rows
                                    "cross_attention_backward", states[1], states[0], None, *states[1:], *mine,
                                    sequences * len(steps), *view, scale, False, interleaved, *grads_of, None, False,
                                    backend=self.spec.backend,
                                )  # fmt: skip
                steps.clear()
