// Rows as floats, and rotations of them.
#pragma once
#include "simd.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

// A row as floats: where it lies, or converted into the buffer.
const float* row_floats(const Rows& rows, int64_t row, int64_t head, int64_t d, float* buffer) {
  const char* p = row_of(rows, row, head);
  if (rows.dtype == DType::f32) return reinterpret_cast<const float*>(p);
  load_row(buffer, p, rows.dtype, d);
  return buffer;
}

// A row to be written as floats: where it lies, or in the buffer and converted by done().
struct RowWriter {
  char* row;
  float* floats;
  DType dtype;

  RowWriter(const Rows& rows, int64_t row_index, int64_t head, float* buffer)
      : row(row_of(rows, row_index, head)), floats(rows.dtype == DType::f32 ? reinterpret_cast<float*>(row) : buffer), dtype(rows.dtype) {}

  void done(int64_t d) const {
    if (dtype != DType::f32) store_row(row, floats, dtype, d);
  }
};

void copy_row(const Rows& dst, int64_t dst_row, const Rows& src, int64_t src_row, int64_t head, int64_t d) {
  if (src.dtype == dst.dtype) {
    __builtin_memcpy(row_of(dst, dst_row, head), row_of(src, src_row, head), uint64_t(d * element_size(src.dtype)));
    return;
  }
  alignas(64) float x[kMaxHeadDim];
  store_row(row_of(dst, dst_row, head), row_floats(src, src_row, head, d, x), dst.dtype, d);
}

// A linear map of a row, y[i] = x[i] * near[i] + x[partner(i)] * far[i]. The partner is i +- dim/2, or i ^ 1 when interleaved;
// elements from dim on have none. Rotation, its transpose, and both after a product with the norm's weight have this form.
struct Rotation {
  int64_t size, dim;  // of a row, of its rotary part (0: no rotation)
  bool interleaved;
  alignas(64) float near[kMaxHeadDim], far[kMaxHeadDim];

  Rotation(int64_t size, int64_t dim, bool interleaved) : size(size), dim(dim), interleaved(interleaved) {}

  // weight, then rotation: y[i] = x[i] w[i] cos[i] -+ x[j] w[j] sin[i]
  void set(const float* cos, const float* sin, const float* weight) {
    const int64_t half = dim / 2;
    if (interleaved) {
      for (int64_t i = 0; i < dim; i += 2) {
        far[i] = -sin[i] * weight[i + 1];
        far[i + 1] = sin[i + 1] * weight[i];
      }
    } else {
      for (int64_t i = 0; i < half; ++i) far[i] = -sin[i] * weight[i + half];
      for (int64_t i = 0; i < half; ++i) far[i + half] = sin[i + half] * weight[i];
    }
    for (int64_t i = 0; i < dim; ++i) near[i] = cos[i] * weight[i];
    for (int64_t i = dim; i < size; ++i) near[i] = weight[i];
  }

  // The rotation's transpose: y[i] = x[i] cos[i] +- x[j] sin[j]
  void set_transposed(const float* cos, const float* sin) {
    const int64_t half = dim / 2;
    if (interleaved) {
      for (int64_t i = 0; i < dim; i += 2) {
        far[i] = sin[i + 1];
        far[i + 1] = -sin[i];
      }
    } else {
      for (int64_t i = 0; i < half; ++i) far[i] = sin[i + half];
      for (int64_t i = 0; i < half; ++i) far[i + half] = -sin[i];
    }
    for (int64_t i = 0; i < dim; ++i) near[i] = cos[i];
    for (int64_t i = dim; i < size; ++i) near[i] = 1;
  }
};

// What is done with a row is written once, for a vector and for a single element of what is left over.
template <class V>
DIFFMAS_INLINE V get(const float* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class V>
DIFFMAS_INLINE void put(float* p, V x) {
  __builtin_memcpy(p, &x, sizeof x);
}

typedef uint64_t vpair __attribute__((vector_size(W * 4)));
DIFFMAS_INLINE vf swap_pairs(vf x) { return (vf)((vpair)x << 32 | (vpair)x >> 32); }

// Calls visit(i, y at i), a vector or a single element at a time. y may go where x was.
template <class F>
DIFFMAS_INLINE void rotate_row(const Rotation& t, const float* x, const F& visit) {
  int64_t i = 0;
  if (t.interleaved) {
    for (; i + W <= t.dim; i += W) {
      const vf a = load(x + i);
      visit(i, a * load(t.near + i) + swap_pairs(a) * load(t.far + i));
    }
    for (; i < t.dim; i += 2) {
      const float a = x[i], b = x[i + 1];
      visit(i, a * t.near[i] + b * t.far[i]);
      visit(i + 1, b * t.near[i + 1] + a * t.far[i + 1]);
    }
  } else {
    const int64_t half = t.dim / 2;
    for (; i + W <= half; i += W) {
      const vf a = load(x + i), b = load(x + i + half);
      visit(i, a * load(t.near + i) + b * load(t.far + i));
      visit(i + half, b * load(t.near + i + half) + a * load(t.far + i + half));
    }
    for (; i < half; ++i) {
      const float a = x[i], b = x[i + half];
      visit(i, a * t.near[i] + b * t.far[i]);
      visit(i + half, b * t.near[i + half] + a * t.far[i + half]);
    }
    i = t.dim;
  }
  for (; i + W <= t.size; i += W) visit(i, load(x + i) * load(t.near + i));
  for (; i < t.size; ++i) visit(i, x[i] * t.near[i]);
}

}  // namespace
}  // namespace diffmas::cpu::DIFFMAS_ISA
