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

__all__ = ["BACKENDS", "available", "inject", "cross_attention", "merge_states", "reposition"]

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
FLOAT_MAX = torch.finfo(torch.float32).max
MAX_HEAD_DIM = 512

# ---- schemas ---------------------------------------------------------------------------------------------------------

ROPE = "Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved"
VIEW = (
    "Tensor q_indptr, Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Tensor? seg_shift, Tensor? inv_freq, "
    "float scale, bool causal, bool interleaved"
)
MOVE = "Tensor src, Tensor dst, Tensor shift, Tensor inv_freq, bool interleaved"
POOLS, GRADS = "Tensor(a!) k_pool, Tensor(b!) v_pool", "Tensor(a!) dk_pool, Tensor(b!) dv_pool"
SCHEMAS = {
    "inject": f"(Tensor q, Tensor k, Tensor v, {ROPE}, {POOLS}, str backend='auto') -> Tensor",
    "inject_backward": f"(Tensor dq_rot, Tensor q, Tensor k, {ROPE}, {GRADS}, str backend='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cross_attention": f"(Tensor q, Tensor k_pool, Tensor v_pool, {VIEW}, str backend='auto') -> (Tensor, Tensor)",
    "cross_attention_backward": "(Tensor do, Tensor? dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, "
    f"Tensor v_pool, {VIEW}, {GRADS}, Tensor? newest=None, bool want_dq=True, str backend='auto') -> Tensor",
    "merge_states": "(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, str backend='auto') -> (Tensor, Tensor)",
    "merge_states_backward": "(Tensor do, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, Tensor o, "
    "Tensor lse, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor)",
    "reposition": f"({MOVE}, {POOLS}, str backend='auto') -> ()",
    "reposition_backward": f"({MOVE}, {GRADS}, str backend='auto') -> ()",
}

# ---- backends --------------------------------------------------------------------------------------------------------


class Backend:
    """A set of op implementations, and the devices, dtypes and head sizes that it serves."""

    interpreted = False  # too slow for "auto"

    def __init__(self, name, ops, devices, dtypes, why_missing):
        self.name, self.ops, self.devices, self.dtypes, self.max_head_dim = name, ops, devices, dtypes, math.inf
        self.why_missing = why_missing  # None when it is usable

    def has(self, op: str, head_dim: int) -> bool:
        return head_dim <= self.max_head_dim and hasattr(self.ops, op)

    def serves(self, op: str, device: str, dtype: torch.dtype, head_dim: int) -> bool:
        if (self.devices is not None and device not in self.devices) or (self.dtypes is not None and dtype not in self.dtypes):
            return False
        return self.why_missing is None and self.has(op, head_dim)


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


class CudaBackend(Backend):
    """The CUDA kernels of the extension. Devices are looked for when it is first needed."""

    def __init__(self):
        self.name, self.ops, self.devices, self.dtypes = "cuda", torch.ops.diffmas_cuda, ("cuda",), FLOATS
        self.max_head_dim = MAX_HEAD_DIM

    @functools.cached_property
    def why_missing(self) -> str | None:
        if _extension.cuda_error:
            return _extension.cuda_error
        if not torch.cuda.is_available():
            return "there is no CUDA device"
        # A target's code runs on its generation's later members too, unless it ends with "a".
        for major, minor in map(torch.cuda.get_device_capability, range(torch.cuda.device_count())):
            if not any(t == f"{major}{minor}a" or (t.isdecimal() and t[:-1] == str(major)) for t in _extension.cuda_targets):
                return f"it has no code for compute capability {major}.{minor}"
        return None


# In order of preference. cuda has not been measured against triton on a GPU yet: it serves what triton does not, or by name.
BACKENDS = {
    "triton": TritonBackend(),
    "cuda": CudaBackend(),
    "cpu": Backend("cpu", torch.ops.diffmas_cpu, ("cpu",), FLOATS, _extension.error),
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
    have, an op or a head size, runs on the reference."""
    return getattr(_choose(op, lead.device, lead.dtype, lead.shape[-1], backend), op)


@functools.cache  # on every call of every op: looked up, not searched
def _choose(op: str, device: torch.device, dtype: torch.dtype, head_dim: int, backend: str):
    name = AUTO if backend == "auto" else backend
    if name == "auto":
        return next(b for b in BACKENDS.values() if not b.interpreted and b.serves(op, device.type, dtype, head_dim)).ops
    chosen = BACKENDS[check_backend(name)]
    if not chosen.has(op, head_dim):
        return reference
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

    _library.define(name + SCHEMAS[name])
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


def _refuse(argument: str, expected: str, got) -> None:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _expect(condition: bool, argument: str, expected: str, got) -> None:
    if not condition:
        _refuse(argument, expected, got)


def _check_shape(name: str, x: Tensor, shape: tuple) -> None:
    """`shape` holds sizes, or names for sizes that are free."""
    if x.shape != shape:
        fits = x.dim() == len(shape) and all(isinstance(want, str) or want == have for want, have in zip(shape, x.shape))
        _expect(fits, name, f"shape [{', '.join(map(str, shape))}]", f"{list(x.shape)}")


def _check_floats(like: Tensor, **tensors: Tensor | None) -> None:
    device, dtype = like.device, like.dtype
    for name, x in tensors.items():
        if x is None:
            continue
        _expect(x.dtype in (*FLOATS, torch.float64), name, "a floating-point tensor of 16, 32 or 64 bits", x.dtype)
        if x.device != device:
            _refuse(name, f"a tensor on {device}", x.device)
        if (x.dtype == torch.float64) != (dtype == torch.float64) and name not in ("inv_freq", "cos", "sin"):
            _refuse(name, f"a dtype that goes with {dtype}", x.dtype)
        if x.dim() and x.shape[-1] > 1 and x.stride(-1) != 1:
            _refuse(name, "a last stride of 1", x.stride())


def _values(x: Tensor) -> np.ndarray | None:
    """The values of an index, where looking at them needs no device sync: on the CPU."""
    return x.numpy() if x.device.type == "cpu" else None


def _index(name: str, x: Tensor, like: Tensor, low: int | None = None, high: int | None = None) -> Tensor:
    """`x` as the kernels read it, contiguous int64."""
    if x.dtype not in (torch.int64, torch.int32) or x.dim() != 1:
        _refuse(name, "a 1-D int64 or int32 tensor", f"{x.dtype} {list(x.shape)}")
    if x.device != like.device:
        _refuse(name, f"a tensor on {like.device}", x.device)
    values = _values(x)
    if values is not None and values.size:
        _expect(low is None or values.min() >= low, name, f"values >= {low}", values.min())
        _expect(high is None or values.max() < high, name, f"values < {high}", values.max())
    return x.long().contiguous()


def _indptr(name: str, x: Tensor, like: Tensor, end: int) -> Tensor:
    x = _index(name, x, like)
    _expect(x.numel() >= 1, name, "at least one entry", 0)
    values = _values(x)
    if values is not None and not (values[0] == 0 and values[-1] == end and (values[1:] >= values[:-1]).all()):
        _refuse(name, f"values that rise from 0 to {end}", values)
    return x


def _check_distinct(name: str, x: Tensor) -> None:
    """Two tokens in one row would make the result depend on their order."""
    values = _values(x)
    if values is None or values.size < 2:
        return
    used = np.sort(values[values >= 0])
    again = used[1:] == used[:-1]
    if again.any():
        _refuse(name, "distinct rows", f"repeated ones, {used[1:][again][0]} first")


def _check_segments(seg_indptr: Tensor, seg_start: Tensor, seg_len: Tensor, rows: int) -> None:
    """Inside the pool, none empty, disjoint within a sequence: a row read twice would get its gradient twice at once."""
    indptr, start, length = map(_values, (seg_indptr, seg_start, seg_len))
    if start is None or not start.size:
        return
    _expect(length.min() >= 1, "seg_len", "lengths >= 1", length.min())
    if (start > rows - length).any():
        _refuse("seg_start + seg_len", f"rows up to {rows}", (start + length).max())
    if start.size > 1:
        sequence = np.repeat(np.arange(indptr.size - 1), np.diff(indptr))
        order = np.lexsort((start, sequence))
        sequence, start, end = sequence[order], start[order], (start + length)[order]
        shared = (start[1:] < end[:-1]) & (sequence[1:] == sequence[:-1])
        if shared.any():
            _refuse("seg_start", "disjoint segments within a sequence", f"row {start[1:][shared][0]} in two")


class _Box:
    """Where a [rows, heads, D] tensor lies: sizes and strides with the wider one first, addresses in bytes."""

    def __init__(self, x: Tensor):
        strides = x.stride()
        self.sizes, self.strides = x.shape[:2], strides[:2]
        if strides[1] > strides[0]:
            self.sizes, self.strides = self.sizes[::-1], self.strides[::-1]
        self.d, self.element, self.empty = x.shape[2], x.element_size(), not x.numel()
        self.inner = (self.sizes[1] - 1) * self.strides[1] + self.d
        self.begin = x.data_ptr()
        self.end = self.begin + ((self.sizes[0] - 1) * self.strides[0] + self.inner) * self.element

    @property
    def overlaps_itself(self) -> bool:
        (rows, heads), (wide, narrow) = self.sizes, self.strides
        return not self.empty and ((heads > 1 and narrow < self.d) or (rows > 1 and wide < self.inner))

    def overlaps(self, other: "_Box") -> bool:
        """Exact for one layout (K and V interleaved in one allocation); another layout inside the range counts as shared."""
        if self.empty or other.empty or self.begin >= other.end or other.begin >= self.end:
            return False
        delta, part = divmod(other.begin - self.begin, self.element)
        if self.strides != other.strides or self.element != other.element or part:
            return True
        rests = [delta]
        for stride, a, b in zip(self.strides, self.sizes, other.sizes):
            if stride and max(a, b) > 1:  # up to two steps of this stride come near
                rests = [r - step * stride for r in rests for step in (r // stride, r // stride + 1) if abs(step) < max(a, b)]
        return any(abs(r) < max(self.d, other.d) for r in rests)


def _check_written(k_pool: Tensor, v_pool: Tensor, **read: Tensor | None) -> None:
    """No element of the pools may be written twice, or be read under another name."""
    if k_pool.device.type == "meta":
        return
    boxes = {"k_pool": _Box(k_pool), "v_pool": _Box(v_pool)}
    for name, box in boxes.items():
        _expect(
            not box.overlaps_itself, name, "rows and heads that do not overlap", f"strides {box.strides[0]}, {box.strides[1]}"
        )
    _expect(not boxes["k_pool"].overlaps(boxes["v_pool"]), "k_pool", "memory of its own", "a tensor that overlaps v_pool")
    for other, x in read.items():
        if x is None:
            continue
        there = _Box(x if x.dim() == 3 else x.unsqueeze(1) if x.dim() == 2 else x[None, None])
        for name, box in boxes.items():
            if box.overlaps(there):
                _refuse(name, "memory of its own", f"a tensor that overlaps {other}")


def _check_query(q: Tensor) -> tuple[int, int, int]:
    _check_shape("q", q, ("n", "Hq", "D"))
    _expect(q.shape[1] > 0 and q.shape[2] > 0, "q", "at least one head of at least one dimension", list(q.shape))
    _expect(q.shape[2] <= MAX_HEAD_DIM, "q", f"a head size up to {MAX_HEAD_DIM}", q.shape[2])
    return tuple(q.shape)


def _check_pools(k_pool: Tensor, v_pool: Tensor, heads: int | str, D: int | str) -> None:
    _check_shape("k_pool", k_pool, ("R", heads, D))
    _check_shape("v_pool", v_pool, tuple(k_pool.shape))
    if k_pool.dtype != v_pool.dtype:
        _refuse("v_pool", f"the dtype of k_pool, {k_pool.dtype}", v_pool.dtype)


def _narrowed(x: Tensor | None, like: Tensor) -> Tensor | None:
    """Rotary tables are float64 for the float64 ops only."""
    return x.float() if x is not None and x.dtype == torch.float64 and like.dtype != torch.float64 else x


def _frequencies(x: Tensor | None, like: Tensor) -> Tensor | None:
    """As the kernels read them: contiguous, in the accumulation dtype."""
    return None if x is None else x.to(reference.accumulator(like.dtype)).contiguous()


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
    n, Hq, D = _check_query(q)
    _check_shape("k", k, (n, "Hkv", D))
    _check_shape("v", v, tuple(k.shape))
    _expect(k.shape[1] > 0 and Hq % k.shape[1] == 0, "k", f"a number of heads that divides {Hq}", k.shape[1])
    _expect((cos is None) == (sin is None), "sin", "cos and sin together", "only one of them")
    if cos is not None:
        _check_shape("cos", cos, (n, "Dr"))
        _check_shape("sin", sin, tuple(cos.shape))
        _expect(cos.shape[1] <= D and cos.shape[1] % 2 == 0, "cos", f"an even Dr <= {D}", cos.shape[1])
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            _check_shape(name, weight, (D,))
    _check_pools(k_pool, v_pool, k.shape[1], D)
    _check_floats(q, q=q, k=k, v=v, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight, k_pool=k_pool, v_pool=v_pool)
    if k.dtype != q.dtype or v.dtype != q.dtype:
        _refuse("k, v", f"the dtype of q, {q.dtype}", f"{k.dtype}, {v.dtype}")
    _check_shape("slots", slots, (n,))
    slots = _index("slots", slots, q, -1, k_pool.shape[0])
    _check_distinct("slots", slots)
    _expect(0 <= eps <= FLOAT_MAX, "eps", "a finite float32 >= 0", eps)
    cos, sin = _narrowed(cos, q), _narrowed(sin, q)
    _check_written(k_pool, v_pool, q=q, k=k, v=v, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    return torch.ops.diffmas.inject(
        q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, check_backend(backend)
    )


def cross_attention(
    q: Tensor, k_pool: Tensor, v_pool: Tensor, q_indptr: Tensor, seg_indptr: Tensor, seg_start: Tensor,
    seg_len: Tensor, seg_shift: Tensor | None = None, inv_freq: Tensor | None = None, *, scale: float | None = None,
    causal: bool = True, interleaved: bool = False, backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of n packed queries of B sequences, each over its own view of the pools, without a concatenation.

    q [n, Hq, D], rotated; k_pool, v_pool [R, Hkv, D]; q_indptr, seg_indptr [B + 1]: where each sequence's queries and
    segments begin; seg_start, seg_len [S]: pool rows of each segment in the order they are read, at least one, disjoint
    within a sequence; seg_shift [S]: read the segment as if its keys stood that many positions later (needs inv_freq
    [Dr/2]); all of these int64 or int32; scale defaults to D ** -0.5. Causal is bottom-right aligned: the newest tokens of
    a view are its queries' own.
    Returns o [n, Hq, D] and lse [n, Hq] (natural log, float32). Nothing visible: o = 0, lse = -inf.

    Raises ValueError naming the argument for shapes, dtypes, devices and (on the CPU) rows that do not fit.
    """
    n, Hq, D = _check_query(q)
    _check_pools(k_pool, v_pool, "Hkv", D)
    Hkv = k_pool.shape[1]
    _expect(Hkv > 0 and Hq % Hkv == 0, "k_pool", f"a number of heads that divides {Hq}", Hkv)
    _check_floats(q, q=q, k_pool=k_pool, v_pool=v_pool, inv_freq=inv_freq)
    _expect(seg_start.dim() == 1, "seg_start", "a 1-D int64 or int32 tensor", f"{seg_start.dtype} {list(seg_start.shape)}")
    S = seg_start.shape[0]
    _check_shape("seg_indptr", seg_indptr, tuple(q_indptr.shape))
    q_indptr, seg_indptr = _indptr("q_indptr", q_indptr, q, n), _indptr("seg_indptr", seg_indptr, q, S)
    _check_shape("seg_len", seg_len, (S,))
    seg_start, seg_len = _index("seg_start", seg_start, q, 0), _index("seg_len", seg_len, q)
    _check_segments(seg_indptr, seg_start, seg_len, k_pool.shape[0])
    scale = D**-0.5 if scale is None else scale
    _expect(abs(scale) <= FLOAT_MAX, "scale", "a finite float32", scale)
    if seg_shift is not None:
        _check_shape("seg_shift", seg_shift, (S,))
        seg_shift = _index("seg_shift", seg_shift, q)
        _expect(inv_freq is not None, "inv_freq", "the rotary frequencies that seg_shift needs", None)
    if inv_freq is not None:
        _check_shape("inv_freq", inv_freq, ("Dr/2",))
        _expect(2 * inv_freq.shape[0] <= D, "inv_freq", f"at most {D // 2} frequencies", inv_freq.shape[0])
    return torch.ops.diffmas.cross_attention(
        q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, _frequencies(inv_freq, q),
        scale, causal, interleaved, check_backend(backend),
    )  # fmt: skip


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """The attention state (o [n, H, D], lse [n, H]) over the union of two disjoint views; differentiable in all four.

    Associative and commutative; (0, -inf) is the neutral element. Raises ValueError naming the argument.
    """
    _check_shape("o_a", o_a, ("n", "H", "D"))
    _check_shape("o_b", o_b, tuple(o_a.shape))
    _check_shape("lse_a", lse_a, tuple(o_a.shape[:2]))
    _check_shape("lse_b", lse_b, tuple(o_a.shape[:2]))
    _check_floats(o_a, o_a=o_a, lse_a=lse_a, o_b=o_b, lse_b=lse_b)
    _expect(0 < o_a.shape[2] <= MAX_HEAD_DIM, "o_a", f"a head size from 1 to {MAX_HEAD_DIM}", o_a.shape[2])
    acc = reference.accumulator(o_a.dtype)
    lse_a, lse_b = lse_a.to(acc), lse_b.to(acc)
    return torch.ops.diffmas.merge_states(o_a, lse_a, o_b, lse_b, check_backend(backend))


def reposition(
    src: Tensor, dst: Tensor, shift: Tensor, inv_freq: Tensor, k_pool: Tensor, v_pool: Tensor, *,
    interleaved: bool = False, backend: str = "auto",
) -> None:  # fmt: skip
    """Copies pool rows `src` to rows `dst`, their keys rotated on by `shift` positions.

    src, dst, shift [m] int64 or int32 (dst distinct, none of them also in src); inv_freq [Dr/2]: a pure rotation, without the
    attention factor that some models scale cos and sin by; k_pool, v_pool [R, Hkv, D], mutated.
    Raises ValueError naming the argument.
    """
    _check_pools(k_pool, v_pool, "Hkv", "D")
    _check_floats(k_pool, k_pool=k_pool, v_pool=v_pool, inv_freq=inv_freq)
    _, Hkv, D = k_pool.shape
    _expect(
        Hkv > 0 and 0 < D <= MAX_HEAD_DIM, "k_pool", f"at least one head of 1 to {MAX_HEAD_DIM} dimensions", list(k_pool.shape)
    )
    R = k_pool.shape[0]
    src = _index("src", src, k_pool, 0, R)
    for name, x in (("dst", dst), ("shift", shift)):
        _check_shape(name, x, tuple(src.shape))
    dst, shift = _index("dst", dst, k_pool, 0, R), _index("shift", shift, k_pool)
    _check_distinct("dst", dst)
    if dst.device.type == "cpu":
        _expect(not np.isin(_values(dst), _values(src)).any(), "dst", "rows that are not read", "rows that are also in src")
    _check_shape("inv_freq", inv_freq, ("Dr/2",))
    _expect(2 * inv_freq.shape[0] <= D, "inv_freq", f"at most {D // 2} frequencies", inv_freq.shape[0])
    _check_written(k_pool, v_pool)
    inv_freq = _frequencies(inv_freq, k_pool)
    torch.ops.diffmas.reposition(src, dst, shift, inv_freq, interleaved, k_pool, v_pool, check_backend(backend))
