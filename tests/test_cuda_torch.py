"""The extension with a CUDA build of torch, GPU or not (`make test-cuda-torch`): it is loaded, its CUDA ops are registered, and
whoever asks for them is told what is missing."""

import ctypes
import os

import pytest
import torch
from op_cases import VIEWS, attention_inputs

import diffmas
from diffmas import ops
from diffmas.ops import backends, extension
from diffmas.ops.schemas import QUANTIZED, SCHEMAS

no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
needs_cuda_torch = pytest.mark.skipif(torch.version.cuda is None, reason="torch is built without CUDA")
pytestmark = pytest.mark.skipif(not extension.cuda_targets, reason=str(extension.cuda_error))


@needs_cuda_torch
def test_torchs_current_stream_is_found():
    """Where csrc/binding/cuda.cpp looks for it: in a library that torch has loaded already."""
    library = ctypes.CDLL("libtorch_cuda.so", mode=os.RTLD_NOLOAD | os.RTLD_LAZY)
    assert library.aoti_torch_get_current_cuda_stream


@pytest.mark.parametrize("op", SCHEMAS | QUANTIZED)
def test_every_op_has_an_implementation_per_device(op):
    """merge_states, reposition and dq over rows of 8 bits have none for CUDA."""
    has = lambda key: torch._C._dispatch_has_kernel_for_dispatch_key(f"diffmas_native::{op}", key)
    assert has("CPU") and has("CUDA") == (op in backends.CudaBackend.OPS) and not has("CompositeExplicitAutograd")


def test_tensors_on_another_device_are_refused():
    meta = [x.to("meta") if isinstance(x, torch.Tensor) else x for x in attention_inputs(VIEWS["ragged"]).args()]
    with pytest.raises(NotImplementedError, match="diffmas_native::cross_attention.*Meta"):
        torch.ops.diffmas_native.cross_attention(*meta)


@no_gpu
@needs_cuda_torch
def test_without_a_gpu_everything_runs_on_the_cpu():
    """And a backend that needs one says so before it is used."""
    assert ops.available()["cuda"] == "there is no CUDA device" and ops.available()["cpu"] is None
    args = attention_inputs(VIEWS["ragged"]).to(torch.float32).args()
    with pytest.raises(ValueError, match="'cuda' is not usable here: there is no CUDA device"):
        diffmas.ops.cross_attention(*args[:7], backend="cuda")
    assert ops.implementation("cross_attention", args[0], "auto") is torch.ops.diffmas_native.cross_attention


def test_versions_of_the_runtime_and_the_driver():
    driver, runtime = torch.ops.diffmas_native.versions()
    assert runtime // 1000 >= 12 and (driver >= 12000 if torch.cuda.is_available() else driver >= 0)


@pytest.mark.parametrize("capability, versions, why", [
    ((9, 0), (13000, 13000), None), ((9, 0), (13010, 13000), None), ((9, 0), (13000, 13010), None),
    ((8, 9), (14000, 13000), None),
    ((9, 0), (12080, 13000), "it was built with CUDA 13, which this machine's driver, of CUDA 12, does not run"),
    ((7, 5), (13000, 13000), "it has no code for compute capability 7.5"),
])  # fmt: skip
def test_what_a_gpu_needs(capability, versions, why, monkeypatch):
    """A driver runs any minor version of its CUDA and of older ones."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.ops.diffmas_native, "versions", lambda: versions)
    assert backends.CudaBackend().why_missing == why
