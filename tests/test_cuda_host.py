"""The CUDA kernels on the CPU, under the sanitizers (csrc/cuda/host.h), and that this finds what is wrong with a kernel."""

import on_host
import pytest
import torch

pytestmark = pytest.mark.skipif(not on_host.COMPILER, reason="no g++ here")

# ---- host execution itself -------------------------------------------------------------------------------------------


def selftest(kernel: str, y, n=0, mistake=0, blocks=1, seed=0):
    kernels = ("turn", "warp", "pipe", "round")
    numbers = dict(kernel=kernels.index(kernel), n=n, mistake=mistake, blocks=blocks)
    on_host.run("selftest", numbers, {}, dict(y=y), seed)
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


def test_inputs_must_not_be_written():
    with pytest.raises(on_host.Failed, match="y was written, which is an input"):
        on_host.run("selftest", dict(kernel=0, n=0, mistake=0, blocks=1), dict(y=torch.arange(64.0)), {})
