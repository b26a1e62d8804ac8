"""Peers that are compiled or come from other libraries: FlexAttention, torch's varlen_attn, FlashAttention-4, FlashInfer,
xformers."""

import importlib
import inspect

import torch

from diffmas.benchmarks import ours
from diffmas.benchmarks.attention.problem import Inputs, Packed
from diffmas.benchmarks.attention.sdpa import torch_peer
from diffmas.benchmarks.measure import Cannot, Problem, Senseless, Trial

__all__ = ["flash_attn_4", "flashinfer", "flex", "flex_flash", "varlen", "xformers"]


def varlen(p: Problem) -> Trial:
    """torch's own attention of packed sequences, which came with torch 2.10; its options have changed since."""
    if not ours.on_gpu():
        raise Senseless
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        raise Cannot("this torch has no varlen_attn") from None
    y: Packed = p.inputs.packed
    options = dict(window_size=(-1, 0), is_causal=True, enable_gqa=True, scale=p.inputs.scale)  # a window that is causal
    options = {name: x for name, x in options.items() if name in inspect.signature(varlen_attn).parameters}
    index = *y.indptr(), *map(max, y.lengths)
    return torch_peer(lambda y, *qkv: varlen_attn(*qkv, *index, **options), layout="packed")(p)


def _flex(p: Problem, **options) -> Trial:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    x: Inputs = p.inputs
    y = x.padded
    L, N = y.q.shape[2], y.k.shape[2]
    lengths = torch.tensor([len(r) for r in x.rows], device=y.q.device)
    even = all(len(r) == N for r in x.rows)

    def visible(b, h, i, j):
        below = (j - (N - L)) <= i
        return below if even else below & (j >= N - lengths[b])

    try:
        mask = create_block_mask(visible, len(x.queries), None, L, N, device=str(y.q.device))
        torch._dynamo.config.fail_on_recompile_limit_hit = True  # or the fallback runs in silence
        torch._functorch.config.donated_buffer = False  # the graph of the forward is kept
        attend = torch.compile(flex_attention, dynamic=False)
        options = dict(block_mask=mask, scale=x.scale, enable_gqa=y.q.shape[1] != y.k.shape[1]) | options
        peer = torch_peer(lambda y, *qkv: attend(*qkv, **options))
        peer(p).call()  # compiles, for leaves and in the mode that are timed; its buffers have a gradient in them
        return peer(p)
    except Exception as reason:  # the compiler's errors are of many kinds; any of them means: does not run here
        raise Cannot(f"FlexAttention does not run here: {type(reason).__name__}: {str(reason).splitlines()[0][:120]}") from None


def flex(p: Problem) -> Trial:
    """FlexAttention, compiled, with a block mask; no backward on a CPU."""
    if p.inputs.q.device.type == "cpu" and p.case.phase != "forward":
        raise Cannot("FlexAttention has no backward on a CPU")
    if p.inputs.q.device.type == "cpu" and not (p.case.quick and p.case.heads == "16/8" and p.case.dtype == "float32"):
        raise Senseless("compiled for one or two shapes of each regime")
    return _flex(p)


def flex_flash(p: Problem) -> Trial:
    """FlexAttention by the kernels of FlashAttention-4, which must be installed."""
    if not ours.on_gpu() or p.case.dtype == "float32":
        raise Senseless
    _installed("flash_attn.cute")
    return _flex(p, kernel_options={"BACKEND": "FLASH"})


def _installed(name: str):
    try:
        return importlib.import_module(name)
    except ImportError:
        raise Cannot(f"{name} is not installed") from None


def flash_attn_4(p: Problem) -> Trial:
    """FlashAttention-4 itself, of packed sequences; causal from the bottom right, as ours."""
    if not ours.on_gpu() or p.case.dtype == "float32":
        raise Senseless
    attend = _installed("flash_attn.cute").flash_attn_varlen_func
    y: Packed = p.inputs.packed
    (queries, keys), longest = y.indptr(), tuple(map(max, y.lengths))
    options = dict(cu_seqlens_q=queries, cu_seqlens_k=keys, max_seqlen_q=longest[0], max_seqlen_k=longest[1])
    options |= dict(softmax_scale=p.inputs.scale, causal=True)
    options = {name: x for name, x in options.items() if name in inspect.signature(attend).parameters}  # older: no lengths

    def output(y: Packed, *qkv):
        o = attend(*qkv, **options)
        return o[0] if isinstance(o, tuple) else o  # o, lse

    return torch_peer(output, layout="packed")(p)


def gpu_library(name: str, prepare):
    """A provider from prepare(module, y: Packed) -> a call that gives o [n, Hq, D] of an optional library; forward only. Never
    run: there was no GPU."""

    def provider(p: Problem) -> Trial:
        if not ours.on_gpu() or p.case.phase != "forward":
            raise Senseless
        module = _installed(name)
        return Trial(torch.no_grad()(prepare(module, p.inputs.packed)), lambda o: {"o": o})

    return provider


def _flashinfer(flashinfer, y: Packed):
    q, k, v, scale = y.q, y.k, y.v, y.x.scale
    if len(y.x.queries) > 1:
        wrapper = flashinfer.BatchPrefillWithRaggedKVCacheWrapper(
            torch.zeros(1 << 28, dtype=torch.uint8, device=q.device), "NHD"
        )
        heads = q.shape[1], k.shape[1], q.shape[2]
        wrapper.plan(*y.indptr(), *heads, causal=True, sm_scale=scale, q_data_type=q.dtype, kv_data_type=k.dtype)
        return lambda: wrapper.run(q, k, v)
    if len(q) == 1:
        products = q.shape[1] // k.shape[1] >= 4  # what its authors say of tensor cores
        return lambda: flashinfer.single_decode_with_kv_cache(q[0], k, v, sm_scale=scale, use_tensor_cores=products)[None]
    return lambda: flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, sm_scale=scale)


def _xformers(ops, y: Packed):
    Hkv = y.k.shape[1]
    q = y.q.unflatten(1, (Hkv, -1))[None]
    k, v = (t[None, :, :, None].expand(-1, -1, -1, q.shape[3], -1) for t in (y.k, y.v))
    mask = ops.fmha.attn_bias.BlockDiagonalMask.from_seqlens(*y.lengths).make_causal_from_bottomright()
    return lambda: ops.memory_efficient_attention(q, k, v, attn_bias=mask, scale=y.x.scale)[0].flatten(1, 2)


flashinfer = gpu_library("flashinfer", _flashinfer)
xformers = gpu_library("xformers.ops", _xformers)
