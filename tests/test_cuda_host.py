"""The CUDA kernels on the CPU, under the sanitizers (tests/host), and that this finds what is wrong with a kernel."""

from dataclasses import replace

import on_host
import pytest
import torch
from op_cases import head_major, inject_inputs
from op_runs import exact_in_half, inject_all, raw, within_budget

from diffmas import ops
from diffmas.ops import backends

pytestmark = pytest.mark.skipif(not on_host.COMPILER, reason="no g++ here")

# ---- host execution itself -------------------------------------------------------------------------------------------


def selftest(kernel: str, y, n=0, mistake=0, blocks=1, seed=0, **inputs):
    kernels = ("turn", "warp", "pipe", "round", "product")
    numbers = dict(kernel=kernels.index(kernel), n=n, mistake=mistake, blocks=blocks)
    on_host.run("selftest", numbers, inputs, dict(y=y), seed)
    return y


@pytest.mark.parametrize("seed", range(3))
def test_right_kernels(seed):
    i = torch.arange(192)
    assert torch.equal(selftest("turn", i.float(), blocks=3, seed=seed), (i + (i ^ 32)).float())

    lane = torch.arange(32).repeat(2)
    i = torch.arange(64)
    groups = i.view(-1, 8).sum(1).repeat_interleave(8) + i.view(-1, 16).amax(1).repeat_interleave(16)
    down = torch.where(lane % 8 + 3 < 8, lane + 3, lane)
    votes = (i % 3 == 0).view(2, 32).sum(1).repeat_interleave(32)
    want = groups + (lane % 16 + 1 + 16 * (lane < 16)) + down + votes + 50
    y = torch.full((2 + 5 * 64,), torch.nan)
    y[0] = 0
    got = selftest("warp", y, blocks=5, seed=seed)
    assert torch.equal(got[2:].view(5, 64), want.float().expand(5, 64)) and got[1] == 5 * want.sum()

    y = torch.full((6, 32), torch.nan)
    assert torch.equal(selftest("pipe", y, n=6, seed=seed), torch.arange(192.0).view(6, 32).flip(1))


def test_rounding_to_half_precision():
    bits = torch.randint(-(2**31), 2**31, (3000,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    near = torch.randn(3000) * 10 ** torch.randint(-9, 6, (3000,))
    ties = (torch.arange(-2000, 2000) * 2 + 1) * 2.0**-25
    edges = torch.tensor(
        [0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65504, 65519, 65520, 2**-25, 2**-24, 1.5 * 2**-24, 3.4e38]
    )
    halves = torch.cat([(torch.arange(2**16) - 2**15).to(torch.int16).view(t).float() for t in (torch.float16, torch.bfloat16)])
    x = torch.cat((bits, near, ties, edges, halves))
    got = selftest("round", torch.cat((x, x, x)), n=len(x)).view(3, -1)
    torch.testing.assert_close(got[1], x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(got[2], x.half().float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("mistake, message", [
    (1, "barrier divergence: 63 threads wait at .*selftest.cpp:.* 1 of 64 have returned"),
    (2, "barrier divergence: thread .* is at .*selftest.cpp:.* others wait at"),
    (5, "reads lane 9, which is not in the mask 00000100"),
    (6, "heap-buffer-overflow"), (7, "heap-buffer-overflow|use-after-poison|out of bounds"), (8, "misaligned address"),
])  # fmt: skip
def test_wrong_kernels_are_stopped(mistake, message):
    with pytest.raises(on_host.Failed, match=message):
        selftest("turn", torch.arange(64.0), mistake=mistake)


@pytest.mark.parametrize("mistake", [3, 4])
def test_what_is_read_too_early_is_nan(mistake):
    """Shared memory that another thread has not written yet, and a copy that was not waited for."""
    assert selftest("turn", torch.arange(64.0), mistake=mistake).isnan().any()


def products(mistake=0, seed=0):
    a, b, c = (torch.randn(rows, size).bfloat16() for rows, size in ((64, 16), (64, 16), (16, 64)))
    got = selftest("product", torch.full((2, 64, 64), torch.nan), mistake=mistake, seed=seed, a=a, b=b, c=c)
    return got, torch.stack((a.float() @ b.float().T, a.float() @ c.float()))


def test_products_of_boxes():
    """Copy engine, barriers that count bytes and products of a warpgroup, with operands in either direction."""
    for seed in range(2):
        got, want = products(seed=seed)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mistake, message", [
    (9, "a barrier that was not initialised"), (10, "barrier divergence: 128 threads wait at .*sm90_emulation.h"),
    (11, "a panel at 128, which 1024 does not divide"), (14, "multiplies by other operands than its warpgroup"),
    (15, "warp 3 took part in 0 products of its warpgroup, of 2"),
])  # fmt: skip
def test_wrong_products_are_stopped(mistake, message):
    with pytest.raises(on_host.Failed, match=message):
        products(mistake)


@pytest.mark.parametrize("mistake, which", [(12, 0), (13, 1), (16, 0), (17, 0)])
def test_products_too_early_are_nan(mistake, which):
    """Boxes that are not here yet, sides that are overwritten before they were read, sums that are looked at too early; what a
    product has read by then is a matter of chance."""
    assert any(products(mistake, seed)[0][which].isnan().any() for seed in range(3))
    assert mistake != 13 or not all(products(mistake, seed)[0][which].isnan().any() for seed in range(6))


def test_what_is_not_published_is_not_multiplied():
    """Products see memory by another way than the stores of threads."""
    (plain, _), (unsaid, _), (published, _) = (torch.manual_seed(0) and products(mistake)[0] for mistake in (0, 18, 19))
    assert torch.equal(unsaid, plain) and plain[:, 3].all()
    plain[:, 3] = 0
    assert torch.equal(published, plain)


def test_inputs_must_not_be_written():
    with pytest.raises(on_host.Failed, match="y was written, which is an input"):
        on_host.run("selftest", dict(kernel=0, n=0, mistake=0, blocks=1), dict(y=torch.arange(64.0)), {})


# ---- inject ----------------------------------------------------------------------------------------------------------


class Kernels:
    """The ops of csrc/cuda, on CPU tensors: what diffmas.ops sees in the place of torch.ops.diffmas_native."""

    def __init__(self):
        self.seed, self.processors, self.vectors = 0, 1, True

    def inject(self, q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool):
        q_out = torch.full_like(q, torch.nan, memory_format=torch.contiguous_format)
        inputs = dict(q=q, k=k, v=v, cos=cos, sin=sin, slots=slots, q_weight=q_weight, k_weight=k_weight)
        self.run(False, eps, interleaved, inputs, dict(k_pool=k_pool, v_pool=v_pool, q_out=q_out))
        return q_out

    def inject_backward(
        self, dq_rot, q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool
    ):  # fmt: skip
        inputs = dict(dq_rot=dq_rot, q=q, k=k, cos=cos, sin=sin, slots=slots, q_weight=q_weight, k_weight=k_weight)
        grads = {name: torch.full(x.shape, torch.nan, dtype=q.dtype) for name, x in dict(q_out=q, dk=k, dv=k).items()}
        weights = {
            f"d{name}": None if w is None else torch.full(w.shape, torch.nan)
            for name, w in dict(q_weight=q_weight, k_weight=k_weight).items()
        }
        self.run(True, eps, interleaved, inputs, dict(k_pool=dk_pool, v_pool=dv_pool, **grads, **weights))
        return *grads.values(), *(torch.zeros(0) if w is None else w for w in weights.values())

    def run(self, backward, eps, interleaved, inputs, outputs):
        numbers = dict(
            backward=backward, eps=eps, interleaved=interleaved, processors=self.processors, vectors=self.vectors
        )  # fmt: skip
        on_host.run("inject", numbers, inputs, outputs, self.seed)


@pytest.fixture
def kernels(monkeypatch):
    """Backend "cuda" runs on the host."""
    kernels = Kernels()
    monkeypatch.setitem(ops.BACKENDS, "cuda", backends.Backend("cuda", kernels, ("cpu",), backends.FLOATS, None))
    backends._choose.cache_clear()
    yield kernels
    backends._choose.cache_clear()


def agree(inputs, dtype, wide_tables=False):
    """One forward and backward against the reference in that precision and in float64."""
    dq_rot, (dk, dv) = exact_in_half(*inputs.q.shape), exact_in_half(2, POOL, *inputs.k.shape[1:])

    def run(dtype, backend):
        x = inputs.to(dtype)
        if wide_tables and dtype != torch.float64:
            x.cos, x.sin = inputs.cos.float(), inputs.sin.float()
        return inject_all(x, backend, dq_rot, dk, dv)

    results = run(dtype, "cuda")
    for got, like, want in zip(results, run(dtype, "reference"), run(torch.float64, "reference")):
        assert got.shape == want.shape and got.dtype == like.dtype
        if got.numel():
            within_budget(got, like, want, inputs.q.shape[2])
    return results


POOL = 60
INJECTS = {
    "one_token": dict(n=1, heads=(16, 8), D=128),
    "gqa2": dict(norm=False, strided=True),
    "gqa8": dict(n=11, heads=(8, 1), D=128, strided=True),
    "mha": dict(n=19, heads=(2, 2), D=80),
    "partial": dict(n=9, D=80, Dr=32, strided=True),
    "partial_without_norm": dict(n=5, D=80, Dr=48, norm=False),
    "uneven_tail": dict(n=5, D=88, Dr=32),
    "interleaved": dict(n=9, heads=(8, 1), D=64, interleaved=True, strided=True),
    "partial_interleaved": dict(n=9, heads=(2, 2), D=80, Dr=48, interleaved=True),
    "no_rope": dict(n=9, Dr=0),
    "scatter": dict(n=9, Dr=0, norm=False),
    "largest": dict(n=2, heads=(2, 1), D=512),
    "small": dict(n=40, heads=(4, 2), D=16),
    "no_tokens": dict(n=0),
}
# Element by element: sizes that 16 bytes do not divide.
ODD = {
    "odd": dict(n=5, heads=(18, 9), D=37, Dr=22, strided=True),
    "odd_interleaved": dict(n=5, heads=(4, 2), D=37, Dr=22, interleaved=True),
    "partial_24": dict(n=9, D=80, Dr=24),
    "one_dimension": dict(n=3, D=1, Dr=0),
    "largest_odd": dict(n=1, heads=(2, 1), D=511, Dr=510),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*INJECTS, *ODD])
def test_inject(name, dtype, kernels):
    kernels.vectors = name in INJECTS or (name == "partial_24" and dtype == torch.float32)
    agree(inject_inputs(**(INJECTS | ODD)[name], rows=POOL), dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
def test_inject_with_float32_tables(dtype, interleaved, kernels):
    """Each dimension has a cosine and a sine of its own; nothing assumes that a pair shares them."""
    tables = dict(cos=exact_in_half(5, 48), sin=exact_in_half(5, 48))
    inputs = inject_inputs(n=5, interleaved=interleaved, rows=POOL)
    agree(replace(inputs, **tables), dtype, wide_tables=True)


@pytest.mark.parametrize("missing", ["q_weight", "k_weight"])
def test_inject_with_one_norm(missing, kernels):
    agree(replace(inject_inputs(n=7, rows=POOL), **{missing: None}), torch.float32)


def test_inject_where_the_address_is_odd(kernels):
    """Rows that begin two bytes after a multiple of 16."""
    kernels.vectors = False
    x = inject_inputs(n=5, rows=POOL)
    shifted = torch.zeros(5, 4, 65, dtype=torch.float64)[..., 1:].copy_(x.q)
    agree(replace(x, q=shifted), torch.bfloat16)


def test_inject_into_other_pools(kernels):
    """float16 pools under float32 queries; no row but the given ones is read or written."""
    kernels.vectors = False
    x = inject_inputs(n=9, rows=POOL).to(torch.float32)
    pools = [head_major(POOL, 2, 64, torch.float16) for _ in "kv"]
    want = [p.clone() for p in pools]
    q_rot = raw.inject(x.q, x.k, x.v, *x.rope(), *pools, "cuda")
    torch.testing.assert_close(q_rot, raw.inject(x.q, x.k, x.v, *x.rope(), *want, "reference"))
    for a, b in zip(pools, want):
        torch.testing.assert_close(a, b, equal_nan=True)

    kernels.vectors = True
    stored = x.slots[x.slots >= 0]
    grads = [head_major(POOL, 2, 64, torch.float32) for _ in "kv"]
    for g in grads:
        g[stored] = 1.0
    assert all(out.isfinite().all() for out in raw.inject_backward(x.q, x.q, x.k, *x.rope(), *grads, "cuda"))
    for g in grads:
        assert (g[stored] == 0).all() and g.isnan().sum() == (POOL - len(stored)) * 2 * 64


@pytest.mark.parametrize("case", [dict(n=40, heads=(8, 4)), dict(n=13, heads=(4, 2), D=37, Dr=22)])
def test_the_same_bits_in_every_order(case, kernels):
    """Of blocks and threads; with blocks that loop over rows."""
    kernels.processors, kernels.vectors = 1, "D" not in case
    inputs = inject_inputs(**case, rows=POOL)
    results = []
    for kernels.seed in range(3):
        torch.manual_seed(0)
        results.append(agree(inputs, torch.float32))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
