"""The parts of split attention made one: a program takes all parts of a row at once, and adds them always in the same order."""

import triton
import triton.language as tl

from diffmas.kernels.attention_tiles import LOG2E

__all__ = ["cross_attention_merge_kernel"]


@triton.jit(do_not_specialize=["rows", "splits"])
def cross_attention_merge_kernel(
    parts, lse_parts, out, lse, rows, splits, D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Grid (rows,), a row for each (token, query head). out [rows, D]: the sum of parts [splits, rows, D]; or, with lse_parts
    [splits, rows] in log2, the state that these make together, and its lse [rows]."""
    i_r, o_d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    o_s = tl.arange(0, BLOCK_S)
    o_part, m_part = o_s * rows.to(tl.int64) + i_r, o_s < splits
    b_x = tl.load(parts + o_part[:, None] * D + o_d[None, :], mask=m_part[:, None] & (o_d < D)[None, :], other=0)
    if lse_parts is not None:
        b_lse = tl.load(lse_parts + o_part, mask=m_part, other=-float("inf"))
        top = tl.max(b_lse, 0)
        b_weight = tl.exp2(b_lse - tl.where(top == -float("inf"), 0.0, top))
        total = tl.sum(b_weight, 0)
        total = tl.where(total == 0, 1.0, total)  # a row that sees nothing
        b_x *= (b_weight / total)[:, None]
        tl.store(lse + i_r, (top + tl.log2(total)) / LOG2E)
    tl.store(out + i_r * D + o_d, tl.sum(b_x, 0), mask=o_d < D)
