"""The attention part alone of a training step: every prompt and latent step of all agents in one layer, forward and backward.

What it answers: how much memory attention and the cache need, and how it grows with N, T and the number of agents. q, k and v
of every forward pass are given; the peer is Hugging Face's own DynamicCache, rotary function and SDPA function under autograd.
"""

import types

import torch
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.systems import DEVICE, SHAPES
from diffmas.trace import Trace
from diffmas.trace.spec import LayerSpec, ModelSpec

__all__ = ["CASES", "PROVIDERS", "problem"]


def _case(N, T, agents=3, model="small", quick=False) -> Case:
    s = SHAPES[model]
    heads = f"{s['num_attention_heads']}/{s['num_key_value_heads']}"
    return Case("attention_schedule", "agents", "step", N=N, T=T, agents=agents, heads=heads, D=s["head_dim"], quick=quick,
                note="one layer, attention alone")  # fmt: skip


CASES = [
    *(_case(N, 16, quick=N <= 2048) for N in (1024, 2048, 4096, 8192)),
    *(_case(4096, T) for T in (0, 10, 40)),
    *(_case(4096, 16, agents) for agents in (2, 4)),
    _case(4096, 16, model="0.6B"),
]


def passes(case: Case) -> list[int]:
    """New tokens of each forward pass."""
    prompt = (case.N - (case.agents - 1) * case.T) // case.agents
    return [*([prompt, *[1] * case.T] * (case.agents - 1)), prompt]


def problem(case: Case) -> Problem:
    Hq, Hkv = map(int, case.heads.split("/"))
    lengths, D = passes(case), case.D
    random = lambda n, H: torch.randn(n, H, D, device=DEVICE)
    leaves = [[3 * random(n, Hq), random(n, Hkv), random(n, Hkv)] for n in lengths]
    grads = [random(n, Hq) for n in lengths]
    angle = torch.arange(sum(lengths))[:, None] * 1e6 ** (-torch.arange(0, D, 2).double() / D)
    angle = torch.cat((angle, angle), -1).to(DEVICE)
    inputs = (leaves, grads, angle)

    def answer(dtype: torch.dtype) -> dict:
        call, read = _plain(inputs, dtype)
        return read(call())

    return Problem(case, inputs, answer, tolerance=1e-4)


def _outputs(leaves, outs) -> dict:
    out = {"o": torch.cat([o.detach() for o in outs])}
    for i, name in enumerate(("dq", "dk", "dv")):
        out[name] = torch.cat([given[i].grad for given in leaves])
    return out


def _fresh(inputs, dtype):
    leaves, grads, angle = inputs
    copies = [[t.to(dtype, copy=True).requires_grad_() for t in given] for given in leaves]
    return copies, [g.to(dtype) for g in grads], angle.cos().to(dtype), angle.sin().to(dtype)


def _clear(leaves) -> None:
    for given in leaves:
        for t in given:
            t.grad = None


def diffmas(p: Problem) -> Trial:
    """As a trace in a system does it: rows for all passes from the start, the gradients of latent steps deferred."""
    leaves, grads, cos, sin = _fresh(p.inputs, torch.float32)
    total, scale = sum(len(q) for q, _, _ in leaves), p.case.D**-0.5
    layer = LayerSpec(0, "half")
    spec = ModelSpec([layer])

    def call():
        _clear(leaves)
        trace, first, outs = Trace(spec, capacity=total), 0, []
        for q, k, v in leaves:
            forward_pass = trace.plan([len(q)], "latent" if len(q) == 1 else "prompt", reserve=total - first - len(q))
            rows = slice(first, first + len(q))
            outs.append(forward_pass.attend(layer, q, k, v, scale, cos=cos[rows], sin=sin[rows]))
            forward_pass.end(outs[-1])
            trace.commit(forward_pass)
            first += len(q)
        torch.autograd.backward(outs, grads)
        return outs

    return Trial(call, lambda outs: _outputs(leaves, outs))


def _plain(inputs, dtype):
    leaves, grads, cos, sin = _fresh(inputs, dtype)
    groups = leaves[0][0].shape[1] // leaves[0][1].shape[1]
    module = types.SimpleNamespace(num_key_value_groups=groups, is_causal=True, training=True)
    scale = leaves[0][0].shape[2] ** -0.5

    def call():
        _clear(leaves)
        cache, first, outs = DynamicCache(), 0, []
        for given in leaves:
            q, k, v = (t[None].transpose(1, 2) for t in given)
            n = q.shape[2]
            q, k = apply_rotary_pos_emb(q, k, cos[None, first : first + n], sin[None, first : first + n])
            first += n
            k, v = cache.update(k, v, 0)
            mask = None
            if 1 < n < first:  # as transformers builds it
                mask = torch.ones(1, 1, n, first, dtype=torch.bool, device=q.device).tril(first - n)
            outs.append(sdpa_attention_forward(module, q, k, v, mask, scaling=scale)[0][0])
        torch.autograd.backward(outs, grads)
        return outs

    return call, lambda outs: _outputs(leaves, outs)


def plain(p: Problem) -> Trial:
    return Trial(*_plain(p.inputs, torch.float32))


PROVIDERS = {OURS: diffmas, "DynamicCache": plain}


def test_schedule(bench, case):
    bench(case, problem, PROVIDERS)
