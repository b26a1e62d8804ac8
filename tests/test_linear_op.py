"""The CPU's op of a linear layer and its LoRA adapter, against float64."""

import pytest
import torch

from diffmas.ops import extension
from diffmas.ops.linear import FEW_ROWS, Adapter, Parts, linear, lora_grads

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")


def with_one(x, weight, bias, a, b, scale, **options):
    """`linear` with one adapter: y and its u."""
    y, (u,) = linear(x, Parts(weight, bias, (Adapter(a, b, scale),)), **options)
    return y, u


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 7, 12, 25, 32, 33, 70])
def test_the_op(n, dtype):
    torch.manual_seed(n)
    out, length, r = 96, 160, 5
    x, dy = torch.randn(n, length).to(dtype), torch.randn(n, out).to(dtype)
    weight, bias = (torch.randn(out, length) / length**0.5).to(dtype), torch.randn(out).to(dtype)
    a, b = torch.randn(r, length) / length**0.5, torch.randn(out, r) / r**0.5
    X, DY, W, A, B = (t.double() for t in (x, dy, weight, a, b))
    (y, u), (dx, v) = with_one(x, weight, bias, a, b, 0.7), with_one(dy, weight, None, a, b, 0.7, transposed=True)
    of_a, of_b = lora_grads(x, u, dy, v, 0.7)
    exact = (
        X @ W.T + bias.double() + 0.7 * X @ A.T @ B.T, X @ A.T, DY @ W + 0.7 * DY @ B @ A, DY @ B,
        0.7 * (DY @ B).T @ X, 0.7 * DY.T @ (X @ A.T),
    )  # fmt: skip
    for got, want, kind in zip((y, u, dx, v, of_a, of_b), exact, (dtype, None, dtype, None, None, None)):
        torch.testing.assert_close(
            got.double(), want, **(dict(rtol=0.02, atol=0.02) if kind == torch.bfloat16 else dict(rtol=1e-4, atol=1e-4))
        )
    if 2 <= n <= 32:  # a row's bits are its own
        for i in (0, n - 2):
            assert torch.equal(with_one(x[i : i + 2], weight, bias, a, b, 0.7)[0], y[i : i + 2])
            assert torch.equal(with_one(dy[i : i + 2], weight, None, a, b, 0.7, transposed=True)[0], dx[i : i + 2])


@pytest.mark.parametrize("n", [5, 40])
def test_rows_that_lie_anyhow(n):
    """Transposed, or one number for all, as the gradient of a sum is."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(96, 64), torch.randn(4, 64), torch.randn(96, 4)
    x, dy = torch.randn(64, n).t(), torch.ones(()).expand(n, 96)
    (y, u), (dx, v) = with_one(x, weight, None, a, b, 0.5), with_one(dy, weight, None, a, b, 0.5, transposed=True)
    laid = x.contiguous(), u, dy.contiguous(), v
    assert torch.equal(y, with_one(laid[0], weight, None, a, b, 0.5)[0])
    assert torch.equal(dx, with_one(laid[2], weight, None, a, b, 0.5, transposed=True)[0])
    assert all(map(torch.equal, lora_grads(x, u, dy, v, 0.5), lora_grads(*laid, 0.5)))


def test_gradients_of_many_rows():
    """Sums over many rows round like torch's: not one float after the other."""
    torch.manual_seed(0)
    n = 20_000
    x, u, dy, v = (torch.rand(n, width) for width in (64, 4, 32, 4))
    for got, want, plain in zip(
        lora_grads(x, u, dy, v, 1.0), (v.double().T @ x.double(), dy.double().T @ u.double()), (v.T @ x, dy.T @ u)
    ):
        assert (got.double() - want).norm() < 3 * (plain.double() - want).norm()


def test_bits_do_not_depend_on_the_threads():
    torch.manual_seed(0)
    x, weight = torch.randn(12, 1024), torch.randn(768, 1024)
    a, b, before = torch.randn(8, 1024), torch.randn(768, 8), torch.get_num_threads()
    rows, found = torch.randn(100, 1024), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        y, u = with_one(x, weight, None, a, b, 0.5)
        dx, v = with_one(y, weight, None, a, b, 0.5, transposed=True)
        many = torch.zeros(100, 768)
        of_many = torch.ops.diffmas_native.add_lora(many, rows, a, b, 0.5, False)
        found.append((y, u, dx, v, *lora_grads(x, u, y, v, 0.5), many, of_many))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_the_op_says_what_is_wrong():
    x, weight = torch.randn(2, 64), torch.randn(32, 64)
    for wrong, what in (((x[:, :32], weight), "x"), ((x, weight.bfloat16()), "weight"), ((x, weight[:, :40]), "x")):
        with pytest.raises(RuntimeError, match=f"{what}: expected"):
            linear(wrong[0], Parts(wrong[1], None))


@pytest.mark.parametrize("n", [9, FEW_ROWS + 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_with_rows_of_their_own(n, dtype):
    """Each on its rows what it is alone: in float32 the bits, in bfloat16 but for one rounding more. One has no row."""
    torch.manual_seed(0)
    x, dy, weight, bias = (torch.randn(*shape).to(dtype) for shape in ((n, 64), (n, 96), (96, 64), (96,)))
    ends, some = [4, 4, n], [Adapter(torch.randn(r, 64) / 8, torch.randn(96, r), s) for r, s in ((3, 0.5), (5, 1.0), (5, 2.0))]
    (y, us), (dx, vs) = (
        linear(x, Parts(weight, bias, tuple(some)), ends),
        linear(dy, Parts(weight, None, tuple(some)), ends, transposed=True),
    )
    close = dict(rtol=0, atol=0) if dtype == torch.float32 else dict(rtol=0.02, atol=0.05)
    for first, end, adapter, u, v in zip((0, *ends), ends, some, us, vs):
        own = slice(first, end)
        assert len(u) == len(v) == end - first
        if first < end:
            (y_, (u_,)), (dx_, (v_,)) = (
                linear(x[own], Parts(weight, bias, (adapter,))),
                linear(dy[own], Parts(weight, None, (adapter,)), transposed=True),
            )
            if n <= FEW_ROWS:
                torch.testing.assert_close(y[own], y_, **close)
                torch.testing.assert_close(dx[own], dx_, **close)
            else:  # torch's product of more rows sums in another order
                torch.testing.assert_close(y[own], y_, rtol=0.02, atol=0.06)
                torch.testing.assert_close(dx[own], dx_, rtol=0.02, atol=0.06)
            torch.testing.assert_close(u, u_, rtol=1e-6, atol=1e-5)
            torch.testing.assert_close(v, v_, rtol=1e-6, atol=1e-5)
