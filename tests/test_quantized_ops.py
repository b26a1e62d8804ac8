"""Rows in 8 and 4 bits: what becomes of numbers, and attention that reads them, against a loop over their values in float64."""

import pytest
import torch
from op_cases import VIEWS, View, attention_inputs, random_attention
from op_runs import exact_in_half, within_budget
from quantized_cases import BITS, by_hand, in_bits, run_quantized

from diffmas import ops
from diffmas.ops.quantize import FORMATS, pack, unpack

BACKENDS = [name for name in ("cpu",) if ops.available()[name] is None]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
raw = torch.ops.diffmas


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", BITS)
def test_numbers(bits):
    """Each is off by half a step at most, the largest of a row not at all, zeros stay zeros; whatever the rows' magnitude."""
    x = torch.randn(50, 3, 33, dtype=torch.float64) * torch.logspace(-30, 30, 50)[:, None, None]
    x[7], x[8, 1, 5:] = 0, 0
    payload, scale = ops.quantize(x, bits)
    assert payload.dtype == FORMATS[bits].payload and scale.dtype == torch.float32 and scale.shape == (50, 3)
    got = ops.dequantize(payload, scale, torch.float64)
    step = scale.double()[..., None]
    if bits == "fp8":  # three bits behind the first one, of numbers that are not the smallest
        step = torch.maximum(step * 2.0**-9, x.abs() * 2.0**-3)
    assert ((got - x).abs() <= step / 2 * (1 + 1e-5)).all() and (got[x == 0] == 0).all()
    top = x.abs().amax(-1)
    torch.testing.assert_close(got.abs().amax(-1), top, rtol=1e-6, atol=0)
    half = ops.dequantize(*ops.quantize(x[20:30].bfloat16(), bits), torch.bfloat16)
    assert half.dtype == torch.bfloat16 and (half - x[20:30]).abs().max() < top[20:30].max()


def test_what_is_not_finite_stays_in_its_row():
    for bits in BITS:
        for value in (torch.nan, torch.inf, -torch.inf):
            x = torch.randn(4, 2, 16)
            x[2, 1, 3] = value
            payload, scale = ops.quantize(x, bits)
            got = ops.dequantize(payload, scale)
            assert got[2, 1].isnan().all() and got.isnan().sum() == 16 and not payload.float().isnan().any()


@pytest.mark.parametrize("D", [1, 2, 7, 64])
def test_int4_is_packed(D):
    payload, _ = ops.quantize(torch.randn(5, 2, D), "int4")
    packed = pack(payload)
    assert packed.shape == (5, 2, -(-D // 2)) and packed.dtype == torch.uint8
    assert torch.equal(unpack(packed, D), payload)


def test_other_bits_are_refused():
    with pytest.raises(ValueError, match=r"bits: expected one of \['fp8', 'int4', 'int8'\], got 'int2'"):
        ops.quantize(torch.zeros(1, 2), "int2")


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ragged", "empty_view", "offset", "not_causal", "shared_rows"])
@pytest.mark.parametrize("bits", BITS)
def test_the_reference_is_a_loop_over_the_values(bits, name):
    for interleaved in (False, True):
        inputs = attention_inputs(VIEWS[name], (4, 2), 16, 8, interleaved, rows=700)
        do = exact_in_half(*inputs.q.shape)
        for got, want in zip(run_quantized(in_bits(inputs, bits), do, "reference"), by_hand(inputs, bits, do)):
            torch.testing.assert_close(got, want)


def agree(inputs, bits, dtype, backend):
    do = exact_in_half(*inputs.q.shape)
    exact = run_quantized(in_bits(inputs, bits), do, "reference")
    args = in_bits(inputs.to(dtype), bits)
    heads = inputs.q.shape[1] / inputs.k_pool.shape[1]
    same = run_quantized(args, do, "reference")
    for got, like, want in zip(run_quantized(args, do, backend), same, exact):
        within_budget(got, like, want, inputs.q.shape[2] * heads**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_budget(backend, bits, dtype):
    for name, view in VIEWS.items():
        for heads in ((2, 2), (8, 1)) if name in ("ragged", "one_query_long_view", "offset") else ((4, 2),):
            agree(attention_inputs(view, heads), bits, dtype, backend)


@pytest.mark.parametrize(
    "D, Dr, interleaved", [(128, 128, False), (80, 48, True), (256, 64, False), (20, 8, False), (33, 16, False)]
)
@pytest.mark.parametrize("bits", BITS[:2])
@pytest.mark.parametrize("backend", BACKENDS)
def test_head_sizes(backend, bits, D, Dr, interleaved):
    for name in ("offset", "ragged"):
        agree(attention_inputs(VIEWS[name], (4, 2), D, Dr, interleaved), bits, torch.float32, backend)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("backend", BACKENDS)
def test_random_views(backend, seed):
    agree(random_attention(seed), BITS[seed % 2], DTYPES[seed % 3], backend)


@pytest.mark.parametrize("queries", [1, 40])
@pytest.mark.parametrize("payload", [torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_all_codes(backend, payload, queries):
    """Of a view of one row that has them, e4m3's two NaN in V alone, which leave the other dimensions as they are."""
    v = torch.arange(256).to(torch.uint8).view(payload)[None, None]
    k, scale = v.float().nan_to_num(0).to(payload), torch.full((1, 1), 0.25)
    index = [torch.tensor(x) for x in ([0, queries], [0, 1], [0], [1])]
    q = torch.randn(queries, 1, 256)
    o, lse = raw.cross_attention_quantized(q, k, v, scale, scale, *index, None, None, 1.0, False, backend)
    torch.testing.assert_close(o, 0.25 * v.float().expand_as(o), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(lse[..., None], 0.25 * (q * k.float()).sum(-1, keepdim=True), rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("queries", [2, 40])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_stays_in_its_sequence(backend, queries):
    """Of a row whose scale is NaN, as `quantize` makes it."""
    inputs = attention_inputs(View([queries, 2], [[(0, 300, 0)], [(300, 320, 0)]], causal=False), rows=650)
    do = exact_in_half(queries + 2, 4, 64)
    clean = run_quantized(in_bits(inputs.to(torch.float32), "int8"), do, backend)
    inputs.v_pool[9, 0, 5] = torch.nan
    got = run_quantized(in_bits(inputs.to(torch.float32), "int8"), do, backend)
    assert got[0][:queries, :2].isnan().all() and got[2][:queries, :2].isnan().all()
    for x, y in zip(got, clean):
        assert torch.equal(x[queries:], y[queries:]) and torch.equal(x[:queries, 2:], y[:queries, 2:])


# ---- the public function ---------------------------------------------------------------------------------------------


def public(**changes):
    k, k_scale = ops.quantize(torch.randn(16, 2, 8))
    index = dict(
        q_indptr=torch.tensor([0, 2]), seg_indptr=torch.tensor([0, 1]), seg_start=torch.tensor([3]), seg_len=torch.tensor([9])
    )
    args = dict(q=torch.randn(2, 4, 8), k_pool=k, v_pool=k, **index, k_scale=k_scale, v_scale=k_scale, causal=False) | changes
    return ops.cross_attention(**args)


def test_the_public_function():
    q, (k, scale) = torch.randn(2, 4, 8), ops.quantize(torch.randn(16, 2, 8))
    rows = ops.dequantize(k, scale)
    got = public(q=q, k_pool=k, v_pool=k, k_scale=scale, v_scale=scale)
    want = public(q=q, k_pool=rows, v_pool=rows, k_scale=None, v_scale=None)
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"causal": True}, "causal: expected False with quantised rows"),
        ({"v_scale": None}, "k_scale, v_scale: expected both of them, got only one"),
        ({"k_pool": torch.zeros(16, 2, 8), "v_pool": torch.zeros(16, 2, 8)}, "k_pool: expected one of .*int8.*float8"),
        ({"v_pool": torch.zeros(16, 2, 8, dtype=torch.uint8)}, "v_pool: expected the dtype of k_pool"),
        ({"k_scale": torch.zeros(16, 1)}, r"k_scale: expected shape \[16, 2\], got \[16, 1\]"),
        ({"v_scale": torch.zeros(16, 2, dtype=torch.bfloat16)}, "v_scale: expected float32"),
        ({"k_pool": torch.zeros(16, 8, 2, dtype=torch.int8).mT}, "k_pool: expected a last stride of 1"),
        ({"seg_len": torch.tensor([14])}, "seg_start . seg_len: expected rows up to 16"),
        ({"backend": "cuda"}, "backend: "),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        public(**changes)


def test_fake_tensors():
    from torch._subclasses.fake_tensor import FakeTensorMode

    args = in_bits(attention_inputs(VIEWS["ragged"], rows=400).to(torch.bfloat16), "int8")
    with FakeTensorMode() as mode:
        args = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in args]
        o, lse = raw.cross_attention_quantized(*args, "auto")
        assert o.shape == args[0].shape and o.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert raw.cross_attention_quantized_backward(o, args[0], o, lse, *args[1:], "auto").shape == o.shape
