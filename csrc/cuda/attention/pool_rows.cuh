// Rows of a pool in T, or of any dtype one element at a time: what a kernel that walks keys does with them.
#pragma once
#include "key_stream.cuh"
#include "query_rows.cuh"

namespace diffmas::cuda {

template <class T, int D, bool kVectors>
struct PoolRows {
  using F = Form<T, D>;
  using Keys = Tile<T, D>;
  using Row = decltype(row_of<T, kVectors>(Rows{}, 0, 0));

  const AttentionLaunch& launch;
  const Row k_rows, v_rows;

  __device__ __forceinline__ explicit PoolRows(const AttentionLaunch& launch)
      : launch(launch),
        k_rows(row_of<T, kVectors>(launch.a.k_pool, 0, blockIdx.y)),
        v_rows(row_of<T, kVectors>(launch.a.v_pool, 0, blockIdx.y)) {}

  // Starts the copies of a tile. row: of key lane % 16; -1: none.
  __device__ __forceinline__ void copy(Keys k, Keys v, int row) const {
#pragma unroll 8
    for (int j = 0; j < Keys::kChunks / 2; ++j) {
      const int key = lane_id() / Keys::kChunks, chunk = lane_id() % Keys::kChunks;
      const int key0 = 32 * j / Keys::kChunks, chunk0 = 32 * j % Keys::kChunks, slot = (chunk0 + chunk) * Keys::kElements;
      const int key_row = __shfl_sync(~0u, row, key0 + key);
      const int64_t from = max(key_row, 0);
      copy_chunk<T, kVectors>(k.at(key, chunk, key0, chunk0), k_rows + from * launch.a.k_pool.stride_row, key_row >= 0, slot, launch);
      copy_chunk<T, kVectors>(v.at(key, chunk, key0, chunk0), v_rows + from * launch.a.v_pool.stride_row, key_row >= 0, slot, launch);
    }
  }

  // Reads a tile of q, rotated by the table if there is one.
  template <class To>
  __device__ __forceinline__ static void read_queries(To& to, const AttentionLaunch& launch, const Work& work, const float2* table) {
    put_rows<T, D, kVectors>(to, launch, work, launch.a.q, table);
  }

  // What a key's products with q are multiplied with, to be scores.
  __device__ __forceinline__ static float score_scale(const Keys&, float scale, int) { return scale; }

  // Writes four slots of a query's row of o or dq.
  __device__ __forceinline__ static void write(const AttentionLaunch& launch, const Rows& rows, QueryRow at, int slot,
                                               const float (&x)[4]) {
    const Row row = row_of<T, kVectors>(rows, at.token, at.head);
    if constexpr (kVectors) {
      const int d = launch.slots.dim(slot);
      if (d >= 0) store<4>(row + d, pack<T>(x));
    } else {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int d = launch.slots.dim(slot + e);
        if (d >= 0) set_element(row, d, x[e]);
      }
    }
  }
};

}  // namespace diffmas::cuda
