"""Every op of every backend against the float64 reference, within an error budget; autograd of the pools; bad input.

Budget (DESIGN section 8): a backend's error is at most twice that of the plain-PyTorch reference in the same precision.
"""

import itertools

import numpy as np
import pytest
import torch
from op_cases import HEADS, ROWS, VIEWS, View, attention_inputs, head_major, inject_inputs
from op_runs import (
    attention_all,
    exact_in_half,
    inject_all,
    merge_all,
    nan_stays_in_its_sequence,
    reposition_all,
    row_makes_nan_of_what_it_sees,
    within_budget,
)

from diffmas import ops
from diffmas.ops import extension
from diffmas.ops.fused import Composed
from diffmas.trace import autograd
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Hold, Store
from diffmas.trace.views import KVRange

BACKENDS = [name for name in ("cpu",) if ops.available()[name] is None]  # test_triton.py has the kernels for GPUs
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
raw = torch.ops.diffmas


def products(backend, dtype):
    """What p and ds are rounded to: bfloat16 where this machine's form of the CPU kernels multiplies it."""
    bfloats = backend == "cpu" and dtype == torch.bfloat16 and extension.cpu_form() in ("avx512_bf16", "amx", "arm_bf16")
    return dtype if bfloats else torch.float32


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_budget(backend, name, dtype):
    for heads in HEADS.values():
        inputs = attention_inputs(VIEWS[name], heads)
        do = torch.randn_like(inputs.q).bfloat16().double()
        exact = attention_all(inputs, "reference", do)
        same = attention_all(inputs.to(dtype), "reference", do)
        for got, like, want in zip(attention_all(inputs.to(dtype), backend, do), same, exact):
            within_budget(got, like, want, 64 * (heads[0] / heads[1]) ** 0.5, products(backend, dtype))


@pytest.mark.parametrize(
    "D, Dr, interleaved",
    [(32, 32, False), (80, 80, True), (96, 48, False), (128, 128, False), (256, 64, True), (40, 20, False), (20, 8, False)],
)
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_head_sizes(backend, dtype, D, Dr, interleaved):
    for name in ("offset", "ragged"):
        inputs = attention_inputs(VIEWS[name], (4, 2), D, Dr, interleaved)
        do, dlse = exact_in_half(*inputs.q.shape), torch.randn(inputs.q.shape[:2])
        exact = attention_all(inputs, "reference", do, dlse.double())
        same = attention_all(inputs.to(dtype), "reference", do, dlse)
        for got, like, want in zip(attention_all(inputs.to(dtype), backend, do, dlse), same, exact):
            within_budget(got, like, want, D * 2**0.5, products(backend, dtype))


@pytest.mark.parametrize(
    "name", ["prefill_on_trace", "ragged", "one_row_segments", "split", "chunks", "offset", "many_queries"]
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_backward_of_the_grad_tail(backend, name):
    """`grad_tail` limits dK and dV, not dq; without dq the pools get the same bits."""
    inputs = attention_inputs(VIEWS[name])
    single = inputs.to(torch.float32)
    do = torch.randn_like(inputs.q)
    lengths = torch.tensor([sum(s[1] for s in row) for row in inputs.view.segments])
    for grad_tail in (lengths // 3, lengths + 5, 0 * lengths):
        exact = attention_all(inputs, "reference", do, grad_tail=grad_tail)
        same = attention_all(single, "reference", do, grad_tail=grad_tail)
        results = attention_all(single, backend, do, grad_tail=grad_tail)
        for got, like, want in zip(results, same, exact):
            within_budget(got, like, want, 64 * 2**0.5)
        without = attention_all(single, backend, do, grad_tail=grad_tail, want_dq=False)
        assert without[2].shape == (0,)
        assert torch.equal(without[3], results[3]) and torch.equal(without[4], results[4])
    full = attention_all(inputs, "reference", do)
    assert torch.equal(exact[2], full[2]) and (exact[3] == 0.5).all() and (exact[4] == 0.5).all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_attention_backward_in_two_parts(backend):
    """dK and dV of a view's older rows, from a call that sees only them, complete those of its newest rows."""
    view = View([1, 1], [[(0, 90, 0), (200, 7, 0)], [(0, 64, 3), (210, 7, 0)]])
    inputs = attention_inputs(view).to(torch.float32)
    do = torch.randn_like(inputs.q)
    *_, dq, dk, dv = attention_all(inputs, backend, do)
    args = inputs.args()
    o, lse = raw.cross_attention(*args, backend)
    got = [head_major(ROWS, 2, 64, torch.float32, fill=0.5) for _ in "kv"]
    grads = (do, None, args[0], o, lse)
    assert torch.equal(dq, raw.cross_attention_backward(*grads, *args[1:], *got, torch.tensor([7, 7]), True, backend))
    older = View([1, 1], [[(0, 90, 0)], [(0, 64, 3)]], causal=False)
    inputs.view = older
    raw.cross_attention_backward(*grads, *inputs.args()[1:], *got, None, False, backend)
    torch.testing.assert_close(got[0], dk, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[1], dv, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_backward_of_many_blocks(backend):
    """So many blocks and chunks that the CPU kernels go through them in phases: the same as two calls of half the queries."""
    n, H, N, D = 1200, 8, 2048, 512
    q, do = torch.randn(n, H, D), torch.randn(n, H, D)
    k, v = (torch.randn(H, N, D).transpose(0, 1) for _ in "kv")

    def backward(q, do, dk, dv):
        view = (torch.tensor([0, len(q)]), torch.tensor([0, 1]), torch.tensor([0]), torch.tensor([N]), None, None)
        args = (q, k, v, *view, D**-0.5, False, False)
        o, lse = raw.cross_attention(*args, backend)
        return raw.cross_attention_backward(do, None, q, o, lse, *args[1:], dk, dv, None, True, backend)

    whole, parts = ([head_major(N, H, D, torch.float32, fill=0.0) for _ in "kv"] for _ in range(2))
    dq = backward(q, do, *whole)
    half = n // 2  # not a multiple of a block of rows
    assert torch.equal(dq[half + 72 :], backward(q[half:], do[half:], *parts)[72:])
    torch.testing.assert_close(dq[:half], backward(q[:half], do[:half], *parts))
    for a, b in zip(whole, parts):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_takes_any_scale(backend, scale):
    for name in ("one_query_long_view", "ragged", "many_queries"):
        inputs = attention_inputs(VIEWS[name])
        inputs.scale = scale
        exact = attention_all(inputs, "reference", inputs.q)
        same = attention_all(inputs.to(torch.float32), "reference", inputs.q)
        for got, like, want in zip(attention_all(inputs.to(torch.float32), backend, inputs.q), same, exact):
            within_budget(got, like, want, 64 * 2**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["q", "do", "k_pool", "v_pool"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_stays_in_its_sequence(backend, name, dtype):
    nan_stays_in_its_sequence(backend, name, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "do"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_row_that_is_not_finite(backend, name, value, dtype):
    for queries in (1, 5, 100):  # one row of a group, few, and blocks
        row_makes_nan_of_what_it_sees(backend, name, value, dtype, queries)


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_mixed_storage(backend):
    """bfloat16 pools under float32 queries: the pool's values are exact, the math is float32."""
    inputs = attention_inputs(VIEWS["prefill_on_trace"])
    exact = attention_all(inputs, "reference", inputs.q)
    single, half = inputs.to(torch.float32), inputs.to(torch.bfloat16)
    single.k_pool, single.v_pool = half.k_pool, half.v_pool
    same = attention_all(inputs.to(torch.float32), "reference", inputs.q)
    for got, like, want in zip(attention_all(single, backend, inputs.q), same, exact):
        within_budget(got, like, want, 64 * 2**0.5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_bits(backend, dtype):
    before = torch.get_num_threads()
    try:
        for name in ("prefill_on_trace", "split", "chunks", "shared_rows", "offset", "many_queries"):
            inputs = attention_inputs(VIEWS[name]).to(dtype)
            do = torch.randn_like(inputs.q)
            results = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                results.append(attention_all(inputs, backend, do))
            for other in results[1:]:
                for a, b in zip(results[0], other):
                    assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


INJECTS = {
    "llama": dict(norm=False),
    "qwen3": dict(D=128, heads=(8, 2)),
    "partial": dict(D=96, Dr=24, norm=False, strided=True),
    "interleaved": dict(D=80, Dr=40, interleaved=True),
    "no_rope": dict(Dr=0),
    "scatter": dict(Dr=0, norm=False),
    "one_token": dict(n=1),
    "odd": dict(n=130, D=36, Dr=18, heads=(3, 1), strided=True),
    "odd_head": dict(n=5, D=37, Dr=22, heads=(18, 9)),
    "large": dict(n=3, D=512, Dr=256, heads=(2, 1), interleaved=True),
    "no_tokens": dict(n=0),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", INJECTS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_inject_budget(backend, name, dtype):
    inputs = inject_inputs(**INJECTS[name])
    dq_rot = torch.randn_like(inputs.q).bfloat16().double()
    dk, dv = torch.randn(2, ROWS, *inputs.k.shape[1:]).bfloat16().double()
    exact = inject_all(inputs, "reference", dq_rot, dk, dv)
    same = inject_all(inputs.to(dtype), "reference", dq_rot, dk, dv)
    for got, like, want in zip(inject_all(inputs.to(dtype), backend, dq_rot, dk, dv), same, exact):
        assert got.shape == want.shape
        if got.numel():
            within_budget(got, like, want, inputs.q.shape[2])


def test_inject_stores_rows_and_takes_gradients_out():
    inputs = inject_inputs()
    ones = torch.ones(ROWS, *inputs.k.shape[1:], dtype=torch.float64)
    _, k_pool, v_pool, _, dk, dv, _, _, dk_pool, dv_pool = inject_all(inputs, "reference", inputs.q, ones, ones)
    stored = inputs.slots[inputs.slots >= 0]
    assert torch.equal(v_pool[stored], inputs.v[inputs.slots >= 0])
    untouched = torch.ones(ROWS, dtype=torch.bool)
    untouched[stored] = False
    assert (k_pool[untouched] == 7).all() and (v_pool[untouched] == 7).all()
    assert (dk_pool[stored] == 0).all() and (dv_pool[stored] == 0).all()
    assert (dk_pool[untouched] == 1).all()
    assert (dv[inputs.slots < 0] == 0).all() and (dk[inputs.slots < 0] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n, H, D", [(7, 3, 64), (40, 2, 37), (1, 1, 1), (0, 2, 16), (3, 5, 512)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_merge_states_budget(backend, n, H, D, dtype):
    parts = exact_in_half(n, 2 * H, D).split(H, dim=1)  # strided
    lses = [4 * exact_in_half(n, H) for _ in "ab"]
    for lse, rows in zip(lses, (slice(0, None, 5), slice(0, None, 3))):  # one side empty, and both
        lse[rows] = -torch.inf
    states = parts[0], lses[0], parts[1], lses[1]
    do, dlse = exact_in_half(n, H, D), exact_in_half(n, H)
    exact = merge_all(states, do, dlse, torch.float64, "reference")
    same = merge_all(states, do, dlse, dtype, "reference")
    for got, like, want in zip(merge_all(states, do, dlse, dtype, backend), same, exact):
        assert got.shape == want.shape and got.dtype == like.dtype
        if got.numel():
            within_budget(got, like, want, D)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "m, H, D, Dr, interleaved",
    [(90, 3, 64, 64, False), (33, 1, 37, 22, False), (20, 2, 80, 40, True), (5, 2, 16, 0, False), (0, 2, 16, 16, False)],
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_reposition_budget(backend, m, H, D, Dr, interleaved, dtype):
    rows = torch.randperm(ROWS)
    src = rows[torch.randint(0, 40, (m,))]  # some rows are copied more than once
    offset = torch.randint(-100_000, 100_000, (m,)) if m % 2 else torch.tensor([3, -70_000]).repeat(m // 2)
    move = src, rows[40 : 40 + m], offset, 1e4 ** (-torch.arange(0, Dr, 2).float() / max(Dr, 1)), interleaved
    data = [exact_in_half(ROWS, H, D) for _ in range(4)]
    exact = reposition_all(move, *data, torch.float64, "reference")
    same = reposition_all(move, *data, dtype, "reference")
    for got, like, want in zip(reposition_all(move, *data, dtype, backend), same, exact):
        within_budget(got, like, want, 8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_threads_do_not_change_bits_of_small_ops(backend, dtype):
    before = torch.get_num_threads()
    n, H, D = 300, 4, 128
    states = exact_in_half(n, H, D), exact_in_half(n, H), exact_in_half(n, H, D), exact_in_half(n, H)
    rows = torch.randperm(ROWS)
    move = rows[torch.randint(0, 100, (n,))], rows[100 : 100 + n], torch.arange(n), torch.rand(D // 2), False
    data = [exact_in_half(ROWS, H, D) for _ in range(4)]
    inputs = inject_inputs(n=n).to(dtype)
    grads = torch.randn(2, ROWS, 2, 64)
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(
                (
                    *merge_all(states, states[0], states[1], dtype, backend),
                    *reposition_all(move, *data, dtype, backend),
                    *inject_all(inputs, backend, inputs.q, *grads),
                )
            )
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    finally:
        torch.set_num_threads(before)


# ---- the reference itself, against plain PyTorch and finite differences ----------------------------------------------


def test_reference_attention_is_sdpa():
    view = View([12], [[(100, 20, 0), (0, 12, 0)]])
    inputs = attention_inputs(view, (4, 2))
    rows = torch.cat((torch.arange(100, 120), torch.arange(12)))
    k, v = (x[rows].transpose(0, 1)[None] for x in (inputs.k_pool, inputs.v_pool))
    mask = torch.ones(12, 32, dtype=torch.bool).tril(20)
    want = torch.nn.functional.scaled_dot_product_attention(
        inputs.q.transpose(0, 1)[None], k, v, attn_mask=mask, scale=inputs.scale, enable_gqa=True
    )
    o, _ = raw.cross_attention(*inputs.args(), "reference")
    torch.testing.assert_close(o, want[0].transpose(0, 1))


def test_an_offset_equals_rotated_keys():
    """Reading a segment at shifted positions is reading keys rotated on by the offset."""
    for interleaved in (False, True):
        moved = attention_inputs(VIEWS["offset"], interleaved=interleaved)
        plain = attention_inputs(View([7, 1], [[(0, 40, 0), (100, 30, 0), (300, 7, 0)], [(0, 40, 0), (400, 1, 0)]]))
        want = []
        for b, segments in enumerate(VIEWS["offset"].segments):
            pool_b = moved.k_pool.clone()
            for start, length, offset in segments:
                src, dst = torch.arange(start, start + length), torch.arange(500, 500 + length)
                turn = torch.full((length,), offset)
                ops.reposition(src, dst, turn, moved.inv_freq, pool_b, moved.v_pool.clone(), interleaved=interleaved)
                pool_b[src] = pool_b[dst]
            o, _ = raw.cross_attention(plain.q, pool_b, *plain.args()[2:], "reference")
            want.append(o[slice(0, 7) if b == 0 else slice(7, 8)])
        o, _ = raw.cross_attention(*moved.args(), "reference")
        torch.testing.assert_close(o, torch.cat(want))


@pytest.mark.skipif(not extension.loaded, reason="the extension is not built")
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("heads", [(4, 2), (2, 1), (1, 1)])
@pytest.mark.parametrize("n", [1, 4, 37])
def test_a_layers_ops_as_one_call(n, heads, norm):
    """Bit by bit what its parts return, in both layouts."""
    x = inject_inputs(n, heads, norm=norm).to(torch.float32)
    index = torch.tensor
    slots, view = torch.arange(50, 50 + n), (index([0, n]), index([0, 2]), index([0, 50]), index([50, n]), None, None)
    filled = torch.randn(2, 128, heads[1], 64, generator=torch.Generator().manual_seed(1))
    composed, results = Composed(lambda op: getattr(torch.ops.diffmas_native, op)), []
    for run, flat in itertools.product((composed, torch.ops.diffmas_native), (False, True)):
        lay = lambda t: t.flatten(1)[None] if flat else t  # noqa: B023, E731
        cos, sin = (x.cos[None], x.sin[None]) if flat else (x.cos, x.sin)
        rope = (cos, sin, slots, x.q_weight, x.k_weight, 1e-6, False)
        pools, grads = list(filled.clone()), list(torch.zeros_like(filled))
        q_rot, o, lse = run.inject_attend(lay(x.q), lay(x.k), lay(x.v), *rope, *pools, *view, 0.5)
        assert o.shape == lay(x.q).shape and q_rot.shape == x.q.shape
        normed = (lay(x.q), lay(x.k)) if norm else (None, None)
        do = torch.ones(1, 1, 1).expand(o.shape)  # as autograd hands over the gradient of a sum
        arguments = (do, q_rot, o, lse, *normed, *rope, *pools, *view, 0.5)
        frozen = run.inject_attend_backward(*arguments, *(g.clone() for g in grads), None, False)
        *back, dq_weight, dk_weight = run.inject_attend_backward(*arguments, *grads, None, True)
        assert [y.shape for y in back] == [lay(y).shape for y in (x.q, x.k, x.v)]
        assert all(torch.equal(a, b) for a, b in zip(back, frozen))
        back = [y.view(z.shape) for y, z in zip(back, (x.q, x.k, x.v))]
        results.append([q_rot, o.view(x.q.shape), lse, *pools, *back, *grads, *([dq_weight, dk_weight] if norm else [])])
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))


def test_gradcheck_of_a_layer():
    """Two writes and two reads of one pool, with norm and partial RoPE, through the order token."""
    D = 4
    g = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, dtype=torch.float64, generator=g).requires_grad_()  # noqa: E731
    tables_of = torch.randn(2, 5, 2, dtype=torch.float64, generator=g)
    layer = LayerSpec(0, "half")
    spec = ModelSpec([layer], "reference", inv_freq=lambda device: torch.tensor([0.7]))

    def two_passes(q, k, v, qw, kw):
        store, past, out = Store(1), torch.zeros(0), []
        for part, slots, seen in (
            (slice(0, 3), [4, 5, 6], [KVRange(4, 3, 0)]),
            (slice(3, 5), [0, 1], [KVRange(4, 3, 2), KVRange(0, 2, 0)]),
        ):
            store.allocate(8)
            forward_pass = ForwardPass(spec, store, [len(slots)], np.arange(len(slots)), np.array(slots), [seen], past)
            tables = dict(cos=tables_of[0, part], sin=tables_of[1, part])
            o = forward_pass.attend(layer, q[part], k[part], v[part], 0.6, **tables, q_weight=qw, k_weight=kw)
            forward_pass.end(o)
            past = forward_pass.after
            out.append(o)
        return torch.cat(out)

    inputs = (rand(5, 2, D), rand(5, 1, D), rand(5, 1, D), rand(D), rand(D))
    assert torch.autograd.gradcheck(two_passes, inputs)


def test_gradcheck_merge_states():
    rand = lambda *s: torch.randn(*s, dtype=torch.float64).requires_grad_()  # noqa: E731
    assert torch.autograd.gradcheck(ops.merge_states, (rand(3, 2, 4), rand(3, 2), rand(3, 2, 4), rand(3, 2)))


def test_gradcheck_reposition():
    """A row that two copies are made of gets both gradients."""
    layer, inv_freq = LayerSpec(0, "half"), torch.tensor([0.3, 0.05])
    move = torch.tensor([0, 1, 0]), torch.tensor([4, 5, 6]), torch.tensor([3, -2, 9]), inv_freq, False
    spec = ModelSpec([layer], "reference")

    def read_copies(k, v):
        store = Store(1)
        store.allocate(8)
        first = ForwardPass(spec, store, [2], np.arange(2), np.arange(2), [[KVRange(0, 2, 0)]], torch.zeros(0))
        first.end(first.attend(layer, k, k, v, 1.0))
        past = autograd.reposition(first.after, [(store.pools[0], move)], 0, "reference", Hold(store))
        second = ForwardPass(spec, store, [1], np.arange(1), np.array([7]), [[KVRange(4, 4, 0)]], past)
        return second.attend(layer, k[:1], k[:1], v[:1], 1.0)

    rand = lambda: torch.randn(2, 1, 4, dtype=torch.float64).requires_grad_()  # noqa: E731
    assert torch.autograd.gradcheck(read_copies, (rand(), rand()))


def test_merge_states_is_attention_over_the_union():
    whole, a, b = (View([3], [segments], causal=False) for segments in ([(0, 50, 0), (60, 21, 0)], [(0, 50, 0)], [(60, 21, 0)]))
    inputs = attention_inputs(whole)
    want = raw.cross_attention(*inputs.args(), "reference")
    states = []
    for part in (a, b):
        inputs.view = part
        states.append(raw.cross_attention(*inputs.args(), "reference"))
    empty = torch.zeros_like(want[0]), torch.full_like(want[1], -torch.inf)
    for left, right in (states, states[::-1]):
        for got, expected in zip(ops.merge_states(*ops.merge_states(*left, *right), *empty), want):
            torch.testing.assert_close(got, expected)
    for got, expected in zip(ops.merge_states(*empty, *empty), empty):
        assert torch.equal(got, expected)


# ---- registration ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["reference", *BACKENDS])
def test_opcheck(backend):
    small = attention_inputs(VIEWS["ragged"], D=32).to(torch.float32)
    small.k_pool, small.v_pool = small.k_pool.nan_to_num(), small.v_pool.nan_to_num()
    args = small.args()
    o, lse = raw.cross_attention(*args, backend)
    torch.library.opcheck(raw.cross_attention.default, (*args, backend))
    grads = [torch.zeros(ROWS, 2, 32) for _ in range(2)]
    for rest in ((None, True), (torch.ones(4, dtype=torch.int64), False)):
        backward = (o, None, args[0], o, lse, *args[1:], *grads, *rest, backend)
        torch.library.opcheck(raw.cross_attention_backward.default, backward)
    x = inject_inputs(n=9, D=32).to(torch.float32)
    torch.library.opcheck(raw.inject.default, (x.q, x.k, x.v, *x.rope(), *grads, backend))
    torch.library.opcheck(raw.inject_backward.default, (x.q, x.q, x.k, *x.rope(), *grads, backend))
    state = (torch.randn(3, 2, 8), torch.randn(3, 2))
    torch.library.opcheck(raw.merge_states.default, (*state, *state, backend))
    torch.library.opcheck(raw.merge_states_backward.default, (*state, *state, *state, *state, backend))
    move = (torch.arange(4), torch.arange(10, 14), torch.arange(4), torch.ones(16), False)
    torch.library.opcheck(raw.reposition.default, (*move, *grads, backend))
    torch.library.opcheck(raw.reposition_backward.default, (*move, *grads, backend))


def test_expanded_gradient():
    """The gradient of a sum is a stride-0 tensor."""
    for backend in ("reference", *BACKENDS):
        inputs = attention_inputs(VIEWS["ragged"]).to(torch.float32)
        plain = attention_all(inputs, backend, torch.ones_like(inputs.q))
        strided = attention_all(inputs, backend, torch.ones(1, dtype=torch.float32).expand(inputs.q.shape))
        for a, b in zip(plain, strided):
            assert torch.equal(a, b)
