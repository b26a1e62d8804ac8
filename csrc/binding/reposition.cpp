#include "cpu/reposition.h"

#include "ops.h"

namespace diffmas::binding {
namespace {

constexpr Device kCpu{false, 0};

// What both directions take. The pools of the backward are the gradient pools.
cpu::RepositionArgs reposition_args(const Tensor& src, const Tensor& dst, const Tensor& offset, const Tensor& inv_freq, bool interleaved,
                                    const char* k_name, const Tensor& k_pool, const char* v_name, const Tensor& v_pool) {
  cpu::RepositionArgs a{};
  const Pools p = pools(k_name, k_pool, v_name, v_pool, -1, -1, kCpu);
  a.k_pool = p.k, a.v_pool = p.v, a.kv_heads = p.kv_heads, a.head_dim = p.head_dim;
  check_head_dim(k_name, a.head_dim);
  STD_TORCH_CHECK(a.kv_heads >= 1, k_name, ": expected at least one head, got shape ", shape_of(k_pool));
  a.m = length_of("src", src);
  a.src = indices("src", src, a.m, kCpu);
  a.dst = indices("dst", dst, a.m, kCpu);
  a.offset = indices("offset", offset, a.m, kCpu);
  check_bounds("src", a.src, a.m, 0, p.rows);
  check_bounds("dst", a.dst, a.m, 0, p.rows);
  a.inv_freq = frequencies(inv_freq, a.head_dim, kCpu);
  a.half_rotary = inv_freq.size(0);
  a.interleaved = interleaved;
  return a;
}

}  // namespace

void reposition(Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved, Tensor k_pool, Tensor v_pool) {
  cpu::reposition(reposition_args(src, dst, offset, inv_freq, interleaved, "k_pool", k_pool, "v_pool", v_pool), threads());
}

void reposition_backward(Tensor src, Tensor dst, Tensor offset, Tensor inv_freq, bool interleaved, Tensor dk_pool, Tensor dv_pool) {
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  cpu::reposition_backward(reposition_args(src, dst, offset, inv_freq, interleaved, "dk_pool", dk_pool, "dv_pool", dv_pool), threads());
}

}  // namespace diffmas::binding
