"""The compiled Triton kernels, executed: the PTX for sm_80 and sm_90 in numpy (tests/ptx), against the float64 reference."""

import pytest
import torch
from op_cases import View, attention_inputs, head_major
from op_runs import exact_in_half, finite, within_budget

pytest.importorskip("triton")

from ptx.kernels import executed  # noqa: E402

from diffmas.kernels import backend  # noqa: E402

ROWS = 704
ARCHITECTURES = [80, 90]


def attention(inputs, launches, do, dlse=None, grad_tail=None, want_dq=True):
    """As op_runs.attention_all, with the launchers and tiles of an architecture."""
    args = inputs.args()
    o, lse = backend.cross_attention(*args, tiles=launches.tiles)
    dk, dv = (head_major(*inputs.k_pool.shape, torch.float32, 0.5) for _ in "kv")
    dq = backend.cross_attention_backward(
        do.to(o), dlse, args[0], o, lse, *args[1:], dk, dv, grad_tail, want_dq, tiles=launches.tiles
    )
    return o, finite(lse), dq, dk, dv


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_attention(arch):
    from op_runs import attention_all

    dtype = torch.bfloat16
    x = attention_inputs(View([30], [[(0, 130, 0), (300, 30, 0)]]), (4, 2), 128, rows=ROWS)
    do, dlse = exact_in_half(*x.q.shape), exact_in_half(*x.q.shape[:2])
    exact = attention_all(x.to(torch.float64), "reference", do, dlse)
    same = attention_all(x.to(dtype), "reference", do, dlse.float())
    with executed(arch) as launches:
        results = attention(x.to(dtype), launches, do, dlse.float())
    for got, like, want in zip(results, same, exact):
        within_budget(got, like, want, 128 * 2**0.5, dtype)
