// Products of small-q tasks (decoding, latent steps), which are bound by the speed at which memory delivers K and V.
//
// Measured: one core reads memory at full speed only when it asks for it strictly in address order. So K and V are read one row
// after another, each row once for all query rows, converted from its stored dtype on the way, or as it is where the instruction set
// multiplies bfloat16.
#pragma once
#include "row_table.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// Query rows that share the registers in one pass over a row of K or V; more rows make more passes, over L1.
constexpr int kPass = 4;

// Keeps the loads of rows as floats in address order: with 32 registers the compiler mixes those of several rows, and one query row
// takes 1.3 times as long from memory.
template <class S>
DIFFMAS_INLINE void in_order() {
  if constexpr (W == 16 && S::kNumbers == 1) asm volatile("" ::: "memory");
}

// How rows of K and V are multiplied. Queries and weights are Elements.
template <DType kStored>
struct Converted {
  using Element = float;
  static constexpr DType kType = kStored;
  static constexpr int kNumbers = 1;  // in an element: along a row of K, or keys of V

  static vf load(const char* row, int64_t c) { return load_as<kType>(row, c); }                         // from number c on
  static vf keys(const char* const* rows, int64_t j, int64_t c) { return load_as<kType>(rows[j], c); }  // element j of the keys
};

#if defined(DIFFMAS_DOTS)
struct Paired {
  using Element = Pair;
  static constexpr DType kType = DType::bf16;
  static constexpr int kNumbers = 2;

  static vu load(const char* row, int64_t c) { return DIFFMAS_ISA::load(reinterpret_cast<const Pair*>(row + 2 * c)); }
  static vu keys(const char* const* rows, int64_t j, int64_t c) {
    const auto half = [&](int64_t i) __attribute__((always_inline)) { return *reinterpret_cast<const vh_any*>(rows[i] + 2 * c); };
    return interleave(half(2 * j), half(2 * j + 1));
  }
};
#endif

// Query rows [rows, d] as Elements, what `scores` takes.
DIFFMAS_INLINE const float* as_elements(const QueryBlock&, const float* rows, float*) { return rows; }
#if defined(DIFFMAS_DOTS)
static const Pair* as_elements(const QueryBlock& q, const float* rows, Pair* buffer) {
  const int64_t length = round_up(q.d, 2 * W);
  for (int64_t i = 0; i < q.rows() * length / 2; ++i) buffer[i] = {};
  for (int64_t r = 0; r < q.rows(); ++r) narrow_row(buffer + r * length / 2, rows + r * q.d, q.d);
  return buffer;
}
#endif

// Calls pass(first row, size) for passes of up to kPass of the rows, as even as they go.
template <class F>
DIFFMAS_INLINE void for_passes(int64_t rows, const F& pass) {
  for (int64_t passes = (rows + kPass - 1) / kPass, r = 0; passes > 0; --passes) {
    const int64_t size = (rows - r + passes - 1) / passes;
    pass(r, size);
    r += size;
  }
}

// s[r, i] = x[r, :] . k[i, :] for 4 keys i: x [R, d], s row length kSmallQKeys.
template <class S, int R>
DIFFMAS_INLINE void dots(const char* const* k, int64_t d, const typename S::Element* x, float* s) {
  constexpr int kVector = S::kNumbers * W;
  const auto query = [&](int r, int64_t c) __attribute__((always_inline)) { return load(x + (r * d + c) / S::kNumbers); };
  vf products[R][4];
  for (int j = 0; j < 4; ++j) {
    in_order<S>();
    vf even[R] = {}, odd[R] = {};
    int64_t c = 0;
    for (; c + 2 * kVector <= d; c += 2 * kVector) {
      const auto k0 = S::load(k[j], c), k1 = S::load(k[j], c + kVector);
      for (int r = 0; r < R; ++r) {
        multiply_add(even[r], k0, query(r, c));
        multiply_add(odd[r], k1, query(r, c + kVector));
      }
    }
    if (c < d) {
      const auto k0 = S::load(k[j], c);
      for (int r = 0; r < R; ++r) multiply_add(even[r], k0, query(r, c));
    }
    for (int r = 0; r < R; ++r) products[r][j] = even[r] + odd[r];
  }
  for (int r = 0; r < R; ++r)
    *reinterpret_cast<f4_any*>(s + r * kSmallQKeys) = sums(products[r][0], products[r][1], products[r][2], products[r][3]);
}

// kD is the row length where it is known: fewer instructions, so more lines of K on their way from memory.
template <class S, int64_t kD>
static void scores_of(const RowTable& k, int64_t count, int64_t d, const typename S::Element* x, int64_t rows, float* s) {
  if (kD) d = kD;
  for (int64_t i = 0; i < count; i += 4) {
    const int64_t bytes = d * element_size(S::kType);
    if (k.fetch) fetch<4>(k.row + i + kAhead, bytes);
    else if (S::kNumbers == 2 && !k.next) fetch<4, To::L2>(k.row + i + kAhead, bytes);
    if (S::kNumbers == 2) fetch_next<4>(k, i, bytes);
    for_passes(rows, [&](int64_t r, int64_t size) __attribute__((always_inline)) {
      const typename S::Element* xr = x + r * d / S::kNumbers;
      switch (size) {
        case 1: return dots<S, 1>(k.row + i, d, xr, s + r * kSmallQKeys + i);
        case 2: return dots<S, 2>(k.row + i, d, xr, s + r * kSmallQKeys + i);
        case 3: return dots<S, 3>(k.row + i, d, xr, s + r * kSmallQKeys + i);
        default: return dots<S, 4>(k.row + i, d, xr, s + r * kSmallQKeys + i);
      }
    });
  }
}

template <class S>
static void scores_as(const RowTable& k, int64_t count, int64_t d, const typename S::Element* x, int64_t rows, float* s) {
  if (d == 128) return scores_of<S, 128>(k, count, d, x, rows, s);
  if (d == 64) return scores_of<S, 64>(k, count, d, x, rows, s);
  scores_of<S, 0>(k, count, d, x, rows, s);
}

// s [rows, kSmallQKeys] = x [rows, d] . k [count, d]; writes s up to the next multiple of 4 keys.
static void scores(const RowTable& k, int64_t count, int64_t d, const float* x, int64_t rows, float* s) {
  switch (k.dtype) {
    case DType::f32: return scores_as<Converted<DType::f32>>(k, count, d, x, rows, s);
    case DType::bf16: return scores_as<Converted<DType::bf16>>(k, count, d, x, rows, s);
    case DType::f16: return scores_as<Converted<DType::f16>>(k, count, d, x, rows, s);
    case DType::i8: return scores_as<Converted<DType::i8>>(k, count, d, x, rows, s);
    case DType::e4m3: return scores_as<Converted<DType::e4m3>>(k, count, d, x, rows, s);
  }
}

// y [d] += p [count] . v [count, d] for one query row: N vectors of y stay in registers, the rest goes through L1.
template <class S, int N, int64_t kD = 0>
static void add_one(const RowTable& v, int64_t count, int64_t d, const typename S::Element* p, float* y) {
  if (kD) d = kD;
  vf sum[N];
  for (int j = 0; j < N; ++j) sum[j] = load(y + j * W);
  for (int64_t i = 0; i < count; i += S::kNumbers) {
    in_order<S>();
    const char* rows[S::kNumbers];  // here, or they are read again after every store
    for (int j = 0; j < S::kNumbers; ++j) rows[j] = v.row[i + j];
    const auto weight = splat(p[i / S::kNumbers]);
    if (v.fetch || S::kNumbers == 2) fetch<S::kNumbers>(v.row + i + kAhead, d * element_size(S::kType));
    for (int j = 0; j < N; ++j) multiply_add(sum[j], weight, S::keys(rows, 0, j * W));
    for (int64_t c = N * W; c < d; c += W) {
      vf rest = load(y + c);
      multiply_add(rest, weight, S::keys(rows, 0, c));
      store(y + c, rest);
    }
  }
  for (int j = 0; j < N; ++j) store(y + j * W, sum[j]);
}

// Asks for the vector at element 2c of the 2 rows [2 d] that start at v[0]: over c in [0, d) all their lines, in address order.
template <DType kType>
DIFFMAS_INLINE void fetch_rows(const char* const* v, int64_t d, int64_t c) {
  constexpr int kSize = element_size(kType);
  const char* p = 2 * c < d ? v[0] + 2 * c * kSize : v[1] + (2 * c - d) * kSize;
  for (int i = 0; i < 2 * W * kSize; i += 64) __builtin_prefetch(p + i);
}

// y[r, :] += p[r, j] v[j, :] for B elements of keys of v: y [R, d], p row length kSmallQKeys.
template <class S, int R, int B>
DIFFMAS_INLINE void axpys(const char* const* v, int64_t d, const typename S::Element* p, float* y, bool fetch) {
  decltype(splat(*p)) weight[R][B];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < B; ++j) weight[r][j] = splat(p[r * kSmallQKeys + j]);
  for (int64_t c = 0; c < d; c += W) {
    if (fetch) fetch_rows<S::kType>(v + kAhead, d, c);
    decltype(S::keys(v, 0, c)) row[B];
    for (int j = 0; j < B; ++j) row[j] = S::keys(v, j, c);
    for (int r = 0; r < R; ++r) {
      vf sum = load(y + r * d + c);
      for (int j = 0; j < B; ++j) multiply_add(sum, weight[r][j], row[j]);
      store(y + r * d + c, sum);
    }
  }
}

template <class S, int B>
DIFFMAS_INLINE void add_some(const char* const* v, int64_t d, const typename S::Element* p, float* y, int64_t rows, bool ahead) {
  for_passes(rows, [&](int64_t r, int64_t size) __attribute__((always_inline)) {
    const bool fetch = ahead && B * S::kNumbers == 2 && r == 0;
    switch (size) {
      case 1: return axpys<S, 1, B>(v, d, p + r * kSmallQKeys, y + r * d, fetch);
      case 2: return axpys<S, 2, B>(v, d, p + r * kSmallQKeys, y + r * d, fetch);
      case 3: return axpys<S, 3, B>(v, d, p + r * kSmallQKeys, y + r * d, fetch);
      default: return axpys<S, 4, B>(v, d, p + r * kSmallQKeys, y + r * d, fetch);
    }
  });
}

// y [R, 64] += p [R, kSmallQKeys] . v [count, 64], all of y in registers; in the order of `axpys`.
template <class S, int R>
static void add_few(const RowTable& v, int64_t count, const typename S::Element* p, float* y) {
  constexpr int N = 64 / W;  // vectors a row
  vf sum[R][N];
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) sum[r][j] = load(y + (r * N + j) * W);
  for (int64_t i = 0; i < count; i += S::kNumbers) {
    const char* rows[S::kNumbers];  // here, or they are read again after every store
    for (int j = 0; j < S::kNumbers; ++j) rows[j] = v.row[i + j];
    fetch_next<S::kNumbers>(v, i, 64 * element_size(S::kType));
    if (v.fetch) fetch<S::kNumbers>(v.row + i + kAhead, 64 * element_size(S::kType));
    for (int j = 0; j < N; ++j) {
      const auto row = S::keys(rows, 0, j * W);
      for (int r = 0; r < R; ++r) multiply_add(sum[r][j], splat(p[r * kSmallQKeys + i / S::kNumbers]), row);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int j = 0; j < N; ++j) store(y + (r * N + j) * W, sum[r][j]);
}

template <class S>
static void weighted_sum_of(const RowTable& v, int64_t count, int64_t d, const typename S::Element* p, float* y, int64_t rows) {
  if (rows == 1) {
    constexpr int kMost = W == 16 ? 16 : 12;
    constexpr int k128 = 128 / W < kMost ? 128 / W : kMost;
    if (d == 128) return add_one<S, k128, 128>(v, count, d, p, y);
    if (d >= kMost * W) return add_one<S, kMost>(v, count, d, p, y);
    if (d >= 8 * W) return add_one<S, 8>(v, count, d, p, y);
    if (d >= 4 * W) return add_one<S, 4>(v, count, d, p, y);
    return add_one<S, 1>(v, count, d, p, y);
  }
  if constexpr (W == 16 && S::kNumbers == 2) {  // 32 registers: y of up to 4 rows of 64 numbers fits
    if (d == 64 && rows == 2) return add_few<S, 2>(v, count, p, y);
    if (d == 64 && rows == 3) return add_few<S, 3>(v, count, p, y);
    if (d == 64 && rows == 4) return add_few<S, 4>(v, count, p, y);
  }
  constexpr int B = 2 / S::kNumbers;
  const bool ahead = S::kNumbers == 1 || v.fetch;
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    if (S::kNumbers == 2) fetch_next<2>(v, i, d * element_size(S::kType));
    add_some<S, B>(v.row + i, d, p + i / S::kNumbers, y, rows, ahead);
  }
  if (i < count) add_some<S, 1>(v.row + i, d, p + i / S::kNumbers, y, rows, false);
}

// y [rows, d] += p [rows, kSmallQKeys] . v [count, d]
static void weighted_sum(const RowTable& v, int64_t count, int64_t d, const float* p, float* y, int64_t rows) {
  switch (v.dtype) {
    case DType::f32: return weighted_sum_of<Converted<DType::f32>>(v, count, d, p, y, rows);
    case DType::bf16: return weighted_sum_of<Converted<DType::bf16>>(v, count, d, p, y, rows);
    case DType::f16: return weighted_sum_of<Converted<DType::f16>>(v, count, d, p, y, rows);
    case DType::i8: return weighted_sum_of<Converted<DType::i8>>(v, count, d, p, y, rows);
    case DType::e4m3: return weighted_sum_of<Converted<DType::e4m3>>(v, count, d, p, y, rows);
  }
}

#if defined(DIFFMAS_DOTS)
// The same of pairs: of numbers along a row, and of keys, whose last weight is zero where their number is odd.
static void scores(const RowTable& k, int64_t count, int64_t d, const Pair* x, int64_t rows, float* s) {
  scores_as<Paired>(k, count, d, x, rows, s);
}
static void weighted_sum(const RowTable& v, int64_t count, int64_t d, const Pair* p, float* y, int64_t rows) {
  weighted_sum_of<Paired>(v, count, d, p, y, rows);
}
#endif

// out [n] += sum_r weights[r * kSmallQKeys] x[r, 0:n], x row length d. kN is n where it is known.
template <int R, int64_t kN = 0>
DIFFMAS_INLINE void add_scaled(float* out, int64_t n, const float* weights, const float* x, int64_t d) {
  if (kN) n = kN;
  vf weight[R];
  for (int r = 0; r < R; ++r) weight[r] = splat(weights[r * kSmallQKeys]);
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    vf sum = load(out + c);
    for (int r = 0; r < R; ++r) sum += weight[r] * load(x + r * d + c);
    store(out + c, sum);
  }
  if constexpr (kN % W != 0 || kN == 0)
    for (; c < n; ++c)
      for (int r = 0; r < R; ++r) out[c] += weights[r * kSmallQKeys] * x[r * d + c];
}

// The tile's rows of a gradient pool [count, n] += weights^T . x: weights [rows, kSmallQKeys], x [rows, d].
static inline void outer_sum(const RowTable& pool, int64_t count, int64_t n, const float* weights, const float* x, int64_t rows,
                             int64_t d) {
  for (int64_t i = 0; i < count; ++i) {
    float* out = reinterpret_cast<float*>(const_cast<char*>(pool.row[i]));
    if (rows == 1 && n == 128) {
      add_scaled<1, 128>(out, n, weights + i, x, d);
      continue;
    }
    for_passes(rows, [&](int64_t r, int64_t size) __attribute__((always_inline)) {
      const float* w = weights + r * kSmallQKeys + i;
      switch (size) {
        case 1: return add_scaled<1>(out, n, w, x + r * d, d);
        case 2: return add_scaled<2>(out, n, w, x + r * d, d);
        case 3: return add_scaled<3>(out, n, w, x + r * d, d);
        default: return add_scaled<4>(out, n, w, x + r * d, d);
      }
    });
  }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
