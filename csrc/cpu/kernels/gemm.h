// Small matrix products on tiles that are already in cache. Operands are never packed: the left one is read by broadcasts with
// any strides, the right one by vectors along its rows.
#pragma once
#include "simd.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// A left operand: element (i, k) at data[i * stride_i + k * stride_k].
struct Left {
  const float* data;
  int64_t stride_i, stride_k;
};

// Rows of K and V that are needed next: asked for from memory a few at a time, so that they arrive while products run. (The
// hardware fetches ahead within a page, and V is read by columns.)
struct Ahead {
  const char* k;
  const char* v;
  int64_t k_stride, v_stride, row_bytes;
  int64_t rows;       // left to ask for
  int64_t per_eight;  // rows to ask for per 8 rows of a product
  int64_t due;

  void step(int64_t product_rows) {
    for (due += product_rows * per_eight; due >= 8 && rows > 0; due -= 8, --rows, k += k_stride, v += v_stride)
      for (int64_t i = 0; i < row_bytes; i += 64) __builtin_prefetch(k + i, 0, 2), __builtin_prefetch(v + i, 0, 2);
  }
};

enum class Into { set, add, scaled_add };

// C[MR, NV*W] = A[MR, depth] B[depth, NV*W], plus C, or plus C with its columns times alpha[NV*W]. Held in MR*NV registers.
template <int MR, int NV, Into kInto>
DIFFMAS_INLINE void micro(int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, const float* alpha) {
  vf acc[MR][NV];
  for (int j = 0; j < NV; ++j) {
    const vf factor = kInto == Into::scaled_add ? load(alpha + j * W) : vf{};
    for (int i = 0; i < MR; ++i) {
      acc[i][j] = kInto == Into::set ? vf{} : load(c + i * ldc + j * W);
      if (kInto == Into::scaled_add) acc[i][j] *= factor;
    }
  }
  const float* p = a.data;
  for (int64_t k = 0; k < depth; ++k, p += a.stride_k, b += ldb) {
    vf bj[NV];
    for (int j = 0; j < NV; ++j) bj[j] = load(b + j * W);
    for (int i = 0; i < MR; ++i) {
      const float ai = p[i * a.stride_i];
      for (int j = 0; j < NV; ++j) acc[i][j] += ai * bj[j];
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

// Rows per register block: as many accumulators as the register file holds beside the operands (16 registers, 32 with AVX-512).
constexpr int block_rows(int nv) { return W == 16 ? (nv == 4 ? 6 : 8) : (nv == 3 ? 4 : nv == 2 ? 6 : 8); }

template <int MR, int NV, Into kInto>
DIFFMAS_INLINE void micro_rest(int64_t m, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, const float* alpha) {
  if (m == MR) return micro<MR, NV, kInto>(depth, a, b, ldb, c, ldc, alpha);
  if constexpr (MR > 1) micro_rest<MR - 1, NV, kInto>(m, depth, a, b, ldb, c, ldc, alpha);
}

// One strip of NV vectors, m rows.
template <int NV, Into kInto>
static void strip(int64_t m, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc, const float* alpha = nullptr,
                  Ahead* ahead = nullptr) {
  constexpr int MR = block_rows(NV);
  for (; m >= MR; m -= MR, a.data += MR * a.stride_i, c += MR * ldc) {
    if (ahead) ahead->step(MR);
    micro<MR, NV, kInto>(depth, a, b, ldb, c, ldc, alpha);
  }
  if (m > 0) micro_rest<MR, NV, kInto>(m, depth, a, b, ldb, c, ldc, alpha);
}

// C[m, n] += A[m, depth] B[depth, n], n a multiple of W. A strip of B stays in L1 while all rows pass over it.
static void add_product(int64_t m, int64_t n, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int NV = W == 16 ? 4 : 2;
  for (; n >= NV * W; n -= NV * W, b += NV * W, c += NV * W) strip<NV, Into::add>(m, depth, a, b, ldb, c, ldc);
  for (; n >= W; n -= W, b += W, c += W) strip<1, Into::add>(m, depth, a, b, ldb, c, ldc);
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
