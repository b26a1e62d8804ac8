// Tiles of 16 rows in shared memory or registers, and a warp's products of them.
#pragma once
#include "launch.cuh"

namespace diffmas::cuda {

// 16 rows of D elements. The place of a 16-byte chunk within its row depends on the row, so that eight rows of one chunk, as well as the
// chunks of one row, are in different banks.
template <class T, int D>
struct Tile {
  static constexpr int kElements = 16 / sizeof(T), kChunks = D / kElements, kBytes = 16 * D * int(sizeof(T));
  static constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7, kTogether = kChunks < 8 ? 8 / kChunks : 1;  // rows that fill the banks
  char* data;

  // Chunk [row0 + row][chunk0 + chunk], when no bit is set in both of row0 and row, nor in chunk0 and chunk. With row0 and chunk0
  // known when compiling, a loop over them needs one register and not one for each of its addresses.
  __device__ __forceinline__ char* at(int row, int chunk, int row0 = 0, int chunk0 = 0) const {
    const int place = (row * kChunks + (chunk ^ (row / kTogether & kMask))) ^ ((row0 / kTogether ^ chunk0) & kMask);
    return data + place * 16 + (row0 * kChunks + (chunk0 & ~kMask)) * 16;
  }
  // As the left side of a product, and as what rows are read into (see put_rows).
  __device__ __forceinline__ void left(int unit, uint32_t (&a)[4]) const {
    load_tiles<false>(a, at(lane_id() % 16, lane_id() / 16, 0, 2 * unit));
  }
  __device__ __forceinline__ void put(int unit, int h, int c, const float (&x)[2]) const {
    const int slot = 8 * c + lane_id() % 4 * 2;
    store<2>(reinterpret_cast<T*>(at(lane_id() / 4, slot / kElements, 8 * h, 16 / kElements * unit)) + slot % kElements, pack<T>(x));
  }
};

// The same in registers, as the left side of products only.
template <class T, int D>
struct RegisterTile {
  uint32_t words[D / 16][4];

  __device__ __forceinline__ void left(int unit, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[unit][i];
  }
  __device__ __forceinline__ void put(int unit, int h, int c, const float (&x)[2]) { words[unit][h + 2 * c] = pack<T>(x).words[0]; }
};

// Products of a warp. A result [16 x 8 N] is x[N][4]: a lane has two columns, beginning with 2 (lane % 4), of row lane / 4 and of the row
// eight below it.

// x [16 x 16] += a [16 x D] b' [D x 16]
template <class T, int D, class Left>
__device__ __forceinline__ void add_scores(float (&x)[2][4], const Left& a, const Tile<T, D>& b) {
  const int lane = hidden(lane_id());
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int unit = 0; unit < D / 16; ++unit) {
      uint32_t left[4], right[4];
      a.left(unit, left);
      load_tiles<false>(right, b.at(lane / 16 * 8 + lane % 8, lane / 8 % 2, 0, 2 * unit));
      multiply_add<T>(x[0], left, right[0], right[1]);
      multiply_add<T>(x[1], left, right[2], right[3]);
    }
  } else {
#pragma unroll 2
    for (int chunk = 0; chunk < D / 4; ++chunk)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Pack<float, 4> left = load<4>(reinterpret_cast<const float*>(a.at(lane / 4, 0, 8 * h, chunk)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Pack<float, 4> right = load<4>(reinterpret_cast<const float*>(b.at(lane % 4 * 2, 0, i / 2 * 8 + i % 2, chunk)));
#pragma unroll
          for (int e = 0; e < 4; ++e) x[i / 2][2 * h + i % 2] += left[e] * right[e];
        }
      }
  }
}

// sum [16 x 8 N] += p [16 x 16] b [16 x 8 N], columns of b from slot `first` on
template <class T, int D, int N>
__device__ __forceinline__ void add_product(float (&sum)[N][4], const float (&p)[2][4], const Tile<T, D>& b, int first = 0) {
  const int lane = hidden(lane_id());
  if constexpr (sizeof(T) == 2) {
    uint32_t left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = two_from_floats<T>(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t right[4];
      load_tiles<true>(right, b.at(lane % 16, lane / 16, 0, first / 8 + j));
      multiply_add<T>(sum[j], left, right[0], right[1]);
      multiply_add<T>(sum[j + 1], left, right[2], right[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)  // the four sets of keys i / 2 * 8 + i % 2 + 0, 2, 4, 6, whose p is in register i % 2 of one lane each
#pragma unroll 1
      for (int t = 0; t < 4; ++t) {
        const float low = __shfl_sync(~0u, p[i / 2][i % 2], t, 4), high = __shfl_sync(~0u, p[i / 2][2 + i % 2], t, 4);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const char* chunk = b.at(2 * t, lane % 4 / 2, i / 2 * 8 + i % 2, first / 4 + 2 * j);
          const Pack<float, 2> right = load<2>(reinterpret_cast<const float*>(chunk) + lane % 2 * 2);
          sum[j][0] += low * right[0], sum[j][1] += low * right[1], sum[j][2] += high * right[0], sum[j][3] += high * right[1];
        }
      }
  }
}

}  // namespace diffmas::cuda
