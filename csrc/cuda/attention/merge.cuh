// Merges what the warps of a block, and then the blocks of a tile, have found; the last block to arrive merges the blocks.
#pragma once
#include "key_stream.cuh"

namespace diffmas::cuda {

// Adds up `count` results x [count, 16, D]. kSoftmax: they are softmax states, whose maxima (of log2 scores) and sums are `tops`. Calls
// done(row, slot, x, top, sum) with four of a row's slots at a time.
template <int D, bool kSoftmax, class Done>
__device__ __forceinline__ void merge(int count, int rows, const float* x, const float2* tops, Done done) {
  for (int i = int(threadIdx.x); i < rows * (D / 4); i += int(blockDim.x)) {
    const int row = i / (D / 4), slot = i % (D / 4) * 4;
    float top = -INFINITY, sum = 0, total[4] = {};
    if constexpr (kSoftmax)
      for (int j = 0; j < count; ++j) top = fmaxf(top, tops[j * kTileRows + row].x);
    const float base = top == -INFINITY ? 0 : top;
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      float weight = 1;
      if constexpr (kSoftmax) {
        weight = exp2f(tops[j * kTileRows + row].x - base);
        sum += weight * tops[j * kTileRows + row].y;
      }
      const Pack<float, 4> part = load<4>(x + (j * kTileRows + row) * D + slot);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += weight * part[e];
    }
    done(row, slot, total, top, sum);
  }
}

// Whether this block is the last of `blocks` to arrive; it then sees what the others wrote. The counter returns to zero. `before` is in
// shared memory.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned blocks, unsigned* before) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *before = atomicInc(counter, blocks - 1);
  __syncthreads();
  __threadfence();
  return *before == blocks - 1;
}

// Merges what all warps of all parts have; one block calls done(row, slot, x, top, sum). Overwrites the ring.
template <class F, bool kSoftmax, class Done>
__device__ __forceinline__ void merge_all(const AttentionLaunch& launch, const Work& work, char* shared, const float (&x)[F::kDim / 8][4],
                                          const float (&top)[2], const float (&sum)[2], Done done) {
  constexpr int D = F::kDim, kSize = kTileRows * D, kWarps = F::kWarps;
  float* const warps = reinterpret_cast<float*>(shared);
  float2* const warp_tops = reinterpret_cast<float2*>(warps + kWarps * kSize);
  const int lane = lane_id();
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      store<2>(warps + warp_id() * kSize + row * D + 8 * j + lane % 4 * 2, pack<float>({x[j][2 * h], x[j][2 * h + 1]}));
    if (lane % 4 == 0) warp_tops[warp_id() * kTileRows + row] = make_float2(top[h], sum[h]);
  }
  __syncthreads();
  if (gridDim.z == 1) return merge<D, kSoftmax>(kWarps, work.rows, warps, warp_tops, done);

  const int64_t tiles = int64_t(gridDim.x) * gridDim.y, tile = int64_t(blockIdx.y) * gridDim.x + blockIdx.x, parts = gridDim.z;
  float* const all = launch.parts + tile * parts * kSize;
  float2* const all_tops = reinterpret_cast<float2*>(launch.parts + tiles * parts * kSize) + tile * parts * kTileRows;
  merge<D, kSoftmax>(kWarps, work.rows, warps, warp_tops, [&](int row, int slot, const float (&x)[4], float top, float sum) {
    store<4>(all + int64_t(blockIdx.z) * kSize + row * D + slot, pack<float>(x));
    if (kSoftmax && slot == 0) all_tops[int(blockIdx.z) * kTileRows + row] = make_float2(top, sum);
  });
  unsigned* const before = reinterpret_cast<unsigned*>(shared + F::kTables);
  if (last_to_arrive(launch.counters + tile, gridDim.z, before)) merge<D, kSoftmax>(int(parts), work.rows, all, all_tops, done);
}

}  // namespace diffmas::cuda
