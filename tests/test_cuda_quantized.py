"""csrc/cuda/attention_quantized.cu on the CPU, under the sanitizers: every code of 8 bits, and attention against the float64
reference over the numbers that the rows stand for."""

import itertools

import on_host
import pytest
import torch
from host_attention import HostAttention
from op_cases import VIEWS, View, attention_inputs, random_attention
from op_runs import finite, raw, within_budget
from quantized_cases import in_bits

from diffmas import ops
from diffmas.ops import backends

HOST = pytest.mark.skipif(not on_host.COMPILER, reason="no g++ here")
DTYPES = [torch.bfloat16, torch.float16]


class Kernels(HostAttention):
    """processors: decides how many parts a view is cut into."""

    def __init__(self, processors: int = 1, seed: int = 0):
        super().__init__("attention_quantized")
        self.processors, self.seed = processors, seed

    def more(self) -> dict:
        return dict(processors=self.processors)


def agree(inputs, bits, dtype, **how):
    """o and lse of one forward against the reference in that precision and in float64."""
    inputs.view.causal = False
    args = in_bits(inputs.to(dtype), bits)
    got = Kernels(**how).cross_attention_quantized(*args)
    same = raw.cross_attention_quantized(*args, "reference")
    exact = raw.cross_attention_quantized(*in_bits(inputs, bits), "reference")
    for x, like, want in zip(*((o, finite(lse)) for o, lse in (got, same, exact))):
        within_budget(x, like, want, inputs.q.shape[2], dtype)
    return got


def exact_codes(attend, payload, dtype, device="cpu"):
    """Of a view of one row that has all codes: o is its values, lse of a query that is 1 at one dimension its key there."""
    values = torch.arange(256).to(torch.uint8).view(payload).float().nan_to_num(0)  # NaN is no payload
    codes, scale = values.to(payload)[None, None], torch.full((1, 1), 0.25)
    q = torch.eye(256, dtype=dtype)[::3, None]
    index = [torch.tensor(x) for x in ([0, len(q)], [0, 1], [0], [1])]
    args = [x.to(device) for x in (q, codes, codes, scale, scale, *index)]
    o, lse = (x.cpu() for x in attend(*args, None, None, 2.0, False))
    assert torch.equal(o.float(), (0.25 * values).to(dtype).float().expand_as(o))
    torch.testing.assert_close(lse[:, 0], 0.5 * values[::3], rtol=1e-6, atol=1e-6)


@HOST
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("payload", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_code(payload, dtype):
    exact_codes(Kernels().cross_attention_quantized, payload, dtype)


CASES = {
    "ragged": (VIEWS["ragged"], dict(heads=(4, 1))),
    "empty_view": (VIEWS["empty_view"], dict(heads=(2, 2))),
    "parts": (VIEWS["one_query_long_view"], dict(heads=(8, 1), D=128)),
    "offset": (VIEWS["offset"], dict()),
    "partial": (VIEWS["offset"], dict(D=80, Dr=24, heads=(3, 1))),
    "interleaved": (VIEWS["offset"], dict(D=112, Dr=54, heads=(2, 1), interleaved=True)),
    "d256": (VIEWS["offset"], dict(D=256, heads=(1, 1))),
    "d16": (VIEWS["one_row_segments"], dict(D=16)),
}


@HOST
@pytest.mark.parametrize("name", CASES)
def test_budget(name):
    view, shape = CASES[name]
    inputs = attention_inputs(View(view.queries, view.segments), **shape, rows=500)
    i = list(CASES).index(name)
    for bits, dtype in ((("int8", "fp8")[i % 2], DTYPES[i // 2 % 2]),) if shape else itertools.product(("int8", "fp8"), DTYPES):
        agree(inputs, bits, dtype, processors=8 if name in ("parts", "offset") else 1)


@HOST
@pytest.mark.parametrize("seed", range(2))
def test_random_views(seed):
    bits, dtype = ("int8", "fp8")[seed % 2], DTYPES[1 - seed % 2]
    agree(random_attention(seed, 200), bits, dtype, processors=1 + 7 * (seed % 2), seed=seed)


@HOST
@pytest.mark.parametrize("largest", [1e-6, 65504.0])
def test_float16_is_long_enough_for_scales(largest):
    """Of rows that are tiny and as large as float16 goes, which no part of a product may be too small or too large for."""
    inputs = attention_inputs(View([1], [[(0, 40, 0)]]), (1, 1), 16, rows=40)
    inputs.v_pool[:] = largest * inputs.v_pool / inputs.v_pool.abs().amax(-1, keepdim=True)
    agree(inputs, "int8", torch.bfloat16)
    inputs.q *= 1e-3  # all weights are alike, and their sum with the values cannot leave float16
    args = in_bits(inputs, "int8")
    want, _ = raw.cross_attention_quantized(*args, "reference")
    got, _ = Kernels().cross_attention_quantized(args[0].half(), *args[1:])
    assert (got.double() - want).abs().max() <= 2e-3 * want.abs().max() + 6e-8 and got.isfinite().all()


@HOST
def test_a_nan_stays_in_its_sequence():
    """Of a row whose scale is NaN, as `quantize` makes it; rows outside of the views are NaN anyway."""
    inputs = attention_inputs(View([2, 2], [[(0, 40, 0)], [(40, 33, 0)]]), rows=75).to(torch.bfloat16)
    inputs.view.causal = False
    clean = Kernels().cross_attention_quantized(*in_bits(inputs, "int8"))
    for pool in (inputs.k_pool, inputs.v_pool):
        pool[9, 0, 5] = torch.nan
        got = Kernels().cross_attention_quantized(*in_bits(inputs, "int8"))
        assert got[0][:2, :2].isnan().all()
        for x, y in zip(got, clean):
            assert torch.equal(x[2:], y[2:]) and torch.equal(x[:2, 2:], y[:2, 2:])
        pool[9, 0, 5] = 0


@HOST
@pytest.mark.parametrize("shape, dtype", [(dict(D=24), torch.float16), (dict(), torch.float32), (dict(Dr=12), torch.float16)])
def test_what_is_not_served_is_refused(shape, dtype):
    inputs = attention_inputs(VIEWS["offset"], **shape, rows=500).to(dtype)
    with pytest.raises(on_host.Failed, match="error 1"):
        Kernels().cross_attention_quantized(*in_bits(inputs, "int8"))


class Recorder:
    """In the place of a backend's ops."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __getattr__(self, op):
        return lambda *args: self.calls.append(self.name) or self.name


@pytest.mark.parametrize("missing", [None, "not here"])
def test_who_runs_it(missing, monkeypatch):
    """Backend "cuda" takes the forward of few queries, and leaves the rest to Triton, or to the reference without it."""
    calls, other = [], "reference" if missing else "triton"
    recorders = {name: Recorder(name, calls) for name in ("cuda", "triton", "reference")}
    monkeypatch.setitem(ops.BACKENDS, "triton", backends.Backend("triton", recorders["triton"], None, None, missing))
    monkeypatch.setattr(backends, "reference", recorders["reference"])
    monkeypatch.setattr(torch.ops, "diffmas_native", recorders["cuda"])

    def who(tokens=1, D=64, dtype=torch.bfloat16, half=None, interleaved=False, skip=0, odd=None):
        kv, scales, indptr = torch.empty(9, 4, D + skip, dtype=torch.int8)[..., skip:], torch.empty(9, 4), torch.empty(2)
        if odd is not None:  # a dimension of size 1, whose stride says nothing
            kv = kv.narrow(odd, 0, 1)
            kv = kv.as_strided(kv.shape, [7 if dim == odd else stride for dim, stride in enumerate(kv.stride())])
        offset, inv_freq = (None, None) if half is None else (torch.empty(1), torch.empty(half))
        view = (indptr, None, None, None, offset, inv_freq, 1.0, interleaved)
        q = torch.empty(tokens, 8, D, dtype=dtype)
        return backends.CudaOps().cross_attention_quantized(q, kv, kv, scales, scales, *view)

    served = dict(), dict(tokens=32), dict(D=256, half=128), dict(D=112, half=27, interleaved=True), dict(skip=16)
    for ours in (*served, dict(odd=0), dict(odd=1)):
        assert who(**ours) == "cuda"
    others = dict(tokens=33), dict(D=72), dict(dtype=torch.float32), dict(half=6), dict(skip=8)
    for case in others:
        assert who(**case) == other

    def work(kernel, pool):
        q, view = torch.empty(1, 8, 64).bfloat16(), (torch.empty(2), *5 * (None,))
        return backends.CudaOps().attention_work(kernel, q, pool, *view, 1.0, False, False, 70)

    payloads = torch.empty(9, 4, 64, dtype=torch.int8)  # dq of few queries needs what Triton works on
    assert work("fwd", payloads) is None and work("dq", payloads) == other and work("dq", payloads.bfloat16()) is None


def test_the_backend_reads_them(monkeypatch):
    cuda = backends.CudaBackend()
    assert cuda.has("cross_attention_quantized", torch.bfloat16, 256)
    assert not cuda.has("cross_attention_quantized", torch.bfloat16, 257)
    assert not cuda.has("cross_attention_quantized_backward", torch.bfloat16, 64)
    cuda.why_missing = None
    monkeypatch.setitem(ops.BACKENDS, "cuda", cuda)
    backends.check_reads("cuda")
