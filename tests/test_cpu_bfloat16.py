"""csrc/cpu in bfloat16 with dot products (AVX512-BF16) and tiles (AMX), on any CPU: with an emulation of these instructions,
under the sanitizers, against the float64 reference."""

from dataclasses import replace

import on_host
import pytest
import torch
from host_attention import HostAttention
from op_cases import VIEWS, View, attention_inputs, random_attention
from op_runs import (
    attention_all,
    exact_in_half,
    nan_stays_in_its_sequence,
    row_makes_nan_of_what_it_sees,
    within_budget,
)
from quantized_cases import BITS, in_bits, run_quantized

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


@pytest.mark.parametrize("bits", BITS[:2])
@pytest.mark.parametrize("name", ["one_query_long_view", "ragged", "offset", "many_queries", "odd"])
def test_quantised_rows(name, bits, kernels):
    """Which become floats, under the sanitizers too."""
    view, shape = SHAPES.get(name) or (VIEWS[name], {})
    inputs = attention_inputs(view, **shape, rows=700)
    do = exact_in_half(*inputs.q.shape)
    run = lambda dtype, backend: run_quantized(in_bits(inputs.to(dtype), bits), do, backend)
    for got, like, want in zip(run(torch.bfloat16, "cpu"), run(torch.bfloat16, "reference"), run(torch.float64, "reference")):
        within_budget(got, like, want, inputs.q.shape[2] * 2**0.5)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes(name, kernels):
    view, shape = SHAPES[name]
    agree(attention_inputs(view, **shape, rows=520))


# Every remainder of a vector, a pair and a tile.
@pytest.mark.parametrize("D", [2, 8, 20, 33, 80, 96, 130, 250, 256])
def test_head_sizes(D, kernels):
    view = View([19, 1, 2, 1], [[(40, 33, 7), (10, 1, 0)], [(0, 1, 0)], [(100, 35, -3)], []])
    agree(attention_inputs(view, heads=(1, 1), D=D, Dr=D // 4 * 2, rows=150))


@pytest.mark.parametrize("keys", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65])
def test_numbers_of_keys(keys, kernels):
    """Of a tile; blocks, few query rows and one."""
    for queries in (13, 3, 1):
        agree(attention_inputs(View([queries], [[(30, keys, 0)]], causal=False), heads=(1, 1), D=32, rows=100))


@pytest.mark.parametrize("heads", [(1, 1), (4, 2)], ids=str)
@pytest.mark.parametrize("D", [64, 80])
def test_rows_that_lie_anyhow(D, heads, kernels):
    """Rows begin at any element, odd ones too; the numbers between them are NaN, and the sanitizer knows them."""
    inputs = attention_inputs(View([21, 1], [[(7, 64, 0), (100, 21, 0)], [(0, 90, 0)]]), heads=heads, D=D, rows=130)
    want = attention_all(inputs.to(torch.bfloat16), "cpu", inputs.q)

    def apart(x):  # [rows, heads, D] in rows of heads * (D + 1) elements and one more
        rows, heads, D = x.shape
        wide = torch.full((rows, heads * (D + 1) + 1), torch.nan, dtype=x.dtype)
        return wide[:, 1:].unflatten(1, (heads, -1))[..., :D].copy_(x)

    half = inputs.to(torch.bfloat16)
    half.k_pool, half.v_pool = apart(half.k_pool), apart(half.v_pool)
    assert half.k_pool.stride(0) % 2 == (heads[1] + heads[1] * D + 1) % 2
    assert all(torch.equal(a, b) for a, b in zip(attention_all(half, "cpu", inputs.q), want))


@pytest.mark.parametrize("name", ["q", "do", "k_pool", "v_pool"])
def test_a_nan_stays_in_its_sequence(name, kernels):
    nan_stays_in_its_sequence("cpu", name, torch.bfloat16)


@pytest.mark.parametrize("name", ["q", "do"])
@pytest.mark.parametrize("queries", [1, 5, 55])
def test_a_row_that_is_not_finite(queries, name, kernels):
    for value in (torch.nan, torch.inf):
        row_makes_nan_of_what_it_sees("cpu", name, value, torch.bfloat16, queries, keys=120)


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


@pytest.mark.parametrize("queries, pools", [("float32", "bfloat16"), ("bfloat16", "float32"), ("float16", "bfloat16")])
def test_mixed_dtypes_stay_floats(queries, pools, kernels):
    """What the instructions do not multiply is as exact as ever, in blocks and with few rows."""
    for name in ("prefill", "ragged"):
        inputs = attention_inputs(VIEWS[name], rows=400)
        exact = attention_all(inputs, "reference", inputs.q)
        mixed, others = inputs.to(getattr(torch, queries)), inputs.to(getattr(torch, pools))
        same = attention_all(mixed, "reference", inputs.q)
        mixed.k_pool, mixed.v_pool = others.k_pool, others.v_pool
        for got, like, want in zip(attention_all(mixed, "cpu", inputs.q), same, exact):
            within_budget(got, like, want, 64 * 2**0.5)
