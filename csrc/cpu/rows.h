// The plain data every CPU kernel works on: raw pointers, strides and tables. No torch, no STL.
#pragma once
#include <cstdint>

namespace diffmas::cpu {

enum class DType : int32_t { f32, bf16, f16 };

inline constexpr int64_t kMaxHeadDim = 512;

// A [rows, heads, D] tensor: strides in elements, the last one is 1.
struct Rows {
  void* data;
  int64_t stride_row, stride_head;
  DType dtype;
};

// A [rows, Dr] tensor (cos, sin) or a [D] vector (norm weight, stride 0); data is null when absent.
struct Table {
  const void* data;
  int64_t stride;
  DType dtype;
};

// Runs body(begin, end, context) over [0, count) on the caller's thread pool. The only door to threads.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Threads {
  int64_t count;
  ParallelFor parallel_for;
};

// Memory for partial results from the caller's allocator, valid until the call is over; taken once.
struct Workspace {
  void* context;
  float* (*take)(void* context, int64_t floats);
};

}  // namespace diffmas::cpu
