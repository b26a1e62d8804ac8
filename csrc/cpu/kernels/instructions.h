// Instructions on bfloat16 beyond the vectors of simd.h: dot products of pairs (AVX512-BF16, ARM's BF16) and tiles (AMX). Pairs are two
// numbers that are neighbours along the reduced dimension of a product. Tests put an emulation in their place, with the contracts
// that are stated here: tests/host/cpu_emulation.h.
#pragma once
#include "simd.h"
#if defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#include <arm_neon.h>
#endif

// Which of the two there are; the tests define them themselves.
#if defined(__AVX512BF16__) || defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define DIFFMAS_DOTS
#endif
#if defined(__AMX_BF16__)
#define DIFFMAS_TILES
#endif

namespace diffmas::cpu::DIFFMAS_ISA {

struct Pair {
  uint16_t first, second;  // bfloat16
};

typedef uint32_t vu_any __attribute__((vector_size(W * 4), aligned(2), may_alias));

DIFFMAS_INLINE vu load(const Pair* p) { return *reinterpret_cast<const vu_any*>(p); }
DIFFMAS_INLINE void store(Pair* p, vu x) { *reinterpret_cast<vu_any*>(p) = x; }
DIFFMAS_INLINE vu splat(Pair x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return vu{} + bits;
}

// sum + a.first * b.first + a.second * b.second in every lane, rounded in between as the CPU does it; subnormals count as zero.
DIFFMAS_INLINE vf dot(vf sum, vu a, vu b);
// Rounded to nearest even; subnormals may become zero. Of two vectors: pairs.
DIFFMAS_INLINE vh narrow(vf x);
DIFFMAS_INLINE vu narrow(vf first, vf second);

DIFFMAS_INLINE vu interleave(vh first, vh second) { return __builtin_convertvector(first, vu) | __builtin_convertvector(second, vu) << 16; }

#if defined(DIFFMAS_TILES)
// What tiles there are: palette 1, bytes of a row and rows of each.
struct TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};
static_assert(sizeof(TileConfig) == 64);
constexpr TileConfig kTiles = {1, 0, {}, {64, 64, 64, 64, 64, 64, 64, 64}, {16, 16, 16, 16, 16, 16, 16, 16}};  // all eight, 16 x 16 words

// No tile may be used before, and other code pays for tiles that were not released. A tile is loaded from, and stored to, rows
// that are `stride` bytes apart.
DIFFMAS_INLINE void configure_tiles(const TileConfig& config);
DIFFMAS_INLINE void release_tiles();
template <int kTile>
DIFFMAS_INLINE void tile_zero();
template <int kTile>
DIFFMAS_INLINE void tile_load(const void* rows, int64_t stride);
template <int kTile>
DIFFMAS_INLINE void tile_store(void* rows, int64_t stride);
// C [16, 16] floats += A [16, 16 pairs] B [16 pairs, 16], rounded in between as the CPU does it; subnormals count as zero.
template <int kC, int kA, int kB>
DIFFMAS_INLINE void tile_dot();
#endif

#if !defined(DIFFMAS_HOST_EMULATION) && defined(__AVX512BF16__)
DIFFMAS_INLINE vf dot(vf sum, vu a, vu b) { return (vf)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b); }
DIFFMAS_INLINE vh narrow(vf x) { return (vh)_mm512_cvtneps_pbh((__m512)x); }
DIFFMAS_INLINE vu narrow(vf first, vf second) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3,
                                         18, 2, 17, 1, 16, 0);
  return (vu)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first));
}
#endif

#if !defined(DIFFMAS_HOST_EMULATION) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
DIFFMAS_INLINE vf dot(vf sum, vu a, vu b) { return (vf)vbfdotq_f32((float32x4_t)sum, (bfloat16x8_t)a, (bfloat16x8_t)b); }
DIFFMAS_INLINE vh narrow(vf x) { return (vh)vcvt_bf16_f32((float32x4_t)x); }
DIFFMAS_INLINE vu narrow(vf first, vf second) { return interleave(narrow(first), narrow(second)); }
#endif

#if !defined(DIFFMAS_HOST_EMULATION) && defined(DIFFMAS_TILES)
DIFFMAS_INLINE void configure_tiles(const TileConfig& config) { asm volatile("ldtilecfg %0" ::"m"(config)); }
DIFFMAS_INLINE void release_tiles() { asm volatile("tilerelease"); }
template <int kTile>
DIFFMAS_INLINE void tile_zero() {
  asm volatile("tilezero %%tmm%c0" ::"i"(kTile));
}
template <int kTile>
DIFFMAS_INLINE void tile_load(const void* rows, int64_t stride) {
  asm volatile("tileloadd (%0,%1), %%tmm%c2" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kTile>
DIFFMAS_INLINE void tile_store(void* rows, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1)" ::"r"(rows), "r"(stride), "i"(kTile) : "memory");
}
template <int kC, int kA, int kB>
DIFFMAS_INLINE void tile_dot() {
  asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(kC), "i"(kA), "i"(kB));
}
#endif

}  // namespace diffmas::cpu::DIFFMAS_ISA

#if defined(DIFFMAS_HOST_EMULATION)
#include "cpu_emulation.h"
#endif
