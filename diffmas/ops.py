"""The ops of diffmas: registered torch ops (`torch.ops.diffmas.*`), their checks, and the one place that picks a backend.

Raw ops mutate pools, so they carry no autograd of their own and refuse to drop a gradient: `diffmas.pool` holds the
autograd of `inject` and `cross_attention`. The functions of this module are the checked entry points; inside the package,
plans that were built and checked once per forward call `torch.ops.diffmas.*` directly.

Backends: `reference` (plain PyTorch, anywhere), `cpu` (the compiled extension), `triton` and `cuda` (GPUs).
`backend="auto"` takes the fastest one that serves the device, dtype and head size; the environment variable DIFFMAS_BACKEND,
read on import, overrides "auto".
"""

import functools
import importlib
import importlib.util
import math
import os

import numpy as np
import torch
from torch import Tensor

from diffmas import _extension, reference
from diffmas.checks import (
    FLOAT_MAX,
    FLOATS,
    MAX_HEAD_DIM,
    check_distinct,
    check_floats,
    check_index,
    check_indptr,
    check_pools,
    check_query,
    check_segments,
    check_shape,
    check_written,
    expect,
    frequencies_of,
    narrowed,
    refuse,
    values_of,
)  # fmt: skip
from diffmas.schemas import SCHEMAS, with_backend

__all__ = ["BACKENDS", "available", "inject", "cross_attention", "merge_states", "reposition"]

# ---- backends --------------------------------------------------------------------------------------------------------


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
    and in float64 too."""

    def __init__(self):
        self.name, self.max_head_dim = "triton", 256
        self.interpreted = os.environ.get("TRITON_INTERPRET") == "1"
        self.devices, self.dtypes = (None, None) if self.interpreted else (("cuda",), FLOATS)

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
        short = head_dim <= 128 or dtype != torch.float32 or self.interpreted or not op.startswith("cross_attention")
        return short and super().has(op, dtype, head_dim)


class CudaOps:
    """torch.ops.diffmas_native. Its attention is for few queries a sequence, as it reads a view again for every 16 of their
    rows; of many it takes dK and dV in 16-bit types, which it keeps in registers where Triton's fit in small tiles only. The
    rest is Triton's, or the reference's where there is no Triton: o and dq of many queries, pools of another dtype than q, and
    rotated halves whose padding makes a head longer than 256."""

    FEW_ROWS = 64  # (token, head of the GQA group) pairs of a sequence, on average; a guess until it is measured

    def __getattr__(self, op):
        return getattr(torch.ops.diffmas_native, op)

    def _few(self, q, k_pool, q_indptr):
        return q.shape[0] * q.shape[1] // k_pool.shape[1] <= self.FEW_ROWS * (q_indptr.shape[0] - 1)

    @staticmethod
    def _slots(q, seg_shift, inv_freq, interleaved):
        """The length of a row as the kernels keep it: halves that are turned into each other are padded to eights."""
        padding = 0 if seg_shift is None or interleaved else -inv_freq.shape[0] % 8
        return q.shape[2] + 2 * padding

    def _served(self, q, k_pool, seg_shift, inv_freq, interleaved):
        return k_pool.dtype == q.dtype and self._slots(q, seg_shift, inv_freq, interleaved) <= 256

    def cross_attention(
        self, q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale, causal, interleaved
    ):
        ours = self._few(q, k_pool, q_indptr) and self._served(q, k_pool, seg_shift, inv_freq, interleaved)
        run = torch.ops.diffmas_native.cross_attention if ours else _triton_or_reference("cross_attention", q)
        return run(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale, causal, interleaved)

    def cross_attention_backward(
        self, do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq,
        scale, causal, interleaved, dk_pool, dv_pool, newest=None, want_dq=True,
    ):  # fmt: skip
        args = (
            do, dlse, q, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale,
            causal, interleaved, dk_pool, dv_pool,
        )  # fmt: skip
        ours = torch.ops.diffmas_native.cross_attention_backward
        served = self._served(q, k_pool, seg_shift, inv_freq, interleaved)
        if served and self._few(q, k_pool, q_indptr):
            return ours(*args, newest, want_dq)
        other = _triton_or_reference("cross_attention_backward", q)
        # Other than in whole packs of 16 bytes they would go element by element.
        packs = q.shape[2] % 8 == 0 and self._slots(q, seg_shift, inv_freq, interleaved) == q.shape[2]
        if not served or not packs or q.dtype == torch.float32:
            return other(*args, newest, want_dq)
        nobody = q_indptr.new_zeros(q_indptr.shape[0] - 1)  # learns there
        dq = other(*args, nobody, True) if want_dq else None
        none = ours(*args, newest, False)
        return dq if want_dq else none


def _triton_or_reference(op: str, lead: Tensor):
    triton = BACKENDS["triton"]
    usable = triton.why_missing is None and triton.has(op, lead.dtype, lead.shape[-1])
    return getattr(triton.ops if usable else reference, op)


class CudaBackend(Backend):
    """The CUDA kernels of the extension. Devices are looked for when it is first needed."""

    OPS = ("inject", "inject_backward", "cross_attention", "cross_attention_backward")

    def __init__(self):
        self.name, self.ops, self.devices, self.dtypes = "cuda", CudaOps(), ("cuda",), FLOATS

    def has(self, op: str, dtype: torch.dtype, head_dim: int) -> bool:
        most = 256 if op.startswith("cross_attention") else MAX_HEAD_DIM
        return head_dim <= most and op in self.OPS

    @functools.cached_property
    def why_missing(self) -> str | None:
        if _extension.cuda_error:
            return _extension.cuda_error
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        driver, runtime = (version // 1000 for version in torch.ops.diffmas_native.versions())
        if driver < runtime:  # torch's own runtime may be an older one
            return f"it was built with CUDA {runtime}, which this machine's driver, of CUDA {driver}, does not run"
        # A target's code runs on its generation's later members too, unless it ends with "a".
        for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())):
            if not any(t == f"{major}{minor}a" or (t.isdecimal() and t[:-1] == str(major)) for t in _extension.cuda_targets):
                return f"it has no code for compute capability {major}.{minor}"
        return None


# In order of preference. cuda has not been measured against triton on a GPU yet: it serves what triton does not, or by name.
BACKENDS = {
    "triton": TritonBackend(),
    "cuda": CudaBackend(),
    "cpu": Backend("cpu", torch.ops.diffmas_native, ("cpu",), FLOATS, _extension.error),
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


def implementation(op: str, lead: Tensor, backend: str):
    """The function that runs `op` on `lead` [.., D], which decides device, dtype and head size. What a named backend does not
    have, an op or a head size (of that dtype), runs on the reference; what "cuda" does not have on Triton if it can."""
    return getattr(_choose(op, lead.device, lead.dtype, lead.shape[-1], backend), op)


@functools.cache  # on every call of every op: looked up, not searched
def _choose(op: str, device: torch.device, dtype: torch.dtype, head_dim: int, backend: str):
    name = AUTO if backend == "auto" else backend
    if name == "auto":
        return next(b for b in BACKENDS.values() if not b.interpreted and b.serves(op, device.type, dtype, head_dim)).ops
    chosen = BACKENDS[check_backend(name)]
    if not chosen.has(op, dtype, head_dim):
        triton = BACKENDS["triton"]
        return triton.ops if name == "cuda" and triton.serves(op, device.type, dtype, head_dim) else reference
    if not chosen.serves(op, device.type, dtype, head_dim):
        raise ValueError(f"backend: {name!r} serves {chosen.devices} in {chosen.dtypes}, got {device.type} in {dtype}")
    return chosen.ops


# ---- registration ----------------------------------------------------------------------------------------------------

_library = torch.library.Library("diffmas", "DEF")


def _register(name: str, lead: int) -> None:
    """Defines op `name`; its argument number `lead` decides device, dtype and head size."""

    def run(*args, backend="auto"):
        if len(args) == count + 1:  # the dispatcher passes a non-default backend as the last positional argument
            args, backend = args[:-1], args[-1]
        # Off inside autograd.Function, which is where the gradients are taken care of.
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args):
            raise RuntimeError(
                f"diffmas.ops.{name} works on K/V pools in place and records no gradient; call it under torch.no_grad(), "
                "or go through diffmas.pool.attend, which is differentiable"
            )
        return implementation(name, args[lead], backend)(*args)

    _library.define(name + with_backend(SCHEMAS[name]))
    count = len(getattr(torch.ops.diffmas, name).default._schema.arguments) - 1
    _library.impl(name, run, "CompositeExplicitAutograd")


for _name, _lead in {
    "inject": 0, "inject_backward": 1, "cross_attention": 0, "cross_attention_backward": 2,
    "merge_states": 0, "merge_states_backward": 2, "reposition": 5, "reposition_backward": 5,
}.items():  # fmt: skip
    _register(_name, _lead)


def call(name: str, lead: Tensor, *args, backend: str = "auto"):
    """Runs a raw op on the backend of `lead`, one of its arguments; nothing is recorded by autograd.

    Straight to the backend, a third of the time that the dispatcher's way takes for one token; through torch.ops.diffmas where
    something wants to see the op: torch.compile, fake tensors, dispatch modes.
    """
    if type(lead) is not Tensor or torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return getattr(torch.ops.diffmas, name)(*args, backend=backend)
    return implementation(name, lead, backend)(*args)


def _fake_states(q, *_, **__):
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=reference.accumulator(q.dtype))


def _fake_dq(do, dlse, q, *rest, **__):
    want_dq = rest[16] if len(rest) > 16 else True
    return q.new_empty(q.shape if want_dq else 0)


def _fake_inject_backward(dq_rot, q, k, cos, sin, slots, q_weight, k_weight, *_, **__):
    acc = reference.accumulator(q.dtype)
    weights = (q.new_empty(0 if w is None else w.shape[0], dtype=acc) for w in (q_weight, k_weight))
    return q.new_empty(q.shape), q.new_empty(k.shape), q.new_empty(k.shape), *weights


def _fake_merge_backward(do, dlse, o_a, lse_a, o_b, lse_b, *_, **__):
    return tuple(x.new_empty(x.shape) for x in (o_a, lse_a, o_b, lse_b))


torch.library.register_fake("diffmas::inject", lambda q, *_, **__: q.new_empty(q.shape))
torch.library.register_fake("diffmas::inject_backward", _fake_inject_backward)
torch.library.register_fake("diffmas::cross_attention", _fake_states)
torch.library.register_fake("diffmas::cross_attention_backward", _fake_dq)
torch.library.register_fake("diffmas::merge_states", _fake_states)
torch.library.register_fake("diffmas::merge_states_backward", _fake_merge_backward)
torch.library.register_fake("diffmas::reposition", lambda *_, **__: None)
torch.library.register_fake("diffmas::reposition_backward", lambda *_, **__: None)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.backend = inputs[4]


def _merge_backward(ctx, do, dlse):
    return *torch.ops.diffmas.merge_states_backward(do, dlse, *ctx.saved_tensors, ctx.backend), None


torch.library.register_autograd("diffmas::merge_states", _merge_backward, setup_context=_merge_setup)

# ---- checked entry points --------------------------------------------------------------------------------------------


def inject(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None, slots: Tensor,
    k_pool: Tensor, v_pool: Tensor, *, q_weight: Tensor | None = None, k_weight: Tensor | None = None,
    eps: float = 1e-6, interleaved: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    """Per-head RMSNorm, RoPE and the K/V scatter of n packed tokens, in one op.

    q [n, Hq, D]; k, v [n, Hkv, D]; cos, sin [n, Dr] (Dr <= D even, Hugging Face's tables) or None for no rotation;
    slots [n] (int64 or int32), the pool row of each token, -1 for a token that is not stored; k_pool, v_pool [R, Hkv, D],
    mutated; q_weight, k_weight [D] or None for no norm. Returns the rotated q [n, Hq, D].

    Raises ValueError naming the argument for shapes, dtypes, devices and (on the CPU) rows that do not fit.
    """
    n, Hq, D = check_query(q)
    check_shape("k", k, (n, "Hkv", D))
    check_shape("v", v, tuple(k.shape))
    expect(k.shape[1] > 0 and Hq % k.shape[1] == 0, "k", f"a number of heads that divides {Hq}", k.shape[1])
    expect((cos is None) == (sin is None), "sin", "cos and sin together", "only one of them")
    if cos is not None:
        check_shape("cos", cos, (n, "Dr"))
        check_shape("sin", sin, tuple(cos.shape))
        expect(cos.shape[1] <= D and cos.shape[1] % 2 == 0, "cos", f"an even Dr <= {D}", cos.shape[1])
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check_shape(name, weight, (D,))
    check_pools(k_pool, v_pool, k.shape[1], D)
    check_floats(q, q=q, k=k, v=v, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, k_pool=k_pool, v_pool=v_pool)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        refuse("k, v", f"the dtype of q, {q.dtype}", f"{k.dtype}, {v.dtype}")
    check_shape("slots", slots, (n,))
    slots = check_index("slots", slots, q, -1, k_pool.shape[0])
    check_distinct("slots", slots)
    expect(0 <= eps <= FLOAT_MAX, "eps", "a finite float32 >= 0", eps)
    cos, sin = narrowed(cos, q), narrowed(sin, q)
    check_written(k_pool, v_pool, q=q, k=k, v=v, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    return torch.ops.diffmas.inject(
        q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, check_backend(backend)
    )


def cross_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, q_indptr: Tensor, seg_indptr: Tensor, seg_start: Tensor,
    seg_len: Tensor, seg_offset: Tensor | None = None, inv_freq: Tensor | None = None, *, scale: float | None = None,
    causal: bool = True, interleaved: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of n packed queries of B sequences, each over its own view of the pools, without a concatenation.

    q [n, Hq, D], rotated; k_pool, v_pool [R, Hkv, D]; q_indptr, seg_indptr [B + 1]: where each sequence's queries and
    segments begin; seg_start, seg_len [S]: pool rows of each segment in the order they are read, at least one, disjoint
    within a sequence; seg_offset [S]: read the segment as if its keys stood that many positions later (needs inv_freq
    [Dr/2]); all of these int64 or int32; scale defaults to D ** -0.5. Causal is bottom-right aligned: the newest tokens of
    a view are its queries' own.
    Returns o [n, Hq, D] and lse [n, Hq] (natural log, float32). Nothing visible: o = 0, lse = -inf.

    Raises ValueError naming the argument for shapes, dtypes, devices and (on the CPU) rows that do not fit.
    """
    n, Hq, D = check_query(q)
    check_pools(k_pool, v_pool, "Hkv", D)
    Hkv = k_pool.shape[1]
    expect(Hkv > 0 and Hq % Hkv == 0, "k_pool", f"a number of heads that divides {Hq}", Hkv)
    check_floats(q, q=q, k_pool=k_pool, v_pool=v_pool, inv_freq=inv_freq)
    expect(seg_start.dim() == 1, "seg_start", "a 1-D int64 or int32 tensor", f"{seg_start.dtype} {list(seg_start.shape)}")
    S = seg_start.shape[0]
    check_shape("seg_indptr", seg_indptr, tuple(q_indptr.shape))
    q_indptr, seg_indptr = check_indptr("q_indptr", q_indptr, q, n), check_indptr("seg_indptr", seg_indptr, q, S)
    check_shape("seg_len", seg_len, (S,))
    seg_start, seg_len = check_index("seg_start", seg_start, q, 0), check_index("seg_len", seg_len, q)
    check_segments(seg_indptr, seg_start, seg_len, k_pool.shape[0])
    scale = D**-0.5 if scale is None else scale
    expect(abs(scale) <= FLOAT_MAX, "scale", "a finite float32", scale)
    if seg_offset is not None:
        check_shape("seg_offset", seg_offset, (S,))
        seg_offset = check_index("seg_offset", seg_offset, q)
        expect(inv_freq is not None, "inv_freq", "the rotary frequencies that seg_offset needs", None)
    if inv_freq is not None:
        check_shape("inv_freq", inv_freq, ("Dr/2",))
        expect(2 * inv_freq.shape[0] <= D, "inv_freq", f"at most {D // 2} frequencies", inv_freq.shape[0])
    return torch.ops.diffmas.cross_attention(
        q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, frequencies_of(inv_freq, q),
        scale, causal, interleaved, check_backend(backend),
    )  # fmt: skip


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The attention state (o [n, H, D], lse [n, H]) over the union of two disjoint views; differentiable in all four.

    Associative and commutative; (0, -inf) is the neutral element. Raises ValueError naming the argument.
    """
    check_shape("o_a", o_a, ("n", "H", "D"))
    check_shape("o_b", o_b, tuple(o_a.shape))
    check_shape("lse_a", lse_a, tuple(o_a.shape[:2]))
    check_shape("lse_b", lse_b, tuple(o_a.shape[:2]))
    check_floats(o_a, o_a=o_a, lse_a=lse_a, o_b=o_b, lse_b=lse_b)
    expect(0 < o_a.shape[2] <= MAX_HEAD_DIM, "o_a", f"a head size from 1 to {MAX_HEAD_DIM}", o_a.shape[2])
    acc = reference.accumulator(o_a.dtype)
    lse_a, lse_b = lse_a.to(acc), lse_b.to(acc)
    return torch.ops.diffmas.merge_states(o_a, lse_a, o_b, lse_b, check_backend(backend))


def reposition(
    src: Tensor, dst: Tensor, offset: Tensor, inv_freq: Tensor, k_pool: Tensor, v_pool: Tensor, *,
    interleaved: bool = False, backend: str = "auto",
) -> None:  # fmt: skip
    """Copies pool rows `src` to rows `dst`, their keys rotated on by `offset` positions.

    src, dst, offset [m] int64 or int32 (dst distinct, none of them also in src); inv_freq [Dr/2]: a pure rotation, without the
    attention factor that some models scale cos and sin by; k_pool, v_pool [R, Hkv, D], mutated.
    Raises ValueError naming the argument.
    """
    check_pools(k_pool, v_pool, "Hkv", "D")
    check_floats(k_pool, k_pool=k_pool, v_pool=v_pool, inv_freq=inv_freq)
    _, Hkv, D = k_pool.shape
    expect(
        Hkv > 0 and 0 < D <= MAX_HEAD_DIM, "k_pool", f"at least one head of 1 to {MAX_HEAD_DIM} dimensions", list(k_pool.shape)
    )
    R = k_pool.shape[0]
    src = check_index("src", src, k_pool, 0, R)
    for name, x in (("dst", dst), ("offset", offset)):
        check_shape(name, x, tuple(src.shape))
    dst, offset = check_index("dst", dst, k_pool, 0, R), check_index("offset", offset, k_pool)
    check_distinct("dst", dst)
    if dst.device.type == "cpu":
        expect(not np.isin(values_of(dst), values_of(src)).any(), "dst", "rows that are not read", "rows that are also in src")
    check_shape("inv_freq", inv_freq, ("Dr/2",))
    expect(2 * inv_freq.shape[0] <= D, "inv_freq", f"at most {D // 2} frequencies", inv_freq.shape[0])
    check_written(k_pool, v_pool)
    inv_freq = frequencies_of(inv_freq, k_pool)
    torch.ops.diffmas.reposition(src, dst, offset, inv_freq, interleaved, k_pool, v_pool, check_backend(backend))
