"""The public functions: every argument is checked, then the registered op runs.

Inside the package, indices that were built and checked once per forward pass go to `diffmas.ops.register.call` directly.
"""

import numpy as np
import torch
from torch import Tensor

from diffmas.ops import reference
from diffmas.ops.backends import check_backend
from diffmas.ops.checks import (
    FLOAT_MAX,
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

__all__ = ["cross_attention", "inject", "merge_states", "reposition"]


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
