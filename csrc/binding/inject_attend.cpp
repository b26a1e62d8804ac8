#include "ops.h"

namespace diffmas::binding {

std::tuple<Tensor, Tensor, Tensor> inject_attend(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos,
                                                 const Optional& sin, const Tensor& slots, const Optional& q_weight,
                                                 const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
                                                 const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                                                 const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                                 const Optional& inv_freq, double scale) {
  const Tensor q_rot = inject(q, k, v, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool);
  const auto [o, lse] =
      cross_attention(q_rot, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, true, interleaved);
  return {q_rot, o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_attend_backward(
    const Tensor& d_o, const Tensor& q_rot, const Tensor& o, const Tensor& lse, const Optional& q, const Optional& k, const Optional& cos,
    const Optional& sin, const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved,
    const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
    const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale, const Tensor& dk_pool,
    const Tensor& dv_pool, const Optional& grad_tail) {
  const Tensor dq_rot =
      cross_attention_backward(d_o, {}, q_rot, o, lse, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
                               scale, true, interleaved, dk_pool, dv_pool, grad_tail, true);
  // Without norms the backward is linear: q and k only tell shape and dtype.
  const Tensor k_like = k ? *k : empty(q_rot, {q_rot.size(0), k_pool.size(1), q_rot.size(2)}, q_rot.scalar_type());
  return inject_backward(dq_rot, q ? *q : q_rot, k_like, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool);
}

}  // namespace diffmas::binding
