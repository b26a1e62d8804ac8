"""The Triton kernels against the float64 reference, within the budget of test_ops.py: on the GPU where there is one, else in
Triton's interpreter."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from launches import note_launches
from models import assert_close, gradients
from op_cases import VIEWS, View, attention_inputs, head_major, inject_inputs, random_attention
from op_runs import attention_all, exact_in_half, inject_all, merge_all, raw, reposition_all, within_budget
from quantized_cases import BITS, in_bits, run_quantized
from systems import ANSWERS, QUESTIONS, system

from diffmas import Agent, ops
from diffmas.models.patch import patch_of
from diffmas.ops import reference
from diffmas.ops.backends import TritonBackend
from diffmas.trace import views
from diffmas.trace.forward_pass import ForwardPass
from diffmas.trace.spec import LayerSpec, ModelSpec
from diffmas.trace.store import Store
from diffmas.trace.views import KVRange

pytestmark = pytest.mark.skipif(ops.available()["triton"] is not None, reason=str(ops.available()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
POOL = 704  # rows: the program of a tile that nobody reads costs time in the interpreter


@pytest.fixture(scope="module", autouse=True)
def bfloat16():
    if DEVICE == "cuda":
        yield
        return
    from interpreted_bfloat16 import interpreted_bfloat16

    with interpreted_bfloat16():
        yield


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request):
    return request.param


def agree(run, dtype, terms, products=torch.float32):
    """`run(dtype, backend, device)` on the kernels, against the reference in that precision and in float64; -> the results."""
    exact, same = run(torch.float64, "reference", "cpu"), run(dtype, "reference", "cpu")
    results = run(dtype, "triton", DEVICE)
    for got, like, want in zip(results, same, exact):
        assert got.shape == want.shape and got.dtype == like.dtype
        if got.numel():
            within_budget(got, like, want, terms, products)
    return results


def injecting(inputs):
    dq_rot = exact_in_half(*inputs.q.shape)
    dk, dv = exact_in_half(2, POOL, *inputs.k.shape[1:])
    return lambda dtype, backend, device: inject_all(inputs.to(dtype, device), backend, dq_rot, dk, dv)


INJECTS = {
    "one_token": dict(n=1, heads=(16, 8), D=128),
    "gqa2": dict(norm=False, strided=True),
    "gqa8": dict(n=19, heads=(8, 1), D=128, strided=True),
    "mha": dict(n=19, heads=(2, 2), D=80),
    "partial": dict(n=9, D=80, Dr=24, strided=True),
    "partial_without_norm": dict(n=5, D=80, Dr=48, norm=False),
    "interleaved": dict(n=9, heads=(8, 1), D=64, interleaved=True, strided=True),
    "partial_interleaved": dict(n=9, heads=(2, 2), D=80, Dr=40, interleaved=True),
    "no_rope": dict(n=9, Dr=0),
    "scatter": dict(n=9, Dr=0, norm=False),
    "odd": dict(n=5, heads=(18, 9), D=37, Dr=22, strided=True),
    "more_tiles_than_programs": dict(n=70, heads=(16, 8), D=16),
    "reference_s": dict(n=2, heads=(2, 1), D=512),
    "no_tokens": dict(n=0),
}


@pytest.mark.parametrize("name", INJECTS)
def test_inject(name, dtype):
    inputs = inject_inputs(rows=POOL, **INJECTS[name])
    agree(injecting(inputs), dtype, inputs.q.shape[2])


@pytest.mark.parametrize("n", [3, 40])
@pytest.mark.parametrize("missing", ["q_weight", "k_weight"])
def test_inject_with_one_norm(missing, n):
    inputs = replace(inject_inputs(rows=POOL, n=n), **{missing: None})
    agree(injecting(inputs), torch.float32, 64)


def test_inject_without_an_epsilon():
    """Of the last tile there are rows that no token has: 21 rows of 256 dimensions, eight in a tile."""
    agree(injecting(replace(inject_inputs(rows=POOL, n=7, heads=(3, 3), D=256), eps=0.0)), torch.float32, 256)


@pytest.fixture
def launched(monkeypatch):
    """-> the (kernel, grid) of every launch from now on."""
    from diffmas.kernels import cross_attention, inject

    return note_launches(monkeypatch, cross_attention, inject)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter's processors")
def test_inject_backward_loops_over_its_tiles(launched):
    """As many programs as run at once, not as tiles; one more launch for the weights, none where one program did it all."""
    for n, heads in ((200, (16, 8)), (1, (2, 1))):
        inputs = inject_inputs(rows=POOL, n=n, heads=heads, D=16)
        injecting(inputs)(torch.float32, "triton", DEVICE)
    (forward, _), (backward, (programs,)), (weights, grid), *others = launched
    assert (forward, backward, weights, grid) == ("inject_fwd_kernel", "inject_bwd_kernel", "inject_bwd_kernel_weights", (1, 2))
    assert programs <= 24 < 300 == 200 * 24 // 16
    assert [name for name, _ in others] == ["inject_fwd_kernel", "inject_bwd_kernel"]


@pytest.mark.parametrize("interleaved", [False, True])
def test_inject_with_any_tables(interleaved):
    """Each dimension has a cosine and a sine of its own; nothing assumes that a pair shares them."""
    tables = dict(cos=exact_in_half(5, 48), sin=exact_in_half(5, 48))
    agree(injecting(replace(inject_inputs(rows=POOL, n=5, interleaved=interleaved), **tables)), torch.float32, 64)


def test_inject_into_shorter_pools():
    """float16 pools under float32 queries; no row but the given ones is read or written."""
    x = inject_inputs(rows=POOL, n=9).to(torch.float32, DEVICE)
    pools = [head_major(POOL, 2, 64, torch.float16, device=DEVICE) for _ in "kv"]
    want = [p.clone() for p in pools]
    q_rot = raw.inject(x.q, x.k, x.v, *x.rope(), *pools, "triton")
    torch.testing.assert_close(q_rot, raw.inject(x.q, x.k, x.v, *x.rope(), *want, "reference"))
    for a, b in zip(pools, want):
        torch.testing.assert_close(a, b, equal_nan=True)

    stored = x.slots[x.slots >= 0]
    grads = [head_major(POOL, 2, 64, torch.float32, device=DEVICE) for _ in "kv"]
    for g in grads:
        g[stored] = 1.0
    assert all(out.isfinite().all() for out in raw.inject_backward(x.q, x.q, x.k, *x.rope(), *grads, "triton"))
    for g in grads:
        assert (g[stored] == 0).all() and g.isnan().sum() == (POOL - len(stored)) * 2 * 64


@pytest.mark.parametrize("n, H, D", [(37, 2, 80), (7, 8, 128), (5, 3, 37), (1, 1, 1), (0, 2, 64)])
def test_merge_states(n, H, D, dtype):
    parts = exact_in_half(n, 2 * H, D).split(H, dim=1)  # strided
    lses = [4 * exact_in_half(n, H) for _ in "ab"]
    for lse, rows in zip(lses, (slice(0, None, 5), slice(0, None, 3))):  # one side empty, and both
        lse[rows] = -torch.inf
    states = parts[0], lses[0], parts[1], lses[1]
    do, dlse = exact_in_half(n, H, D), exact_in_half(n, H)
    agree(lambda *where: merge_all(states, do, dlse, *where), dtype, D)


def test_merge_states_differentiates():
    """Also with the gradient of a sum, whose strides are zero."""
    args = [torch.randn(*shape, device=DEVICE).requires_grad_() for shape in 2 * ((3, 2, 16), (3, 2))]
    for total in (lambda o, lse: o.sum(), lambda o, lse: (o * o).sum() + lse.sum()):
        got, want = (
            torch.autograd.grad(total(*ops.merge_states(*args, backend=name)), args) for name in ("triton", "reference")
        )
        torch.testing.assert_close(got, want)


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
def test_merge_states_gradcheck():
    args = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in 2 * ((1, 2, 4), (1, 2))]
    assert torch.autograd.gradcheck(lambda *x: ops.merge_states(*x, backend="triton"), args)


def moves(m, Dr, interleaved=False):
    """Rows, some of them copied more than once, and far offsets."""
    rows = torch.randperm(POOL)
    inv_freq = 1e4 ** (-torch.arange(0, Dr, 2).float() / max(Dr, 1))
    return (
        rows[torch.randint(0, 1 + m // 2, (m,))],
        rows[m : 2 * m],
        torch.randint(-100_000, 100_000, (m,)),
        inv_freq,
        interleaved,
    )


@pytest.mark.parametrize(
    "m, H, D, Dr, interleaved",
    [(37, 2, 64, 64, False), (20, 1, 80, 40, True), (5, 8, 128, 128, False), (9, 2, 37, 22, False), (5, 2, 64, 0, False)]
    + [(1, 1, 64, 64, True), (0, 2, 64, 64, False)],
)
def test_reposition(m, H, D, Dr, interleaved, dtype):
    move = moves(m, Dr, interleaved)
    data = [exact_in_half(POOL, H, D) for _ in range(4)]
    agree(lambda *where: reposition_all(move, *data, *where), dtype, 8)


def test_reposition_leaves_other_rows_alone():
    """Rows-major pools, and NaN in all rows that are not named."""
    src, dst, *rest = moves(9, 64)
    for op, counterpart in ((raw.reposition, reference.reposition), (raw.reposition_backward, reference.reposition_backward)):
        pools = torch.full((2, POOL, 2, 64), torch.nan)
        pools[:, src], pools[:, dst] = torch.randn(2, 2, 9, 2, 64)
        want = pools.clone()
        counterpart(src, dst, *rest, *want)
        got = pools.to(DEVICE)
        op(*(x.to(DEVICE) for x in (src, dst, *rest[:2])), rest[2], *got, "triton")
        torch.testing.assert_close(got.cpu(), want, equal_nan=True)


def test_the_same_bits_every_time():
    inputs = inject_inputs(rows=POOL, heads=(8, 2))
    states = [exact_in_half(*shape) for shape in 2 * ((20, 2, 64), (20, 2))]
    move, data = moves(20, 64), [exact_in_half(POOL, 2, 64) for _ in range(4)]
    for run in (
        injecting(inputs),
        lambda *where: merge_all(states, states[0], states[1], *where),
        lambda *where: reposition_all(move, *data, *where),
    ):
        first, second = (run(torch.float32, "triton", DEVICE) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second))


def test_opcheck():
    grads = [torch.zeros(20, 2, 16, device=DEVICE) for _ in range(2)]
    x = inject_inputs(rows=POOL, n=3, D=16).to(torch.float32, DEVICE)
    x.slots = torch.tensor([3, -1, 7], device=DEVICE)
    torch.library.opcheck(raw.inject.default, (x.q, x.k, x.v, *x.rope(), *grads, "triton"))
    torch.library.opcheck(raw.inject_backward.default, (x.q, x.q, x.k, *x.rope(), *grads, "triton"))
    state = (torch.randn(3, 2, 8, device=DEVICE), torch.randn(3, 2, device=DEVICE))
    torch.library.opcheck(raw.merge_states.default, (*state, *state, "triton"))
    torch.library.opcheck(raw.merge_states_backward.default, (*state, *state, *state, *state, "triton"))
    rows = torch.arange(4, device=DEVICE)
    move = (rows, rows + 10, rows, torch.ones(8, device=DEVICE), False)
    torch.library.opcheck(raw.reposition.default, (*move, *grads, "triton"))
    torch.library.opcheck(raw.reposition_backward.default, (*move, *grads, "triton"))


def test_what_the_backend_takes():
    def chosen(head_dim, backend, dtype=torch.float32):
        return ops.implementation("inject", torch.empty(1, 1, head_dim, dtype=dtype, device=DEVICE), backend)

    kernel = ops.BACKENDS["triton"].ops.inject
    assert chosen(64, "triton") is kernel and chosen(256, "triton") is kernel
    assert chosen(257, "triton") is reference.inject
    if DEVICE == "cuda":
        wide = "cuda" if ops.available()["cuda"] is None else "reference"
        assert chosen(64, "auto") is kernel and chosen(257, "auto") is ops.BACKENDS[wide].ops.inject
        with pytest.raises(ValueError, match="backend: 'triton' serves"):
            chosen(64, "triton", torch.float64)
    else:
        assert chosen(64, "auto") is ops.BACKENDS["cpu" if ops.available()["cpu"] is None else "reference"].ops.inject
        assert chosen(64, "auto", torch.float64) is reference.inject


def test_the_interpreter_takes_no_bfloat16_by_itself(monkeypatch):
    """It would multiply bits as if they were numbers."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    served = lambda dtype: TritonBackend().serves("inject", "cpu", dtype, 64)
    assert [served(dtype) for dtype in (*DTYPES, torch.float64)] == [True, True, False, True]


SMALL = [name for name, v in VIEWS.items() if sum(v.queries) < 100 and all(s[0] + s[1] <= POOL for r in v.segments for s in r)]


def attending(inputs, grad_tail=None, want_dq=True):
    do, dlse = exact_in_half(*inputs.q.shape), exact_in_half(*inputs.q.shape[:2])
    wide = lambda dtype: torch.float64 if dtype == torch.float64 else torch.float32
    return lambda dtype, backend, device: attention_all(
        inputs.to(dtype, device), backend, do, dlse.to(wide(dtype)), grad_tail, want_dq
    )


@pytest.mark.parametrize("name", SMALL)
def test_attention(name, dtype):
    heads = (2, 2) if dtype == torch.float16 else (4, 2)
    agree(attending(attention_inputs(VIEWS[name], heads, rows=POOL)), dtype, 64 * 2**0.5, products=dtype)


@pytest.mark.parametrize("heads, D, Dr, interleaved", [
    ((8, 1), 64, 64, False), ((6, 2), 80, 80, True), ((2, 1), 96, 48, False), ((4, 2), 128, 128, False),
    ((2, 1), 256, 64, True), ((3, 1), 40, 20, False),
])  # fmt: skip
def test_attention_heads(heads, D, Dr, interleaved):
    for name in ("offset", "ragged"):
        inputs = attention_inputs(VIEWS[name], heads, D, Dr, interleaved, rows=POOL)
        agree(attending(inputs), torch.float32, D * (heads[0] / heads[1]) ** 0.5)


@pytest.mark.parametrize("offset", [0, 9])
def test_attention_over_three_agents(offset, dtype):
    """Of 1, 63 and 130 rows, that lie in another order than they are read in."""
    view = View([5, 1], [[(650, 1, offset), (400, 63, 0), (20, 130, -offset)], [(20, 130, 0)]])
    agree(attending(attention_inputs(view, (8, 1), 80, rows=POOL)), dtype, 80 * 8**0.5, products=dtype)


@pytest.mark.parametrize("name", ["prefill_on_trace", "ragged", "one_row_segments", "offset", "not_causal"])
def test_attention_backward_of_the_last_tokens(name):
    view = VIEWS[name]
    grad_tail = torch.arange(1, len(view.queries) + 1)
    agree(attending(attention_inputs(view, rows=POOL), grad_tail), torch.float32, 64 * 2**0.5)
    agree(attending(attention_inputs(view, rows=POOL), grad_tail, want_dq=False), torch.float32, 64 * 2**0.5)


def test_attention_backward_of_a_tail_of_many_windows():
    """More windows of rows than a sequence has programs; they begin and end in the middle of segments, at three offsets. One
    tail is far longer than its view, one is nothing."""
    first, second = [(300, 150, 3), (20, 90, 0), (130, 2, 0)], [(500, 9, 0), (150, 70, -2)]
    view = View([2, 3, 1, 1], [first, second, [(240, 5, 0)], [(0, 4, 0)]])
    grad_tail = torch.tensor([201, 75, 2**40, 0])
    agree(attending(attention_inputs(view, rows=POOL), grad_tail), torch.float32, 64 * 2**0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter's tiles")
def test_dkv_of_a_latent_step_is_launched_over_the_newest_rows():
    """Two programs for each sequence and K/V head, however long the pool is; of a prompt, no more than fill the device or than
    four times its share, or than a grid can have."""
    from diffmas.kernels.blocks import attention_blocks
    from diffmas.kernels.cross_attention import sizes

    def grid(n, B, R):
        rest = torch.float32, torch.float32, torch.device("cpu"), None, 0.1, True, False, attention_blocks
        return sizes("dkv_tail", n, 4, 64, R, 2, B, *rest).grid

    assert grid(3, 3, 1000) == grid(3, 3, 10**6) == (3, 2, 2)
    assert grid(320, 1, 1000) == (1, 2, 10) and grid(3200, 16, 10**4) == (16, 2, 28)
    assert grid(4_000_000, 1, 10**7) == (1, 2, 65_535)


@pytest.mark.parametrize("seed", range(60 if DEVICE == "cuda" else 4))
def test_attention_of_random_views(seed, dtype):
    inputs = random_attention(seed, 3000 if DEVICE == "cuda" else 300)
    agree(attending(inputs), dtype, inputs.q.shape[2] * 2**0.5, products=dtype)


def attending_in(bits, inputs):
    do = exact_in_half(*inputs.q.shape)
    return lambda dtype, backend, device: run_quantized(in_bits(inputs.to(dtype, device), bits), do, backend)


@pytest.mark.parametrize("bits", BITS[:2])
@pytest.mark.parametrize("name", ["ragged", "offset", "one_query_long_view", "prefill_on_trace", "empty_view"])
def test_quantised_rows(name, bits, dtype):
    heads = (2, 2) if dtype == torch.float16 else (4, 2)
    inputs = attention_inputs(VIEWS[name], heads, rows=POOL)
    agree(attending_in(bits, inputs), dtype, 64 * 2**0.5, products=dtype)


@pytest.mark.parametrize("seed", range(60 if DEVICE == "cuda" else 3))
def test_quantised_rows_of_random_views(seed, dtype):
    inputs = random_attention(seed, 3000 if DEVICE == "cuda" else 300)
    agree(attending_in(BITS[seed % 2], inputs), dtype, inputs.q.shape[2] * 2**0.5, products=dtype)


def test_small_quantised_rows_in_float16():
    """Their weights, which are multiplied with scales, stay in float16's range."""
    inputs = attention_inputs(VIEWS["not_causal"], rows=POOL)
    inputs.v_pool /= 512  # exact
    agree(attending_in("int8", inputs), torch.float16, 1, products=torch.float16)


def test_quantised_rows_whose_scales_lie_apart():
    inputs = attention_inputs(VIEWS["not_causal"], rows=POOL).to(torch.float32, DEVICE)
    args = list(in_bits(inputs, "fp8"))
    want = raw.cross_attention_quantized(*args, "triton")
    args[3] = args[3].contiguous()
    for got, x in zip(raw.cross_attention_quantized(*args, "triton"), want):
        assert torch.equal(got, x)


def test_attention_at_offsets_in_inference_mode_and_after_a_change():
    """Offsets may be inference tensors, and may change in place between two calls."""
    inputs = attention_inputs(VIEWS["offset"], rows=POOL)
    do = exact_in_half(*inputs.q.shape)
    want = attention_all(inputs.to(torch.float64), "reference", do)
    with torch.inference_mode():
        for got, exact in zip(attention_all(inputs.to(torch.float32, DEVICE), "triton", do), want):
            torch.testing.assert_close(got.double().cpu(), exact, atol=1e-4, rtol=0)
    args = inputs.to(torch.float32, DEVICE).args()
    offset, run = args[7], lambda: raw.cross_attention(*args, "triton")[0]
    before = run()
    offset += 3
    assert not torch.equal(run(), before)
    offset -= 3
    assert torch.equal(run(), before)


def test_attention_of_many_sequences_and_segments():
    """More than one scan over the index: 131 sequences, some without queries, and a view of 140 segments."""
    lengths = [1 + b % 2 if b % 8 == 7 or b == 130 else 0 for b in range(131)]
    segments = [[(3 * b, 3, 0), (400 + b, 1, 0)] for b in range(131)]
    segments[7] = [(2 * i, 1, i % 3) for i in range(140)]
    inputs = attention_inputs(View(lengths, segments), (1, 1), 16, rows=POOL)
    agree(attending(inputs), torch.float32, 64)


def test_attention_of_a_split_over_many_segments():
    """Splits that begin in the second scan over the index; a group of seven; rows one by one, in any order."""
    segments = [(2 * (i * 67 % 150), 1 + i % 2, 0) for i in range(150)]
    agree(attending(attention_inputs(View([1], [segments]), (7, 1), 24, rows=POOL)), torch.float32, 64)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter's processors")
def test_parts_are_merged_by_a_program_for_each_row(launched):
    """Of the forward and of dq, in one launch each."""
    attending(attention_inputs(VIEWS["one_query_long_view"], rows=POOL))(torch.float32, "triton", DEVICE)
    launches = [(name.removeprefix("cross_attention_"), grid) for name, grid in launched if "work" not in name]
    names = [name for name, _ in launches]
    assert names == ["fwd_kernel", "merge_kernel", "bwd_kernel_delta", "bwd_kernel_dq", "merge_kernel", "bwd_kernel_dkv"]
    assert launches[1][1] == launches[4][1] == (4,)  # one token of four heads


@pytest.mark.parametrize("name, short", [("offset", 0), ("prefill_on_trace", 0), ("one_row_segments", 0), ("ragged", 1000)])
def test_attention_whatever_passes_for_a_short_segment(name, short, monkeypatch):
    """Each segment has a loop of its own, or all tiles are gathered."""
    from diffmas.kernels import cross_attention

    monkeypatch.setattr(cross_attention, "SHORT", short)
    agree(attending(attention_inputs(VIEWS[name], rows=POOL)), torch.float32, 64 * 2**0.5)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_attention_of_a_scale_that_is_not_positive(scale):
    """Scores are scaled behind their maximum, where the order stays the same."""
    inputs = replace(attention_inputs(VIEWS["ragged"], rows=POOL), scale=scale)
    cast = lambda dtype, device: replace(inputs.to(dtype, device), scale=scale)
    do = exact_in_half(*inputs.q.shape)
    agree(lambda dtype, backend, device: attention_all(cast(dtype, device), backend, do), torch.float32, 64 * 2**0.5)


@pytest.mark.skipif(DEVICE == "cuda", reason="tiles of the GPU's architecture are in the table")
@pytest.mark.parametrize("block", [dict(BLOCK_M=16, BLOCK_N=64), dict(BLOCK_M=64, BLOCK_N=16, HOIST=False)], ids=str)
def test_attention_in_tiles_that_the_caller_chooses(block, dtype):
    """Launchers take their tiles from an argument, and do not remember one caller's for another."""
    from diffmas.kernels import backend

    asked = []
    tiles = lambda kernel, *_: asked.append(kernel) or block
    inputs = attention_inputs(VIEWS["ragged"], rows=POOL)
    do, dlse = (exact_in_half(*shape) for shape in (inputs.q.shape, inputs.q.shape[:2]))

    def run(dtype, name, device):
        x = inputs.to(dtype, device)
        if name == "reference":
            return attention_all(x, name, do, dlse.to(reference.accumulator(dtype)))
        args = x.args()
        backend.cross_attention(*args)
        o, lse = backend.cross_attention(*args, tiles=tiles)
        grads = [torch.full_like(p, 0.5, dtype=torch.float32) for p in args[1:3]]
        dq = backend.cross_attention_backward(do.to(o), dlse.to(lse), args[0], o, lse, *args[1:], *grads, tiles=tiles)
        return o, lse.masked_fill(lse == -torch.inf, -1e30), dq, *grads

    agree(run, dtype, 64 * 2**0.5, products=dtype)
    assert asked == ["fwd", "dq", "dkv"]


@pytest.mark.parametrize("current", [0, 1])
def test_a_launch_enters_its_device_only_where_another_is_current(current, monkeypatch):
    from diffmas.kernels import launch

    class OnDevice1:
        is_cuda, device = True, torch.device("cuda", 1)
        get_device = staticmethod(lambda: 1)

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    entered = launch.on(OnDevice1)
    assert entered.idx == 1 if current == 0 else entered is launch.NOTHING


def test_a_launch_finds_its_binary_once_for_arguments_of_a_kind():
    """Another dtype, alignment or number is another kind; constants follow in the order of the kernel's arguments."""
    from diffmas.kernels.launch import Launch

    ran, compiled = [], []

    class Kernel:
        arg_names = ["x", "y", "n", "D", "FLAG"]

        def __getitem__(self, grid):
            return lambda *args, **constants: compiled.append((grid, args, constants)) or self.Binary()

        class Binary:
            def __getitem__(self, grid):
                return lambda *args: ran.append((grid, args))

    kernel, launch, x = Kernel(), Launch((3, 2), dict(FLAG=True, num_warps=4, D=64)), torch.zeros(64)
    launch(kernel, (x, None), (5,))
    assert compiled == [((3, 2), (x, None, 5), dict(FLAG=True, num_warps=4, D=64))] and not ran
    launch(kernel, (x[4:], None), (5,))  # 16 bytes further
    ((grid, (first, *rest)),) = ran
    assert grid == (3, 2, 1) and first.data_ptr() == x[4:].data_ptr() and rest == [None, 5, 64, True] and len(compiled) == 1
    for pointers, number in (((x[1:], None), 5), ((x.double(), None), 5), ((x, x), 5), ((x, None), 16)):
        launch(kernel, pointers, (number,))
    launch(Kernel(), (x, None), (5,))
    assert len(compiled) == 6 and len(ran) == 1

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    launch(kernel, (x.as_subclass(Elsewhere), None), (5,))
    assert len(compiled) == 7 and len(ran) == 1


def test_attention_gradient_whose_strides_are_zero():
    inputs = attention_inputs(VIEWS["ragged"], rows=POOL)
    run = lambda dtype, backend, device: attention_all(
        inputs.to(dtype, device), backend, torch.ones((), dtype=torch.float64).expand(inputs.q.shape)
    )
    agree(run, torch.float32, 64 * 2**0.5)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["q", "do", "k_pool", "v_pool"])
def test_a_nan_stays_in_its_sequence(name, wrong):
    """And reaches all that it must there. Both sequences have rows in one tile of the pool; one is read at an offset, and sees
    the wrong number in a part of its view."""
    dtype = DTYPES[-1]
    view = View([9, 2], [[(0, 20, 0), (40, 9, 0)], [(20, 20, 4), (49, 2, 0)]], causal=False)
    inputs, do = attention_inputs(view, (2, 1), 32, rows=64), exact_in_half(11, 2, 32)
    clean = attention_all(inputs.to(dtype, DEVICE), "triton", do)
    {"do": do, **vars(inputs)}[name][7, 0, 5] = wrong  # a token, or a row, of the first sequence
    got = attention_all(inputs.to(dtype, DEVICE), "triton", do)
    like = attention_all(inputs.to(dtype), "reference", do)
    rows = torch.cat((torch.arange(20, 40), torch.arange(49, 64)))
    for i, (x, before, wanted) in enumerate(zip(got, clean, like)):
        other = slice(9, 11) if i < 3 else rows.to(DEVICE)
        assert torch.equal(x[other], before[other]) and not x[wanted.isnan().to(DEVICE)].isfinite().any()
    assert like[3].isnan().any()


@pytest.mark.parametrize("name", ["q", "do"])
def test_a_nan_stays_with_the_keys_that_it_sees(name):
    """A token that is not finite gives nothing to later rows of its own sequence."""
    inputs, do = attention_inputs(View([20], [[(40, 20, 0)]]), D=32, rows=64), exact_in_half(20, 4, 32)
    {"do": do, "q": inputs.q}[name][9, 1, 5] = torch.nan
    _, _, _, dk, dv = attention_all(inputs.to(DTYPES[-1], DEVICE), "triton", do)
    for x in (dk, dv):
        assert x[50:60].isfinite().all() and x[40:50, 0].isnan().all() and x[40:50, 1].isfinite().all()


def test_attention_is_deterministic():
    """The results of splits and of many readers of a row are added in one order."""
    readers = View([1] * 5, [[(0, 150, 0), (400 + b, 1, 0)] for b in range(5)])
    run = attending(attention_inputs(readers, rows=POOL))
    first, second = (run(torch.float32, "triton", DEVICE) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@pytest.mark.skipif(DEVICE == "cuda", reason="float64 is for the interpreter")
def test_attention_gradcheck():
    """The registered ops through autograd: rows written and read by a forward pass."""
    layer = LayerSpec(0, "half")
    spec = ModelSpec([layer], "triton", inv_freq=lambda device: torch.tensor([1.0, 0.1], dtype=torch.float64))
    view = [KVRange(0, 1, 0), KVRange(2, 1, 2), KVRange(5, 1, 0)]

    def attend(q, k, v, q_weight, k_weight):
        store = Store(1)
        store.allocate(8)
        forward_pass = ForwardPass(spec, store, [3], np.arange(3), np.array([2, 0, 5]), [view], torch.zeros(0))
        return forward_pass.attend(layer, q, k, v, 0.7, q_weight=q_weight, k_weight=k_weight)

    shapes = (3, 2, 4), (3, 1, 4), (3, 1, 4), (4,), (4,)
    args = [torch.randn(*shape, dtype=torch.float64).requires_grad_() for shape in shapes]
    assert torch.autograd.gradcheck(attend, args, fast_mode=True)


def test_a_training_step_and_a_generation(monkeypatch):
    """Through every kernel: prompts, latent steps and their deferred gradient, decoding of several samples on shared rows. On a
    GPU the CUDA kernels too."""
    dtype = torch.float64 if DEVICE == "cpu" else torch.float32
    agents = [Agent("a", "w5 {question}", 2), Agent("b", "w7 {question}", 1), Agent("c", "w9 {question}")]
    s = system(agents=agents, dtype=dtype, realign="none").to(DEVICE)
    monkeypatch.setattr(views, "SAVED_ROWS", 1)
    results = []
    for backend in ("reference", "triton", *["cuda"] * (ops.available()["cuda"] is None)):
        patch_of(s.model).spec.backend = backend
        s.zero_grad()
        loss = s(QUESTIONS[:2], ANSWERS[:2]).loss
        loss.backward()
        tokens = s.generate_tokens(QUESTIONS[:2], max_new_tokens=2, temperature=0, samples=2)
        results.append((loss.detach(), gradients(s), tokens))
    (want_loss, want, want_tokens), *others = results
    tolerance = 1e-9 if DEVICE == "cpu" else 1e-3
    for loss, got, tokens in others:
        assert_close(loss, want_loss, tolerance)
        assert_close(got, want, tolerance)
        assert tokens == want_tokens
