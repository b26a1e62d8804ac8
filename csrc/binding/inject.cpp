#include "common/inject.h"

#include "cpu/inject.h"
#include "ops.h"
#ifdef DIFFMAS_CUDA
#include "cuda.h"
#include "cuda/inject.h"
#endif

namespace diffmas::binding {
namespace {

// What both directions take; n, head_dim: of q and k, which may be flat. The pools of the backward are the gradient pools.
InjectArgs inject_args(const Tensor& q, const Tensor& k, int64_t n, int64_t head_dim, const Optional& cos, const Optional& sin,
                       const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved,
                       const char* k_pool_name, const Tensor& k_pool, const char* v_pool_name, const Tensor& v_pool) {
  const Device device = device_of(q);
  const Heads qs = heads("q", q, n, head_dim, device), ks = heads("k", k, n, head_dim, device);
  InjectArgs a{};
  a.q = qs.rows, a.n = n, a.q_heads = qs.heads, a.head_dim = head_dim;
  a.k = ks.rows, a.kv_heads = ks.heads;
  check_dtype("k", k, q.scalar_type());
  check_heads(a.q_heads, "k", a.kv_heads, a.head_dim);
  if (device.cuda) check_rows_fit("q", a.n * a.q_heads);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither, got one");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() >= 1, "cos: expected 2 dimensions [n, Dr], got shape ", shape_of(*cos));
    a.rotary_dim = cos->size(cos->dim() - 1);
    STD_TORCH_CHECK(a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim, "cos: expected an even rotary size up to ", a.head_dim, ", got ",
                    a.rotary_dim);
    a.cos = table("cos", cos, {a.n, a.rotary_dim}, device);
    a.sin = table("sin", sin, {a.n, a.rotary_dim}, device);
  }
  a.q_weight = table("q_weight", q_weight, {a.head_dim}, device);
  a.k_weight = table("k_weight", k_weight, {a.head_dim}, device);
  a.eps = float(eps);
  a.interleaved = interleaved;
  const Pools p = pools(k_pool_name, k_pool, v_pool_name, v_pool, a.kv_heads, a.head_dim, device);
  a.k_pool = p.k, a.v_pool = p.v;
  a.slots = indices("slots", slots, a.n, device);
  if (!device.cuda) check_bounds("slots", a.slots, a.n, -1, p.rows);
  return a;
}

}  // namespace

Tensor inject_heads(const Tensor& q, const Tensor& k, const Tensor& v, int64_t n, int64_t head_dim, const Optional& cos,
                    const Optional& sin, const Tensor& slots, const Optional& q_weight, const Optional& k_weight, double eps,
                    bool interleaved, const Tensor& k_pool, const Tensor& v_pool) {
  const OnDevice on(q);
  const Device device = device_of(q);
  InjectArgs a =
      inject_args(q, k, n, head_dim, cos, sin, slots, q_weight, k_weight, eps, interleaved, "k_pool", k_pool, "v_pool", v_pool);
  a.v = heads("v", v, n, a.kv_heads, head_dim, device).rows;
  check_dtype("v", v, q.scalar_type());
  Tensor out = empty_heads(q, n, a.q_heads, head_dim, false);
  a.q_out = rows_of_own(out, a.q_heads, head_dim, a.q.dtype);
#ifdef DIFFMAS_CUDA
  if (device.cuda) {
    check_cuda(diffmas_cuda_inject_forward(&a, device.index, current_stream(device)));
    return out;
  }
#endif
  cpu::inject_forward(a, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor> inject_heads_backward(const Tensor& dq_rot, const Tensor& q, const Tensor& k, int64_t n,
                                                         int64_t head_dim, bool flat, const Optional& cos, const Optional& sin,
                                                         const Tensor& slots, const Optional& q_weight, const Optional& k_weight,
                                                         double eps, bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool,
                                                         const Optional& dq_weight, const Optional& dk_weight) {
  const OnDevice on(q);
  const Device device = device_of(q);
  InjectArgs a =
      inject_args(q, k, n, head_dim, cos, sin, slots, q_weight, k_weight, eps, interleaved, "dk_pool", dk_pool, "dv_pool", dv_pool);
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_shape("dq_rot", dq_rot, {n, a.q_heads, head_dim});
  const Tensor grad = packed(dq_rot);
  a.dq_rot = rows("dq_rot", grad, device);
  Tensor dq = empty_heads(q, n, a.q_heads, head_dim, flat);
  Tensor dk = empty_heads(q, n, a.kv_heads, head_dim, flat), dv = empty_heads(q, n, a.kv_heads, head_dim, flat);
  a.q_out = rows_of_own(dq, a.q_heads, head_dim, a.q.dtype);
  a.dk = rows_of_own(dk, a.kv_heads, head_dim, a.q.dtype), a.dv = rows_of_own(dv, a.kv_heads, head_dim, a.q.dtype);
  float* const dqw = dq_weight ? floats_of_own(*dq_weight) : nullptr;
  float* const dkw = dk_weight ? floats_of_own(*dk_weight) : nullptr;
#ifdef DIFFMAS_CUDA
  if (device.cuda) {
    Tensor partials = empty(q, {diffmas_cuda_inject_partials(&a, device.index)}, ScalarType::Float);
    a.weight_partials = floats_of_own(partials);
    check_cuda(diffmas_cuda_inject_backward(&a, dqw, dkw, device.index, current_stream(device)));
    return {dq, dk, dv};
  }
#endif
  cpu::inject_backward(a, dqw, dkw, threads());
  return {dq, dk, dv};
}

Tensor inject(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos, const Optional& sin, const Tensor& slots,
              const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
              const Tensor& v_pool) {
  check_dims("q", q);
  return inject_heads(q, k, v, q.size(0), q.size(2), cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(const Tensor& dq_rot, const Tensor& q, const Tensor& k,
                                                                   const Optional& cos, const Optional& sin, const Tensor& slots,
                                                                   const Optional& q_weight, const Optional& k_weight, double eps,
                                                                   bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool) {
  check_dims("q", q);
  const auto weight_grad = [&](const Optional& weight) { return empty(q, {weight ? q.size(2) : 0}, ScalarType::Float); };
  const Tensor dq_weight = weight_grad(q_weight), dk_weight = weight_grad(k_weight);
  const auto wanted = [](const Optional& weight, const Tensor& grad) { return weight ? Optional(grad) : Optional(); };
  const auto [dq, dk, dv] =
      inject_heads_backward(dq_rot, q, k, q.size(0), q.size(2), false, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool,
                            dv_pool, wanted(q_weight, dq_weight), wanted(k_weight, dk_weight));
  return {dq, dk, dv, dq_weight, dk_weight};
}

}  // namespace diffmas::binding
