def blocks(op, head_dim, x, rows=0):
    if op in ("cross_attention_fwd", "cross_attention_dq"):
        return dict(BLOCK_M=16 if rows <= 16 else 32 if rows <= 32 else 64, BLOCK_N=32, num_warps=4, num_stages=2)
    if op == "cross_attention_dkv":
        return dict(BLOCK_M=32, BLOCK_N=32, num_warps=4, num_stages=2)
    return dict(BLOCK_R=16, num_warps=4)
