"""Tile sizes and warps of every kernel: tuned offline, never in a user's first call.

inject, merge_states and reposition move bytes and compute next to nothing: what binds is memory, or the launch when there is
one token. A tile is BLOCK_R rows of one (token, head) each. 16 rows of 128 16-bit numbers over 4 warps are two 16-byte accesses
a thread and tensor, registers for five or more programs on a multiprocessor, and all 16 heads of a single token in one program.
"""

import torch

BLOCKS = {
    "inject": dict(BLOCK_R=16, num_warps=4),
    "inject_backward": dict(BLOCK_R=16, num_warps=4),
    "merge_states": dict(BLOCK_R=16, num_warps=4),
    "merge_states_backward": dict(BLOCK_R=16, num_warps=4),
    "reposition": dict(BLOCK_R=16, num_warps=4),
    "reposition_backward": dict(BLOCK_R=16, num_warps=4),
    "cross_attention_merge": dict(BLOCK_R=16, num_warps=4),
    "cross_attention_delta": dict(BLOCK_R=16, num_warps=4),
}

FUSION = dict(enable_fp_fusion=True)  # said aloud: Triton's default is about to change


def blocks(op: str, head_dim: int, device: torch.device) -> dict:
    """The keyword arguments of the op's launch for this head size and device."""
    return BLOCKS[op] | FUSION


def attention_blocks(kernel: str, rows: int, head_dim: int, wide: bool, shifted: bool, device: torch.device) -> dict:
    """As `blocks`, for the kernels fwd, dq and dkv. rows: query rows of a sequence, on average; wide: float32 products;
    shifted: some segment is read at a shifted position."""
    if kernel == "dkv":
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2) | FUSION
    return dict(BLOCK_M=16 if rows <= 16 else 32 if rows <= 32 else 64, BLOCK_N=32, num_warps=4, num_stages=2) | FUSION
