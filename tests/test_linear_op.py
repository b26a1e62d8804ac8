"""The CPU's op of a linear layer and its LoRA adapter, against float64."""

import pytest
import torch

from diffmas.ops import extension
from diffmas.ops.linear import linear, lora_grads

pytestmark = pytest.mark.skipif(not extension.loaded, reason=f"the CPU kernels are missing: {extension.error}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 3, 7, 12, 25, 32, 33, 70])
def test_the_op(n, dtype):
    torch.manual_seed(n)
    out, length, r = 96, 160, 5
    x, dy = torch.randn(n, length).to(dtype), torch.randn(n, out).to(dtype)
    weight, bias = (torch.randn(out, length) / length**0.5).to(dtype), torch.randn(out).to(dtype)
    a, b = torch.randn(r, length) / length**0.5, torch.randn(out, r) / r**0.5
    X, DY, W, A, B = (t.double() for t in (x, dy, weight, a, b))
    (y, u), (dx, v) = linear(x, weight, bias, a, b, 0.7), linear(dy, weight, None, a, b, 0.7, transposed=True)
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
            assert torch.equal(linear(x[i : i + 2], weight, bias, a, b, 0.7)[0], y[i : i + 2])
            assert torch.equal(linear(dy[i : i + 2], weight, None, a, b, 0.7, transposed=True)[0], dx[i : i + 2])


@pytest.mark.parametrize("n", [5, 40])
def test_rows_that_lie_anyhow(n):
    """Transposed, or one number for all, as the gradient of a sum is."""
    torch.manual_seed(0)
    weight, a, b = torch.randn(96, 64), torch.randn(4, 64), torch.randn(96, 4)
    x, dy = torch.randn(64, n).t(), torch.ones(()).expand(n, 96)
    (y, u), (dx, v) = linear(x, weight, None, a, b, 0.5), linear(dy, weight, None, a, b, 0.5, transposed=True)
    laid = x.contiguous(), u, dy.contiguous(), v
    assert torch.equal(y, linear(laid[0], weight, None, a, b, 0.5)[0])
    assert torch.equal(dx, linear(laid[2], weight, None, a, b, 0.5, transposed=True)[0])
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
        y, u = linear(x, weight, None, a, b, 0.5)
        dx, v = linear(y, weight, None, a, b, 0.5, transposed=True)
        many = torch.zeros(100, 768)
        of_many = torch.ops.diffmas_native.add_lora(many, rows, a, b, 0.5, False)
        found.append((y, u, dx, v, *lora_grads(x, u, y, v, 0.5), many, of_many))
    torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*found))


def test_the_op_says_what_is_wrong():
    x, weight = torch.randn(2, 64), torch.randn(32, 64)
    for wrong, what in (((x[:, :32], weight), "x"), ((x, weight.bfloat16()), "weight"), ((x, weight[:, :40]), "x")):
        with pytest.raises(RuntimeError, match=f"{what}: expected"):
            linear(*wrong, None, None, None, 1.0)
