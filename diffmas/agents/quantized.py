"""An agent's rows in 8 bits for whoever reads them, and in training rounded as if they were.

Without gradients the rows are stored so (diffmas.trace.frozen): readers' attention reads the bytes, and the rows as they were
written are free. With gradients a copy of them is rounded to the numbers that the bytes would stand for, and its gradient goes
to the rows as if nobody had rounded (the straight-through estimator, arXiv 1308.3432): the writer learns to say what survives.

The agent itself reads its own rows as they are, and so does everybody the sinks, whose keys are far larger than others.
"""

import numpy as np
import torch
from torch import Tensor

from diffmas.ops.quantize import dequantize, quantize
from diffmas.trace import Trace
from diffmas.trace.views import by_sequence, length_of, packed, places, without_first

__all__ = ["quantized"]


def quantized(handed: Trace, fixed: list[int], bits: str) -> Trace:
    """What an agent hands on, with all rows of sequence b but the first fixed[b] in a format of `diffmas.ops.quantize`."""
    rows = by_sequence(handed)
    own = handed.reading([without_first(row, n) for row, n in zip(rows, fixed)])
    if not any(own.lengths):
        return handed
    first = handed.reading([places(row, np.arange(min(n, length_of(row)))) for row, n in zip(rows, fixed)])
    if not torch.is_grad_enabled():
        return Trace.join([first, handed.adopted(own.quantize(bits))], "keep")
    return first.extended(packed(by_sequence(own)), [tuple(_rounded(x, bits) for x in pair) for pair in own.packed_rows()])


def _rounded(x: Tensor, bits: str) -> Tensor:
    """The numbers that x [n, Hkv, D] has in 8 bits, and the gradient of x."""
    constant = x.detach()
    return dequantize(*quantize(constant, bits), x.dtype) + (x - constant)
