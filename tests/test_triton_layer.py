"""Triton's linears, norms and gates against plain PyTorch in float64: on the GPU if there is one, else in its interpreter."""

import pytest
import torch
from launches import note_launches
from layer_cases import EPS, SCALE, FeedForward, Linear, Together, agree, gates, lora_gradients, norms
from op_runs import exact_in_half

from diffmas import ops

pytestmark = pytest.mark.skipif(ops.available()["triton"] is not None, reason=str(ops.available()["triton"]))

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="module", autouse=True)
def bfloat16():
    if DEVICE == "cuda":
        yield
        return
    from interpreted_bfloat16 import interpreted_bfloat16

    with interpreted_bfloat16():
        yield


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=str)
def dtype(request):
    return request.param


@pytest.fixture
def kernels():
    return ops.BACKENDS["triton"].ops


@pytest.fixture
def launched(monkeypatch):
    """-> the (kernel, grid) of every launch from now on."""
    from diffmas.kernels import linear, pointwise

    return note_launches(monkeypatch, linear, pointwise)


LINEARS = {
    "one_row": Linear(1),
    "two_rows": Linear(2, r=4),
    "five_rows": Linear(5, out=1536, length=576, bias=False),
    "back_to_576": Linear(5, out=576, length=1536, r=16, bias=False, far=True),
    "seventeen_rows": Linear(17, r=64),
    "thirty_two_rows": Linear(32, r=5, far=True),
    "without_an_adapter": Linear(7, r=0),
    "whose_sums_are_not_split": Linear(3, out=544, length=96, r=0),
    "rank_1": Linear(3, r=1, bias=False),
    "odd": Linear(4, out=37, length=67, r=3, far=True),
    "no_rows": Linear(0),
}


@pytest.mark.parametrize("name", LINEARS)
def test_linear(name, dtype, kernels):
    case = LINEARS[name]
    agree(case.run(kernels.linear, dtype, DEVICE), case.plain, dtype, case.terms)


# The lengths are of one part in the interpreter, alone and together: then the bits are the same, too.
TOGETHER = {
    "one_row": Together(1, (96, 32, 32), 64, (8, 8, 8)),
    "with_biases": Together(5, (64, 32, 32), 100, (4, 4, 4), bias=True),
    "of_other_ranks": Together(3, (48, 80, 16), 96, (5, 0, 17), far=True),
    "without_adapters": Together(17, (64, 48, 32), 64, (0, 0, 0)),
    "two": Together(2, (40, 72), 67, (0, 3)),
    "odd": Together(4, (37, 5, 20), 67, (3, 1, 0), bias=True, far=True),
    "no_rows": Together(0, (32, 32), 64, (4, 4)),
}
FEED_FORWARD = {
    "one_row": FeedForward(1, 96, 64, (8, 8, 8)),
    "with_biases": FeedForward(5, 64, 96, (4, 0, 17), bias=True),
    "without_adapters": FeedForward(17, 48, 64),
    "odd": FeedForward(3, 67, 37, (0, 3, 0)),
    "no_rows": FeedForward(0, 32, 64),
}


@pytest.mark.parametrize(
    "case", [*TOGETHER.values(), *FEED_FORWARD.values()], ids=[*TOGETHER, *(f"mlp_{x}" for x in FEED_FORWARD)]
)
def test_linears_together(case, dtype, kernels):
    """The bits of each alone."""
    got = case.run(kernels, dtype, DEVICE)
    agree(got, case.plain, dtype, case.terms)
    if DEVICE == "cpu":
        assert all(map(torch.equal, got, case.one_by_one(kernels, dtype)))


def test_gate_and_up_need_not_be_kept(dtype, kernels):
    x, _, parts = FEED_FORWARD["with_biases"].both.at(dtype, DEVICE)
    y, gate, up, us = kernels.gated_linears(x, parts, False)
    want, *_, codes = kernels.gated_linears(x, parts, True)
    assert gate is up is None and torch.equal(y, want) and all(map(torch.equal, us, codes))


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter's processors")
@pytest.mark.parametrize("case", [Together(3, (96, 300, 33), 160, (4, 0, 5)), FeedForward(2, 200, 160, (4, 0, 3))])
def test_linears_together_whose_sums_are_split(case, launched, kernels, monkeypatch):
    """And into fewer parts, where one is shorter than others."""
    from diffmas.kernels import linear

    monkeypatch.setattr(linear, "PROGRAMS", 40)
    got = case.run(kernels, torch.float32)
    assert max(grid[1] for name, grid in launched if name.endswith("products")) > 1
    agree(got, case.plain, torch.float32, case.terms)
    assert all(map(torch.equal, got, case.run(kernels, torch.float32)))


MANY = {
    "thirty_three": Linear(33, bias=False),
    "seventy": Linear(70, r=64, bias=False, far=True),
    "odd": Linear(33, out=37, length=67, r=3, bias=False),
    "few": Linear(5, bias=False),
}


@pytest.mark.parametrize("name", MANY)
def test_what_lora_adds_to_many_rows(name, dtype, kernels):
    """To products that have been rounded, which lie anyhow; what is beside them stays."""

    def run(x, weight, bias, a, b, scale, transposed):
        product = x @ weight if transposed else x @ weight.T
        y = torch.cat((product, product), 1)
        u = kernels.add_lora(y[:, : product.shape[1]], x, a, b, scale, transposed)
        assert torch.equal(y[:, product.shape[1] :], product)
        return y[:, : product.shape[1]], u

    agree(MANY[name].run(run, dtype, DEVICE), MANY[name].plain, dtype, MANY[name].terms)


@pytest.mark.parametrize("n, r, length", [(1, 8, 192), (5, 4, 64), (33, 16, 200), (70, 64, 96), (1200, 5, 37), (0, 8, 32)])
def test_lora_grad(n, r, length, dtype, kernels):
    run = lora_gradients(n, r, length)
    agree(run(dtype, DEVICE, kernels), run, dtype, max(n, 1) ** 0.5)


def test_gradients_of_many_rows(launched, kernels):
    """Sums over many rows round like torch's: not one float after the other, but 512 of them at most. (The interpreter does not
    show it: it adds 32 at once.)"""
    n = 20_000
    c, z = torch.rand(n, 4), torch.rand(n, 32)
    got = kernels.lora_grad(c.to(DEVICE), z.to(DEVICE), 1.0).cpu().double()
    want = c.double().T @ z.double()
    ((_, (_, _, parts)),) = launched
    assert 512 * parts >= n
    assert (got - want).norm() < 3 * ((c.T @ z).double() - want).norm()


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("n, length", [(1, 576), (2, 64), (5, 1536), (17, 37), (0, 64)])
def test_norm(n, length, far, dtype, kernels):
    run = norms(n, length, far)
    agree(run(dtype, DEVICE, kernels), run, dtype, length**0.5)


@pytest.mark.parametrize("far", [False, True])
@pytest.mark.parametrize("n, length", [(1, 1536), (2, 64), (5, 1100), (33, 37), (0, 64)])
def test_gate(n, length, far, dtype, kernels):
    run = gates(n, length, far)
    agree(run(dtype, DEVICE, kernels), run, dtype, 4)


@pytest.mark.skipif(DEVICE == "cuda", reason="of the CPU's exponentials and roots, which torch has here, too")
def test_norms_and_gates_round_where_transformers_does(kernels):
    """bfloat16: nearly all numbers are those of the chain in that precision, and not one rounding more or less away."""
    for run in (norms(8, 576), gates(8, 576)):
        for mine, like in zip(run(torch.bfloat16, DEVICE, kernels), run(torch.bfloat16)):
            assert (mine == like).double().mean() > 0.999


def test_gates_far_from_zero(kernels):
    """silu of what exp(-x) is infinite for."""
    gate = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]], device=DEVICE)
    one = torch.ones_like(gate)
    y, (dgate, dup) = kernels.gate(gate, one), kernels.gate_backward(one, gate, one)
    want = torch.nn.functional.silu(gate)
    torch.testing.assert_close(y, want)
    torch.testing.assert_close(dup, want)
    torch.testing.assert_close(dgate, torch.tensor([[0.0, 0.0, 0.5, 1.0, 1.0]], device=DEVICE))


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_a_row_that_is_not_finite_stays_alone(wrong, dtype, kernels):
    case = Linear(5, bias=False)
    many = Linear(40, bias=False)
    norm, gate = norms(5, 64), gates(5, 64)
    together, feed_forward = Together(5, (32, 16, 16), 64, (4, 0, 4)), FeedForward(5, 32, 64, (4, 4, 4))

    def found():
        return [
            *case.run(kernels.linear, dtype, DEVICE),
            kernels.add_lora(torch.zeros(40, 192, dtype=dtype, device=DEVICE), *many_of(), SCALE, False),
            kernels.norm(x := exact_in_half(5, 64).to(dtype).to(DEVICE), x[0], EPS),
            *norm(dtype, DEVICE, kernels),
            *gate(dtype, DEVICE, kernels),
            *together.run(kernels, dtype, DEVICE),
            *feed_forward.run(kernels, dtype, DEVICE),
        ]

    def many_of():
        x, _, _, _, a, b = many.at(dtype, DEVICE)
        return x, a, b

    torch.manual_seed(1)
    clean = found()
    for rows in (case.x, case.dy, many.x, together.of_each[0].x, feed_forward.both.of_each[0].x, feed_forward.down.dy):
        rows[3, 5] = wrong
    torch.manual_seed(1)
    got = found()
    for i, (x, before) in enumerate(zip(got, clean)):
        others = torch.arange(len(x)) != 3
        assert torch.equal(x[others], before[others])
        if i < 5:
            assert not x[3].isfinite().any()


def test_what_is_launched(launched, kernels):
    """An op is one launch, or two where sums are split or an adapter is there."""
    x, dy, weight, bias, a, b = Linear(5, out=544, length=96).at(torch.float32, DEVICE)
    for args in ((x, weight, bias, None, None, 0.0, False), (x, weight, bias, a, b, SCALE, False)):
        kernels.linear(*args)
    kernels.norm(x, x[0], EPS)
    kernels.norm_backward(x, x, x[0], EPS)
    kernels.gate(x, x)
    kernels.gate_backward(x, x, x)
    names = [name for name, _ in launched]
    assert names == [
        "linear_kernel_products", "linear_kernel_products", "linear_kernel_finish",
        "norm_fwd_kernel", "norm_bwd_kernel", "gate_fwd_kernel", "gate_bwd_kernel",
    ]  # fmt: skip
    launched.clear()
    TOGETHER["of_other_ranks"].run(kernels, torch.float32, DEVICE)
    FEED_FORWARD["one_row"].run(kernels, torch.float32, DEVICE)
    ends = [name.removeprefix("linear_kernel_") for name, _ in launched]
    assert ends[::2] == ["products"] * 4 and ends[1::2] == ["finish", "sum", "gate", "gate_backward"]


@pytest.mark.skipif(DEVICE == "cuda", reason="of the interpreter's processors")
def test_sums_are_split_where_tiles_do_not_fill_the_gpu(launched, kernels):
    case = Linear(5, out=64, length=1600)
    agree(case.run(kernels.linear, torch.float32, DEVICE), case.plain, torch.float32, case.terms)
    (_, (tiles, splits, rows)), *_ = launched
    assert (tiles, rows) == (2 + 1, 1) and splits > 1


def test_the_same_bits_every_time(kernels):
    case, many = Linear(5, out=64, length=1600), lora_gradients(1200, 5, 64)
    runs = [
        lambda: case.run(kernels.linear, torch.float32, DEVICE),
        lambda: many(torch.float32, DEVICE, kernels),
    ]
    for run in runs:
        assert all(map(torch.equal, run(), run()))
    x, _, weight, bias, a, b = case.at(torch.float32, DEVICE)
    y, _ = kernels.linear(x, weight, bias, a, b, SCALE, False)
    assert torch.equal(kernels.linear(x[1:4], weight, bias, a, b, SCALE, False)[0], y[1:4])  # a row's are its own
