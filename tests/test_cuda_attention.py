"""csrc/cuda/attention.cu on the CPU, under the sanitizers, against the float64 reference."""

import types
from dataclasses import replace

import on_host
import pytest
import torch
from host_attention import HostAttention
from op_cases import VIEWS, View, as_it_lies, attention_inputs, head_major, random_attention
from op_runs import attention_all, exact_in_half, nan_stays_in_its_sequence, raw, within_budget

from diffmas import ops
from diffmas.ops import backends, reference

pytestmark = pytest.mark.skipif(not on_host.COMPILER, reason="no g++ here")

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAX_SHARED = {False: 101376, True: 232448}  # bytes of a block on sm_120, the least of our targets, and on sm_90


class Kernels(HostAttention):
    """processors: decides how many parts a view is cut into."""

    def __init__(self):
        super().__init__("attention")
        self.processors, self.vectors = 1, True
        self.resident = 1  # blocks that run side by side
        self.warpgroups = False  # on sm_90, whose forms of the forward, dK and dV must then serve
        self.sm90 = False  # on sm_90, where they need not

    def more(self):
        numbers = dict(processors=self.processors, vectors=self.vectors, warpgroups=self.warpgroups)
        return numbers | dict(resident=self.resident, max_shared=MAX_SHARED[self.warpgroups], sm90=self.warpgroups or self.sm90)


@pytest.fixture
def kernels(monkeypatch):
    """Backend "cuda" runs on the host."""
    kernels = Kernels()
    monkeypatch.setitem(ops.BACKENDS, "cuda", backends.Backend("cuda", kernels, ("cpu",), backends.FLOATS, None))
    backends._choose.cache_clear()
    yield kernels
    backends._choose.cache_clear()


def agree(inputs, dtype, dlse=True, **call):
    """One forward and backward against the reference in that precision and in float64."""
    do, dlse = exact_in_half(*inputs.q.shape), exact_in_half(*inputs.q.shape[:2]) if dlse else None
    run = lambda dtype, backend: attention_all(
        inputs.to(dtype), backend, do, None if dlse is None else dlse.to(reference.accumulator(dtype)), **call
    )
    results = run(dtype, "cuda")
    for got, like, want in zip(results, run(dtype, "reference"), run(torch.float64, "reference")):
        assert got.shape == want.shape and got.dtype == like.dtype
        if got.numel():
            within_budget(got, like, want, inputs.q.shape[2], dtype)
    return results


FEW = [name for name, view in VIEWS.items() if sum(view.queries) < 80]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FEW)
def test_views(name, dtype, kernels):
    agree(attention_inputs(VIEWS[name]), dtype)


OFFSET = View(
    [3, 1],
    [[(0, 20, 13), (100, 19, -70000), (119, 1, 5), (300, 9, 0), (40, 30, 13)], [(0, 40, 100_000), (400, 1, 0)]],
)
SHAPES = {
    "mha": dict(heads=(2, 2)),
    "gqa3": dict(heads=(6, 2)),
    "gqa8": dict(heads=(8, 1)),
    "gqa20": dict(heads=(20, 1)),
    "d16": dict(D=16),
    "d80": dict(D=80),
    "d80_partial": dict(D=80, Dr=48),
    "d80_partial_interleaved": dict(D=80, Dr=24, interleaved=True),
    "d128": dict(D=128, heads=(4, 1)),
    "d128_interleaved": dict(D=128, interleaved=True),
    "d256": dict(D=256, heads=(2, 1)),
    "d192_partial": dict(D=192, Dr=64, heads=(2, 1)),
}
# Element by element: sizes that 16 bytes do not divide.
ODD = {
    "d80_partial_24": dict(D=80, Dr=24),
    "odd": dict(D=37, Dr=22),
    "odd_interleaved": dict(D=37, Dr=22, interleaved=True),
    "two_dimensions": dict(D=2),
}


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", [*SHAPES, *ODD])
def test_shapes(name, dtype, kernels):
    """Views that are cut into parts, segments that are read elsewhere."""
    kernels.processors, kernels.vectors = 8, name in SHAPES
    agree(attention_inputs(OFFSET, **(SHAPES | ODD)[name], rows=500), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_random_views(seed, dtype, kernels):
    kernels.processors, kernels.seed = 1 + 4 * (seed % 2), seed
    agree(random_attention(seed, 300), dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["one_query_long_view", "ragged", "one_row_segments", "offset", "not_causal"])
def test_backward_of_the_grad_tail(name, dtype, kernels):
    """`grad_tail` limits dK and dV, not dq; without dq the pools get the same bits."""
    inputs = attention_inputs(VIEWS[name], rows=500)
    lengths = torch.tensor([sum(s[1] for s in row) for row in inputs.view.segments])
    for grad_tail in (torch.arange(1, len(lengths) + 1), lengths // 3):
        both = []
        for want_dq in (True, False):
            torch.manual_seed(0)
            both.append(agree(inputs, dtype, grad_tail=grad_tail, want_dq=want_dq))
        assert all(torch.equal(a, b) for a, b in zip(both[0][3:], both[1][3:]))
    *_, dk, dv = agree(inputs, dtype, grad_tail=0 * lengths)
    assert (dk == 0.5).all() and (dv == 0.5).all()


# Many queries: dK and dV only, which is what they are served (backends.CudaOps).
RAGGED = View([130, 0, 200], [[(250, 40, 0), (0, 130, 0)], [(5, 9, 0)], [(260, 70, 0), (400, 200, 0)]])
AFAR = View([130, 33], [[(250, 40, -9), (300, 50, 70_000), (0, 130, 0)], [(280, 30, 12), (140, 40, 0)]])
MANY = {
    "gqa2": (RAGGED, dict(heads=(4, 2))),
    "gqa8": (AFAR, dict(heads=(8, 1), D=16)),
    "not_causal": (replace(RAGGED, causal=False), dict(heads=(1, 1))),
    "offset": (AFAR, dict(heads=(3, 1))),
    "d128": (AFAR, dict(heads=(2, 1), D=128)),
    "interleaved": (AFAR, dict(heads=(2, 1), D=128, Dr=72, interleaved=True)),
    "d80_partial": (AFAR, dict(heads=(2, 1), D=80, Dr=48)),
    "d256": (AFAR, dict(heads=(1, 1), D=256)),
}


def dkv_of(inputs, dtype, backend, grad_tail=None):
    """The gradient pools of one backward; o and lse are the reference's."""
    x = inputs.to(dtype)
    torch.manual_seed(0)
    do, dlse = exact_in_half(*x.q.shape).to(dtype), exact_in_half(*x.q.shape[:2]).to(reference.accumulator(dtype))
    o, lse = raw.cross_attention(*x.args(), "reference")
    pools = [head_major(*x.k_pool.shape, reference.accumulator(dtype), fill=0.5) for _ in "kv"]
    raw.cross_attention_backward(do, dlse, x.q, o, lse, *x.args()[1:], *pools, grad_tail, False, backend)
    return pools


def pools_agree(inputs, dtype=torch.bfloat16, grad_tail=None):
    """The gradient pools are as accurate as the reference's -> those."""
    results = dkv_of(inputs, dtype, "cuda", grad_tail)
    wanted = (dkv_of(inputs, t, "reference", grad_tail) for t in (dtype, torch.float64))
    for got, like, want in zip(results, *wanted):
        within_budget(got, like, want, inputs.q.shape[2], dtype)
    return results


@pytest.mark.parametrize("name, dtype", [*((name, DTYPES[1]) for name in MANY), ("interleaved", DTYPES[2])], ids=str)
def test_pools_of_many_queries(name, dtype, kernels):
    """The same bits from any number of blocks in any order."""
    view, case = MANY[name]
    inputs = attention_inputs(view, **case, rows=640)
    kernels.processors = 2
    results = pools_agree(inputs, dtype)
    kernels.processors, kernels.seed = 1, 1
    assert name not in ("offset", "d128") or all(torch.equal(a, b) for a, b in zip(results, dkv_of(inputs, dtype, "cuda")))


def test_dkv_of_many_queries_of_the_grad_tail(kernels):
    inputs = attention_inputs(RAGGED, (2, 1), rows=640)
    pools_agree(inputs, grad_tail=torch.tensor([150, 9, 3]))
    assert all((x == 0.5).all() for x in pools_agree(inputs, grad_tail=torch.tensor([0, 0, 0])))


def test_many_queries_go_two_ways(kernels, monkeypatch):
    """o and dq to Triton, which must leave the pools alone."""
    monkeypatch.setattr(torch.ops, "diffmas_native", kernels)
    monkeypatch.setitem(ops.BACKENDS, "cuda", backends.Backend("cuda", backends.CudaOps(), ("cpu",), backends.FLOATS, None))
    inputs = attention_inputs(View([40, 35], [[(60, 20, 0), (0, 40, 0)], [(50, 30, 7), (100, 35, 0)]]), rows=150)
    for grad_tail in (None, torch.tensor([50, 3])):
        agree(inputs, torch.float16, grad_tail=grad_tail)


def test_backward_of_older_rows(kernels):
    """A call that sees only a part of the view that o and lse are of."""
    x = attention_inputs(View([1, 2], [[(0, 90, 0), (200, 7, 0)], [(0, 64, 3), (210, 7, 0)]]), rows=300).to(torch.float32)
    o, lse = raw.cross_attention(*x.args(), "reference")
    x.view = View([1, 2], [[(0, 90, 0)], [(0, 64, 3)]], causal=False)
    grads, results = (torch.randn_like(x.q), None, x.q, o, lse), []
    for backend in ("cuda", "reference"):
        pools = [head_major(300, 2, 64, torch.float32, fill=0.5) for _ in "kv"]
        results.append((raw.cross_attention_backward(*grads, *x.args()[1:], *pools, None, True, backend), *pools))
    for got, want in zip(*results):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_many_sequences_and_segments(kernels):
    """More than one look at the index: 131 sequences, some without queries, and a view of 140 segments."""
    lengths = [1 + b % 2 if b % 8 == 7 or b == 130 else 0 for b in range(131)]
    segments = [[(3 * b, 3, 0), (400 + b, 1, 0)] for b in range(131)]
    segments[7] = [(2 * i, 1, i % 3) for i in range(140)]
    agree(attention_inputs(View(lengths, segments), (1, 1), 16, rows=540), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("name", ["q", "do", "k_pool", "v_pool"])
def test_a_nan_stays_in_its_sequence(name, dtype, kernels):
    kernels.processors = 8
    nan_stays_in_its_sequence("cuda", name, dtype)


class Recorder:
    """In the place of a backend's ops: notes who was called, with which `grad_tail` and `want_dq`."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def cross_attention(self, *args):
        self.calls.append(self.name)

    def cross_attention_backward(self, *args):
        grad_tail, want_dq = args[-2:]
        self.calls.append((self.name, grad_tail if grad_tail is None else grad_tail.tolist(), want_dq))
        return self.name


@pytest.mark.parametrize("missing", [None, "not here"])
@pytest.mark.parametrize("hopper", [0, 4])
def test_who_runs_it(missing, hopper, monkeypatch):
    """Backend "cuda" leaves dq of many queries, and what it does not serve, to Triton, or to the reference without it, but not
    on Hopper; the forward of many, too, unless there are as many tiles of 128 rows as a Hopper GPU has multiprocessors."""
    calls, other = [], "reference" if missing else "triton"
    recorders = {name: Recorder(name, calls) for name in ("cuda", "triton", "reference")}
    monkeypatch.setitem(ops.BACKENDS, "triton", backends.Backend("triton", recorders["triton"], None, None, missing))
    monkeypatch.setattr(backends, "reference", recorders["reference"])
    monkeypatch.setattr(torch.ops, "diffmas_native", recorders["cuda"])
    monkeypatch.setattr(backends, "_hopper_multiprocessors", lambda device: hopper)

    def who(tokens, D=64, dtype=torch.bfloat16, pool=None, half=None, interleaved=False, B=1, scale=1.0):
        q, kv, indptr = torch.empty(tokens, 8, D, dtype=dtype), torch.empty(9, 4, D, dtype=pool or dtype), torch.empty(B + 1)
        offset, inv_freq = (None, None) if half is None else (torch.empty(1), torch.empty(half))
        view = (indptr, None, None, None, offset, inv_freq, scale, True, interleaved)
        calls.clear()
        backends.CudaOps().cross_attention(q, kv, kv, *view)
        for want_dq in (True, False):
            given = backends.CudaOps().cross_attention_backward(q, None, q, q, q, kv, kv, *view, kv, kv, None, want_dq)
            assert given == calls[-2 if want_dq and len(calls) > 2 else -1][0]
        return list(calls)

    alone = lambda name: [name, (name, None, True), (name, None, False)]
    odd = dict(tokens=1, D=37, dtype=torch.float32)
    for few in (dict(tokens=32), dict(tokens=128, B=4), dict(tokens=1, D=250, half=24), odd):
        assert who(**few) == alone("cuda")
    shared = [other, (other, [0], True), ("cuda", None, False), ("cuda", None, False)]
    backward = [other, *(alone("cuda") if hopper else shared)[1:]]
    assert who(tokens=33) == backward
    for many in (dict(tokens=99, D=256, half=64), dict(tokens=99, D=80, half=12, interleaved=True)):
        assert who(**many) == shared
    not_served = dict(tokens=1, pool=torch.float16), dict(tokens=1, D=250, half=20), dict(tokens=99, D=80, half=12)
    for case in (*not_served, dict(tokens=99, dtype=torch.float32), dict(tokens=99, D=37)):
        assert who(**case) == alone(other)
    for case in (dict(tokens=64), dict(tokens=64, D=128), dict(tokens=99, D=80)):
        assert who(**case) == (alone("cuda") if hopper else shared)
    for case in (dict(tokens=63), dict(tokens=64, scale=-1.0)):
        assert who(**case) == backward
    for case in (dict(tokens=64, D=136), dict(tokens=64, half=32)):
        assert who(**case) == shared


def test_work_is_found_where_triton_runs(monkeypatch):
    """Not for what the kernels on Hopper will do, which find their own."""
    found = types.SimpleNamespace(attention_work=lambda kernel, *args: (kernel, len(args)))
    monkeypatch.setitem(ops.BACKENDS, "triton", backends.Backend("triton", found, None, None, None))
    q, pool, view = torch.empty(64, 8, 64).bfloat16(), torch.empty(9, 4, 64).bfloat16(), (torch.empty(2), *5 * (None,))
    work = lambda kernel, q=q: backends.CudaOps().attention_work(kernel, q, pool, *view, 1.0, True, False, 70)
    assert work("fwd") == ("fwd", 12) and work("dq") == ("dq", 12) and work("fwd", q[:1]) is None
    monkeypatch.setattr(backends, "_hopper_multiprocessors", lambda device: 4)
    assert work("fwd") is None and work("dq") is None


@pytest.mark.parametrize("missing", [None, "not here"])
def test_ops_that_cuda_has_not(missing, monkeypatch):
    """merge_states and reposition are Triton's, or the reference's without it."""
    others = types.SimpleNamespace(merge_states=lambda: "triton")
    monkeypatch.setitem(ops.BACKENDS, "triton", backends.Backend("triton", others, ("cpu",), backends.FLOATS, missing))
    monkeypatch.setitem(
        ops.BACKENDS, "cuda", backends.Backend("cuda", types.SimpleNamespace(), ("cpu",), backends.FLOATS, None)
    )
    backends._choose.cache_clear()
    wanted = reference.merge_states if missing else others.merge_states
    assert ops.implementation("merge_states", torch.empty(1, 1, 8), "cuda") is wanted
    assert ops.implementation("reposition", torch.empty(1, 1, 8), "cuda") is reference.reposition
    backends._choose.cache_clear()


def test_head_sizes_of_the_extension():
    if ops.extension.cuda_targets:
        has = lambda op, head_dim: backends.CudaBackend().has(op, torch.float32, head_dim)
        assert has("cross_attention", 256) and not has("cross_attention_backward", 257) and has("inject", 512)


def test_where_the_address_is_odd(kernels):
    """Rows that begin two bytes after a multiple of 16."""
    kernels.vectors = False
    x = attention_inputs(VIEWS["ragged"])
    offset = torch.zeros(*x.q.shape[:2], 65, dtype=torch.float64)[..., 1:].copy_(x.q)
    x = replace(x, q=offset)
    x.to = lambda dtype: replace(attention_inputs(VIEWS["ragged"]).to(dtype), q=as_it_lies(offset, dtype))
    agree(x, torch.bfloat16)


@pytest.mark.parametrize("dtype, case", [(torch.bfloat16, dict(D=128)), (torch.float32, dict(D=37, Dr=22, heads=(2, 1)))])
def test_the_same_bits_in_every_order(dtype, case, kernels):
    """Of blocks and threads; five parts and more are merged by whichever block comes last."""
    kernels.processors, kernels.vectors = 12, "Dr" not in case
    view = View([1, 2], [[(10, 400, 0), (500, 250, 9)], [(10, 400, -3)]])
    inputs = attention_inputs(view, **case, rows=800)
    results = []
    for kernels.seed in range(3):
        torch.manual_seed(0)
        results.append(agree(inputs, dtype))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
