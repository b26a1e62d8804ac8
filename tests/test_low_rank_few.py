"""Few queries over rows with low-rank parts, by the kernels that write no row, against tiles on the float64 reference."""

import pytest
import torch
from op_runs import within_budget

from diffmas import ops
from diffmas.ops.low_rank import Codes, Tile, Whole, low_rank_attention, low_rank_attention_backward, of_pairs
from diffmas.ops.reference import offset_tables
from diffmas.trace.low_rank import CodedReads, Coding
from diffmas.trace.views import KVRange

pytestmark = pytest.mark.skipif(ops.available()["cpu"] is not None, reason="the C++ extension is not built")
Hq, Hkv, R, N = 6, 2, 800, 700
ROWS = torch.cat((torch.arange(5, 305), torch.arange(330, 730)))  # of the pool, that there are codes of
# By sequence, its queries and (first code, rows, offset). Two of them share rows; short ranges, and gaps; one sees nothing.
VIEWS = [
    (4, [(0, 300, 0), (300, 290, 0)]),
    (1, [(10, 20, 7), (40, 5, 7), (45, 9, 7), (350, 320, 0), (30, 3, 0)]),
    (0, [(0, 5, 0)]),
    (2, []),
]
KINDS = {
    "k and v": ("z_k", "b_k", "z_v", "b_v"),
    "k": ("z_k", "b_k"),
    "v": ("z_v", "b_v"),
    "normed": Codes._fields,
}


def numbers(*xs):
    return torch.tensor(xs, dtype=torch.int64)


def view(start_of):
    """What the ops take, of ranges that begin where `start_of` says."""
    ends, indptr, found = [0], [0], []
    for queries, ranges in VIEWS:
        ends.append(ends[-1] + queries)
        indptr.append(indptr[-1] + len(ranges))
        found += [(start_of(at, n), n, by) for at, n, by in ranges]
    return tuple(map(lambda x: numbers(*x), (ends, indptr, *zip(*found))))


READ = torch.cat([torch.arange(at, at + n) for _, ranges in VIEWS for at, n, _ in ranges]).unique()
TILE = Tile(ROWS[READ], READ, view(lambda at, n: int(torch.searchsorted(READ, at))))
WHOLE = Whole(numbers(*(at for _, ranges in VIEWS for at, _, _ in ranges)), view(lambda at, n: int(ROWS[at])))


def made(kind, D, Dr, rank, interleaved, dtype):
    """Inputs; what nobody reads is NaN. q and the pools are of the dtype, codes float32, but for float64."""
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.randn(*shape, generator=g).bfloat16().double()  # noqa: E731
    shape = lambda name: {"z": (N, rank), "b": (Hkv * D, rank)}.get(name[0], (N, Hkv))  # noqa: E731
    codes = {name: random(*shape(name)) / (rank**0.5 if name[0] == "b" else 1) for name in KINDS[kind]}
    q, do = random(7, Hq, D), random(7, Hq, D)
    pools = [torch.full((Hkv, R, D), torch.nan).transpose(0, 1).double() for _ in "kv"]
    for pool in pools:
        pool[ROWS[READ]] = random(len(READ), Hkv, D)
    unread = torch.ones(N, dtype=torch.bool)
    unread[READ] = False
    for name, x in codes.items():
        if name[0] != "b":
            x[unread] = torch.nan
    inv_freq = 100.0 ** -(torch.arange(Dr // 2) / Dr)
    tables = tuple(1.1 * x for x in offset_tables(torch.arange(N) + 11, inv_freq, interleaved, torch.float32))
    floats = torch.float64 if dtype == torch.float64 else torch.float32
    codes = Codes(**{name: x.to(floats) for name, x in codes.items()})
    tables = tuple(x.to(floats) for x in of_pairs(tables, interleaved))
    return *(x.to(dtype) for x in (q, *pools, do)), codes, tables, inv_freq.to(floats)


def run(inputs, reads, interleaved, backend, states=None, learning=(True, True)):
    """By name: what a forward and a backward give. states: o and lse that the backward takes. learning: codes; the pools."""
    q, k, v, do, codes, tables, inv_freq = inputs
    rest = codes, tables if codes.z_k is not None else None, reads, inv_freq, 0.3, interleaved, backend
    o, lse = low_rank_attention(q, k, v, *rest)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    grads = Codes(*(x if x is None else torch.full_like(x, 0.5) for x in codes)) if learning[0] else None
    pools = [torch.full((Hkv, R, k.shape[2]), 0.5, dtype=wide).transpose(0, 1) for _ in "kv"] if learning[1] else None
    states = (o, lse) if states is None else (states[0].to(o), states[1].to(lse))
    dq = low_rank_attention_backward(do, q, *states, k, v, *rest, grads, pools)
    found = {"o": o, "lse": lse.masked_fill(lse == -torch.inf, -1e30), "dq": dq}
    found |= {name: x for name, x in (grads or Codes())._asdict().items() if x is not None}
    return found | dict(zip(("dk", "dv"), pools or ()))


def agree(kind, D, Dr, rank, interleaved, dtype):
    exact_inputs = made(kind, D, Dr, rank, interleaved, torch.float64)
    exact = run(exact_inputs, [TILE], interleaved, "reference")
    states = exact["o"], exact["lse"].masked_fill(exact["lse"] == -1e30, -torch.inf)
    inputs = made(kind, D, Dr, rank, interleaved, dtype)
    same = run(inputs, [TILE], interleaved, "reference", states)
    got = run(inputs, WHOLE, interleaved, "auto", states)
    assert set(got) == set(exact)
    for name, x in got.items():
        terms = len(READ) if name[0] == "b" else Hq * D
        within_budget(x, same[name], exact[name], terms)
    return inputs, got, states


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_budget(kind, interleaved, dtype):
    """Output and all gradients, which are added to what is there."""
    agree(kind, 64, 64, 8, interleaved, dtype)


@pytest.mark.parametrize("D, Dr, rank", [(128, 128, 16), (80, 48, 5), (33, 16, 1), (20, 8, 17), (256, 64, 40)])
@pytest.mark.parametrize("kind", ["k and v", "normed"])
def test_head_sizes_and_ranks(kind, D, Dr, rank):
    agree(kind, D, Dr, rank, D == 80, torch.float32)


@pytest.mark.parametrize("learning", [(True, False), (False, True), (False, False)], ids=["codes", "pools", "nothing"])
def test_what_does_not_learn_changes_nothing_else(learning):
    inputs, want, states = agree("normed", 64, 64, 8, False, torch.float32)
    got = run(inputs, WHOLE, False, "auto", states, learning)
    assert len(got) == 3 + 6 * learning[0] + 2 * learning[1]
    assert all(torch.equal(x, want[name]) for name, x in got.items())


def test_bits_do_not_depend_on_threads():
    inputs, before = made("normed", 64, 64, 8, False, torch.float32), torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(run(inputs, WHOLE, False, "auto"))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, other[name]) for name, x in found[0].items())


def test_nan_stays_in_its_sequence():
    """Of a row's code; another head's output does not see a NaN of K or V of one."""
    inputs = made("k and v", 64, 64, 8, False, torch.float32)
    want = run(inputs, WHOLE, False, "auto")
    inputs[4].z_v[360, 2] = torch.nan  # in the first sequence's view and the second's
    inputs[4].z_k[675 - 6, 0] = torch.nan  # in the second's
    got = run(inputs, WHOLE, False, "auto")
    assert got["o"][:5].isnan().all() and torch.equal(got["o"][5:], want["o"][5:])
    assert torch.equal(got["lse"][:4], want["lse"][:4]) and got["lse"][4].isnan().all()


@pytest.mark.parametrize("queries, kind", [(8, Whole), (9, list)])
def test_more_queries_are_cut_into_pieces(queries, kind):
    """Two at most, as none of them is masked; then tiles take them."""
    q, k, v, _, codes, tables, _ = made("k and v", 64, 64, 8, False, torch.float32)
    q = q[[0, 1, 2, 3, 4, 5, 6, 0, 1][:queries]].contiguous()
    coding = Coding(ROWS.numpy(), [codes], tables, False, 0, False, False)
    view = [KVRange(coding.first + int(ROWS[at]), n, 0) for at, n, _ in VIEWS[0][1]]
    reads = CodedReads([coding], [view], [queries])
    (_, found), *_ = reads._of(0, None, q, k, "auto")
    assert isinstance(found, kind)
    (got,) = reads.attend(0, None, q, (k, v), None, 0.3, "auto")
    (want,) = reads.attend(0, None, q, (k, v), None, 0.3, "reference")
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)


def test_what_does_not_fit_is_refused():
    inputs = made("k and v", 64, 64, 8, False, torch.float32)
    indptr = WHOLE.view[0].clone()
    indptr[1:] = 7
    cases = [
        (
            WHOLE._replace(view=(indptr, *WHOLE.view[1:])),
            "q_indptr: expected up to 12 heads of a group and sequence, got 21",
        ),
        (WHOLE._replace(codes=WHOLE.codes + 500), "seg_code: expected codes among 700, got 500 \\+ 300 at 0"),
        (WHOLE._replace(codes=WHOLE.codes - 1), "seg_code: expected codes among 700, got -1 \\+ 300 at 0"),
    ]
    for reads, message in cases:
        with pytest.raises(RuntimeError, match=message):
            run(inputs, reads, False, "auto")
    with pytest.raises(RuntimeError, match="z_v, b_v: expected both or neither"):
        run((*inputs[:4], inputs[4]._replace(b_v=None), *inputs[5:]), WHOLE, False, "auto")
