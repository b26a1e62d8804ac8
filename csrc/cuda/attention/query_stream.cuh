// Brings query rows (q and do) from global memory to shared memory for the blocks of dK and dV. In 16-bit types asynchronous copies fill a
// ring, and q is rotated there after it has arrived.
#pragma once
#include "key_stream.cuh"
#include "query_rows.cuh"

namespace diffmas::cuda {

// A tile as the left side of products, its first kHeld units in registers.
template <class T, int D, int kHeld>
struct HeldTile {
  Tile<T, D> tile;
  uint32_t words[kHeld > 0 ? kHeld : 1][4];

  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int unit = 0; unit < kHeld; ++unit) tile.left(unit, words[unit]);
  }
  __device__ __forceinline__ void left(int unit, uint32_t (&a)[4]) const {
    if (unit >= kHeld) return tile.left(unit, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[unit][i];
  }
  __device__ __forceinline__ const char* at(int row, int chunk, int row0, int chunk0) const { return tile.at(row, chunk, row0, chunk0); }
};

// How dK and dV use a multiprocessor. A warp owns 16 pool rows, beyond 128 dimensions half of theirs, and keeps the sums of dK and dV in
// registers. In 16-bit types query rows come through a ring of two tiles, and the remaining registers hold keys and values.
template <class T, int D>
struct PoolForm {
  using Keys = Tile<T, D>;
  static constexpr bool kAsync = sizeof(T) == 2;
  static constexpr int kWarps = 4, kHalves = D > 128 ? 2 : 1, kSlots = D / kHalves, kGroups = kWarps / kHalves, kRows = 16 * kGroups;
  static constexpr int kBlocks = kAsync && D <= 64 ? 3 : 2;  // of a multiprocessor; one where its shared memory is 100 KB (sm_120)
  static constexpr int kQueries = kAsync && D <= 128 ? 32 : 16, kStages = kAsync ? 2 : 1;
  static constexpr int kHeldKeys = kAsync && D <= 128 ? D / 16 : 0, kHeldValues = kHeldKeys < 4 ? kHeldKeys : 4;
  static constexpr int kAtOnce = 8;  // pairs of gradients that are loaded before the first is stored

  // Shared memory: tiles of K, of V, the ring of q and do, base and delta of its rows, a rotation table, votes of two kinds.
  static constexpr int kRing = 2 * kGroups * Keys::kBytes, kOne = kQueries / 16 * Keys::kBytes, kNumbers = kRing + kStages * 2 * kOne;
  static constexpr int kTable = kNumbers + kStages * kQueries * int(sizeof(float2)), kVotes = kTable + D / 2 * int(sizeof(float2));
  static constexpr int kBytes = kVotes + 2 * kWarps * int(sizeof(unsigned));
  static_assert(kBytes <= kMaxShared);
};

// Copies query rows [row, row + kQueries) of a sequence's `rows` into a stage of the ring, zeros behind the last one. A thread copies
// whole units of 32 bytes, so it has both slots of a pair and can rotate what it has copied.
template <class T, int D>
struct QueryCopies {
  using F = PoolForm<T, D>;
  using Keys = Tile<T, D>;
  static constexpr int kUnits = D / 16, kStep = 32 * F::kWarps / kUnits;
  static_assert(F::kQueries % kStep == 0);

  // Chunk 0 or 1 of this thread. Where halves are paired, the chunks are neighbours; otherwise neighbouring lanes copy neighbouring chunks.
  __device__ __forceinline__ static int chunk(const Slots& slots, int i) {
    const int unit = hidden(int(threadIdx.x)) % kUnits;
    return slots.half ? 2 * unit + i : unit + i * kUnits;
  }
  __device__ __forceinline__ static void issue(char* shared, int stage, const AttentionLaunch& launch, int q_first, int row, int rows) {
    const AttentionArgs& a = launch.a;
    const Keys q{shared + F::kRing + stage * 2 * F::kOne}, d_o{q.data + F::kOne};
    const auto query = [&](int i) {
      const int r = min(row + i, rows - 1);
      return QueryRow{q_first + r / launch.group, int(blockIdx.y) * launch.group + r % launch.group};
    };
#pragma unroll 1
    for (int i = hidden(int(threadIdx.x)) / kUnits; i < F::kQueries; i += kStep) {
      const bool there = row + i < rows;
      const QueryRow from = query(i);
      const T *q_row = row_of<T>(a.q, from.token, from.head), *d_o_row = row_of<T>(a.d_o, from.token, from.head);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int to = chunk(launch.slots, c), tile = i / 16 * Keys::kBytes;
        copy_chunk<T, true>(Keys{q.data + tile}.at(i % 16, to), q_row, there, to * Keys::kElements, launch);
        copy_chunk<T, true>(Keys{d_o.data + tile}.at(i % 16, to), d_o_row, there, to * Keys::kElements, launch);
      }
    }
    if (const int i = int(threadIdx.x); i < F::kQueries) {
      float2* const numbers = reinterpret_cast<float2*>(shared + F::kNumbers) + stage * F::kQueries + i;
      const int64_t from = int64_t(q_first) * launch.group + min(row + i, rows - 1);
      copy_async_8(numbers, launch.bases_of(int(blockIdx.y)) + from, row + i < rows);
    }
    copy_async_commit();
  }
  // Rotates what this thread has copied of q, after it has arrived.
  __device__ __forceinline__ static void rotate(char* shared, int stage, const AttentionLaunch& launch, const float2* table) {
    const int half = int(launch.a.view.half_rotary);
#pragma unroll 1
    for (int i = int(threadIdx.x) / kUnits; i < F::kQueries; i += kStep) {
      const Keys q{shared + F::kRing + stage * 2 * F::kOne + i / 16 * Keys::kBytes};
      T* at[2];
      float x[2][8];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        at[c] = reinterpret_cast<T*>(q.at(i % 16, chunk(launch.slots, c)));
        const Pack<T, 8> eight = load<8>(at[c]);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[c][e] = eight[e];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (launch.a.interleaved) {
          const int first = chunk(launch.slots, e / 4) * 4 + e % 4;
          if (first < half) rotate_pair(x[e / 4][e % 4 * 2], x[e / 4][e % 4 * 2 + 1], table[first]);
        } else if (chunk(launch.slots, 0) * 4 + e < half) {
          rotate_pair(x[0][e], x[1][e], table[chunk(launch.slots, 0) * 4 + e]);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) store<8>(at[c], pack<T>(x[c]));
    }
  }
};

// The same as QueryCopies without asynchronous copies.
template <class T, int D, bool kVectors>
__device__ __forceinline__ void put_queries(char* shared, const AttentionLaunch& launch, int q_first, int row, int rows,
                                            const float2* table) {
  using F = PoolForm<T, D>;
  Work work;
  work.q_first = q_first, work.row_first = row, work.rows = min(F::kQueries, rows - row);
  Tile<T, D> q{shared + F::kRing}, d_o{shared + F::kRing + F::kOne};
  put_rows<T, D, kVectors>(q, launch, work, launch.a.q, table, warp_id(), F::kWarps);
  put_rows<T, D, kVectors>(d_o, launch, work, launch.a.d_o, nullptr, warp_id(), F::kWarps);
  if (threadIdx.x < F::kQueries) {
    const bool there = int(threadIdx.x) < work.rows;
    const int64_t from = int64_t(q_first) * launch.group + row + (there ? int(threadIdx.x) : 0);
    const float2 numbers = launch.bases_of(int(blockIdx.y))[from];
    reinterpret_cast<float2*>(shared + F::kNumbers)[threadIdx.x] = there ? numbers : make_float2(0, 0);
  }
}

// Writes zeros to rows of q and do whose base is NaN. The base itself makes NaN of the keys that such a row sees; without the zeros,
// 0 times NaN would reach all keys of the warp's tile, also those of other sequences.
template <class T, int D>
__device__ __forceinline__ void clear_not_finite(char* q, const float* numbers) {
  using F = PoolForm<T, D>;
  using Keys = Tile<T, D>;
  const float base = numbers[2 * (hidden(lane_id()) % F::kQueries)];
  const unsigned wrong = __ballot_sync(~0u, base != base);
  if (!wrong) return;  // the same rows in all warps
#pragma unroll 1
  for (int i = hidden(int(threadIdx.x)); i < F::kQueries * Keys::kChunks; i += int(blockDim.x)) {
    const int row = i / Keys::kChunks;
    float* const chunk = reinterpret_cast<float*>(Keys{q + row / 16 * Keys::kBytes}.at(row % 16, i % Keys::kChunks));
    if (wrong >> row & 1) store<4>(chunk, zeros<float, 4>()), store<4>(chunk + F::kOne / 4, zeros<float, 4>());
  }
  __syncthreads();
}

}  // namespace diffmas::cuda
