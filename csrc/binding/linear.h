// What the ops of linear layers and of what lies between them take of their tensors.
#pragma once
#include "cpu/linear.h"

#include <algorithm>
#include <vector>

#include "tensors.h"

namespace diffmas::binding {

inline constexpr Device kCpu{false, 0};

inline void check(bool right, const char* name, const char* expected, const Tensor& t) {
  STD_TORCH_CHECK(right, name, ": expected ", expected, ", got shape ", shape_of(t), " in ",
                  torch::headeronly::toString(t.scalar_type()));
}

inline cpu::Matrix matrix(const char* name, const Tensor& t, int64_t columns) {
  check(t.dim() == 2 && t.size(1) == columns && columns % cpu::kLinearColumns == 0, name, "rows of a length that fits, a multiple of 32", t);
  check(!t.is_cuda() && (columns == 0 || t.stride(1) == 1) && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16),
        name, "rows in float32 or bfloat16 on the CPU", t);
  return {t.data_ptr(), t.stride(0), t.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16};
}

inline const void* vector(const char* name, const Tensor& t, int64_t length, ScalarType dtype) {
  check_shape(name, t, {length}), check_dtype(name, t, dtype);
  check(t.is_contiguous() && !t.is_cuda(), name, "a contiguous tensor on the CPU", t);
  return t.data_ptr();
}

// A call's memory, of which parts are taken one after the other.
struct Memory {
  Tensor all;
  float* next;
  Memory(const Tensor& like, int64_t floats) : all(empty(like, {floats}, ScalarType::Float)), next(floats_of_own(all)) {}
  float* take(int64_t floats) { return (next += floats) - floats; }
};

// a [rank, in], b [out, rank]; null: none. u, b_rows: memory for what is theirs in Lora.
inline cpu::Lora lora(const Tensor* a, const Tensor* b, double scale, int64_t in, int64_t out, bool transposed, float* u, float* b_rows) {
  if (!a || !a->size(0)) return {};
  const int64_t rank = a->size(0);
  const float *a_rows = floats("a", *a, {rank, in}, kCpu), *b_data = floats("b", *b, {out, rank}, kCpu);
  return {rank, float(scale), b_data, transposed ? b_rows : a_rows, transposed ? a_rows : b_rows, b_rows, u};
}

// a and b as above.
struct Adapter {
  const Tensor *a, *b;
  double scale;

  int64_t rank() const { return a->size(0); }
};

// weight [out, in], bias [out]. adapters: none, one, or several, of which each has rows of its own (diffmas/models/adapter_rows.py).
struct Linear {
  const Tensor& weight;
  const Tensor* bias;
  std::vector<Adapter> adapters;

  int64_t out() const { return weight.size(0); }
  int64_t in() const { return weight.size(1); }
  int64_t rank() const { return adapters.size() == 1 ? adapters[0].rank() : 0; }
  // That its args, and its adapters, take of the memory at most, for n rows.
  int64_t floats(int64_t n) const {
    int64_t ranks = 0;
    for (const Adapter& adapter : adapters) ranks += adapter.rank();
    return n * std::max(in(), out()) + ranks * out();
  }
  cpu::Lora lora(const Adapter& adapter, float* u, Memory& memory, bool transposed) const {
    return binding::lora(adapter.a, adapter.b, adapter.scale, in(), out(), transposed, u, memory.take(adapter.rank() * out()));
  }

  // With the adapter, where it is one.
  cpu::LinearArgs args(int64_t n, const cpu::Matrix& x, int64_t length, const cpu::Matrix& y, float* u, Memory& memory,
                       bool transposed = false) const {
    cpu::LinearArgs args{};
    args.n = n, args.transposed = transposed, args.x = x, args.y = y;
    args.from = transposed ? out() : in(), args.to = transposed ? in() : out();
    check(args.from == length, "weight", "what fits the rows of x", weight);
    args.weight = matrix("weight", weight, in());
    check(args.to % cpu::kLinearColumns == 0, "weight", "a number of rows that is a multiple of 32", weight);
    check(args.weight.dtype == x.dtype, "weight", "the dtype of x", weight);
    if (bias && !transposed) args.bias = vector("bias", *bias, args.to, weight.scalar_type());
    args.x_floats = memory.take(x.dtype == DType::f32 ? 0 : n * args.from);
    if (adapters.size() == 1) args.lora = lora(adapters[0], u, memory, transposed);
    return args;
  }
};

inline const Tensor* pointer(const Optional& t) { return t ? &*t : nullptr; }

}  // namespace diffmas::binding
