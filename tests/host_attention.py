"""cross_attention by a program of tests/host, in the place of torch.ops.diffmas_native."""

import on_host
import torch

INPUTS = "q k_pool v_pool q_indptr seg_indptr seg_start seg_len seg_offset inv_freq".split()
NUMBERS = "scale causal interleaved".split()


class HostAttention:
    """Has the ops that diffmas.ops looks for. more: numbers that the program wants."""

    def __init__(self, program: str):
        self.program, self.seed = program, 0

    def more(self) -> dict:
        return {}

    def cross_attention(self, *args):
        q = args[0]
        outputs = dict(o=torch.full_like(q, torch.nan), lse=torch.full(q.shape[:2], torch.nan))
        self._run(False, args, {}, outputs)
        return outputs["o"], outputs["lse"]

    def cross_attention_backward(self, do, dlse, q, o, lse, *args):
        args, (dk_pool, dv_pool, grad_tail, want_dq) = (q, *args[:-4]), args[-4:]
        outputs = dict(dk_pool=dk_pool, dv_pool=dv_pool) | (dict(dq=torch.full_like(q, torch.nan)) if want_dq else {})
        self._run(True, args, {"do": do.contiguous(), "dlse": dlse, "o": o, "lse": lse, "grad_tail": grad_tail}, outputs)
        return outputs["dq"] if want_dq else q.new_empty(0)

    def cross_attention_quantized(self, q, k_pool, v_pool, k_scale, v_scale, *args):
        *args, interleaved = args
        outputs = dict(o=torch.full_like(q, torch.nan), lse=torch.full(q.shape[:2], torch.nan))
        scales = dict(k_scale=k_scale, v_scale=v_scale)
        self._run(False, (q, k_pool, v_pool, *args, False, interleaved), scales, outputs)
        return outputs["o"], outputs["lse"]

    def cross_attention_quantized_backward(self, do, q, o, lse, k_pool, v_pool, k_scale, v_scale, q_indptr, *args):
        *args, interleaved = args
        more = dict(
            do=do.contiguous(), o=o, lse=lse, grad_tail=torch.zeros_like(q_indptr[1:]), k_scale=k_scale, v_scale=v_scale
        )
        outputs = dict(dq=torch.full_like(q, torch.nan))
        self._run(True, (q, k_pool, v_pool, q_indptr, *args, False, interleaved), more, outputs)
        return outputs["dq"]

    def _run(self, backward, args, more, outputs):
        inputs, numbers = dict(zip(INPUTS, args)), dict(zip(NUMBERS, args[len(INPUTS) :]))
        if inputs["q"].shape[0]:
            on_host.run(self.program, numbers | self.more() | {"backward": backward}, inputs | more, outputs, self.seed)
