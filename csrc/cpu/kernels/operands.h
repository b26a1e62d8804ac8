// The operands of the matrix products of many query rows: floats anywhere, and where the instruction set multiplies bfloat16, pairs of
// it. A left operand has its reduced dimension along its rows or, as floats, in any direction; a right one is [depth, columns], and
// its columns are query rows or elements of a head.
#pragma once
#include "../tasks.h"
#include "gemm.h"

namespace diffmas::cpu::DIFFMAS_ISA {

#if defined(DIFFMAS_DOTS)
constexpr bool kHasDots = true;
#else
constexpr bool kHasDots = false;
#endif
#if defined(DIFFMAS_TILES)
constexpr bool kHasTiles = true;
#else
constexpr bool kHasTiles = false;
#endif

// Any dtype, converted to floats.
struct Floats {
  using Element = float;
  static constexpr int kNumbers = 1;                           // in an element, along the reduced dimension
  static constexpr int kRows = 1, kDepth = 1, kRowLength = W;  // a left operand's rows, the reduced numbers and a row are multiples

  // The scale of the scores goes into the queries.
  static float of_queries(float scale) { return scale; }
  static float of_scores(float) { return 1; }
  static float of_dq(float scale) { return scale; }
};

// Queries, keys and values in bfloat16. P and dS are rounded to it; scores, softmax and sums are floats.
struct Bfloats {
  using Element = Pair;
  static constexpr int kNumbers = 2;
  static constexpr int kRows = kHasTiles ? 16 : 1, kDepth = kHasTiles ? 32 : 2, kRowLength = kHasTiles ? 32 : W;

  // The queries stay exact, and what factors the scores is not negative: a masked score, -inf, stays so.
  static float of_queries(float scale) { return scale > 0 ? 1.f : scale < 0 ? -1.f : 0.f; }
  static float of_scores(float scale) { return scale == 0 ? 1 : __builtin_fabsf(scale); }
  static float of_dq(float scale) { return of_queries(scale); }
};

DIFFMAS_INLINE bool in_bfloats(const AttentionArgs& args) {
  const auto is = [](const Rows& rows) { return rows.dtype == DType::bf16; };
  return kHasDots && !args.low && is(args.q) && is(args.k_pool) && is(args.v_pool) && (!args.d_o.data || is(args.d_o));
}

// Length of a row in scratch: head_dim rounded up, zero filled.
DIFFMAS_INLINE int64_t row_length(const ScheduledAttention& args) {
  return round_up(args.head_dim, in_bfloats(args) ? Bfloats::kRowLength : Floats::kRowLength);
}

// Tiles are configured as long as this lives.
template <class N>
struct UsingTiles {
  UsingTiles() {}
};
#if defined(DIFFMAS_TILES)
template <>
struct UsingTiles<Bfloats> {
  UsingTiles() { configure_tiles(kTiles); }
  ~UsingTiles() { release_tiles(); }
};
#endif

// From a buffer of floats.
template <class E = float>
DIFFMAS_INLINE E* take(float*& scratch, int64_t size) {
  static_assert(sizeof(E) == sizeof(float));
  E* p = reinterpret_cast<E*>(scratch);
  scratch += size;
  return p;
}

// dst[c, r] = src[r, c] for up to 4 rows, zeros in place of missing ones; cols a multiple of 4.
DIFFMAS_INLINE void transpose_four(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; c += 4) {
    f4 x[4], y[4];
    for (int i = 0; i < 4; ++i) x[i] = i < rows ? *reinterpret_cast<const f4_any*>(src + i * lds + c) : f4{};
    for (int i = 0; i < 4; i += 2) {
      y[i] = DIFFMAS_SHUFFLE4(x[i], x[i + 1], 0, 4, 1, 5);
      y[i + 1] = DIFFMAS_SHUFFLE4(x[i], x[i + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<f4_any*>(dst + (c + 2 * i) * ldd) = DIFFMAS_SHUFFLE4(y[i], y[i + 2], 0, 1, 4, 5);
      *reinterpret_cast<f4_any*>(dst + (c + 2 * i + 1) * ldd) = DIFFMAS_SHUFFLE4(y[i], y[i + 2], 2, 3, 6, 7);
    }
  }
}

// dst[c, r] = src[r, c], rows rounded up to W with zeros; cols a multiple of 4.
static void transpose(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t cols) {
  const int64_t whole = rows / 4 * 4;
  for (int64_t r = 0; r < whole; r += 4) transpose_four(dst + r, ldd, src + r * lds, lds, 4, cols);
  for (int64_t r = whole; r < round_up(rows, W); r += 4) transpose_four(dst + r, ldd, src + r * lds, lds, rows - r, cols);
}

// Rows of a tile, or of a block: element (i, c) at data[i * stride + c].
template <class E>
struct TileRows {
  const E* data;
  int64_t stride;

  Left<E> left() const { return {data, stride, 1}; }
};

// The left operand whose rows are the columns of a tile, reduced over its `count` keys.
DIFFMAS_INLINE Left<float> columns(TileRows<float> rows, int64_t, int64_t, float*) { return {rows.data, 1, rows.stride}; }

// The right operand whose depth is a block's rows.
DIFFMAS_INLINE const float* by_rows(const float* rows, int64_t, int64_t, float*) { return rows; }

#if defined(DIFFMAS_DOTS)
DIFFMAS_INLINE const uint16_t* numbers(const Pair* p) { return &p->first; }

// dst [rows / 2, cols] = pairs of float rows, padded with zeros to the depth of a product.
static void pair_rows(Pair* dst, const float* src, int64_t lds, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < round_up(rows, Bfloats::kDepth); r += 2, dst += cols)
    for (int64_t c = 0; c < cols; c += W)
      store(dst + c, narrow(r < rows ? load(src + r * lds + c) : vf{}, r + 1 < rows ? load(src + (r + 1) * lds + c) : vf{}));
}

// dst = src, n numbers.
DIFFMAS_INLINE void narrow_row(Pair* dst, const float* src, int64_t n) {
  for (int64_t i = 0; i < n; i += W) *reinterpret_cast<vh_any*>(&dst->first + i) = narrow(load(src + i));
}

static const Pair* by_rows(const float* rows, int64_t count, int64_t d, Pair* buffer) {
  pair_rows(buffer, rows, d, count, d);
  return buffer;
}

// Keys are paired on the way into the buffer [kTileKeys, d], once for all panels of a block. Tiles want a left operand's rows in one
// piece; a dot product takes them as they come, and half the time to pack.
static Left<Pair> columns(TileRows<Pair> rows, int64_t count, int64_t d, Pair* buffer) {
  constexpr int64_t kPairs = kTileKeys / 2;
  const auto at = [&](int64_t i, int64_t c) __attribute__((always_inline)) {
    return i < count ? *reinterpret_cast<const vh_any*>(numbers(rows.data + i * rows.stride) + c) : vh{};
  };
  Pair* pairs = kHasTiles ? buffer + kPairs * d : buffer;
  for (int64_t i = 0; i < round_up(count, Bfloats::kDepth); i += 2)
    for (int64_t c = 0; c < d; c += W) store(pairs + i / 2 * d + c, interleave(at(i, c), at(i + 1, c)));
  if (!kHasTiles) return {pairs, 1, d};
  transpose(reinterpret_cast<float*>(buffer), kPairs, reinterpret_cast<float*>(pairs), d, round_up(count, Bfloats::kDepth) / 2, d);
  return {buffer, kPairs, 1};
}
#endif

}  // namespace diffmas::cpu::DIFFMAS_ISA
