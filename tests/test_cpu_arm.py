"""csrc/cpu's attention in vectors of four, compiled for ARM and run by qemu: plain, and with ARM's dot products of bfloat16."""

import shutil
from dataclasses import replace

import pytest
import torch
from host_attention import HostAttention
from op_cases import VIEWS, View, attention_inputs, random_attention
from op_runs import attention_all, exact_in_half, nan_stays_in_its_sequence, row_makes_nan_of_what_it_sees, within_budget
from quantized_cases import BITS, in_bits, run_quantized

from diffmas import ops
from diffmas.ops import backends

MISSING = [tool for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64") if not shutil.which(tool)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed here: {', '.join(MISSING)}")
FORMS = {"cpu_arm": torch.float32, "cpu_arm_bf16": torch.bfloat16}  # what they round p and ds to


@pytest.fixture(params=FORMS)
def form(request, monkeypatch):
    """Backend "cpu" is this form, by qemu."""
    ops_of_form = HostAttention(request.param)
    monkeypatch.setitem(ops.BACKENDS, "cpu", backends.Backend("cpu", ops_of_form, ("cpu",), backends.FLOATS, None))
    backends._choose.cache_clear()
    yield request.param
    backends._choose.cache_clear()


def agree(inputs, form, dtype):
    do = exact_in_half(*inputs.q.shape)
    run = lambda dtype, backend: attention_all(inputs.to(dtype), backend, do)
    products = FORMS[form] if dtype == torch.bfloat16 else torch.float32
    for got, like, want in zip(run(dtype, "cpu"), run(dtype, "reference"), run(torch.float64, "reference")):
        within_budget(got, like, want, inputs.q.shape[2] * (inputs.q.shape[1] / inputs.k_pool.shape[1]) ** 0.5, products)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["one_query_long_view", "prefill_on_trace", "ragged", "one_row_segments", "offset", "many_queries"]
)
def test_views(name, dtype, form):
    agree(attention_inputs(VIEWS[name], rows=700), form, dtype)


@pytest.mark.parametrize("D", [2, 20, 33, 80, 128])
def test_head_sizes(D, form):
    view = View([19, 1, 2], [[(40, 33, 7), (10, 1, 0)], [(0, 1, 0)], [(100, 35, -3)]])
    agree(attention_inputs(view, heads=(1, 1), D=D, Dr=D // 4 * 2, rows=150), form, torch.bfloat16)


@pytest.mark.parametrize("seed", range(4))
def test_random_views(seed, form):
    agree(random_attention(seed, 300), form, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", BITS[:2])
@pytest.mark.parametrize("name", ["one_query_long_view", "ragged", "offset"])
def test_quantised_rows(name, bits, dtype, form):
    inputs = attention_inputs(VIEWS[name], D=80 if name == "ragged" else 33, Dr=16, rows=700)
    do = exact_in_half(*inputs.q.shape)
    run = lambda dtype, backend: run_quantized(in_bits(inputs.to(dtype), bits), do, backend)
    for got, like, want in zip(run(dtype, "cpu"), run(dtype, "reference"), run(torch.float64, "reference")):
        within_budget(got, like, want, 80 * 2**0.5)


def test_scale(form):
    for scale in (0.0, -0.3):
        agree(replace(attention_inputs(VIEWS["ragged"], rows=400), scale=scale), form, torch.bfloat16)


def test_what_is_not_finite(form):
    for name in ("q", "do"):
        nan_stays_in_its_sequence("cpu", name, torch.bfloat16)
        row_makes_nan_of_what_it_sees("cpu", name, torch.nan, torch.bfloat16, 55, keys=120)
