"""The schemas of the ops: torch.ops.diffmas_native (csrc/binding) has them as they are, torch.ops.diffmas with a backend."""

__all__ = ["FUSED", "LEAD", "LINEAR", "LOW_RANK", "QUANTIZED", "SCHEMAS", "with_backend"]

ROPE = "Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, float eps, bool interleaved"
TABLES = "Tensor q_indptr, Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Tensor? seg_offset, Tensor? inv_freq"
VIEW = f"{TABLES}, float scale, bool causal, bool interleaved"
MOVE = "Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved"
POOLS, GRADS = "Tensor(a!) k_pool, Tensor(b!) v_pool", "Tensor(a!) dk_pool, Tensor(b!) dv_pool"
SCHEMAS = {
    "inject": f"(Tensor q, Tensor k, Tensor v, {ROPE}, {POOLS}) -> Tensor",
    "inject_backward": f"(Tensor dq_rot, Tensor q, Tensor k, {ROPE}, {GRADS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "cross_attention": f"(Tensor q, Tensor k_pool, Tensor v_pool, {VIEW}) -> (Tensor, Tensor)",
    "cross_attention_backward": "(Tensor do, Tensor? dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, Tensor v_pool, "
    f"{VIEW}, {GRADS}, Tensor? grad_tail=None, bool want_dq=True) -> Tensor",
    "merge_states": "(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor, Tensor)",
    "merge_states_backward": "(Tensor do, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, Tensor o, "
    "Tensor lse) -> (Tensor, Tensor, Tensor, Tensor)",
    "reposition": f"({MOVE}, {POOLS}) -> ()",
    "reposition_backward": f"({MOVE}, {GRADS}) -> ()",
}

# Attention over rows of 8 bits: all of a view, whose rows are constants.
ROWS_OF_8_BITS = f"Tensor k_pool, Tensor v_pool, Tensor k_scale, Tensor v_scale, {TABLES}, float scale, bool interleaved"
QUANTIZED = {
    "cross_attention_quantized": f"(Tensor q, {ROWS_OF_8_BITS}) -> (Tensor, Tensor)",
    "cross_attention_quantized_backward": f"(Tensor do, Tensor q, Tensor o, Tensor lse, {ROWS_OF_8_BITS}) -> Tensor",
}

# Of torch.ops.diffmas_native alone, and on the CPU: few queries over rows with low-rank parts (diffmas/ops/low_rank.py).
# seg_code: the code of each segment's first row.
CODES = "Tensor? z_k, Tensor? b_k, Tensor? z_v, Tensor? b_v, Tensor? keep, Tensor? add, Tensor? cos, Tensor? sin"
CODED_ROWS = f"Tensor k_pool, Tensor v_pool, Tensor seg_code, {CODES}, {TABLES}, float scale, bool interleaved"
CODE_GRADS = "Tensor(a!)? dz_k, Tensor(b!)? db_k, Tensor(c!)? dz_v, Tensor(d!)? db_v, Tensor(e!)? dkeep, Tensor(f!)? dadd"
LOW_RANK = {
    "low_rank_attention": f"(Tensor q, {CODED_ROWS}) -> (Tensor, Tensor)",
    "low_rank_attention_backward": f"(Tensor do, Tensor q, Tensor o, Tensor lse, {CODED_ROWS}, {CODE_GRADS}, "
    "Tensor(g!)? dk_pool, Tensor(h!)? dv_pool) -> Tensor",
}

# Of torch.ops.diffmas_native alone: diffmas/ops/fused.py.
FUSED = {
    "inject_attend": f"(Tensor q, Tensor k, Tensor v, {ROPE}, {POOLS}, {TABLES}, float scale) -> (Tensor, Tensor, Tensor)",
    "inject_attend_backward": f"(Tensor do, Tensor q_rot, Tensor o, Tensor lse, Tensor? q, Tensor? k, {ROPE}, Tensor k_pool, "
    f"Tensor v_pool, {TABLES}, float scale, {GRADS}, Tensor? grad_tail, bool weight_grads) "
    "-> (Tensor, Tensor, Tensor, Tensor?, Tensor?)",
}


LAYERS = "Tensor[] norms, float[] eps, Tensor[] linears, int[] parts, float[] scales, int[] ends"
LAYERS_HEADS = "Tensor? cos, Tensor? sin, Tensor slots, Tensor[] head_norms, float head_eps, bool interleaved"
LAYERS_VIEWS = "Tensor[] view, Tensor[] rest, Tensor? inv_freq, float scale, Tensor[] frozen, Tensor[] frozen_view"

# Of torch.ops.diffmas_native alone, and on the CPU; Triton has launchers of the same (kernels/backend.py), but there are no
# few_rows_... among them. diffmas/ops/layer.py picks one.
LINEAR = {
    "linear": "(Tensor x, Tensor weight, Tensor? bias, Tensor? a, Tensor? b, float scale, bool transposed) -> (Tensor, Tensor)",
    "few_rows_layers": f"(Tensor x, {LAYERS}, {LAYERS_HEADS}, Tensor(a!)[] k_pools, Tensor(b!)[] v_pools, {LAYERS_VIEWS}, "
    "bool learning) -> Tensor[]",
    "few_rows_layers_backward": f"(Tensor dy, Tensor x, Tensor[] kept, {LAYERS}, {LAYERS_HEADS}, Tensor[] k_pools, "
    f"Tensor[] v_pools, {LAYERS_VIEWS}, Tensor(a!)[] dk_pools, Tensor(b!)[] dv_pools, int[] own_rows_only, Tensor tail, "
    "Tensor? no_tail) -> Tensor[]",
    "few_rows_lora_grads": f"({LAYERS}, Tensor[] os, Tensor[] xs, Tensor[] us, Tensor[] dys, Tensor[] vs) -> Tensor[]",
    "norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "norm_backward": "(Tensor dy, Tensor x, Tensor weight, float eps) -> Tensor",
    "gate": "(Tensor gate, Tensor up) -> Tensor",
    "gate_backward": "(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
    "add_lora": "(Tensor(a!) y, Tensor x, Tensor a, Tensor b, float scale, bool transposed) -> Tensor",
    "lora_grad": "(Tensor c, Tensor z, float scale) -> Tensor",
}


def with_backend(name: str) -> str:
    """Of torch.ops.diffmas. work: what a backend's `attention_work` has found."""
    work = ", Tensor? work=None" if name.startswith("cross_attention") else ""
    return (SCHEMAS | QUANTIZED)[name].replace(") -> ", f", str backend='auto'{work}) -> ")


# The number of the argument whose device, dtype and head size decide which backend runs the op.
LEAD = {
    "inject": 0, "inject_backward": 1, "cross_attention": 0, "cross_attention_backward": 2,
    "cross_attention_quantized": 0, "cross_attention_quantized_backward": 1,
    "merge_states": 0, "merge_states_backward": 2, "reposition": 5, "reposition_backward": 5,
}  # fmt: skip
