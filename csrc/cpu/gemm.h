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

// C[MR, NV*W] (+)= A[MR, depth] B[depth, NV*W], held in MR*NV registers.
template <int MR, int NV, bool kAdd>
static void micro(int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  vf acc[MR][NV];
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) acc[i][j] = kAdd ? load(c + i * ldc + j * W) : vf{};
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

template <int MR, int NV, bool kAdd>
static void micro_rest(int64_t m, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  if (m == MR) return micro<MR, NV, kAdd>(depth, a, b, ldb, c, ldc);
  if constexpr (MR > 1) micro_rest<MR - 1, NV, kAdd>(m, depth, a, b, ldb, c, ldc);
}

// One strip of NV vectors, m rows.
template <int NV, bool kAdd>
static void strip(int64_t m, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int MR = block_rows(NV);
  for (; m >= MR; m -= MR, a.data += MR * a.stride_i, c += MR * ldc) micro<MR, NV, kAdd>(depth, a, b, ldb, c, ldc);
  if (m > 0) micro_rest<MR, NV, kAdd>(m, depth, a, b, ldb, c, ldc);
}

// C[m, n] (+)= A[m, depth] B[depth, n], n a multiple of W. A strip of B stays in L1 while all rows pass over it.
template <bool kAdd>
static void gemm(int64_t m, int64_t n, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int NV = W == 16 ? 4 : 2;
  for (; n >= NV * W; n -= NV * W, b += NV * W, c += NV * W) strip<NV, kAdd>(m, depth, a, b, ldb, c, ldc);
  for (; n >= W; n -= W, b += W, c += W) strip<1, kAdd>(m, depth, a, b, ldb, c, ldc);
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
