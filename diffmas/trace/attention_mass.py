"""How much attention the new tokens of a forward pass pay to each row that they see.

o = P v. For a gradient of o that is one in a lane of each head and zero in the others, attention's backward gives v, in that
lane, the sums of the columns of P: so the kernels there are sum them, and nobody has to store P. Each sequence has a lane of
its own, since several may see a row.
"""

import torch
from torch import Tensor

from diffmas.ops.fused import with_heads
from diffmas.ops.register import call
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.pool import rows_of_heads
from diffmas.trace.views import rows_of

__all__ = ["AttentionMass"]


class AttentionMass:
    """Of a forward pass without gradients, which is about to run.

    by_layer: of each layer that has run, for each sequence, [rows of its view, new ones at the end]: what share of a token's
    attention a row gets, the mean over heads and over the sequence's new tokens; float32, or float64.
    """

    def __init__(self, forward_pass: ForwardPass):
        if not forward_pass.work.plain:
            raise ValueError(
                "attention: expected rows as they were written, got quantised ones or codes, whose shares nobody sums"
            )
        self.by_layer: dict[int, list[Tensor]] = {}
        self._work = forward_pass.work
        self._work.attended = self._sum

    def _sum(
        self, layer: int, q: Tensor, o: Tensor, lse: Tensor, kv: tuple[Tensor, Tensor], view: tuple, scale: float,
        interleaved: bool,
    ) -> None:  # fmt: skip
        """q [n, Hq, D], rotated; o in any layout; view: as the ops take it, q_indptr first."""
        rows, Hkv, D = kv[0].shape
        n, Hq, _ = q.shape
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        lengths = self._work.lengths
        sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).to(q.device)
        found: list[Tensor] = []
        for first in range(0, len(lengths), D):
            lane = (sequence - first)[:, None, None]
            do = (torch.arange(D, device=q.device) == lane).to(q.dtype).expand(n, Hq, D).contiguous()
            dk, dv = (rows_of_heads(rows, Hkv, D, dtype, q.device)[:rows] for _ in range(2))
            call(
                "cross_attention_backward", q, do, None, q, with_heads(o, n, D), lse, *kv, *view, scale, True, interleaved,
                dk, dv, None, False, backend=self._work.spec.backend,
            )  # fmt: skip
            for b, (view_b, tokens) in enumerate(zip(self._work.views[first : first + D], lengths[first : first + D])):
                seen = torch.from_numpy(rows_of(view_b)).to(q.device)
                found.append(dv[seen, :, b].sum(1) / max(Hq * tokens, 1))
        self.by_layer[layer] = found
