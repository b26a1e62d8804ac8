"""The schemas of the ops: argument names, types, what is mutated. Every implementation takes the arguments in this order."""

__all__ = ["LEAD", "SCHEMAS"]

ROPE = "Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved"
VIEW = (
    "Tensor q_indptr, Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Tensor? seg_offset, Tensor? inv_freq, "
    "float scale, bool causal, bool interleaved"
)
MOVE = "Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved"
POOLS, GRADS = "Tensor(a!) k_pool, Tensor(b!) v_pool", "Tensor(a!) dk_pool, Tensor(b!) dv_pool"
SCHEMAS = {
    "inject": f"(Tensor q, Tensor k, Tensor v, {ROPE}, {POOLS}, str backend='auto') -> Tensor",
    "inject_backward": f"(Tensor dq_rot, Tensor q, Tensor k, {ROPE}, {GRADS}, str backend='auto')"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cross_attention": f"(Tensor q, Tensor k_pool, Tensor v_pool, {VIEW}, str backend='auto') -> (Tensor, Tensor)",
    "cross_attention_backward": "(Tensor do, Tensor? dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, "
    f"Tensor v_pool, {VIEW}, {GRADS}, Tensor? grad_tail=None, bool want_dq=True, str backend='auto') -> Tensor",
    "merge_states": "(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, str backend='auto') -> (Tensor, Tensor)",
    "merge_states_backward": "(Tensor do, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, Tensor o, "
    "Tensor lse, str backend='auto') -> (Tensor, Tensor, Tensor, Tensor)",
    "reposition": f"({MOVE}, {POOLS}, str backend='auto') -> ()",
    "reposition_backward": f"({MOVE}, {GRADS}, str backend='auto') -> ()",
}

# The number of the argument whose device, dtype and head size decide which backend runs the op.
LEAD = {
    "inject": 0, "inject_backward": 1, "cross_attention": 0, "cross_attention_backward": 2,
    "merge_states": 0, "merge_states_backward": 2, "reposition": 5, "reposition_backward": 5,
}  # fmt: skip
