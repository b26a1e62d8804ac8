"""The CPU's two ops of a decoder layer of few rows, against its linears one by one and against float64."""

import pytest
import torch
import torch.nn.functional as F
from forms import FORMS, run_again

from diffmas.ops import extension
from diffmas.ops.linear import linear

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")

HIDDEN, INNER, KV, EPS = 96, 160, 32, 1e-5


def make_linear(out, length, dtype, rank):
    weight, bias = torch.randn(out, length) / length**0.5, 0.3 * torch.randn(out)
    if not rank:
        return weight.to(dtype), None, None, None, 0.0
    return weight.to(dtype), bias.to(dtype), torch.randn(rank, length) / length**0.5, torch.randn(out, rank) / rank**0.5, 0.7


def make_layer(dtype, rank=0, hidden=HIDDEN, inner=INNER):
    shapes = [(hidden, hidden), (KV, hidden), (KV, hidden), (hidden, hidden), (inner, hidden), (inner, hidden), (hidden, inner)]
    return [make_linear(*shape, dtype, rank) for shape in shapes], [(1 + 0.3 * torch.randn(hidden)).to(dtype) for _ in range(2)]


def fused(x, o, linears, norms):
    q, k, v, *rest = linears
    ops = torch.ops.diffmas_native
    outs = ops.norm_qkv(x[None], norms[0], EPS, *q, *k, *v)
    return [y[0] for y in (*outs, ops.after_attention(o[None], x[None], norms[1], EPS, *(t for some in rest for t in some)))]


def one_by_one(x, o, linears, norms, product):
    """As transformers' layers do it."""

    def norm(x, weight):
        wide = x if x.dtype == torch.float64 else x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    q, k, v, out, gate, up, down = (lambda x, some=some: product(x, *some) for some in linears)
    normed, h = norm(x, norms[0]), x + out(o)
    inner = norm(h, norms[1])
    return [q(normed), k(normed), v(normed), h + down(F.silu(gate(inner)) * up(inner))]


def exact_product(x, weight, bias, a, b, scale):
    y = x @ weight.T
    return y if a is None else y + bias + scale * x @ a.T @ b.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("n", [1, 3, 12, 32])
def test_the_ops(n, rank, dtype):
    torch.manual_seed(n)
    linears, norms = make_layer(dtype, rank)
    x, o = torch.randn(n, HIDDEN).to(dtype), torch.randn(n, HIDDEN).to(dtype)
    got = fused(x, o, linears, norms)
    plain = one_by_one(x, o, linears, norms, lambda *args: linear(*args)[0])
    wide = lambda t: t.double() if isinstance(t, torch.Tensor) else t
    exact = one_by_one(wide(x), wide(o), [tuple(map(wide, some)) for some in linears], list(map(wide, norms)), exact_product)
    for y, one, want in zip(got, plain, exact):
        assert y.dtype == dtype
        # A rounding more, or less, would change nearly half of the numbers.
        assert dtype == torch.float32 or (y == one).double().mean() > 0.97
        tolerance = 1e-5 if dtype == torch.float32 else 0.03
        torch.testing.assert_close(y.double(), want, rtol=tolerance, atol=tolerance)


def test_large_numbers_through_the_gate():
    """SiLU of what exp would overflow on is 0 or the number itself."""
    linears, norms = make_layer(torch.float32)
    linears[4] = (200 * linears[4][0], *linears[4][1:])
    x, o = torch.randn(4, HIDDEN), torch.randn(4, HIDDEN)
    got, want = fused(x, o, linears, norms)[3], one_by_one(x, o, linears, norms, lambda *args: linear(*args)[0])[3]
    assert want.abs().max() > 20
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_bits_do_not_depend_on_the_threads():
    torch.manual_seed(0)
    linears, norms = make_layer(torch.bfloat16, 5, hidden=512, inner=1024)
    x, o = torch.randn(12, 512).bfloat16(), torch.randn(12, 512).bfloat16()
    before, found = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(fused(x, o, linears, norms))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*found))


@pytest.mark.parametrize("form", FORMS)
def test_every_instruction_set(form):
    run_again(form, __file__, "test_the_ops or large_numbers or test_norm_and_gate or test_a_gate")


def test_what_is_wrong_is_said():
    ops = torch.ops.diffmas_native
    x, norm, linear = torch.randn(1, 2, 64), torch.ones(64), (torch.randn(64, 64), None, None, None, 0.0)
    short, other = (torch.randn(64, 32), *linear[1:]), (torch.randn(64, 64).bfloat16(), *linear[1:])
    for wrong, what in (
        ((x[0], norm, 1e-6, *linear, *linear, *linear), "x"), ((x, norm[:32], 1e-6, *linear, *linear, *linear), "norm"),
        ((x, norm, 1e-6, *linear, *short, *linear), "weight"), ((x, norm, 1e-6, *linear, *linear, *other), "weight"),
        ((torch.randn(1, 33, 64), norm, 1e-6, *linear, *linear, *linear), "x"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError, match=f"{what}: expected"):
            ops.norm_qkv(*wrong)
    for wrong, what in (
        ((x[:, :1].contiguous(), x, norm, 1e-6, *linear, *linear, *linear, *linear), "o"),
        ((x, x, norm, 1e-6, *linear, *linear, *short, *linear), "weight"),
        ((x, x, norm, 1e-6, *linear, *linear, *linear, *short), "weight"),
    ):
        with pytest.raises(RuntimeError, match=f"{what}: expected"):
            ops.after_attention(*wrong)


# ---- norm and gate of any number of rows, and their gradients --------------------------------------------------------


def plain_norm(x, weight):
    wide = x if x.dtype == torch.float64 else x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)


def plain_gate(gate, up):
    return F.silu(gate) * up


def with_gradients(op, dy, *inputs):
    """y, and the gradients of all inputs."""
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    y = op(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def ours(name, dy, *inputs, **options):
    ops = torch.ops.diffmas_native
    grads = getattr(ops, f"{name}_backward")(dy, *inputs, *options.values())
    return [getattr(ops, name)(*inputs, *options.values()), *([grads] if name == "norm" else grads)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "plain"), [("norm", plain_norm), ("gate", plain_gate)])
@pytest.mark.parametrize("n", [0, 1, 7, 300])
def test_norm_and_gate(n, name, plain, dtype):
    """The numbers of torch's own chain of ops, rounded where they are; strides between rows are taken as they come."""
    torch.manual_seed(n)
    x, dy = (3 * torch.randn(n, HIDDEN)).to(dtype), torch.randn(n, 2 * HIDDEN).to(dtype)[:, HIDDEN:]
    other = torch.randn(n, HIDDEN).to(dtype) if name == "gate" else (1 + 0.3 * torch.randn(HIDDEN)).to(dtype)
    options = {"eps": EPS} if name == "norm" else {}
    got = ours(name, dy, x, other, **options)
    wide = with_gradients(plain, dy.double(), x.double(), other.double())[: len(got)]
    for y, same, exact in zip(got, with_gradients(plain, dy, x, other), wide):
        assert y.dtype == dtype
        if dtype == torch.float32:
            torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        elif n:
            assert (y == same).double().mean() > 0.97
            assert (y.double() - exact).norm() <= 1.1 * (same.double() - exact).norm()


def test_a_gate_that_is_shut_or_wide_open():
    gate = torch.tensor([[-200.0, -90.0, 90.0, 200.0] * 8])
    y, dgate, dup = ours("gate", torch.ones_like(gate), gate, torch.full_like(gate, 2.0))
    want = torch.tensor([[0.0, 0.0, 1.0, 1.0] * 8])
    torch.testing.assert_close(dgate, 2 * want)
    torch.testing.assert_close(dup, want * gate)
    torch.testing.assert_close(y, 2 * want * gate)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda dy, x, weight: (dy, x[:, :40], weight[:40]), "x: expected rows of a length that fits, a multiple of 32"),
        (lambda dy, x, weight: (dy[1:], x, weight), "dy"),
        (lambda dy, x, weight: (dy, x, weight[1:]), "weight"),
        (lambda dy, x, weight: (dy.bfloat16(), x.bfloat16(), weight), "weight"),
        (lambda dy, x, weight: (dy.bfloat16(), x, weight), "dy: expected the dtype of the others"),
        (lambda dy, x, weight: (dy, x.half(), weight), "x: expected rows in float32 or bfloat16"),
    ],
)
def test_what_does_not_fit(change, message):
    tensors = torch.randn(3, HIDDEN), torch.randn(3, HIDDEN), torch.randn(HIDDEN)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.diffmas_native.norm_backward(*change(*tensors), EPS)
