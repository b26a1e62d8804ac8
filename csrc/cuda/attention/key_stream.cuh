// Brings K and V from the pools to shared memory. Each warp has a ring of asynchronous copies; the ring knows nothing of segments, so it
// does not run dry between them.
#pragma once
#include "row_numbers.cuh"
#include "tile.cuh"
#include "work.cuh"

namespace diffmas::cuda {

// Copies a chunk of a row, or zeros where it is not valid: pool rows that were never written may hold NaN.
template <class T, bool kVectors, class Row>
__device__ __forceinline__ void copy_chunk(char* to, Row row, bool valid, int slot, const AttentionLaunch& launch) {
  if constexpr (kVectors) {
    const int d = launch.slots.dim(slot);
    copy_async_16(to, row + max(d, 0), valid && d >= 0);
  } else {
#pragma unroll 1
    for (int e = 0; e < 16 / int(sizeof(T)); ++e) {
      const int d = launch.slots.dim(slot + e);
      reinterpret_cast<T*>(to)[e] = valid && d >= 0 ? element(row, d) : 0;
    }
  }
}

// Maps positions of a view, which a lane asks for in rising order, to pool rows and position offsets.
struct Cursor {
  int s, end, to_row, offset;

  // Starts before the first segment that reaches beyond n_first.
  __device__ __forceinline__ Cursor(const Segments& view, const Work& work) : s(work.s_first - 1), end(0), to_row(0), offset(0) {
    for (int first = work.s_first; first < work.s_last; first += 32) {
      const int mine = first + lane_id();
      const int mine_end = end + warp_scan(mine < work.s_last ? int(view.length[mine]) : 0);
      const int passed = __popc(__ballot_sync(~0u, mine < work.s_last && mine_end <= work.n_first));
      if (passed) end = __shfl_sync(~0u, mine_end, passed - 1);
      s += passed;
      if (passed < 32) break;
    }
  }
  __device__ __forceinline__ int row(const Segments& view, int position) {
    if (position >= end) {
      int begin;
      do {
        begin = end, end += int(view.length[++s]);
      } while (position >= end);
      to_row = int(view.start[s]) - begin;
      offset = view.offset ? int(view.offset[s]) : 0;
    }
    return position + to_row;
  }
};

// How the forward and dq use a multiprocessor: up to four warps with a ring of their own, 100 KB a block. Query rows are in registers
// where those suffice. InRing: the tiles of the ring.
template <class T, int D, class InRing = Tile<T, D>>
struct Form {
  using Keys = InRing;
  static constexpr int kDim = D;
  static constexpr int kRowBytes = D * int(sizeof(T)), kWarps = kRowBytes <= 256 ? 4 : 1024 / kRowBytes;
  static constexpr int kBlocks = kRowBytes <= 128 ? 3 : 2;  // of a multiprocessor
  static constexpr bool kInRegisters = sizeof(T) == 2 && D <= 128;
  static constexpr int kStages = kInRegisters ? 3 : 2;
  using Queries = std::conditional_t<kInRegisters, RegisterTile<T, D>, Tile<T, D>>;

  // Shared memory: the ring, a rotation table a warp, query rows, numbers of the rows.
  static constexpr int kRing = kWarps * kStages * 2 * Keys::kBytes, kTable = D / 2 * int(sizeof(float2));
  static constexpr int kTables = kRing, kQueries = kTables + kWarps * kTable;
  static constexpr int kForwardBytes = kQueries + (kInRegisters ? 0 : kWarps * Tile<T, D>::kBytes);
  static constexpr int kNumbers = kForwardBytes + (kInRegisters ? 0 : Tile<T, D>::kBytes);  // backward: behind a tile of do
  static constexpr int kBackwardBytes = kNumbers + kTileRows * int(sizeof(RowNumbers));
  static_assert(kWarps * kTileRows * (D + 2) * int(sizeof(float)) <= kRing);  // the warps' states go there in the end
  static_assert(kBackwardBytes <= kMaxShared);

  __device__ __forceinline__ static float2* table(char* shared) { return reinterpret_cast<float2*>(shared + kTables + warp_id() * kTable); }
  // The i-th tile of query rows, a warp's own or the block's.
  __device__ __forceinline__ static Queries queries(char* shared, int i) {
    if constexpr (kInRegisters) return {};
    else return {shared + kQueries + i * Tile<T, D>::kBytes};
  }
};

// This warp's tiles of a block's keys, rows of kind R (pool_rows.cuh, payload_rows.cuh). The constructor starts the first copies, before
// the query rows are read.
template <class R>
struct KeyStream {
  using F = typename R::F;
  using Keys = typename F::Keys;
  static constexpr int kStep = F::kWarps * kTileKeys;

  const AttentionLaunch& launch;
  const int end, first, count;
  char* const ring;
  const R rows;
  Cursor cursor;
  int offsets[F::kStages];  // of key lane % 16 of the tiles under way

  __device__ __forceinline__ KeyStream(const AttentionLaunch& launch, const Work& work, char* shared)
      : launch(launch),
        end(work.n_end),
        first(work.n_first + warp_id() * kTileKeys),
        count(max(end - first + kStep - 1, 0) / kStep),
        ring(shared + warp_id() * F::kStages * 2 * Keys::kBytes),
        rows(launch),
        cursor(launch.a.view, work) {
#pragma unroll
    for (int i = 0; i < F::kStages - 1; ++i) offsets[i] = copy(i);
  }

  // visit(K tile, V tile, position of the first key, number of keys, offset of key lane % 16)
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    for (int i = 0; i < count; ++i) {
      copy_async_wait<F::kStages - 2>();
      __syncwarp();  // all lanes' copies have arrived, and all lanes have read the tile that the next copies overwrite
      offsets[F::kStages - 1] = copy(i + F::kStages - 1);
      const int position = first + i * kStep;
      visit(stage(i, 0), stage(i, 1), position, min(end - position, kTileKeys), offsets[0]);
#pragma unroll
      for (int j = 0; j + 1 < F::kStages; ++j) offsets[j] = offsets[j + 1];
    }
    copy_async_wait<0>();
  }

 private:
  __device__ __forceinline__ Keys stage(int i, int v) const { return {ring + (i % F::kStages * 2 + v) * Keys::kBytes}; }

  // -> the offset of key lane % 16.
  __device__ __forceinline__ int copy(int i) {
    if (i < count) {
      const int position = first + i * kStep + lane_id() % kTileKeys;
      const int row = position < end ? cursor.row(launch.a.view, position) : -1;
      rows.copy(stage(i, 0), stage(i, 1), row);
    }
    copy_async_commit();
    return cursor.offset;
  }
};

// Takes the keys of one position offset out of `left`, a bit for every key of a tile, and returns them.
__device__ __forceinline__ unsigned take_offset(int offsets, unsigned& left, int& offset) {
  offset = __shfl_sync(~0u, offsets, __ffs(int(left)) - 1);
  const unsigned same = __ballot_sync(~0u, offsets == offset) & left;
  left &= ~same;
  return same;
}

}  // namespace diffmas::cuda
