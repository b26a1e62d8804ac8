#include "ops.h"

namespace diffmas::binding {

std::tuple<Tensor, Tensor, Tensor> inject_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos,
                                                 const Optional& sin, const Tensor& slots, const Optional& q_weight,
                                                 const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
                                                 const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                                                 const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                                 const Optional& inv_freq, double scale) {
  check_dims("k_pool", k_pool);
  const int64_t n = length_of("slots", slots);
  const Tensor q_rot =
      inject_heads(q, k, v, n, k_pool.size(2), cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool);
  const auto [o, lse] = attend(q_rot, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, true,
                               interleaved, is_flat(q, n));
  return {q_rot, o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Optional, Optional> inject_attend_backward(
    const Tensor& d_o, const Tensor& q_rot, const Tensor& o, const Tensor& lse, const Optional& q, const Optional& k, const Optional& cos,
    const Optional& sin, const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved,
    const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
    const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale, const Tensor& dk_pool,
    const Tensor& dv_pool, const Optional& grad_tail, bool weight_grads) {
  check_dims("k_pool", k_pool);
  const int64_t n = length_of("slots", slots), d = k_pool.size(2);
  const Tensor dq_rot = cross_attention_backward(d_o, {}, q_rot, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len,
                                                 seg_offset, inv_freq, scale, true, interleaved, dk_pool, dv_pool, grad_tail, true);
  const auto weight_grad = [&](const Optional& weight) {
    return weight && weight_grads ? Optional(empty(q_rot, {d}, ScalarType::Float)) : Optional();
  };
  const Optional dq_weight = weight_grad(q_weight), dk_weight = weight_grad(k_weight);
  // Without norms the backward is linear: q and k only tell shape and dtype.
  const auto [dq, dk, dv] = inject_heads_backward(dq_rot, q ? *q : q_rot, k ? *k : empty_heads(q_rot, n, k_pool.size(1), d, false), n, d,
                                                  is_flat(d_o, n), cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool,
                                                  dv_pool, dq_weight, dk_weight);
  return {dq, dk, dv, dq_weight, dk_weight};
}

}  // namespace diffmas::binding
