"""The public functions: every argument is checked, then the registered op runs.

Inside the package, indices that were built and checked once per forward pass go to `diffmas.ops.register.call` directly.
"""

import numpy as np
import torch
from torch import Tensor

from diffmas.ops import reference
from diffmas.ops.backends import check_backend, check_reads
from diffmas.ops.checks import (
    FLOAT_MAX,
    MAX_HEAD_DIM,
    check_distinct,
    check_floats,
    check_index,
    check_indptr,
    check_pools,
    check_quantized,
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
    """Per-head RMSNorm, RoPE (Su et al., arXiv 2104.09864) and the write of K and V to their pools, for n packed tokens.

    q [n, Hq, D]; k, v [n, Hkv, D]: projections, Hkv divides Hq.
    cos, sin [n, Dr]: Hugging Face's rotary tables of each token's position, Dr <= D even; None for no rotation.
    slots [n] int64 or int32: the pool row of each token; -1 for a token that is not stored.
    k_pool, v_pool [R, Hkv, D]: mutated.
    q_weight, k_weight [D]: of the norms; None for no norm. eps: of the norms.
    interleaved: rotate neighbouring dimensions, instead of the halves of the first Dr.

    Returns the normed and rotated q, [n, Hq, D]. Raises ValueError naming the argument for shapes, dtypes, devices and (on the
    CPU) rows that do not fit.

        >>> q, k, v = torch.randn(2, 4, 8), torch.randn(2, 1, 8), torch.randn(2, 1, 8)
        >>> k_pool, v_pool = torch.zeros(16, 1, 8), torch.zeros(16, 1, 8)
        >>> inject(q, k, v, None, None, torch.tensor([5, 6]), k_pool, v_pool).shape
        torch.Size([2, 4, 8])
        >>> torch.equal(v_pool[5:7], v)
        True
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
    causal: bool = True, interleaved: bool = False, k_scale: Tensor | None = None, v_scale: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of n packed queries of B sequences, each over its own view of the pools, read in place.

    q [n, Hq, D]: rotated, as `inject` returns it. k_pool, v_pool [R, Hkv, D].
    q_indptr, seg_indptr [B + 1]: where each sequence's queries and segments begin.
    seg_start, seg_len [S]: the first pool row and the length (at least 1) of each segment, in the order of reading; disjoint
        within a sequence.
    seg_offset [S]: reads a segment as if its keys stood that many positions later; needs inv_freq [Dr/2], the rotary
        frequencies. Index tensors are int64 or int32.
    scale: of the scores, by default D ** -0.5.
    causal: the queries are the last tokens of their view, and see no token behind themselves.
    interleaved: as in `inject`.
    k_scale, v_scale [R, Hkv] float32: the pools are payloads of 8 bits, int8 or float8_e4m3fn without NaN, and a row is that
        many times as large (`quantize`). Every query sees such rows: causal must be False.

    Returns o [n, Hq, D] and lse [n, Hq], the natural log of the softmax's denominator, in float32 (float64 for float64);
    where a query sees nothing, o = 0 and lse = -inf. Raises ValueError naming the argument for shapes, dtypes, devices and
    (on the CPU) rows that do not fit.

    One sequence with two new tokens, which reads rows 0 to 3 and its own rows 8 and 9:

        >>> q, k_pool, v_pool = torch.randn(2, 4, 8), torch.randn(16, 1, 8), torch.randn(16, 1, 8)
        >>> q_indptr, seg_indptr = torch.tensor([0, 2]), torch.tensor([0, 2])
        >>> seg_start, seg_len = torch.tensor([0, 8]), torch.tensor([4, 2])
        >>> o, lse = cross_attention(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len)
        >>> o.shape, lse.shape
        (torch.Size([2, 4, 8]), torch.Size([2, 4]))
    """
    n, Hq, D = check_query(q)
    check_pools(k_pool, v_pool, "Hkv", D)
    Hkv = k_pool.shape[1]
    expect(Hkv > 0 and Hq % Hkv == 0, "k_pool", f"a number of heads that divides {Hq}", Hkv)
    quantized = k_scale is not None or v_scale is not None
    if quantized:
        check_floats(q, q=q, inv_freq=inv_freq)
        check_quantized(q, k_pool, v_pool, k_scale, v_scale)
        expect(not causal, "causal", "False with quantised rows, which every query sees", causal)
    else:
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
    view = q_indptr, seg_indptr, seg_start, seg_len, seg_offset, frequencies_of(inv_freq, q)
    if quantized:
        check_reads(backend)
        return torch.ops.diffmas.cross_attention_quantized(
            q, k_pool, v_pool, k_scale, v_scale, *view, scale, interleaved, backend
        )
    return torch.ops.diffmas.cross_attention(q, k_pool, v_pool, *view, scale, causal, interleaved, check_backend(backend))


def merge_states(o_a: Tensor, lse_a: Tensor, o_b: Tensor, lse_b: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint views, from the results over each; differentiable in all four.

    o_a, o_b [n, H, D]; lse_a, lse_b [n, H]: as `cross_attention` returns them. Returns o and lse of the union. Associative and
    commutative, with (0, -inf) as the neutral element (FlashInfer, arXiv 2501.01005). Raises ValueError naming the argument
    that does not fit.

        >>> o, lse = torch.randn(2, 4, 8), torch.randn(2, 4)
        >>> merged, _ = merge_states(o, lse, torch.zeros_like(o), torch.full_like(lse, -torch.inf))
        >>> torch.allclose(merged, o)
        True
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
    """Copies pool rows, the keys rotated by `offset` positions more.

    src, dst [m] int64 or int32: rows to read and to write; dst distinct, and none of them in src.
    offset [m] int64 or int32: positions, may be negative.
    inv_freq [Dr/2]: rotary frequencies; a pure rotation, without the attention factor by which some models scale cos and sin.
    k_pool, v_pool [R, Hkv, D]: mutated.
    interleaved: as in `inject`.

    Raises ValueError naming the argument that does not fit.

        >>> k_pool, v_pool = torch.randn(16, 1, 8), torch.randn(16, 1, 8)
        >>> inv_freq = 10_000 ** (-torch.arange(4) / 4)
        >>> reposition(torch.tensor([0]), torch.tensor([9]), torch.tensor([3]), inv_freq, k_pool, v_pool)
        >>> torch.equal(v_pool[9], v_pool[0]), torch.equal(k_pool[9], k_pool[0])
        (True, False)
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
