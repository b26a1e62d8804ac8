"""The backward of T latent steps in one layer: dK and dV of the older rows in one deferred pass, or added by every step.

The steps run backward one after the other, the last first: a step's dO is known only after the backward of all later steps.
N counts the rows of the steps themselves.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F

from diffmas.benchmarks import bench_attention
from diffmas.benchmarks.attention.problem import Inputs
from diffmas.benchmarks.measure import OURS, Case, Problem, Trial
from diffmas.benchmarks.ours import run_op, variants

__all__ = ["CASES", "PROVIDERS", "problem"]

CPU_CASES = [
    Case("deferred_kv_grad", "latent steps", "backward", N=N, n=T, T=T, heads="16/8", D=128, quick=(N, T) == (2048, 16))
    for N, T in ((2048, 16), (8192, 16), (8192, 40))
]
GPU_CASES = [replace(CPU_CASES[0], N=N, n=32, T=32, dtype="bfloat16", quick=True) for N in (16384, 65536)]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES


def problem(case: Case) -> Problem:
    """The same gradients as those of T queries at once. But a step waits for the one after it, and so reads K and V for itself:
    on a GPU from memory, as they do not fit its cache."""
    p = replace(bench_attention.problem(replace(case, op="cross_attention")), case=case)
    again = (case.T - 1) * 2 * p.inputs.k.numel() * p.inputs.k.element_size() if p.inputs.k.is_cuda else 0
    return replace(p, read=p.read + again)


def diffmas(deferred: bool):
    def provider(p: Problem, run_op=run_op) -> Trial:
        x: Inputs = p.inputs
        T, older = len(x.q), len(x.k) - len(x.q)
        index = lambda *xs: torch.tensor(xs, device=x.q.device)
        o, lse = run_op("cross_attention", x.q, x.q, x.k, x.v, *x.args())
        dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (x.k, x.v))
        # (tokens, view, grad_tail) of each step
        steps = [
            (slice(t, t + 1), (index(0, 1), index(0, 1), index(0), index(older + t + 1)), index(t + 1) if deferred else None)
            for t in reversed(range(T))
        ]
        before = index(0, T), index(0, 1), index(0), index(older)

        def backward(at, view, causal, *rest):
            given = x.do[at], None, x.q[at], o[at], lse[at], x.k, x.v
            return run_op("cross_attention_backward", x.q, *given, *view, None, None, x.scale, causal, False, dk, dv, *rest)

        def call():
            dq = [backward(at, view, True, grad_tail) for at, view, grad_tail in steps]
            if deferred:
                backward(slice(None), before, False, None, False)
            return dq

        return Trial(call, lambda dq: {"dq": torch.cat(dq[::-1]), "dk": dk, "dv": dv})

    return provider


def sdpa(p: Problem) -> Trial:
    """Under autograd, K and V as long as they were at each step."""
    x: Inputs = p.inputs
    older, grouped = len(x.k) - len(x.q), x.q.shape[1] != x.k.shape[1]
    dk, dv = (torch.zeros_like(t, dtype=torch.float32) for t in (x.k, x.v))
    leaves, outs = [], []
    for t in range(len(x.q)):
        seen = slice(0, older + t + 1)
        leaves.append([part.transpose(0, 1)[None].detach().requires_grad_() for part in (x.q[t : t + 1], x.k[seen], x.v[seen])])
        outs.append(F.scaled_dot_product_attention(*leaves[-1], scale=x.scale, enable_gqa=grouped))

    def call():
        dqs = []
        for t in reversed(range(len(outs))):
            do = x.do[t : t + 1].transpose(0, 1)[None]
            dq, *grads = torch.autograd.grad(outs[t], leaves[t], do, retain_graph=True)
            for total, grad in zip((dk, dv), grads):
                total[: older + t + 1].add_(grad[0].transpose(0, 1))
            dqs.append(dq[0].transpose(0, 1))
        return dqs

    return Trial(call, lambda dq: {"dq": torch.cat(dq[::-1]), "dk": dk, "dv": dv})


OWN = {OURS: diffmas(deferred=True), f"{OURS}, not deferred": diffmas(deferred=False)}
PROVIDERS = OWN | variants("cross_attention", OWN[OURS]) | {"sdpa": sdpa}


def test_deferred(bench, case):
    bench(case, problem, PROVIDERS)
