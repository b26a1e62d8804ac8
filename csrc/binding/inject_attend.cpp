#include "ops.h"

namespace diffmas::binding {
namespace {

// Tensors of heads have two layouts: [n, heads, D], and [1, n, heads * D], which projections give and take. cos and sin are [n, Dr] or
// [1, n, Dr]. Views made here cost a tenth of those that the caller would make.
bool is_flat(const Tensor& t, int64_t n) { return t.dim() == 3 && t.size(0) == 1 && t.size(1) == n; }

Tensor with_heads(const Tensor& t, int64_t n, int64_t head_dim) {
  if (!is_flat(t, n) || head_dim < 1 || t.size(2) % head_dim || t.stride(2) != 1) return t;
  return reshaped(t, {n, t.size(2) / head_dim, head_dim}, {t.stride(1), head_dim, 1});
}

// A contiguous [n, heads, D] in the layout of `like`.
Tensor in_layout_of(const Tensor& like, const Tensor& t) {
  const int64_t n = t.size(0), width = t.size(1) * t.size(2);
  return is_flat(like, n) ? reshaped(t, {1, n, width}, {n * width, width, 1}) : t;
}

Optional packed_table(const Optional& t, int64_t n) {
  return t && is_flat(*t, n) ? Optional(reshaped(*t, {n, t->size(2)}, {t->stride(1), t->stride(2)})) : t;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> inject_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos,
                                                 const Optional& sin, const Tensor& slots, const Optional& q_weight,
                                                 const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
                                                 const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                                                 const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                                 const Optional& inv_freq, double scale) {
  const int64_t n = length_of("slots", slots), d = k_pool.size(2);
  const Tensor q_rot = inject(with_heads(q, n, d), with_heads(k, n, d), with_heads(v, n, d), packed_table(cos, n), packed_table(sin, n),
                              slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool);
  const auto [o, lse] =
      cross_attention(q_rot, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, true, interleaved);
  return {q_rot, in_layout_of(q, o), lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_attend_backward(
    const Tensor& d_o, const Tensor& q_rot, const Tensor& o, const Tensor& lse, const Optional& q, const Optional& k, const Optional& cos,
    const Optional& sin, const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved,
    const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
    const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale, const Tensor& dk_pool,
    const Tensor& dv_pool, const Optional& grad_tail) {
  const int64_t n = length_of("slots", slots), d = k_pool.size(2);
  const Tensor dq_rot = cross_attention_backward(with_heads(packed(d_o), n, d), {}, q_rot, with_heads(o, n, d), lse, k_pool, v_pool,
                                                 q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, true, interleaved,
                                                 dk_pool, dv_pool, grad_tail, true);
  // Without norms the backward is linear: q and k only tell shape and dtype.
  const Tensor k_like = k ? with_heads(*k, n, d) : empty(q_rot, {n, k_pool.size(1), d}, q_rot.scalar_type());
  const auto [dq, dk, dv, dq_weight, dk_weight] =
      inject_backward(dq_rot, q ? with_heads(*q, n, d) : q_rot, k_like, packed_table(cos, n), packed_table(sin, n), slots, q_weight,
                      k_weight, eps, interleaved, dk_pool, dv_pool);
  return {in_layout_of(d_o, dq), in_layout_of(d_o, dk), in_layout_of(d_o, dv), dq_weight, dk_weight};
}

}  // namespace diffmas::binding
