"""Quantised rows for tests of the ops: a case's pools in 8 bits, and attention over them as a loop over heads."""

import math

import torch
from op_cases import Inputs

from diffmas.ops import dequantize, quantize
from diffmas.ops.quantize import FORMATS

BITS = [*FORMATS]


def in_bits(inputs: Inputs, bits: str) -> tuple:
    """The arguments of the raw op, of a case whose pools may be any dtype. Rows outside of the views read as NaN."""
    q, *pools, q_indptr, seg_indptr, start, length, offset, inv_freq, scale, _, interleaved = inputs.args()
    payloads, scales = [], []
    for pool in pools:
        payload, by = quantize(pool.double().cpu(), bits)
        lies = torch.empty(payload.transpose(0, 1).shape, dtype=payload.dtype).transpose(0, 1)
        payloads.append(lies.copy_(payload).to(q.device))
        scales.append(by.T.contiguous().T.to(q.device))
    return q, *payloads, *scales, q_indptr, seg_indptr, start, length, offset, inv_freq, scale, interleaved


def run_quantized(args: tuple, do: torch.Tensor, backend: str) -> list[torch.Tensor]:
    """o, lse, and dq for the reference's o and lse: it is large where these are off, by as little as they may be."""
    raw = torch.ops.diffmas
    o, lse = raw.cross_attention_quantized(*args, backend)
    return [o, lse.masked_fill(lse == -torch.inf, -1e30), quantized_dq(args, do, backend)]


def quantized_dq(args: tuple, do: torch.Tensor, backend) -> torch.Tensor:
    """backend: its name, or a function in the place of the op."""
    raw = torch.ops.diffmas
    o, lse = raw.cross_attention_quantized(*args, "reference")
    args = do.to(o), args[0], o, lse, *args[1:]
    return backend(*args) if callable(backend) else raw.cross_attention_quantized_backward(*args, backend)


def by_hand(inputs: Inputs, bits: str, do: torch.Tensor) -> list[torch.Tensor]:
    """The same in float64, with torch's autograd: each sequence and head for itself, over rows that were read one by one."""
    q = inputs.q.double().clone().requires_grad_()
    pools = [dequantize(*quantize(x.double(), bits), torch.float64) for x in (inputs.k_pool, inputs.v_pool)]
    outputs, sums, first = [], [], 0
    for queries, view in zip(inputs.view.queries, inputs.view.segments):
        read = [[], []]
        for start, length, offset in view:
            for row in range(start, start + length):
                read[0].append(turned(pools[0][row], offset, inputs))
                read[1].append(pools[1][row])
        for token in range(first, first + queries):
            for head in range(q.shape[1]):
                mine = head // (q.shape[1] // pools[0].shape[1])
                if not view:
                    outputs.append(0 * q[token, head])
                    sums.append(torch.tensor(-1e30, dtype=torch.float64))
                    continue
                scores = torch.stack([k[mine] for k in read[0]]) @ q[token, head] * inputs.scale
                outputs.append(scores.softmax(0) @ torch.stack([v[mine] for v in read[1]]))
                sums.append(scores.logsumexp(0))
        first += queries
    o = torch.stack(outputs).view_as(q)
    (dq,) = torch.autograd.grad((o * do).sum(), q)
    return [o.detach(), torch.stack(sums).view(q.shape[:2]).detach(), dq]


def turned(k: torch.Tensor, offset: int, inputs: Inputs) -> torch.Tensor:
    """A row's keys [Hkv, D] `offset` positions later."""
    if not offset:
        return k
    k, half = k.clone(), len(inputs.inv_freq)
    for i, frequency in enumerate(inputs.inv_freq.tolist()):
        a, b = (2 * i, 2 * i + 1) if inputs.interleaved else (i, i + half)
        cos, sin = math.cos(offset * frequency), math.sin(offset * frequency)
        k[:, a], k[:, b] = k[:, a] * cos - k[:, b] * sin, k[:, b] * cos + k[:, a] * sin
    return k
