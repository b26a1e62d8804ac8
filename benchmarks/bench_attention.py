"""cross_attention over a trace: a latent step, prompts, several agents, ragged batches; forward, backward, both.

Peers compute the same on the layout a Hugging Face user has: K/V concatenated, [B, Hkv, N, D], left-padded if lengths differ,
masks built beforehand and correct. What they would have to do first (concatenate, pad, build masks) is not counted, except by
the providers with "cat" in their name.
"""

import torch

from diffmas.benchmarks.attention import libraries, sdpa
from diffmas.benchmarks.attention.cases import CASES, CPU_CASES, GPU_CASES
from diffmas.benchmarks.attention.problem import Inputs, problem
from diffmas.benchmarks.measure import OURS, Problem, Trial
from diffmas.benchmarks.ours import run_op, variants
from diffmas.ops import reference

__all__ = ["CASES", "CPU_CASES", "GPU_CASES", "PROVIDERS", "problem"]


def diffmas(p: Problem, run_op=run_op) -> Trial:
    x: Inputs = p.inputs
    args = x.args()
    call = lambda op, *rest: run_op(op, x.q, *rest)  # as the package calls it, layer by layer
    o, lse = call("cross_attention", x.q, x.k, x.v, *args)
    # Pools stay from step to step in training: zero-filled once, added to by every backward.
    dk, dv = (torch.zeros_like(t, dtype=reference.accumulator(t.dtype)) for t in (x.k, x.v))

    def forward():
        return call("cross_attention", x.q, x.k, x.v, *args)

    def backward():
        return call("cross_attention_backward", x.do, None, x.q, o, lse, x.k, x.v, *args, dk, dv)

    def full():
        o, lse = forward()
        return o, lse, call("cross_attention_backward", x.do, None, x.q, o, lse, x.k, x.v, *args, dk, dv)

    if p.case.phase == "forward":
        return Trial(forward, lambda r: {"o": r[0], "lse": r[1]})
    if p.case.phase == "backward":
        return Trial(backward, lambda dq: {"dq": dq, "dk": dk, "dv": dv})
    return Trial(full, lambda r: {"o": r[0], "lse": r[1], "dq": r[2], "dk": dk, "dv": dv})


PROVIDERS = {
    OURS: diffmas,
    **variants("cross_attention", diffmas),
    "sdpa": sdpa.sdpa,
    "sdpa, grouped": sdpa.grouped,
    "sdpa, expanded": sdpa.expanded,
    "sdpa, one by one": sdpa.per_sequence,
    "sdpa, flash": sdpa.on_backend("flash"),
    "sdpa, cudnn": sdpa.on_backend("cudnn"),
    "sdpa, efficient": sdpa.on_backend("efficient"),
    "torch varlen": libraries.varlen,
    "cat + sdpa": sdpa.cat_sdpa,
    "cat into a buffer + sdpa": sdpa.cat_into_buffer_sdpa,
    "eager": sdpa.eager,
    "flex": libraries.flex,
    "flex, flash": libraries.flex_flash,
    "flash-attn 4": libraries.flash_attn_4,
    "flashinfer": libraries.flashinfer,
    "xformers": libraries.xformers,
}
SLOW = {"flex", "flex, flash"}  # compiling takes most of a minute: not with --quick


def test_attention(bench, case):
    bench(case, problem, PROVIDERS)
