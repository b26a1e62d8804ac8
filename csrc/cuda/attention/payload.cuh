// Payloads of 8 bits as tensor cores take them: pairs of T, by bits and one exact multiplication and addition. No conversion of these
// types is on all GPUs that are served.
#pragma once
#include "launch.cuh"

namespace diffmas::cuda {

// The formats.
struct int8 {};
struct e4m3 {};

// What a number of T is short of its payload: T = payload / kUnit, exactly. Of float16, which is too short for small scales: those are
// multiplied with kUnit. int8: 64, so that no more than half of a row's largest element becomes of its scale.
template <class T, class P>
constexpr float kUnit = std::is_same_v<T, bf16> ? 1 : std::is_same_v<P, int8> ? 64 : 256;

// Of the four payloads in a word: the even ones and the odd ones.
struct Pairs {
  uint32_t even, odd;
};

// Two e4m3 without NaN, in the upper halves of the 16-bit elements of x; what is in the lower ones does not matter.
template <class T>
__device__ __forceinline__ uint32_t pair_of_e4m3(uint32_t x) {
  // A float16 of these bits is 2^8 times smaller, a bfloat16 2^120 times, also where it is subnormal.
  if constexpr (std::is_same_v<T, f16>) return (x & 0x80008000u) | (x >> 1 & 0x3F803F80u);
  else return multiply_add_pairs<T>((x & 0x80008000u) | (x >> 4 & 0x07F007F0u), 0x7B807B80u, 0x80008000u);
}

// Two int8 in the lower halves, likewise.
template <class T>
__device__ __forceinline__ uint32_t pair_of_int8(uint32_t x) {
  // float16: 1024 + (x + 128) are the bits 0x6400 + (x + 128); / 64 - 18.
  if constexpr (std::is_same_v<T, f16>)
    return multiply_add_pairs<T>(((x ^ 0x00800080u) & 0x00FF00FFu) | 0x64006400u, 0x24002400u, 0xCC80CC80u);
  // bfloat16: 128 + the lower seven bits, minus 128 or, where the eighth is set, 256.
  else return multiply_add_pairs<T>((x & 0x00800080u) | 0x43004300u, 0xBF80BF80u, (x & 0x007F007Fu) | 0x43004300u);
}

template <class T, class P>
__device__ __forceinline__ Pairs pairs_of(uint32_t word) {
  if constexpr (std::is_same_v<P, int8>) return {pair_of_int8<T>(word), pair_of_int8<T>(word >> 8)};
  else return {pair_of_e4m3<T>(word << 8), pair_of_e4m3<T>(word)};
}

}  // namespace diffmas::cuda
