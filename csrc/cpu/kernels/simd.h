// One float vector as wide as the instruction set, its loads and stores in three dtypes, and exp.
// GCC/Clang vector extensions: the same source for every instruction set, on x86 and elsewhere.
#pragma once
#include "common/rows.h"
#if defined(__AVX__)
#include <immintrin.h>
#endif

#ifndef DIFFMAS_ISA
#error "compile with -DDIFFMAS_ISA=<generic|avx2|avx512|avx512_bf16|amx|arm_bf16>"
#endif

namespace diffmas::cpu::DIFFMAS_ISA {

#if defined(__AVX512F__) || defined(DIFFMAS_HOST_EMULATION)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));
typedef int8_t vb __attribute__((vector_size(W)));
typedef float vf_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef int32_t vi_any __attribute__((vector_size(W * 4), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(W * 2), aligned(2), may_alias));
typedef int8_t vb_any __attribute__((vector_size(W), aligned(1), may_alias));
typedef float f4 __attribute__((vector_size(16)));
typedef float f4_any __attribute__((vector_size(16), aligned(4), may_alias));

#define DIFFMAS_INLINE static inline __attribute__((always_inline))

constexpr float kInf = __builtin_inff();

DIFFMAS_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
DIFFMAS_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
DIFFMAS_INLINE vf splat(float x) { return x - vf{}; }
DIFFMAS_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
DIFFMAS_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
DIFFMAS_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
DIFFMAS_INLINE int64_t round_up(int64_t x, int64_t m) { return (x + m - 1) / m * m; }

// exp to about 1 ulp; 0 below -87 (the last normal float), NaN stays NaN. x > 88 is clamped: a softmax never gets there.
DIFFMAS_INLINE vf exp(vf x) {
  const vf magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to an integer in the low mantissa bits
  const vf clamped = x > splat(88.f) ? splat(88.f) : x;
  const vf t = clamped * 1.44269504f + magic;
  const vf n = t - magic;
  vf r = clamped - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.f;
  const vi power = ((vi)t - (vi)magic + 127) << 23;
  return x < splat(-87.f) ? vf{} : p * (vf)power;
}

#if defined(__clang__)
#define DIFFMAS_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
typedef int32_t i4 __attribute__((vector_size(16)));
#define DIFFMAS_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, i4{i, j, k, l})
#endif

DIFFMAS_INLINE f4 fold(vf x) {
#if defined(__AVX512F__)
  const __m256 y = _mm256_add_ps(_mm512_castps512_ps256(x), _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(x), 1)));
  return _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
#elif defined(__AVX__)
  return _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
#else
  f4 part[W / 4], total = {};
  __builtin_memcpy(part, &x, sizeof x);
  for (int i = 0; i < W / 4; ++i) total += part[i];
  return total;
#endif
}

// {sum(a), sum(b), sum(c), sum(d)}
DIFFMAS_INLINE f4 sums(vf a, vf b, vf c, vf d) {
  const f4 p = fold(a), q = fold(b), r = fold(c), s = fold(d);
  const f4 t = DIFFMAS_SHUFFLE4(p, q, 0, 4, 1, 5) + DIFFMAS_SHUFFLE4(p, q, 2, 6, 3, 7);
  const f4 u = DIFFMAS_SHUFFLE4(r, s, 0, 4, 1, 5) + DIFFMAS_SHUFFLE4(r, s, 2, 6, 3, 7);
  return DIFFMAS_SHUFFLE4(t, u, 0, 1, 4, 5) + DIFFMAS_SHUFFLE4(t, u, 2, 3, 6, 7);
}

DIFFMAS_INLINE float sum(vf x) {
  const f4 y = fold(x);
  return (y[0] + y[2]) + (y[1] + y[3]);
}

DIFFMAS_INLINE float maximum(vf x) {
  float m = x[0];
  for (int i = 1; i < W; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

DIFFMAS_INLINE float bits_to_float(uint32_t u) {
  float f;
  __builtin_memcpy(&f, &u, 4);
  return f;
}
DIFFMAS_INLINE uint32_t float_to_bits(float f) {
  uint32_t u;
  __builtin_memcpy(&u, &f, 4);
  return u;
}

DIFFMAS_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
  if (body >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (body & 0x3ff) << 13);
  // Shifted into place the exponent is 112 too small; the multiplication mends it and normalises subnormals.
  return bits_to_float(sign | float_to_bits(bits_to_float(body << 13) * 0x1p112f));
}

DIFFMAS_INLINE uint16_t float_to_half(float f) {
  const uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000, body = u & 0x7fffffff;
  if (body > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (body >= 0x477ff000) return uint16_t(sign | 0x7c00);
  // A subnormal half is a multiple of 2^-24: let the adder round at that bit.
  if (body < 0x38800000) return uint16_t(sign | (float_to_bits(bits_to_float(body) + 0.5f) - 0x3f000000));
  return uint16_t(sign | ((body - 0x38000000 + 0xfff + ((body >> 13) & 1)) >> 13));
}

DIFFMAS_INLINE float bfloat_to_float(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
DIFFMAS_INLINE uint16_t float_to_bfloat(float f) {
  const uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffff) > 0x7f800000) return uint16_t(u >> 16 | 0x40);
  return uint16_t((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// Rounded to nearest even.
DIFFMAS_INLINE vh to_bfloats(vf x) {
  const vu u = (vu)x;
  const vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const vu nan = u >> 16 | 0x40;
  return __builtin_convertvector(x == x ? rounded : nan, vh);
}

DIFFMAS_INLINE vf load_bfloats(const uint16_t* p) { return (vf)(__builtin_convertvector(*reinterpret_cast<const vh_any*>(p), vu) << 16); }

DIFFMAS_INLINE vf load_halves(const uint16_t* p) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  vf x;
  for (int i = 0; i < W; ++i) x[i] = half_to_float(p[i]);
  return x;
#endif
}

// Eight bits with their sign in all the bits above.
DIFFMAS_INLINE vi load_bytes(const int8_t* p) {
#if defined(__AVX512F__)
  return (vi)_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (vi)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const vb_any*>(p), vi);
#endif
}

// float8_e4m3fn: four bits of exponent with a bias of 7, three of mantissa, subnormals, one NaN and no infinity. A half of these bits is
// 2^8 times smaller, subnormals included; the NaN is a number there. Shifted into a float's place the exponent is 120 too small; a
// subnormal is a multiple of 2^-9, and would be one as a float too, which some CPUs take long for.
DIFFMAS_INLINE vf load_e4m3(const int8_t* p) {
#if defined(__AVX512F__)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __mmask16 number = _mm_cmpneq_epi8_mask(_mm_or_si128(bytes, _mm_set1_epi8(char(0x80))), _mm_set1_epi8(char(0xff)));
  const __m256i halves = _mm256_and_si256(_mm256_slli_epi16(_mm256_cvtepi8_epi16(bytes), 7), _mm256_set1_epi16(int16_t(0xbf80)));
  return (vf)_mm512_mask_cvtph_ps(_mm512_set1_ps(__builtin_nanf("")), number, halves) * 0x1p8f;
#elif defined(__F16C__) && defined(__AVX2__)
  const __m128i shifted = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 7);
  const __m128i nan = _mm_cmpeq_epi16(_mm_or_si128(shifted, _mm_set1_epi16(int16_t(0xc000))), _mm_set1_epi16(int16_t(0xff80)));
  return (vf)_mm256_cvtph_ps(_mm_or_si128(_mm_and_si128(shifted, _mm_set1_epi16(int16_t(0xbf80))), nan)) * 0x1p8f;
#else
  const vi bytes = load_bytes(p);
  const vi body = bytes & 0x7f, sign = bytes & int32_t(0x80000000);
  const vf normal = (vf)((body << 20) + (120 << 23)), subnormal = __builtin_convertvector(body, vf) * 0x1p-9f;
  const vi positive = body < 8 ? (vi)subnormal : body == 0x7f ? (vi)splat(__builtin_nanf("")) : (vi)normal;
  return (vf)(positive | sign);
#endif
}
DIFFMAS_INLINE float e4m3_to_float(uint8_t byte) {
  const uint32_t body = byte & 0x7f;
  const float x = body < 8 ? float(body) * 0x1p-9f : body == 0x7f ? __builtin_nanf("") : bits_to_float((body << 20) + (120 << 23));
  return byte & 0x80 ? -x : x;
}

// W elements of a row stored as kType, from element c on.
template <DType kType>
DIFFMAS_INLINE vf load_as(const void* row, int64_t c) {
  if constexpr (kType == DType::f32) return load(static_cast<const float*>(row) + c);
  if constexpr (kType == DType::bf16) return load_bfloats(static_cast<const uint16_t*>(row) + c);
  if constexpr (kType == DType::f16) return load_halves(static_cast<const uint16_t*>(row) + c);
  if constexpr (kType == DType::i8) return __builtin_convertvector(load_bytes(static_cast<const int8_t*>(row) + c), vf);
  if constexpr (kType == DType::e4m3) return load_e4m3(static_cast<const int8_t*>(row) + c);
}

DIFFMAS_INLINE void store_halves(uint16_t* dst, const float* src) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm512_cvtps_ph(_mm512_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(_mm256_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < W; ++i) dst[i] = float_to_half(src[i]);
#endif
}

// dst[0:d] = factor * float(src[0:d])
static void load_row(float* dst, const void* src, DType dtype, int64_t d, float factor = 1) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    const float* s = static_cast<const float*>(src);
    for (; i + W <= d; i += W) store(dst + i, load(s + i) * factor);
    for (; i < d; ++i) dst[i] = s[i] * factor;
  } else if (dtype == DType::bf16) {
    const uint16_t* s = static_cast<const uint16_t*>(src);
    for (; i + W <= d; i += W) store(dst + i, load_bfloats(s + i) * factor);
    for (; i < d; ++i) dst[i] = bfloat_to_float(s[i]) * factor;
  } else if (dtype == DType::f16) {
    const uint16_t* s = static_cast<const uint16_t*>(src);
    for (; i + W <= d; i += W) store(dst + i, load_halves(s + i) * factor);
    for (; i < d; ++i) dst[i] = half_to_float(s[i]) * factor;
  } else if (dtype == DType::i8) {
    const int8_t* s = static_cast<const int8_t*>(src);
    for (; i + W <= d; i += W) store(dst + i, load_as<DType::i8>(s, i) * factor);
    for (; i < d; ++i) dst[i] = float(s[i]) * factor;
  } else {
    const uint8_t* s = static_cast<const uint8_t*>(src);
    for (; i + W <= d; i += W) store(dst + i, load_as<DType::e4m3>(s, i) * factor);
    for (; i < d; ++i) dst[i] = e4m3_to_float(s[i]) * factor;
  }
}

// dst[0:d] = src[0:d], rounded to nearest even.
static void store_row(void* dst, const float* src, DType dtype, int64_t d) {
  int64_t i = 0;
  if (dtype == DType::f32) {
    float* t = static_cast<float*>(dst);
    for (; i + W <= d; i += W) store(t + i, load(src + i));
    for (; i < d; ++i) t[i] = src[i];
  } else if (dtype == DType::bf16) {
    uint16_t* t = static_cast<uint16_t*>(dst);
    for (; i + W <= d; i += W) *reinterpret_cast<vh_any*>(t + i) = to_bfloats(load(src + i));
    for (; i < d; ++i) t[i] = float_to_bfloat(src[i]);
  } else {
    uint16_t* t = static_cast<uint16_t*>(dst);
    for (; i + W <= d; i += W) store_halves(t + i, src + i);
    for (; i < d; ++i) t[i] = float_to_half(src[i]);
  }
}

static float sum_of_squares(const float* x, int64_t d) {
  vf a = {}, b = {}, c = {}, e = {};
  int64_t i = 0;
  for (; i + 4 * W <= d; i += 4 * W) {
    const vf p = load(x + i), q = load(x + i + W), r = load(x + i + 2 * W), s = load(x + i + 3 * W);
    a += p * p, b += q * q, c += r * r, e += s * s;
  }
  for (; i + W <= d; i += W) a += load(x + i) * load(x + i);
  float total = sum((a + b) + (c + e));
  for (; i < d; ++i) total += x[i] * x[i];
  return total;
}

DIFFMAS_INLINE constexpr int64_t element_size(DType dtype) {
  return dtype == DType::f32 ? 4 : dtype == DType::bf16 || dtype == DType::f16 ? 2 : 1;
}

DIFFMAS_INLINE char* row_of(const Rows& rows, int64_t row, int64_t head) {
  return static_cast<char*>(rows.data) + (row * rows.stride_row + head * rows.stride_head) * element_size(rows.dtype);
}

DIFFMAS_INLINE float scale_of(const Scales& scales, int64_t row, int64_t head) {
  return scales.data ? scales.data[row * scales.stride_row + head * scales.stride_head] : 1.f;
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
