// Small matrix products on tiles that are already in cache: the left operand is read by broadcasts with any strides, the right one
// by vectors along its rows. An element is a float, or a Pair of bfloat16 along the reduced dimension; sums are floats.
#pragma once
#include "instructions.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// A left operand: element (i, k) at data[i * stride_i + k * stride_k].
template <class E>
struct Left {
  const E* data;
  int64_t stride_i, stride_k;
};

DIFFMAS_INLINE void multiply_add(vf& sum, float a, vf b) { sum += a * b; }
DIFFMAS_INLINE void multiply_add(vf& sum, vf a, vf b) { sum += a * b; }
#if defined(DIFFMAS_DOTS)
DIFFMAS_INLINE void multiply_add(vf& sum, Pair a, vu b) { sum = dot(sum, splat(a), b); }
DIFFMAS_INLINE void multiply_add(vf& sum, vu a, vu b) { sum = dot(sum, a, b); }
#endif

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

template <int N>
struct Number {
  static constexpr int value = N;
};

// C[MR, NV*W] = A[MR, depth] B[depth, NV*W] (depth in elements), plus C, or plus C with its columns times alpha[NV*W]. Held in MR*NV registers.
template <int MR, int NV, Into kInto, class E>
DIFFMAS_INLINE void micro(int64_t depth, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc, const float* alpha) {
  vf acc[MR][NV];
  for (int j = 0; j < NV; ++j) {
    const vf factor = kInto == Into::scaled_add ? load(alpha + j * W) : vf{};
    for (int i = 0; i < MR; ++i) {
      acc[i][j] = kInto == Into::set ? vf{} : load(c + i * ldc + j * W);
      if (kInto == Into::scaled_add) acc[i][j] *= factor;
    }
  }
  const E* p = a.data;
  for (int64_t k = 0; k < depth; ++k, p += a.stride_k, b += ldb) {
    decltype(load(b)) bj[NV];
    for (int j = 0; j < NV; ++j) bj[j] = load(b + j * W);
    for (int i = 0; i < MR; ++i) {
      const E ai = p[i * a.stride_i];
      for (int j = 0; j < NV; ++j) multiply_add(acc[i][j], ai, bj[j]);
    }
  }
  for (int i = 0; i < MR; ++i)
    for (int j = 0; j < NV; ++j) store(c + i * ldc + j * W, acc[i][j]);
}

// Rows per register block: as many accumulators as the register file holds beside the operands (16 registers, 32 with AVX-512).
constexpr int block_rows(int nv) { return W == 16 ? (nv == 4 ? 6 : 8) : (nv == 3 ? 4 : nv == 2 ? 6 : 8); }

template <int MR, int NV, Into kInto, class E>
DIFFMAS_INLINE void micro_rest(int64_t m, int64_t depth, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc, const float* alpha) {
  if (m == MR) return micro<MR, NV, kInto>(depth, a, b, ldb, c, ldc, alpha);
  if constexpr (MR > 1) micro_rest<MR - 1, NV, kInto>(m, depth, a, b, ldb, c, ldc, alpha);
}

// One strip of NV vectors, m rows.
template <int NV, Into kInto, class E>
static void strip(int64_t m, int64_t depth, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc, const float* alpha = nullptr,
                  Ahead* ahead = nullptr) {
  constexpr int MR = block_rows(NV);
  for (; m >= MR; m -= MR, a.data += MR * a.stride_i, c += MR * ldc) {
    if (ahead) ahead->step(MR);
    micro<MR, NV, kInto>(depth, a, b, ldb, c, ldc, alpha);
  }
  if (m > 0) micro_rest<MR, NV, kInto>(m, depth, a, b, ldb, c, ldc, alpha);
}

#if defined(DIFFMAS_TILES)
// The same in tiles: m and depth are multiples of 16, and the left operand's rows are contiguous. NV tiles of C stay while the depth
// goes by; they are as many independent sums, 16 cycles of work each, as hide a product's 52 cycles (3: all but 4).
template <int NV, Into kInto>
static void strip(int64_t m, int64_t depth, Left<Pair> a, const Pair* b, int64_t ldb, float* c, int64_t ldc, const float* alpha = nullptr,
                  Ahead* ahead = nullptr) {
  constexpr int kA = 4, kB = 5;  // and after; C is in 0 to 3
  for (; m > 0; m -= 16, a.data += 16 * a.stride_i, c += 16 * ldc) {
    if (ahead) ahead->step(16);
    if constexpr (kInto == Into::scaled_add)
      for (int i = 0; i < 16; ++i)
        for (int j = 0; j < NV * W; j += W) store(c + i * ldc + j, load(c + i * ldc + j) * load(alpha + j));
    const auto for_tiles = [](const auto& visit) __attribute__((always_inline)) {
      visit(Number<0>{});
      if constexpr (NV > 1) visit(Number<1>{});
      if constexpr (NV > 2) visit(Number<2>{});
      if constexpr (NV > 3) visit(Number<3>{});
    };
    for_tiles([&](auto j) __attribute__((always_inline)) {
      if constexpr (kInto == Into::set) tile_zero<j.value>();
      else tile_load<j.value>(c + j.value * W, ldc * 4);
    });
    for (int64_t k = 0; k < depth; k += 16) {
      tile_load<kA>(a.data + k, a.stride_i * 4);
      for_tiles([&](auto j) __attribute__((always_inline)) {
        tile_load<kB + j.value % 3>(b + k * ldb + j.value * W, ldb * 4);
        tile_dot<j.value, kA, kB + j.value % 3>();
      });
    }
    for_tiles([&](auto j) __attribute__((always_inline)) { tile_store<j.value>(c + j.value * W, ldc * 4); });
  }
}
#endif

// C[m, n] (Into) A[m, depth] B[depth, n], n a multiple of W. A strip of B stays in L1 while all rows pass over it.
template <Into kInto, class E>
static void product(int64_t m, int64_t n, int64_t depth, Left<E> a, const E* b, int64_t ldb, float* c, int64_t ldc) {
  constexpr int NV = W == 16 ? 4 : 2;
  for (; n >= NV * W; n -= NV * W, b += NV * W, c += NV * W) strip<NV, kInto>(m, depth, a, b, ldb, c, ldc);
  for (; n >= W; n -= W, b += W, c += W) strip<1, kInto>(m, depth, a, b, ldb, c, ldc);
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
