// The codes of a tile's rows, and the keys that they make (common/low_rank.h), for one head.
#pragma once
#include "rotary.h"
#include "small_q.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

constexpr int64_t kPart = 64;             // keys of a tile that are built at once and stay in L1
constexpr int kTogether = W == 16 ? 8 : 4;  // of which so many are in registers

// RoPE of a row's rotary part by the cos and sin of its pairs, in place, or back.
template <bool kBack>
void turn(float* x, const float* cos, const float* sin, int64_t rotary, bool interleaved) {
  const auto both = [](auto& a, auto& b, auto cos, auto sin) __attribute__((always_inline)) {
    const auto first = a, second = b;
    a = kBack ? first * cos + second * sin : first * cos - second * sin;
    b = kBack ? second * cos - first * sin : second * cos + first * sin;
  };
  const int64_t half = rotary / 2;
  int64_t i = 0;
  if (interleaved) {
    for (; i < half; ++i) both(x[2 * i], x[2 * i + 1], cos[i], sin[i]);
    return;
  }
  for (; i + W <= half; i += W) {
    vf a = load(x + i), b = load(x + i + half);
    both(a, b, load(cos + i), load(sin + i));
    store(x + i, a), store(x + i + half, b);
  }
  for (; i < half; ++i) both(x[i], x[i + half], cos[i], sin[i]);
}

// The codes of a tile's rows, for one head.
struct Codes {
  const QueryBlock& q;
  const ScheduledAttention& args;
  const LowRank& low;
  const int64_t k_pad, v_pad;
  int64_t* code;    // [count]
  float *z_k, *z_v;  // [count, padded rank]

  Codes(const QueryBlock& q, float*& scratch)
      : q(q), args(q.args), low(*q.args.low), k_pad(padded_rank(low.k.rank)), v_pad(padded_rank(low.v.rank)),
        code(reinterpret_cast<int64_t*>(take(scratch, 2 * kSmallQKeys))), z_k(take(scratch, kSmallQKeys * k_pad)),
        z_v(take(scratch, kSmallQKeys * v_pad)) {}

  bool keys() const { return low.k.rank; }
  bool values() const { return low.v.rank; }
  const float* k_by_code() const { return args.low_k.by_code + q.head * low.k.rank * args.padded_dim; }
  const float* v_by_code() const { return args.low_v.by_code + q.head * low.v.rank * args.padded_dim; }
  float factor(const float* of, int64_t i) const { return of ? of[code[i] * args.kv_heads + q.head] : 1.f; }

  void find(const Tile& tile, int64_t count) {
    int64_t segment = tile.segment, token = tile.skip;
    for (int64_t i = 0; i < count; ++i, ++token) {
      while (token == args.view.length[segment]) ++segment, token = 0;
      code[i] = low.code[segment] + token;
    }
    if (keys()) copy(z_k, k_pad, low.k, count);
    if (values()) copy(z_v, v_pad, low.v, count);
  }

  // Without what is beyond the rank, which nobody reads.
  void copy(float* dst, int64_t pad, const LowRankPart& part, int64_t count) const {
    const auto rows = [&](int64_t rank) __attribute__((always_inline)) {
      for (int64_t i = 0; i < count; ++i) __builtin_memcpy(dst + i * pad, part.z + code[i] * part.rank, uint64_t(rank) * sizeof(float));
    };
    switch (part.rank) {
      case 4: return rows(4);
      case 8: return rows(8);
      case 16: return rows(16);
      default: return rows(part.rank);
    }
  }

  template <bool kBack>
  void turn_row(float* x, int64_t i) const {
    const int64_t at = code[i] * low.rotary / 2;
    if (low.cos) turn<kBack>(x, low.cos + at, low.sin + at, low.rotary, args.interleaved);
  }

  // K of the tile's rows, in the buffer [count, d] where it is not the pool's.
  void find_keys(RowTable& k, const Tile& tile, int64_t count, float* buffer) const;
};

// R keys from key i on: their low-rank part is made, turned and added in registers, two halves of a row at a time.
template <DType kType, int R>
DIFFMAS_INLINE void build(const Codes& codes, const char* const* own, int64_t i, float* x) {
  const LowRank& low = codes.low;
  const int64_t d = codes.q.d, half = d / 2, ldb = codes.args.padded_dim, ldz = codes.k_pad, rank = low.k.rank;
  const float *z = codes.z_k + i * ldz, *b = codes.k_by_code(), *cos[R], *sin[R];
  float keep[R], add[R];
  for (int r = 0; r < R; ++r) {
    cos[r] = low.cos + codes.code[i + r] * half, sin[r] = low.sin + codes.code[i + r] * half;
    keep[r] = codes.factor(low.keep, i + r), add[r] = codes.factor(low.add, i + r);
  }
  if (R > 1) fetch<R>(own + R, d * element_size(kType));
  for (int64_t c = 0; c < half; c += W) {
    vf first[R], second[R];
    for (int r = 0; r < R; ++r) first[r] = vf{}, second[r] = vf{};
    for (int64_t j = 0; j < rank; ++j) {
      const vf b0 = load(b + j * ldb + c), b1 = load(b + j * ldb + half + c);
      for (int r = 0; r < R; ++r) first[r] += z[r * ldz + j] * b0, second[r] += z[r * ldz + j] * b1;
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vf cos_c = load(cos[r] + c), sin_c = load(sin[r] + c);
      const vf y0 = first[r] * cos_c - second[r] * sin_c, y1 = second[r] * cos_c + first[r] * sin_c;
      store(x + r * d + c, load_as<kType>(own[r], c) * keep[r] + y0 * add[r]);
      store(x + r * d + half + c, load_as<kType>(own[r], half + c) * keep[r] + y1 * add[r]);
    }
  }
}

template <DType kType>
void build_all(const Codes& codes, const char* const* own, int64_t count, float* buffer) {
  int64_t i = 0;
  for (; i + kTogether <= count; i += kTogether) build<kType, kTogether>(codes, own + i, i, buffer + i * codes.q.d);
  for (; i < count; ++i) build<kType, 1>(codes, own + i, i, buffer + i * codes.q.d);
}

void Codes::find_keys(RowTable& k, const Tile& tile, int64_t count, float* buffer) const {
  if (!keys()) return find_whole_rows<Floats>(k, args, tile, count, args.k_pool, {}, q.head, W, buffer);
  const int64_t d = q.d, D = args.head_dim;
  find_rows(k, args, tile, count, args.k_pool, {}, q.head, false);
  if (low.cos && low.rotary == d && !args.interleaved && d / 2 % W == 0) {
    switch (k.dtype) {
      case DType::f32: build_all<DType::f32>(*this, k.row, count, buffer); break;
      case DType::bf16: build_all<DType::bf16>(*this, k.row, count, buffer); break;
      default: build_all<DType::f16>(*this, k.row, count, buffer);
    }
  } else {
    alignas(64) float own[kMaxHeadDim];
    product<Into::set>(count, d, low.k.rank, {z_k, k_pad, 1}, k_by_code(), args.padded_dim, buffer, d);
    for (int64_t i = 0; i < count; ++i) {
      float* x = buffer + i * d;
      turn_row<false>(x, i);
      load_row(own, k.row[i], k.dtype, D, factor(low.keep, i));
      for (int64_t c = 0; c < D; ++c) x[c] = own[c] + x[c] * factor(low.add, i);
    }
  }
  for (int64_t i = 0; i < count + kPast; ++i) k.row[i] = reinterpret_cast<const char*>(buffer + min(i, count - 1) * d);
  k.dtype = DType::f32;
  k.fetch = false;
}

// Calls visit(part) for the tiles of kPart keys that a tile consists of.
template <class F>
DIFFMAS_INLINE void for_parts(const ScheduledAttention& args, const Tile& tile, const F& visit) {
  Tile part = tile;
  for (int64_t done = 0; done < tile.count; done += kPart) {
    part.count = int32_t(min(kPart, tile.count - done));
    for (; part.skip >= args.view.length[part.segment]; ++part.segment) part.skip -= args.view.length[part.segment];
    visit(part);
    part.view += kPart, part.skip += kPart;
    if (part.row >= 0) part.row += kPart;
  }
}

}  // namespace
}  // namespace diffmas::cpu::DIFFMAS_ISA
