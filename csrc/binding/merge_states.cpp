#include "cpu/merge_states.h"

#include "ops.h"

namespace diffmas::binding {
namespace {

constexpr Device kCpu{false, 0};

// What both directions take.
cpu::MergeArgs merge_args(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b, const Tensor& lse_b) {
  cpu::MergeArgs a{};
  a.o_a = rows("o_a", o_a, kCpu);
  a.n = o_a.size(0), a.heads = o_a.size(1), a.head_dim = o_a.size(2);
  check_head_dim("o_a", a.head_dim);
  a.o_b = rows("o_b", o_b, a.n, a.heads, a.head_dim, kCpu);
  a.lse_a = floats("lse_a", lse_a, {a.n, a.heads}, kCpu);
  a.lse_b = floats("lse_b", lse_b, {a.n, a.heads}, kCpu);
  return a;
}

}  // namespace

std::tuple<Tensor, Tensor> merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) {
  lse_a = torch::stable::contiguous(lse_a), lse_b = torch::stable::contiguous(lse_b);
  cpu::MergeArgs a = merge_args(o_a, lse_a, o_b, lse_b);
  Tensor o = empty(o_a, {a.n, a.heads, a.head_dim}, o_a.scalar_type());
  Tensor lse = empty(o_a, {a.n, a.heads}, ScalarType::Float);
  a.o = rows_of_own(o, a.heads, a.head_dim, a.o_a.dtype);
  a.lse = floats_of_own(lse);
  cpu::merge_states(a, threads());
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(Tensor d_o, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b,
                                                                 Tensor lse_b, Tensor o, Tensor lse) {
  lse_a = torch::stable::contiguous(lse_a), lse_b = torch::stable::contiguous(lse_b);
  cpu::MergeArgs a = merge_args(o_a, lse_a, o_b, lse_b);
  check_shape("do", d_o, {a.n, a.heads, a.head_dim});
  d_o = torch::stable::contiguous(d_o), dlse = torch::stable::contiguous(dlse);  // autograd may hand over expanded tensors
  a.d_o = rows("do", d_o, kCpu);
  a.dlse = floats("dlse", dlse, {a.n, a.heads}, kCpu);
  a.o = rows("o", o, a.n, a.heads, a.head_dim, kCpu);
  check_shape("lse", lse, {a.n, a.heads});
  Tensor do_a = empty(o_a, {a.n, a.heads, a.head_dim}, o_a.scalar_type()), dlse_a = empty(o_a, {a.n, a.heads}, ScalarType::Float);
  Tensor do_b = empty(o_a, {a.n, a.heads, a.head_dim}, o_b.scalar_type()), dlse_b = empty(o_a, {a.n, a.heads}, ScalarType::Float);
  a.do_a = rows_of_own(do_a, a.heads, a.head_dim, a.o_a.dtype), a.dlse_a = floats_of_own(dlse_a);
  a.do_b = rows_of_own(do_b, a.heads, a.head_dim, a.o_b.dtype), a.dlse_b = floats_of_own(dlse_b);
  cpu::merge_states_backward(a, threads());
  return {do_a, dlse_a, do_b, dlse_b};
}

}  // namespace diffmas::binding
