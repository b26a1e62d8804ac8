// The tensors that every kernel works on, as raw pointers and strides. No torch, no STL.
#pragma once
#include <cstdint>

namespace diffmas {

enum class DType : int32_t { f32, bf16, f16, i8, e4m3 };  // the last two: payloads of quantised rows

inline constexpr int64_t kMaxHeadDim = 512;

// A [rows, heads, D] tensor: strides in elements, the last one is 1.
struct Rows {
  void* data;
  int64_t stride_row, stride_head;
  DType dtype;
};

// What the rows of a payload are multiplied with, [rows, heads]; data is null where rows are what they are.
struct Scales {
  const float* data;
  int64_t stride_row, stride_head;
};

// A [rows, Dr] tensor (cos, sin) or a [D] vector (norm weight, stride 0); data is null when absent.
struct Table {
  const void* data;
  int64_t stride;
  DType dtype;
};

}  // namespace diffmas
