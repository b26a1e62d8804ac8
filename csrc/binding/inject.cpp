#include "common/inject.h"

#include "cpu/inject.h"
#include "ops.h"
#ifdef DIFFMAS_CUDA
#include "cuda.h"
#include "cuda/inject.h"
#endif

namespace diffmas::binding {
namespace {

// What both directions take. The pools of the backward are the gradient pools.
InjectArgs inject_args(const Tensor& q, const Tensor& k, const Optional& cos, const Optional& sin, const Tensor& slots,
                       const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved, const char* k_pool_name,
                       const Tensor& k_pool, const char* v_pool_name, const Tensor& v_pool) {
  const Device device = device_of(q);
  InjectArgs a{};
  a.q = rows("q", q, device);
  a.n = q.size(0), a.q_heads = q.size(1), a.head_dim = q.size(2);
  STD_TORCH_CHECK(k.dim() == 3, "k: expected 3 dimensions [n, Hkv, D], got shape ", shape_of(k));
  a.kv_heads = k.size(1);
  a.k = rows("k", k, a.n, a.kv_heads, a.head_dim, device);
  check_dtype("k", k, q.scalar_type());
  check_heads(q, "k", a.kv_heads, a.head_dim);
  if (device.cuda) check_rows_fit("q", a.n * a.q_heads);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither, got one");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 2, "cos: expected 2 dimensions [n, Dr], got shape ", shape_of(*cos));
    a.rotary_dim = cos->size(1);
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

Tensor inject(const Tensor& q, const Tensor& k, const Tensor& v, const Optional& cos, const Optional& sin, const Tensor& slots,
              const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
              const Tensor& v_pool) {
  const OnDevice on(q);
  const Device device = device_of(q);
  InjectArgs a = inject_args(q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, "k_pool", k_pool, "v_pool", v_pool);
  a.v = rows("v", v, a.n, a.kv_heads, a.head_dim, device);
  check_dtype("v", v, q.scalar_type());
  Tensor out = empty(q, {a.n, a.q_heads, a.head_dim}, q.scalar_type());
  a.q_out = rows_of_own(out, a.q.dtype);
#ifdef DIFFMAS_CUDA
  if (device.cuda) {
    check_cuda(diffmas_cuda_inject_forward(&a, device.index, current_stream(device)));
    return out;
  }
#endif
  cpu::inject_forward(a, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(const Tensor& dq_rot, const Tensor& q, const Tensor& k,
                                                                   const Optional& cos, const Optional& sin, const Tensor& slots,
                                                                   const Optional& q_weight, const Optional& k_weight, double eps,
                                                                   bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool) {
  const OnDevice on(q);
  const Device device = device_of(q);
  InjectArgs a = inject_args(q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, "dk_pool", dk_pool, "dv_pool", dv_pool);
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_shape("dq_rot", dq_rot, {a.n, a.q_heads, a.head_dim});
  const Tensor grad = packed(dq_rot);
  a.dq_rot = rows("dq_rot", grad, device);
  Tensor dq = empty(q, {a.n, a.q_heads, a.head_dim}, q.scalar_type());
  Tensor dk = empty(q, {a.n, a.kv_heads, a.head_dim}, q.scalar_type());
  Tensor dv = empty(q, {a.n, a.kv_heads, a.head_dim}, q.scalar_type());
  Tensor dq_weight = empty(q, {q_weight ? a.head_dim : 0}, ScalarType::Float);
  Tensor dk_weight = empty(q, {k_weight ? a.head_dim : 0}, ScalarType::Float);
  a.q_out = rows_of_own(dq, a.q.dtype), a.dk = rows_of_own(dk, a.q.dtype), a.dv = rows_of_own(dv, a.q.dtype);
  float* const dqw = q_weight ? floats_of_own(dq_weight) : nullptr;
  float* const dkw = k_weight ? floats_of_own(dk_weight) : nullptr;
#ifdef DIFFMAS_CUDA
  if (device.cuda) {
    Tensor partials = empty(q, {diffmas_cuda_inject_partials(&a, device.index)}, ScalarType::Float);
    a.weight_partials = floats_of_own(partials);
    check_cuda(diffmas_cuda_inject_backward(&a, dqw, dkw, device.index, current_stream(device)));
    return {dq, dk, dv, dq_weight, dk_weight};
  }
#endif
  cpu::inject_backward(a, dqw, dkw, threads());
  return {dq, dk, dv, dq_weight, dk_weight};
}

}  // namespace diffmas::binding
