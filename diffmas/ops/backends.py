"""Backends: which implementations of the ops there are here, and the one place that picks one.

`reference` (plain PyTorch, anywhere), `cpu` (the compiled extension), `triton` and `cuda` (GPUs). `backend="auto"` takes the
fastest one that serves the device, dtype and head size; the environment variable DIFFMAS_BACKEND, read on import, overrides
"auto".
"""

import functools
import importlib
import importlib.util
import math
import os
import warnings

import torch
from torch import Tensor

from diffmas.ops import extension, reference
from diffmas.ops.checks import FLOATS, MAX_HEAD_DIM
from diffmas.ops.fused import PARTS, Composed
from diffmas.ops.quantize import PAYLOADS

__all__ = ["BACKENDS", "available", "check_backend", "check_reads", "implementation"]

INTERPRETED = (torch.float32, torch.float16, torch.float64)


class Backend:
    """A set of op implementations, and the devices, dtypes and head sizes that it serves."""

    interpreted = False  # too slow for "auto"

    def __init__(self, name, ops, devices, dtypes, why_missing):
        self.name, self.ops, self.devices, self.dtypes, self.max_head_dim = name, ops, devices, dtypes, math.inf
        self.why_missing = why_missing  # None when it is usable

    def has(self, op: str, dtype: torch.dtype, head_dim: int) -> bool:
        return head_dim <= self.max_head_dim and hasattr(self.ops, op)

    def serves(self, op: str, device: str, dtype: torch.dtype, head_dim: int) -> bool:
        if (self.devices is not None and device not in self.devices) or (self.dtypes is not None and dtype not in self.dtypes):
            return False
        return self.why_missing is None and self.has(op, dtype, head_dim)


class TritonBackend(Backend):
    """Triton and its kernels are imported when first needed. With TRITON_INTERPRET=1 its interpreter runs them, on CPU tensors
    and in float64 too, but not in bfloat16, of which it multiplies the bits."""

    def __init__(self):
        self.name, self.max_head_dim = "triton", 256
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.devices, self.dtypes = (None, INTERPRETED) if self.interpreted else (("cuda",), FLOATS)

    @functools.cached_property
    def why_missing(self) -> str | None:
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not self.interpreted and not torch.cuda.is_available():
            return "there is no CUDA device, and TRITON_INTERPRET=1 is not set"
        return None

    @functools.cached_property
    def ops(self):
        return importlib.import_module("diffmas.kernels.backend")

    def has(self, op: str, dtype: torch.dtype, head_dim: int) -> bool:
        # Products of float32 have no tensor cores, and with longer heads no room in registers.
        short = head_dim <= 128 or dtype != torch.float32 or self.interpreted or "attention" not in op
        return short and super().has(op, dtype, head_dim)


class CudaOps:
    """torch.ops.diffmas_native. Its attention is made for small-q calls, since it reads a view again for every 16 of their
    rows; of many it takes dK and dV in 16-bit types, which it keeps in registers where Triton's fit in small tiles only, and
    on Hopper the forward and the whole backward. The rest is Triton's, or the reference's where there is no Triton: other o
    and dq of many queries, pools of another dtype than q, and rotated halves whose padding makes a head longer than 256. Rows
    of 8 bits it reads for small q in 16-bit types, in whole packs of 16 bytes; dq of these is Triton's."""

    SMALL_Q_ROWS = 64  # (token, head of the GQA group) pairs of a sequence, on average; a guess until it is measured
    TILE_ROWS = 128  # of the forward on Hopper
    BACKWARD_ROWS = 64  # of the backward there

    def __getattr__(self, op):
        return getattr(torch.ops.diffmas_native, op)

    def _small_q(self, q, k_pool, q_indptr):
        return q.shape[0] * q.shape[1] // k_pool.shape[1] <= self.SMALL_Q_ROWS * (q_indptr.shape[0] - 1)

    @staticmethod
    def _slots(q, seg_offset, inv_freq, interleaved):
        """The length of a row as the kernels keep it: halves that are rotated into each other are padded to eights."""
        padding = 0 if seg_offset is None or interleaved else -inv_freq.shape[0] % 8
        return q.shape[2] + 2 * padding

    def _served(self, q, k_pool, seg_offset, inv_freq, interleaved):
        return k_pool.dtype == q.dtype and self._slots(q, seg_offset, inv_freq, interleaved) <= 256

    @staticmethod
    def _hopper(q, k_pool, seg_offset, tile_rows):
        """Multiprocessors of a Hopper GPU whose own kernels, with tiles of so many rows, take the call; else 0."""
        Hq, D = q.shape[1:]
        fits = D % 8 == 0 and D <= 128 and Hq <= tile_rows * k_pool.shape[1] and seg_offset is None
        if not fits or q.dtype == torch.float32 or k_pool.dtype != q.dtype:
            return 0
        return _hopper_multiprocessors(q.device)

    def _on_hopper(self, q, k_pool, seg_offset, scale):
        """Whether csrc/cuda/attention/forward_sm90.cuh takes the forward of many queries. It splits no view: where there are
        fewer tiles than multiprocessors Triton does."""
        multiprocessors = self._hopper(q, k_pool, seg_offset, self.TILE_ROWS)
        return scale > 0 and 0 < multiprocessors * self.TILE_ROWS <= q.shape[0] * q.shape[1]

    def _backward_on_hopper(self, q, k_pool, seg_offset):
        """Whether csrc/cuda/attention/backward_sm90.cuh takes the backward of many queries."""
        return self._hopper(q, k_pool, seg_offset, self.BACKWARD_ROWS) > 0

    def attention_work(self, kernel, q, k_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, *more):
        """Where Triton will run."""
        hopper = {"fwd": self._on_hopper(q, k_pool, seg_offset, scale), "dq": self._backward_on_hopper(q, k_pool, seg_offset)}
        small = self._small_q(q, k_pool, q_indptr) and (kernel == "fwd" or k_pool.dtype not in PAYLOADS)
        if small or hopper.get(kernel):
            return None
        view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq
        return _triton_or_reference("attention_work", q)(kernel, q, k_pool, *view, scale, *more)

    def cross_attention(
        self, q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved,
        work=None,
    ):  # fmt: skip
        args = q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved
        small = self._small_q(q, k_pool, q_indptr) and self._served(q, k_pool, seg_offset, inv_freq, interleaved)
        if small or self._on_hopper(q, k_pool, seg_offset, scale):
            return torch.ops.diffmas_native.cross_attention(*args)
        return _triton_or_reference("cross_attention", q)(*args, *(() if work is None else (work,)))

    def cross_attention_quantized(
        self, q, k_pool, v_pool, k_scale, v_scale, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale,
        interleaved, work=None,
    ):  # fmt: skip
        view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq
        args = q, k_pool, v_pool, k_scale, v_scale, *view, scale, interleaved
        if self._small_q(q, k_pool, q_indptr) and self._reads(q, k_pool, v_pool, seg_offset, inv_freq, interleaved):
            return torch.ops.diffmas_native.cross_attention_quantized(*args)
        return _triton_or_reference("cross_attention_quantized", q)(*args, *(() if work is None else (work,)))

    @staticmethod
    def _reads(q, k_pool, v_pool, seg_offset, inv_freq, interleaved):
        """Whether csrc/cuda/attention_quantized.cu takes the forward of few queries."""
        halves = seg_offset is None or interleaved or inv_freq.shape[0] % 4 == 0
        return q.dtype != torch.float32 and q.shape[2] % 16 == 0 and halves and all(map(_in_packs, (q, k_pool, v_pool)))

    def cross_attention_backward(
        self, do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
        scale, causal, interleaved, dk_pool, dv_pool, grad_tail=None, want_dq=True, work=None,
    ):  # fmt: skip
        args = (
            do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale,
            causal, interleaved, dk_pool, dv_pool,
        )  # fmt: skip
        ours = torch.ops.diffmas_native.cross_attention_backward
        served = self._served(q, k_pool, seg_offset, inv_freq, interleaved)
        if served and (self._small_q(q, k_pool, q_indptr) or self._backward_on_hopper(q, k_pool, seg_offset)):
            return ours(*args, grad_tail, want_dq)
        other = _triton_or_reference("cross_attention_backward", q)
        found = () if work is None else (work,)  # the reference takes none
        # Other than in whole packs of 16 bytes they would go element by element.
        packs = q.shape[2] % 8 == 0 and self._slots(q, seg_offset, inv_freq, interleaved) == q.shape[2]
        if not served or not packs or q.dtype == torch.float32:
            return other(*args, grad_tail, want_dq, *found)
        nothing = q_indptr.new_zeros(q_indptr.shape[0] - 1)  # gets dK and dV there
        dq = other(*args, nothing, True, *found) if want_dq else None
        none = ours(*args, grad_tail, False)
        return dq if want_dq else none


def _in_packs(x: Tensor) -> bool:
    """Whether rows [n, H, D] begin at multiples of 16 bytes."""
    strides = (stride for stride, size in zip(x.stride()[:2], x.shape) if size > 1)  # others are walked along by nobody
    return not any(at % 16 for at in (x.data_ptr(), *(stride * x.element_size() for stride in strides)))


@functools.cache
def _hopper_multiprocessors(device: torch.device) -> int:
    """0 where code for sm_90a does not run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != (9, 0):
        return 0
    return torch.cuda.get_device_properties(device).multi_processor_count


def _triton_or_reference(op: str, lead: Tensor):
    triton = BACKENDS["triton"]
    usable = triton.why_missing is None and triton.has(op, lead.dtype, lead.shape[-1])
    return getattr(triton.ops if usable else _fall_back(op, lead.device.type, lead.dtype, lead.shape[-1]), op)


@functools.cache
def _warn_of_the_reference(device: str, dtype: torch.dtype, head_dim: int) -> None:
    if device == "cpu":
        why = BACKENDS["cpu"].why_missing
    elif device == "cuda" and BACKENDS["triton"].why_missing is not None:
        why = f"triton: {BACKENDS['triton'].why_missing}; cuda: {BACKENDS['cuda'].why_missing or f'heads above {MAX_HEAD_DIM}'}"
    elif dtype == torch.float32 and head_dim <= 256:
        why = "in float32 there are kernels up to 128, in bfloat16 and float16 up to 256"
    else:
        why = "there are kernels for heads of up to 256, in bfloat16 and float16 (float32: 128)"
    what = f"{str(dtype).removeprefix('torch.')} with heads of {head_dim} on {device}"
    warnings.warn(
        f"diffmas: attention of {what} has no kernel here and runs on the reference: one sequence after the other, with "
        f"all scores in memory (heads x new tokens x rows). {why}",
        stacklevel=2,
    )


def _fall_back(op: str, device: str, dtype: torch.dtype, head_dim: int):
    """The reference, where nobody asked for it: warns once for what attention costs there. float64 is its own on a CPU."""
    if op.startswith("cross_attention") and (device != "cpu" or dtype in FLOATS):
        _warn_of_the_reference(device, dtype, head_dim)
    return reference


class CudaBackend(Backend):
    """The CUDA kernels of the extension. Devices are looked for when it is first needed."""

    OPS = (
        "inject", "inject_backward", "attention_work",
        "cross_attention", "cross_attention_backward", "cross_attention_quantized",
    )  # fmt: skip

    def __init__(self):
        self.name, self.ops, self.devices, self.dtypes = "cuda", CudaOps(), ("cuda",), FLOATS

    def has(self, op: str, dtype: torch.dtype, head_dim: int) -> bool:
        most = 256 if "attention" in op else MAX_HEAD_DIM
        return head_dim <= most and op in self.OPS

    @functools.cached_property
    def why_missing(self) -> str | None:
        if extension.cuda_error:
            return extension.cuda_error
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        driver, runtime = (version // 1000 for version in torch.ops.diffmas_native.versions())
        if driver < runtime:  # torch's own runtime may be an older one
            return f"it was built with CUDA {runtime}, which this machine's driver, of CUDA {driver}, does not run"
        # A target's code runs on its generation's later members too, unless it ends with "a".
        for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())):
            if not any(t == f"{major}{minor}a" or (t.isdecimal() and t[:-1] == str(major)) for t in extension.cuda_targets):
                return f"it has no code for compute capability {major}.{minor}"
        return None


# In order of preference. cuda has not been measured against triton on a GPU yet: it serves what triton does not, or by name.
BACKENDS = {
    "triton": TritonBackend(),
    "cuda": CudaBackend(),
    "cpu": Backend("cpu", torch.ops.diffmas_native, ("cpu",), FLOATS, extension.error),
    "reference": Backend("reference", reference, None, None, None),
}


def available() -> dict[str, str | None]:
    """Backends by name; None for a usable one, else the reason why it is missing."""
    return {name: backend.why_missing for name, backend in BACKENDS.items()}


def check_backend(name: str) -> str:
    """Returns `name` if it is "auto" or a usable backend; raises ValueError otherwise."""
    if name != "auto" and name not in BACKENDS:
        raise ValueError(f"backend: expected 'auto' or one of {sorted(BACKENDS)}, got {name!r}")
    if name != "auto" and BACKENDS[name].why_missing:
        raise ValueError(f"backend: {name!r} is not usable here: {BACKENDS[name].why_missing}")
    return name


# Read once: on every call, looking it up took a tenth of the time of attention of 17 x 17 tokens.
AUTO = os.environ.get("DIFFMAS_BACKEND") or "auto"


def check_reads(backend: str) -> None:
    """Raises ValueError for a backend that reads no quantised rows."""
    reads = lambda b: b.has("cross_attention_quantized", torch.bfloat16, 64)
    name = AUTO if check_backend(backend) == "auto" else backend
    if name != "auto" and not reads(BACKENDS[check_backend(name)]):
        there = [x for x, b in BACKENDS.items() if b.why_missing is None and reads(b)]
        raise ValueError(f"backend: expected one that reads quantised rows, of those here {there}, got {name!r}")


def implementation(op: str, lead: Tensor, backend: str):
    """The function that runs `op` on `lead` [.., D], which decides device, dtype and head size. What a named backend does not
    have, an op or a head size (of that dtype), runs on the reference; what "cuda" does not have on Triton if it can."""
    return getattr(_choose(op, lead.device, lead.dtype, lead.shape[-1], backend), op)


@functools.cache  # on every call of every op: looked up, not searched
def _choose(op: str, device: torch.device, dtype: torch.dtype, head_dim: int, backend: str):
    if op in PARTS:
        choose = lambda part: _choose(part, device, dtype, head_dim, backend)
        native = BACKENDS["cpu"].ops
        if all(choose(part) is native for part in PARTS[op]):
            return native
        return Composed(lambda part: getattr(choose(part), part))
    name = AUTO if backend == "auto" else backend
    asked = (op, device.type, dtype, head_dim)
    if name == "auto":
        found = next(b for b in BACKENDS.values() if not b.interpreted and b.serves(*asked))
        return _fall_back(*asked) if found is BACKENDS["reference"] else found.ops
    chosen = BACKENDS[check_backend(name)]
    if not chosen.has(op, dtype, head_dim):
        triton = BACKENDS["triton"]
        return triton.ops if name == "cuda" and triton.serves(*asked) else _fall_back(*asked)
    if not chosen.serves(*asked):
        devices = chosen.devices or "all devices"
        raise ValueError(f"backend: {name!r} serves {devices} in {chosen.dtypes}, got {device.type} in {dtype}")
    return chosen.ops
