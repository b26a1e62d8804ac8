"""csrc/cpu in bfloat16 with dot products (AVX512-BF16) and tiles (AMX), on any CPU: with an emulation of these instructions,
under the sanitizers, against the float64 reference."""

from dataclasses import replace

import on_host
import pytest
import torch
from host_attention import HostAttention
from op_cases import VIEWS, View, attention_inputs, random_attention
from op_runs import attention_all, exact_in_half, within_budget

from diffmas import ops
from diffmas.ops import backends, reference

pytestmark = pytest.mark.skipif(not on_host.COMPILER, reason="no g++ here")


@pytest.fixture(params=["cpu_dots", "cpu_tiles"])
def kernels(request, monkeypatch):
    """Backend "cpu" is the emulated form."""
    monkeypatch.setitem(
        ops.BACKENDS, "cpu", backends.Backend("cpu", HostAttention(request.param), ("cpu",), backends.FLOATS, None)
    )
    backends._choose.cache_clear()
    yield
    backends._choose.cache_clear()


def agree(inputs, dtype=torch.bfloat16, **call):
    """One forward and backward against the reference in that precision and in float64."""
    do, dlse = exact_in_half(*inputs.q.shape), exact_in_half(*inputs.q.shape[:2])
    run = lambda dtype, backend: attention_all(inputs.to(dtype), backend, do, dlse.to(reference.accumulator(dtype)), **call)
    results = run(dtype, "cpu")
    for got, like, want in zip(results, run(dtype, "reference"), run(torch.float64, "reference")):
        assert got.shape == want.shape and got.dtype == like.dtype
        if got.numel():
            within_budget(got, like, want, inputs.q.shape[2] * (inputs.q.shape[1] / inputs.k_pool.shape[1]) ** 0.5, dtype)
    return results


@pytest.mark.parametrize("name", [name for name in VIEWS if name not in ("split", "chunks")])
def test_views(name, kernels):
    agree(attention_inputs(VIEWS[name], rows=700))


# Many query rows, hence blocks and panels; tiles that end within 16 keys, rows in the middle of a pool, keys gathered.
MANY = View([70, 0, 55], [[(250, 40, 0), (0, 70, 0)], [(5, 9, 0)], [(260, 17, 0), (310, 9, 0), (330, 5, 0), (400, 100, 0)]])
AFAR = View([40, 33], [[(250, 40, -9), (300, 50, 70_000), (0, 45, 0)], [(280, 30, 12), (140, 40, 0)]])
SHAPES = {
    "gqa3": (MANY, dict(heads=(3, 1), D=16)),
    "not_causal": (replace(MANY, causal=False), dict(heads=(1, 1), D=32)),
    "d128": (AFAR, dict(heads=(2, 1), D=128)),
    "interleaved": (AFAR, dict(heads=(1, 1), D=80, Dr=40, interleaved=True)),
    "odd": (AFAR, dict(heads=(2, 2), D=37, Dr=22)),
    "d48": (MANY, dict(heads=(2, 1), D=48)),
}


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, kernels):
    view, shape = SHAPES[name]
    agree(attention_inputs(view, **shape, rows=520))


@pytest.mark.parametrize("seed", range(6))
def test_random_views(seed, kernels):
    agree(random_attention(seed, 300))


@pytest.mark.parametrize("scale", [0.0, -0.3])
def test_scale(scale, kernels):
    for name in ("prefill", "ragged"):
        inputs = attention_inputs(VIEWS[name], rows=400)
        inputs.scale = scale
        agree(inputs)


def test_backward_of_the_grad_tail(kernels):
    """Rows before the tail, and the pools without dq."""
    inputs = attention_inputs(VIEWS["prefill_on_trace"], rows=700)
    results = []
    for want_dq in (True, False):
        torch.manual_seed(0)
        results.append(agree(inputs, grad_tail=torch.tensor([70]), want_dq=want_dq))
    assert all(torch.equal(a, b) for a, b in zip(results[0][3:], results[1][3:]))


def test_other_dtypes_stay_floats(kernels):
    """A dtype that the instructions do not multiply is as exact as ever: bfloat16 pools under float32 queries."""
    inputs = attention_inputs(VIEWS["prefill"], rows=300)
    single, half = inputs.to(torch.float32), inputs.to(torch.bfloat16)
    single.k_pool, single.v_pool = half.k_pool, half.v_pool
    exact = attention_all(inputs, "reference", inputs.q)
    same = attention_all(inputs.to(torch.float32), "reference", inputs.q)
    for got, like, want in zip(attention_all(single, "cpu", inputs.q), same, exact):
        within_budget(got, like, want, 64 * 2**0.5)
