"""Peers from torch's scaled_dot_product_attention, and eager PyTorch: on K/V as they lie, concatenated, grouped, expanded."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as torch_cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from diffmas.benchmarks import ours
from diffmas.benchmarks.attention.problem import Inputs, Padded
from diffmas.benchmarks.measure import Cannot, Problem, Senseless, Trial
from diffmas.ops import reference

__all__ = [
    "cat_into_buffer_sdpa", "cat_sdpa", "eager", "expanded", "grouped", "on_backend", "per_sequence", "sdpa", "torch_peer",
]  # fmt: skip

# Where peers that were far behind at smaller shapes are left out: they take minutes and teach nothing more.
EAGER_SCORES = 1 << 24  # attention scores that eager PyTorch would store
EXPANDED = 1 << 26  # elements of K repeated for each query head; on a GPU:
EXPANDED_GPU = 1 << 29


def torch_peer(attend, leaves=lambda y: (y.q, y.k, y.v), take=lambda y, grads: grads, layout="padded"):
    """A provider from attend(y, *leaves) -> o [B, Hq, L, D]. Gradients of K/V are added into a buffer, as ours are.

    leaves(y): what autograd differentiates by; take(y, grads) -> dq, dk, dv in the layout of y, which is padded or packed.
    """

    def provider(p: Problem) -> Trial:
        y = getattr(p.inputs, layout)
        inputs = [t.detach().requires_grad_(p.case.phase != "forward") for t in leaves(y)]
        if p.case.phase == "forward":
            return Trial(torch.no_grad()(lambda: attend(y, *inputs)), lambda o: {"o": y.packed(o)})
        wide = [torch.zeros_like(t, dtype=reference.accumulator(t.dtype)) for t in inputs]
        kept = attend(y, *inputs)

        def call():
            o = attend(y, *inputs) if p.case.phase == "full" else kept
            grads = torch.autograd.grad(o, inputs, y.do, retain_graph=p.case.phase != "full")
            for buffer, grad in zip(wide[1:], grads[1:]):
                buffer.add_(grad)
            return o, grads[0]

        def outputs(result):
            o, dq = result
            dq, dk, dv = take(y, (dq, *wide[1:]))
            out = {"dq": y.packed(dq), "dk": y.pooled(dk), "dv": y.pooled(dv)}
            return out | ({"o": y.packed(o.detach())} if p.case.phase == "full" else {})

        return Trial(call, outputs)

    return provider


def _sdpa(y: Padded, q, k, v):
    grouped = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, y.mask, is_causal=y.causal, scale=y.x.scale, enable_gqa=grouped)


def on_backend(name: str):
    """SDPA on one backend of torch's for GPUs, which by itself does not always take the fastest: in the form that serves it,
    without a mask where it knows the diagonal, and with K/V expanded beforehand where it knows no groups."""

    def provider(p: Problem) -> Trial:
        if not ours.on_gpu():
            raise Senseless
        y, train = p.inputs.padded, p.case.phase != "forward"
        L, N, G = y.q.shape[2], y.k.shape[2], y.q.shape[1] // y.k.shape[1]
        mask = None if y.lower_right and name != "cudnn" else y.mask
        for groups in dict.fromkeys((1, G)):
            if groups > 1 and y.k.numel() * groups > EXPANDED_GPU:
                continue
            leaves = [t.detach().requires_grad_(train) for t in (y.q, *(t.repeat_interleave(groups, 1) for t in (y.k, y.v)))]
            grouped = groups < G
            if getattr(torch_cuda, f"can_use_{name}_attention")(torch_cuda.SDPAParams(*leaves, mask, 0.0, y.causal, grouped)):
                break
        else:
            raise Cannot(f"torch's {name} attention does not serve it")
        bias = causal_lower_right(L, N) if mask is not y.mask else mask

        def attend(y: Padded, q, k, v):
            with sdpa_kernel([getattr(SDPBackend, f"{name.upper()}_ATTENTION")]):
                return F.scaled_dot_product_attention(q, k, v, bias, is_causal=y.causal, scale=y.x.scale, enable_gqa=grouped)

        def take(y: Padded, grads):
            dq, *kv = grads
            return dq, *(t.unflatten(1, (-1, groups)).sum(2) for t in kv)

        return torch_peer(attend, lambda y: leaves, take)(p)

    return provider


def _repeat(t: Tensor, groups: int) -> Tensor:
    if groups == 1:
        return t
    if t.numel() * groups >= EXPANDED:
        raise Senseless("too much to expand")
    return t[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


def _expanded(y: Padded, q, k, v):
    G = q.shape[1] // k.shape[1]
    if G == 1:
        raise Senseless("nothing to expand: as many K/V heads as query heads")
    return F.scaled_dot_product_attention(q, _repeat(k, G), _repeat(v, G), y.mask, is_causal=y.causal, scale=y.x.scale)


def _grouped(y: Padded, q, k, v):
    """One token's query heads of a group as that many queries of its K/V head: no expansion and no mask."""
    if q.shape[2] > 1 or q.shape[1] == k.shape[1]:
        raise Senseless("for one query and fewer K/V heads than query heads")
    rows = q.unflatten(1, (k.shape[1], -1)).squeeze(3)
    return F.scaled_dot_product_attention(rows, k, v, y.mask, scale=y.x.scale).flatten(1, 2)[:, :, None]


def _eager(y: Padded, q, k, v):
    G = q.shape[1] // k.shape[1]
    if q.shape[:3].numel() * k.shape[2] > EAGER_SCORES:
        raise Senseless("too many scores to store")
    if q.requires_grad and q.dtype != torch.float32:
        raise Senseless("scores in 16 bits, which give gradients that are too wrong for the gate")
    scores = q @ _repeat(k, G).transpose(2, 3) * y.x.scale
    if y.causal:
        scores = scores + torch.full(scores.shape[2:], -math.inf, dtype=q.dtype, device=q.device).triu(1)
    elif y.mask is not None:
        scores = scores + y.mask
    return scores.softmax(-1, dtype=torch.float32).to(q.dtype) @ _repeat(v, G)


def _cat_leaves(y: Padded):
    L = y.q.shape[2]
    return (y.q, *(t[:, :, part].contiguous() for t in (y.k, y.v) for part in (slice(None, -L), slice(-L, None))))


def _cat_sdpa(y: Padded, q, k_old, k_new, v_old, v_new):
    if k_old.shape[2] == 0:
        raise Senseless("nothing to concatenate to: the first prompt")
    return _sdpa(y, q, torch.cat((k_old, k_new), 2), torch.cat((v_old, v_new), 2))


def _cat_take(y: Padded, grads):
    dq, dk_old, dk_new, dv_old, dv_new = grads
    return dq, torch.cat((dk_old, dk_new), 2), torch.cat((dv_old, dv_new), 2)


def cat_into_buffer_sdpa(p: Problem) -> Trial:
    """Into memory that is kept: a large result of torch.cat is fresh pages at every call, and each of them a fault."""
    if p.case.phase != "forward":
        raise Senseless("torch.cat(out=...) has no gradient")
    buffers = [torch.empty_like(t) for t in (p.inputs.padded.k, p.inputs.padded.v)]

    def attend(y: Padded, q, k_old, k_new, v_old, v_new):
        if k_old.shape[2] == 0:
            raise Senseless("nothing to concatenate to: the first prompt")
        k, v = (torch.cat(parts, 2, out=buffer) for parts, buffer in zip(((k_old, k_new), (v_old, v_new)), buffers))
        return _sdpa(y, q, k, v)

    return torch_peer(attend, _cat_leaves)(p)


def per_sequence(p: Problem) -> Trial:
    """SDPA on one sequence after the other: no padding, no mask beyond the new tokens' own."""
    x: Inputs = p.inputs
    if len(x.queries) == 1:
        raise Senseless("one sequence only")
    if p.case.phase != "forward":
        raise Senseless("measured forward only")
    firsts = [sum(x.queries[:b]) for b in range(len(x.queries))]
    parts = []
    for first, n, rows in zip(firsts, x.queries, x.rows):
        alone = Inputs(x.q[first : first + n], x.do[first : first + n], x.k, x.v, [n], x.view, [rows], x.scale)
        parts.append(alone.padded)

    @torch.no_grad()
    def call():
        return [_sdpa(y, y.q, y.k, y.v) for y in parts]

    return Trial(call, lambda os: {"o": torch.cat([o[0].transpose(0, 1) for o in os])})


sdpa = torch_peer(_sdpa)
grouped = torch_peer(_grouped)
expanded = torch_peer(_expanded)
cat_sdpa = torch_peer(_cat_sdpa, _cat_leaves, _cat_take)
eager = torch_peer(_eager)
