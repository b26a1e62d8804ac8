// dQ of backward_sm90.cuh: blocks of pool rows add what they have of a tile of query rows in the order of their rows, in float32; then a
// small kernel brings the sums to dq.
#pragma once
#include "backward_feed.cuh"

namespace diffmas::cuda {

// One warp for each warpgroup that computes dQ.
template <int D>
__device__ __forceinline__ void carry_sums(const BackwardLaunch& launch, const BackwardShared<D>& shared, int block, int head,
                                           int warpgroup) {
  using F = BackwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  int i = 0;
  for_each_tile(launch, block, [&](int b, int tile, bool) {
    const int turn = i++;
    if (F::kPanels == 1 && turn % 2 != warpgroup) return;
    wait_for(shared.sums_full(warpgroup), turn / (3 - F::kPanels) & 1);
    if (lane_id() == 0) {
      int before = launch.readers.of(block, b).before;  // the last one that adds to the tile
      while (before >= 0 && launch.readers.of(before, b).token >= (tile + 1) * launch.tokens) before = launch.readers.of(before, b).before;
      const int64_t place =
          launch.place(first_tile(l.a.view, b, launch.tokens) + tile, head, F::kPanels == 1 ? 0 : warpgroup, F::kPanels);
      float *const to = launch.sums + place * F::kSums, *const from = shared.query_sums(warpgroup);
      wait_for_word(launch.marks + place, unsigned(before + 1));
      if (before < 0) store_in_bulk(to, from, F::kSums * int(sizeof(float)));
      else add_in_bulk(to, from, F::kSums * int(sizeof(float)));
      wait_for_bulk_reads();
      arrive(shared.sums_empty(warpgroup));
      wait_for_bulk();
      set_word(launch.marks + place, unsigned(block) + 1);
    }
    __syncwarp();
  });
}

constexpr int kSumsThreads = 128;

// A block for every tile and K/V head. Two rows of the 16 of a warp lie side by side.
template <class T, int D>
__global__ void __launch_bounds__(kSumsThreads) attention_bwd_kernel_dq_sums(const __grid_constant__ BackwardLaunch launch) {
  using F = BackwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  const TokenTile tile = find_tile(l.a.view, int(blockIdx.x), launch.tokens);
  if (tile.count <= 0) return;
  const int head = int(blockIdx.y);
  const int64_t place = launch.place(int(blockIdx.x), head, 0, F::kPanels);
  const bool seen = launch.marks[place] != 0;  // otherwise it sees nothing
#pragma unroll 2
  for (int i = int(threadIdx.x); i < F::kQueries / 2 * (D / 4); i += kSumsThreads) {
    const int pair = i / (D / 4), d = i % (D / 4) * 4, thread = pair / 8 * 32 + pair % 8 * 4 + d % 8 / 2;
    if (d >= l.a.head_dim) continue;
    const float* const from = launch.sums + (place + d / kPanelElements) * F::kSums + (d % kPanelElements / 8 * 128 + thread) * 4;
    const Pack<float, 4> low = seen ? load<4>(from) : zeros<float, 4>(), high = seen ? load<4>(from + 4) : zeros<float, 4>();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = pair / 8 * 16 + pair % 8 + 8 * h;
      if (row >= tile.count * l.group) continue;
      T* const to = row_of<T>(l.a.dq, tile.first + row / l.group, head * l.group + row % l.group) + d;
      store<4>(to, pack<T>({low[2 * h] * l.a.scale, low[2 * h + 1] * l.a.scale, high[2 * h] * l.a.scale, high[2 * h + 1] * l.a.scale}));
    }
  }
  __syncthreads();
  if (threadIdx.x < F::kPanels) launch.marks[place + threadIdx.x] = 0;
}

}  // namespace diffmas::cuda
