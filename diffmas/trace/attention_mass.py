"""How much attention the new tokens of a forward pass pay to each row that they see.

o = P v. For a gradient of o that is one in a lane of each head and zero in the others, attention's backward gives v, in that
lane, the sums of the columns of P: so the kernels there are sum them, and nobody has to store P. Each sequence has a lane of
its own, since several may see a row.
"""

import torch
from torch import Tensor

from diffmas.ops.fused import with_heads
from diffmas.ops.register import call
from diffmas.trace.attention_parts import Part
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.pool import rows_of_heads
from diffmas.trace.views import rows_of

__all__ = ["AttentionMass"]


class AttentionMass:
    """Of a forward pass without gradients, which is about to run.

    by_head: of each layer that has run, for each sequence, [rows of its view, new ones at the end; K/V heads]: what share of a
    token's attention a row gets, the mean over a K/V head's queries and over the sequence's new tokens; float32, or float64.
    """

    def __init__(self, forward_pass: ForwardPass):
        if not forward_pass.work.plain:
            raise ValueError(
                "attention: expected rows as they were written, got quantised ones or codes, whose shares nobody sums"
            )
        self.by_head: dict[int, list[Tensor]] = {}
        self._work = forward_pass.work
        self._work.attended = self._sum

    @property
    def by_layer(self) -> dict[int, list[Tensor]]:
        """The same, [rows of its view], the mean over all heads."""
        return {layer: [mass.mean(1) for mass in of_sequence] for layer, of_sequence in self.by_head.items()}

    def _sum(
        self, layer: int, q: Tensor, o: Tensor, lse: Tensor, kv: tuple[Tensor, Tensor], parts: list[Part], scale: float,
        interleaved: bool,
    ) -> None:  # fmt: skip
        """q [n, Hq, D], rotated; o in any layout; parts: of the heads."""
        rows, Hkv, D = kv[0].shape
        n, Hq, _ = q.shape
        o = with_heads(o, n, D)
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lengths = self._work.lengths
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
        found: list[Tensor] = []
        for first in range(0, len(lengths), D):
            lane = (sequence - first)[:, None, None]
            do = (torch.arange(D, device=q.device) == lane).to(q.dtype).expand(n, Hq, D).contiguous()
            dk, dv = (rows_of_heads(rows, Hkv, D, dtype, q.device)[:rows] for _ in range(2))
            for part in parts:
                (do_, q_, o_, lse_), view = part.queries(Hq // Hkv, do, q, o, lse), part.views["all"]
                call(
                    "cross_attention_backward", q_, do_, None, q_, o_, lse_.contiguous(), *part.rows(kv), *view, scale, True,
                    interleaved, *part.rows((dk, dv)), None, False, backend=self._work.spec.backend,
                )  # fmt: skip
            for b, (view_b, tokens) in enumerate(zip(self._work.views[first : first + D], lengths[first : first + D])):
                seen = torch.from_numpy(rows_of(view_b)).to(q.device)
                found.append(dv[seen, :, b] / max(Hq // Hkv * tokens, 1))
        self.by_head[layer] = found
