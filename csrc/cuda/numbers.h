// Numbers of three dtypes, and packs of them as they lie in memory. Include device.h, not this: it brings CUDA's types or their emulation.
#pragma once
#include <cstdint>
#include <type_traits>

namespace diffmas::cuda {

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// Two 16-bit elements in a word, `low` at the lower address.
template <class T>
__device__ __forceinline__ uint32_t two_from_floats(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>)
    return __bfloat16_as_ushort(from_float<bf16>(low)) | uint32_t(__bfloat16_as_ushort(from_float<bf16>(high))) << 16;
  else return __half_as_ushort(from_float<f16>(low)) | uint32_t(__half_as_ushort(from_float<f16>(high))) << 16;
}

// x, hidden from the compiler: it computes what depends on x where that is needed, instead of keeping it in registers.
__device__ __forceinline__ int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// N elements as they lie in memory, in whole words: 16-bit elements are not taken apart before they are used, which would double
// their registers. 16 bytes are one access.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static_assert(sizeof(T) * N % 4 == 0);
  static constexpr int kWords = sizeof(T) * N / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else if constexpr (std::is_same_v<T, bf16>) return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    else return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))));
  }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> pack(const float (&x)[N]) {
  Pack<T, N> y;
#pragma unroll
  for (int i = 0; i < y.kWords; ++i) {
    if constexpr (sizeof(T) == 4) y.words[i] = __float_as_uint(x[i]);
    else y.words[i] = two_from_floats<T>(x[2 * i], x[2 * i + 1]);
  }
  return y;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> zeros() {
  Pack<T, N> y;
#pragma unroll
  for (int i = 0; i < y.kWords; ++i) y.words[i] = 0;
  return y;
}

// p is aligned to the pack.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// Loads memory that nothing writes while the kernel runs: the compiler may move the load before a store.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_constant(const T* p) {
  if constexpr (sizeof(T) * N % 16 == 0) {
    Pack<T, N> y;
#pragma unroll
    for (int i = 0; i < y.kWords; i += 4) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      y.words[i] = x.x, y.words[i + 1] = x.y, y.words[i + 2] = x.z, y.words[i + 3] = x.w;
    }
    return y;
  }
  return load<N>(p);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& x) {
  *reinterpret_cast<Pack<T, N>*>(p) = x;
}

}  // namespace diffmas::cuda
