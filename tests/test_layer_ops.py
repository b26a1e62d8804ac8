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
    run_again(form, __file__, "test_the_ops or large_numbers")


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
