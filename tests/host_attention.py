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

    def _run(self, backward, args, more, outputs):
        inputs, numbers = dict(zip(INPUTS, args)), dict(zip(NUMBERS, args[len(INPUTS) :]))
        if inputs["q"].shape[0]:
            on_host.run(self.program, numbers | self.more() | {"backward": backward}, inputs | more, outputs, self.seed)
