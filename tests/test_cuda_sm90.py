"""csrc/cuda/attention_sm90.cu on the CPU: the backward of many queries, their dK and dV alone, and their forward, as Hopper
computes them, its instructions emulated."""

from dataclasses import replace

import on_host
import pytest
import torch
from op_cases import View, as_it_lies, attention_inputs, head_major
from op_runs import exact_in_half, finite, raw, within_budget
from test_cuda_attention import MANY, RAGGED, Kernels, dkv_of, pools_agree

from diffmas import ops
from diffmas.ops import backends, reference

pytestmark = pytest.mark.skipif(not on_host.COMPILER, reason="no g++ here")


@pytest.fixture
def kernels(monkeypatch):
    """Backend "cuda" runs on the host, as on sm_90."""
    kernels = Kernels()
    kernels.warpgroups = True
    monkeypatch.setitem(ops.BACKENDS, "cuda", backends.Backend("cuda", kernels, ("cpu",), backends.FLOATS, None))
    backends._choose.cache_clear()
    yield kernels
    backends._choose.cache_clear()


# Also groups that do not divide a tile, a sequence that ends within one, in a pool that ends within a block.
SMALLER = View([41, 0, 30], [[(250, 40, 0), (0, 41, 0)], [(5, 9, 0)], [(260, 30, 0), (400, 30, 0)]])
WARPGROUPS = {
    "gqa2": MANY["gqa2"],
    "not_causal": MANY["not_causal"],
    "gqa7": (SMALLER, dict(heads=(14, 2), D=16)),
    "gqa3_d128": (RAGGED, dict(heads=(3, 1), D=128)),
    "gqa8_d80": (replace(SMALLER, causal=False), dict(heads=(8, 1), D=80)),
    "d128": (RAGGED, dict(heads=(1, 1), D=128)),
}
EVERY = [*((name, torch.bfloat16) for name in WARPGROUPS), ("not_causal", torch.float16), ("d128", torch.float16)]


@pytest.mark.parametrize("name, dtype", EVERY, ids=str)
def test_pools(name, dtype, kernels):
    """The same bits in every order of blocks and threads."""
    view, case = WARPGROUPS[name]
    inputs = attention_inputs(view, **case, rows=605)
    results = pools_agree(inputs, dtype)
    kernels.seed = 1
    assert all(torch.equal(a, b) for a, b in zip(results, dkv_of(inputs, dtype, "cuda")))


@pytest.mark.parametrize("next_key", [0, 1])
@pytest.mark.parametrize("start, tokens, heads, D", [(190, 130, 1, 128), (129, 130, 1, 64), (129, 80, 4, 128)])
def test_the_last_key_of_a_query(start, tokens, heads, D, next_key, kernels):
    """Every query looks for the last key that it sees, or the first that it does not. As the rows begin within a block, one
    score of a tile is masked, and one query alone sees a warpgroup's first key."""
    x = attention_inputs(View([tokens], [[(start, tokens, 0)]]), (heads, 1), D, rows=350)
    x.q[: tokens - next_key] = 4 * x.k_pool[start + next_key : start + tokens]
    pools_agree(x)


def where_rows_lie_apart():
    """q (and its gradient) of a fused projection, in either order of tokens and heads; so are the pools."""
    for order in ((0, 1), (1, 0)):
        x = attention_inputs(SMALLER, (4, 1), 128, rows=605)
        place = torch.empty(*(x.q.shape[i] for i in order), 256, dtype=torch.float64)[..., 64:192]
        x.q = (place if order == (0, 1) else place.transpose(0, 1)).copy_(x.q)
        packed = (lambda t: t) if order == (0, 1) else torch.Tensor.contiguous
        pools = lambda dtype, x=x, packed=packed: {n: packed(getattr(x, n).to(dtype)) for n in ("k_pool", "v_pool")}
        x.to = lambda dtype, x=x, pools=pools: replace(x, q=as_it_lies(x.q, dtype), **pools(dtype))
        yield x


def test_pools_where_rows_lie_apart(kernels):
    for x in where_rows_lie_apart():
        pools_agree(x)


def test_many_sequences_and_segments(kernels):
    """More than one look at the index; a sequence that sees nothing, one that asks nothing."""
    segments = [[(2 * i, 1, 0) for i in range(140)], [], [(5, 60, 0)], [(300 + 7 * b, 3, 0) for b in range(40)]]
    pools_agree(attention_inputs(View([150, 3, 0, 2], segments), (2, 1), 16, rows=600))


def test_the_grad_tail(kernels):
    inputs = attention_inputs(RAGGED, (2, 1), rows=640)
    pools_agree(inputs, grad_tail=torch.tensor([150, 9, 3]))
    assert all((x == 0.5).all() for x in pools_agree(inputs, grad_tail=torch.tensor([0, 0, 0])))


@pytest.mark.parametrize("name", ["q", "do", "k_pool", "v_pool"])
@pytest.mark.parametrize("sequence", [0, 1])
def test_a_nan_stays_in_its_sequence(sequence, name, kernels):
    """A token, or a row, of one of two sequences whose rows lie in one block; the first's last tile reaches into the second."""
    view = View([90, 50], [[(0, 40, 0), (100, 90, 0)], [(40, 60, 0), (190, 50, 0)]], causal=False)
    inputs, do = attention_inputs(view, (2, 1), rows=256).to(torch.bfloat16), torch.randn(140, 2, 64).bfloat16()
    mine, others = (torch.cat([torch.arange(s, s + n) for s, n, _ in view.segments[b]]) for b in (sequence, 1 - sequence))

    def pools(backend):
        o, lse = raw.cross_attention(*inputs.args(), "reference")
        out = [head_major(256, 1, 64, torch.float32, fill=0.5) for _ in "kv"]
        raw.cross_attention_backward(do, None, inputs.q, o, lse, *inputs.args()[1:], *out, None, False, backend)
        return out

    clean = pools("cuda")
    {"do": do, **vars(inputs)}[name][mine[3] if "pool" in name else (20, 92)[sequence], 0, 5] = torch.nan
    wanted = pools("reference")
    for x, before, like in zip(pools("cuda"), clean, wanted):
        assert torch.equal(x[others], before[others]) and x[like.isnan()].isnan().all()
    assert wanted[0].isnan().any()


# ---- o and lse -------------------------------------------------------------------------------------------------------


def forward_agrees(inputs, dtype=torch.bfloat16):
    """o and lse are as accurate as the reference's -> those."""

    def run(dtype, backend):
        o, lse = raw.cross_attention(*inputs.to(dtype).args(), backend)
        return o, finite(lse)

    results = run(dtype, "cuda")
    for got, like, want in zip(results, run(dtype, "reference"), run(torch.float64, "reference")):
        assert got.shape == want.shape and got.dtype == like.dtype
        within_budget(got, like, want, inputs.q.shape[2], dtype)
    return results


# More stages than a ring has, of several segments each, one of which ends the pool.
LONG = View([70], [[(3, 400, 0), (410, 1, 0), (420, 60, 0), (535, 70, 0)]])
FORWARD = WARPGROUPS | {
    "long": (LONG, dict(heads=(2, 2))),
    "long_d128": (replace(LONG, causal=False), dict(heads=(1, 1), D=128)),
}
HALF = [(name, torch.float16) for name in ("gqa2", "long_d128")]


@pytest.mark.parametrize("name, dtype", [*((name, torch.bfloat16) for name in FORWARD), *HALF], ids=str)
def test_forward(name, dtype, kernels):
    """The same bits from any number of blocks, in every order of theirs and of threads."""
    view, case = FORWARD[name]
    inputs = attention_inputs(view, **case, rows=605)
    results = forward_agrees(inputs, dtype)
    for kernels.processors, kernels.seed in ((2, 1), (3, 2)):
        assert all(torch.equal(a, b) for a, b in zip(results, forward_agrees(inputs, dtype)))


@pytest.mark.parametrize("next_key", [0, 1])
@pytest.mark.parametrize("before, tokens, heads, D", [(0, 130, 1, 128), (63, 130, 1, 64), (5, 90, 4, 64), (129, 70, 7, 128)])
def test_the_last_key_of_a_query_in_the_forward(before, tokens, heads, D, next_key, kernels):
    """Every query looks for the last key that it sees, or the first that it does not, behind a segment of any length."""
    x = attention_inputs(View([tokens], [[(200, before, 0), (7, tokens, 0)][not before :]]), (heads, 1), D, rows=350)
    x.q[: tokens - next_key] = 4 * x.k_pool[7 + next_key : 7 + tokens]
    forward_agrees(x)


def test_forward_where_rows_lie_apart(kernels):
    for x in where_rows_lie_apart():
        forward_agrees(x)


@pytest.mark.parametrize("causal", [True, False])
def test_forward_of_many_sequences_and_segments(causal, kernels):
    """More than one look at the index, twice within a stage; sequences that see nothing, that ask nothing, that ask for more
    than there is, so that a tile's first tokens see nothing; blocks that find no work, or several tiles."""
    short = [(2 * i, 1 + i % 2, 0) for i in range(140)]
    segments = [short, [], [(5, 60, 0)], [(300 + 17 * b, 1 + b % 17, 0) for b in range(40)], [(290, 7, 0)], []]
    kernels.processors = 11 if causal else 2
    o, lse = forward_agrees(attention_inputs(View([150, 3, 0, 40, 90, 65], segments, causal), (2, 1), 16, rows=980))
    assert not o[150:153].any() and (lse[-65:] == -1e30).all() and (lse[193:276] == -1e30).all() == causal


@pytest.mark.parametrize("name", ["q", "k_pool", "v_pool"])
@pytest.mark.parametrize("sequence", [0, 1])
def test_a_nan_stays_in_its_sequence_of_the_forward(sequence, name, kernels):
    """A token, or a row, of one of two sequences whose rows lie in one box; the first's last tile reaches into the second."""
    view = View([90, 50], [[(0, 40, 0), (99, 91, 0)], [(40, 59, 0), (190, 50, 0)]], causal=False)
    x = attention_inputs(view, (2, 1), rows=256).to(torch.bfloat16)
    clean = raw.cross_attention(*x.args(), "cuda")
    rows = torch.cat([torch.arange(s, s + n) for s, n, _ in view.segments[sequence]])
    getattr(x, name)[rows[[0, 39, 40, -1]] if "pool" in name else (20, 92)[sequence], 0, 5] = torch.nan
    got, wanted = (raw.cross_attention(*x.args(), backend) for backend in ("cuda", "reference"))
    others = slice(90, 140) if sequence == 0 else slice(0, 90)
    for a, before, like in zip(got, clean, wanted):
        assert torch.equal(a[others], before[others]) and a[like.isnan()].isnan().all()
        assert name != "q" or torch.equal(a[~like.isnan()], before[~like.isnan()])
    assert wanted[0].isnan().any()


@pytest.mark.parametrize("change", ["scale", "head_dim", "group"])
def test_forward_that_is_left_to_others(change, kernels):
    """A scale that turns the order of scores round, longer heads, groups that no tile holds."""
    kernels.sm90, kernels.warpgroups = True, False
    heads, D = ((129, 1) if change == "group" else (1, 1)), (136 if change == "head_dim" else 64)
    x = attention_inputs(View([70 if change != "group" else 1], [[(0, 70, 0)]]), heads, D, rows=80)
    x.scale *= -1 if change == "scale" else 1
    forward_agrees(x)


# ---- dQ, dK and dV in one kernel -------------------------------------------------------------------------------------


def gradients_of(inputs, dtype, backend, grad_tail=None):
    """dq and the gradient pools of one backward; o and lse are the reference's."""
    x = inputs.to(dtype)
    torch.manual_seed(0)
    do, dlse = exact_in_half(*x.q.shape).to(dtype), exact_in_half(*x.q.shape[:2]).to(reference.accumulator(dtype))
    o, lse = raw.cross_attention(*x.args(), "reference")
    pools = [head_major(*x.k_pool.shape, reference.accumulator(dtype), fill=0.5) for _ in "kv"]
    return raw.cross_attention_backward(do, dlse, x.q, o, lse, *x.args()[1:], *pools, grad_tail, True, backend), *pools


def backward_agrees(inputs, dtype=torch.bfloat16, grad_tail=None):
    """dq and the gradient pools are as accurate as the reference's -> those."""
    results = gradients_of(inputs, dtype, "cuda", grad_tail)
    wanted = (gradients_of(inputs, t, "reference", grad_tail) for t in (dtype, torch.float64))
    for got, like, want in zip(results, *wanted):
        assert got.shape == want.shape and got.dtype == like.dtype
        within_budget(got, like, want, inputs.q.shape[2], dtype)
    return results


BACKWARD = [*((name, torch.bfloat16) for name in FORWARD), ("not_causal", torch.float16), ("d128", torch.float16)]


@pytest.mark.parametrize("name, dtype", BACKWARD, ids=str)
def test_backward(name, dtype, kernels):
    """The same bits in every order of blocks and threads, also of blocks that run side by side and wait for each other."""
    view, case = FORWARD[name]
    inputs = attention_inputs(view, **case, rows=605)
    results = backward_agrees(inputs, dtype)
    kernels.resident, kernels.seed = 3, 1
    assert all(torch.equal(a, b) for a, b in zip(results, gradients_of(inputs, dtype, "cuda")))


@pytest.mark.parametrize("next_key", [0, 1])
@pytest.mark.parametrize("start, tokens, heads, D", [(190, 130, 1, 128), (129, 80, 4, 64)])
def test_the_last_key_of_a_query_in_the_backward(start, tokens, heads, D, next_key, kernels):
    x = attention_inputs(View([tokens], [[(start, tokens, 0)]]), (heads, 1), D, rows=350)
    x.q[: tokens - next_key] = 4 * x.k_pool[start + next_key : start + tokens]
    backward_agrees(x)


def test_backward_where_rows_lie_apart(kernels):
    for x in where_rows_lie_apart():
        backward_agrees(x)


@pytest.mark.parametrize("causal", [True, False])
def test_backward_of_many_sequences_and_segments(causal, kernels):
    """As in the forward. Segments of a view lie anywhere, so that whose rows are first in the pool are not first in the view;
    a block has rows of many sequences, and of some rows that nobody reads."""
    short = [(2 * i, 1 + i % 2, 0) for i in range(140)][::-1]
    segments = [short, [], [(5, 60, 0)], [(300 + 17 * b, 1 + b % 17, 0) for b in range(40)][::-1], [(290, 7, 0)], []]
    kernels.resident = 4
    dq, *_ = backward_agrees(attention_inputs(View([150, 3, 0, 40, 90, 65], segments, causal), (2, 1), 16, rows=980))
    blind = [slice(150, 153), slice(283, 348), *([slice(193, 276)] if causal else [])]
    assert all(not dq[rows].any() for rows in blind)


def test_backward_of_the_grad_tail(kernels):
    """Rows that do not learn give to dq. Blocks of rows that do, for one of two sequences; that do not; of both."""
    inputs = attention_inputs(RAGGED, (2, 1), rows=640)
    dq = gradients_of(inputs, torch.bfloat16, "cuda")[0]
    for grad_tail in ([150, 9, 3], [0, 0, 70], [0, 0, 0]):
        got, *pools = backward_agrees(inputs, grad_tail=torch.tensor(grad_tail))
        assert torch.equal(got, dq)
    assert all((x == 0.5).all() for x in pools)


@pytest.mark.parametrize("agrees", [pools_agree, backward_agrees])
def test_rows_that_learn_for_one_of_two_readers(agrees, kernels):
    inputs = attention_inputs(View([40, 40], [[(0, 90, 0)], [(0, 90, 0)]]), (2, 1), rows=100)
    agrees(inputs, torch.bfloat16, grad_tail=torch.tensor([90, 7]))


@pytest.mark.parametrize("name", ["q", "do", "k_pool", "v_pool"])
@pytest.mark.parametrize("sequence", [0, 1])
def test_a_nan_stays_in_its_sequence_of_the_backward(sequence, name, kernels):
    """A token, or a row, of one of two sequences whose rows lie in one block; the first's last tile reaches into the second."""
    view = View([90, 50], [[(0, 40, 0), (100, 90, 0)], [(40, 60, 0), (190, 50, 0)]], causal=False)
    inputs, do = attention_inputs(view, (2, 1), rows=256).to(torch.bfloat16), torch.randn(140, 2, 64).bfloat16()
    mine, others = (torch.cat([torch.arange(s, s + n) for s, n, _ in view.segments[b]]) for b in (sequence, 1 - sequence))

    def gradients(backend):
        o, lse = raw.cross_attention(*inputs.args(), "reference")
        pools = [head_major(256, 1, 64, torch.float32, fill=0.5) for _ in "kv"]
        args = do, None, inputs.q, o, lse, *inputs.args()[1:], *pools, None, True, backend
        return raw.cross_attention_backward(*args), *pools

    clean = gradients("cuda")
    {"do": do, **vars(inputs)}[name][mine[3] if "pool" in name else (20, 92)[sequence], 0, 5] = torch.nan
    wanted = gradients("reference")
    for x, before, like, rows in zip(gradients("cuda"), clean, wanted, (((90, 140), (0, 90))[sequence], others, others)):
        rows = slice(*rows) if isinstance(rows, tuple) else rows
        assert torch.equal(x[rows], before[rows]) and x[like.isnan()].isnan().all()
    assert wanted[0].isnan().any() and wanted[1].isnan().any()


@pytest.mark.parametrize("change", ["head_dim", "group"])
def test_backward_that_is_left_to_others(change, kernels):
    """Longer heads, groups that no tile holds."""
    kernels.sm90, kernels.warpgroups = True, False
    heads, D = ((129, 1) if change == "group" else (1, 1)), (136 if change == "head_dim" else 64)
    backward_agrees(attention_inputs(View([70 if change != "group" else 1], [[(0, 70, 0)]]), heads, D, rows=80))
