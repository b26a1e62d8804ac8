"""The CUDA kernels on a GPU, in all dtypes: the cases of test_cuda_host.py and test_cuda_attention.py, streams, graphs,
devices. Needs one."""

import pytest
import torch
from op_cases import VIEWS, View, attention_inputs, inject_inputs, random_attention
from op_runs import attention_all, exact_in_half, finite, inject_all, raw, within_budget
from quantized_cases import in_bits
from test_cuda_attention import MANY, OFFSET, SHAPES
from test_cuda_attention import ODD as ODD_HEADS
from test_cuda_host import INJECTS, ODD, POOL
from test_cuda_quantized import CASES, exact_codes
from test_cuda_sm90 import FORWARD, WARPGROUPS

from diffmas import ops
from diffmas.ops import backends

pytestmark = pytest.mark.skipif(ops.available()["cuda"] is not None, reason=str(ops.available()["cuda"]))


def run(inputs, dtype, backend, device, wide_tables=False):
    torch.manual_seed(0)
    dq_rot, (dk, dv) = exact_in_half(*inputs.q.shape), exact_in_half(2, POOL, *inputs.k.shape[1:])
    x = inputs.to(dtype, device)
    if wide_tables and dtype != torch.float64 and x.cos is not None:
        x.cos, x.sin = inputs.cos.float().to(device), inputs.sin.float().to(device)
    return inject_all(x, backend, dq_rot, dk, dv)


@pytest.mark.parametrize("wide_tables", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*INJECTS, *ODD])
def test_inject(name, dtype, wide_tables):
    inputs = inject_inputs(**(INJECTS | ODD)[name], rows=POOL)
    got, again = (run(inputs, dtype, "cuda", "cuda", wide_tables) for _ in range(2))
    same, exact = (run(inputs, t, "reference", "cpu", wide_tables) for t in (dtype, torch.float64))
    for x, twice, like, want in zip(got, again, same, exact):
        assert x.shape == want.shape and x.dtype == like.dtype and torch.equal(x, twice)
        if x.numel():
            within_budget(x, like, want, inputs.q.shape[2])


@pytest.mark.parametrize("n", [1, 64, 5000, 65536])
def test_as_triton_in_all_lengths(n):
    """Grids of one block and of many; sums of the weights' gradients over every block."""
    g = torch.Generator("cuda").manual_seed(0)
    random = lambda *shape: torch.randn(*shape, generator=g, device="cuda")
    q, k, v = random(n, 8, 128).bfloat16().split((4, 2, 2), 1)
    tables, weights = random(2, n, 128).bfloat16().unbind(), random(2, 128).bfloat16().unbind()
    slots = torch.randperm(n, generator=g, device="cuda")
    rest = *tables, slots, *weights, 1e-6, False
    grads, results = random(2, 2, n, 128), []
    for backend in ("cuda", "triton"):
        pools, wide = torch.zeros(2, 2, n, 128, device="cuda").bfloat16(), grads.clone()
        out = raw.inject(q, k, v, *rest, *pools.transpose(1, 2), backend)
        back = raw.inject_backward(q, q, k, *rest, *wide.transpose(1, 2), backend)
        results.append((out, pools, *back, wide))
    for got, want in zip(*results):
        torch.testing.assert_close(
            got.float(), want.float(), rtol=2e-2, atol=2e-2 * max(1.0, want.float().abs().max().item()) / 4
        )


def test_on_a_stream_and_in_a_graph():
    x = inject_inputs(n=5, rows=POOL).to(torch.float32, "cuda")
    pools = torch.zeros(2, POOL, 2, 64, device="cuda")
    want = raw.inject(x.q, x.k, x.v, *x.rope(), *pools, "cuda")
    backward = lambda: raw.inject_backward(x.q, x.q, x.k, *x.rope(), *pools, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        busy = torch.randn(2000, 2000, device="cuda")
        for _ in range(20):
            busy = busy @ busy * 1e-3
        x.q.copy_(2 * x.q)  # after the products, so a launch on another stream would see the old q
        got = raw.inject(x.q, x.k, x.v, None, None, x.slots, None, None, 1e-6, False, *pools, "cuda")
    stream.synchronize()
    assert torch.equal(got, x.q)
    x.q.mul_(0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured, grads = raw.inject(x.q, x.k, x.v, *x.rope(), *pools, "cuda"), backward()
    pools.fill_(1)
    graph.replay()
    torch.testing.assert_close(captured, want, rtol=0, atol=0)
    assert all(g.isfinite().all() for g in grads) and not pools[:, x.slots[x.slots >= 0]].any()


def test_a_second_gpu_and_mixed_devices():
    x = inject_inputs(n=5, rows=POOL).to(torch.float32, "cuda")
    pools = torch.zeros(2, POOL, 2, 64)
    with pytest.raises(RuntimeError, match="k_pool: expected a tensor on CUDA device 0"):
        raw.inject(x.q, x.k, x.v, *x.rope(), *pools, "cuda")
    if torch.cuda.device_count() < 2:
        pytest.skip("there is one GPU")
    got = run(inject_inputs(n=5, rows=POOL), torch.float32, "cuda", "cuda:1")
    want = run(inject_inputs(n=5, rows=POOL), torch.float32, "cuda", "cuda:0")
    assert torch.cuda.current_device() == 0 and all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(got, want))


# ---- cross_attention -------------------------------------------------------------------------------------------------


@pytest.fixture
def always(monkeypatch):
    """Many queries too."""
    monkeypatch.setattr(backends.CudaOps, "SMALL_Q_ROWS", 10**9)


def attend(inputs, dtype, backend, device, **call):
    torch.manual_seed(0)
    do, dlse = exact_in_half(*inputs.q.shape), exact_in_half(*inputs.q.shape[:2])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return attention_all(inputs.to(dtype, device), backend, do, dlse.to(wide), **call)


def agrees(x, dtype):
    """With the reference, twice with the same bits."""
    grad_tail = torch.arange(1, len(x.view.queries) + 1)
    for call in ({}, dict(grad_tail=grad_tail), dict(grad_tail=grad_tail, want_dq=False)):
        got, again = (attend(x, dtype, "cuda", "cuda", **call) for _ in range(2))
        same, exact = (attend(x, t, "reference", "cpu", **call) for t in (dtype, torch.float64))
        for a, twice, like, want in zip(got, again, same, exact):
            assert a.shape == want.shape and a.dtype == like.dtype and torch.equal(a, twice)
            if a.numel():
                within_budget(a, like, want, x.q.shape[2], dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*VIEWS, *SHAPES, *ODD_HEADS])
def test_attention(name, dtype, always):
    x = attention_inputs(VIEWS[name]) if name in VIEWS else attention_inputs(OFFSET, **(SHAPES | ODD_HEADS)[name], rows=500)
    agrees(x, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("seed", range(60))
def test_attention_of_random_views(seed, dtype):
    """Some of them few queries, some many."""
    agrees(random_attention(seed, 3000), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", MANY | WARPGROUPS)
def test_attention_of_many_queries(name, dtype):
    """dq is Triton's, and o where there are few tiles; dK and dV are ours."""
    view, case = (MANY | WARPGROUPS)[name]
    agrees(attention_inputs(view, **case, rows=640), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FORWARD)
def test_forward_of_many_queries(name, dtype, always):
    """Ours on every GPU, on Hopper by warpgroups."""
    view, case = FORWARD[name]
    agrees(attention_inputs(view, **case, rows=605), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("D, offset", [*((D, 0) for D in (64, 96, 128, 256)), (128, 70)])
def test_prefill_as_triton(D, offset, dtype):
    """Several waves of blocks, many tiles of queries; rows that three sequences share, one of them at another position."""
    views = [[(0, 4000, offset * (b == 1)), (4000 + 1500 * b, 1000 + 200 * b, 0)] for b in range(3)]
    x = attention_inputs(View([1000 + 200 * b for b in range(3)], views), (8, 2), D, rows=9000)
    results = (attend(x, dtype, backend, "cuda") for backend in ("cuda", "triton"))
    for got, want in zip(*results):
        torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2 * want.float().abs().max().item())


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("B, N, n", [(1, 40_000, 1), (4, 9_000, 3), (64, 500, 1)])
def test_attention_as_triton_over_long_views(B, N, n, D, always):
    """All multiprocessors, so as many parts as there may be."""
    views = [[(b * (N + 7), N - n, b % 2 * 3), (B * (N + 7) + b * n, n, 0)] for b in range(B)]
    x = attention_inputs(View([n] * B, views), (8, 2), D, rows=B * (N + 7 + n))
    for dtype in (torch.float32, torch.bfloat16):
        for got, want in zip(*(attend(x, dtype, backend, "cuda") for backend in ("cuda", "triton"))):
            torch.testing.assert_close(got.float(), want.float(), rtol=2e-2, atol=2e-2 * want.float().abs().max().item())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("payload", [torch.int8, torch.float8_e4m3fn], ids=str)
def test_every_code_of_8_bits(payload, dtype, always):
    exact_codes(lambda *args: raw.cross_attention_quantized(*args, "cuda"), payload, dtype, "cuda")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bits", ["int8", "fp8"])
@pytest.mark.parametrize("name", [*CASES, "long"])
def test_rows_of_8_bits(name, bits, dtype, always):
    """With the reference, twice with the same bits; long: as many parts as there may be."""
    long = View([1, 3], [[(7, 40_000, 0)], [(50_000, 9_000, 5), (7, 3000, 0)]]), dict(heads=(8, 2), D=128)
    view, shape = CASES.get(name, long)
    x = attention_inputs(View(view.queries, view.segments, causal=False), **shape, rows=500 if name in CASES else 60_000)
    args = in_bits(x.to(dtype, "cuda"), bits)
    run = lambda args, backend: raw.cross_attention_quantized(*args, backend)
    got, again = (run(args, "cuda") for _ in range(2))
    same, exact = (run(in_bits(x.to(t), bits), "reference") for t in (dtype, torch.float64))
    assert all(torch.equal(a, b) and a.dtype == c.dtype for a, b, c in zip(got, again, same))
    for a, like, want in zip(*((o, finite(lse)) for o, lse in (got, same, exact))):
        within_budget(a, like, want, x.q.shape[2], dtype)


def test_attention_on_a_stream_and_in_a_graph():
    """Three parts and more, whose counters must be zero again when the graph runs the next time."""
    x = attention_inputs(View([1, 2], [[(0, 3000, 0)], [(0, 900, 5)]])).to(torch.bfloat16, "cuda")
    args, do = x.args(), torch.randn_like(x.q)
    pools = torch.zeros(2, *x.k_pool.shape, device="cuda")

    def step():
        o, lse = raw.cross_attention(*args, "cuda")
        return o, lse, raw.cross_attention_backward(do, None, args[0], o, lse, *args[1:], *pools, None, True, "cuda")

    want, grads = [t.clone() for t in step()], pools.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        pools.zero_()
        got = step()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip((*got, pools), (*want, grads)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        pools.zero_()
        for t in captured:
            t.fill_(torch.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip((*captured, pools), (*want, grads)))


@pytest.mark.parametrize("name, spoil", [
    ("k_pool", lambda q, k, v, *_: {1: k.half(), 2: v.half()}), ("k_pool", lambda q, k, *_: {1: k.repeat(1, 1, 2)[..., ::2]}),
    ("v_pool", lambda q, k, v, *_: {2: v.cpu()}), ("v_pool", lambda q, k, v, *_: {2: v.bfloat16()}),
    ("q_indptr", lambda q, k, v, i, *_: {3: i.int()}), ("seg_start", lambda q, k, v, i, j, s, *_: {5: s.cpu()}),
    ("seg_len", lambda q, k, v, i, j, s, n, *_: {6: n[:1]}),
])  # fmt: skip
def test_what_attention_refuses(name, spoil):
    """Before it touches memory."""
    args = attention_inputs(VIEWS["ragged"]).to(torch.float32, "cuda").args()
    wrong = spoil(*args)
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        torch.ops.diffmas_native.cross_attention(*(wrong.get(i, x) for i, x in enumerate(args)))


def test_attention_of_nothing():
    x = attention_inputs(View([], []), rows=9).to(torch.float32, "cuda")
    o, lse = torch.ops.diffmas_native.cross_attention(*x.args())
    assert o.shape == (0, 4, 64) and lse.shape == (0, 4)
    x = attention_inputs(View([2], [[]]), rows=9).to(torch.float32, "cuda")
    o, lse, dq, dk, dv = attend(x, torch.float32, "cuda", "cuda")
    assert not o.any() and not dq.any() and (lse == -1e30).all() and (dk == 0.5).all() and (dv == 0.5).all()
