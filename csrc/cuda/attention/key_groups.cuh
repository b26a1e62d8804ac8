// A view as groups of eight keys, which boxes of the copy engine bring to shared memory.
#pragma once
#include "cuda/sm90.h"
#include "launch.cuh"

namespace diffmas::cuda {

constexpr int kGroupKeys = 8;        // rows whose chunks the swizzle permutes: where a box can begin in a panel
constexpr int kNoKey = INT32_MAX;    // the position of what is no key
constexpr int kQuadKeys = 32;        // four groups side by side in the pool are one box
constexpr int kStreamedKeys = 128;   // a tile: two lanes a group

// Up to eight pool rows of one segment.
struct KeyGroup {
  int row, position, keys;  // in the pool, in the view; keys 0: none, a row outside of the pool
};

// Cuts each segment of a view into groups, the last of them with what is left. A tile is 16 groups, so its keys are rows of several
// segments where segments are short. One warp walks along the view, with 32 segments in its lanes at a time.
struct KeyGroups {
  const Segments& view;
  int s, s_last;             // the next segments to look at
  int start, length, begin;  // of this lane's segment; begin: its position in the view
  int ends;                  // groups of the view up to the end of this lane's segment
  int groups = 0, keys = 0;  // of the view up to the end of the last lane's

  __device__ __forceinline__ KeyGroups(const Segments& view, int s_first, int s_last) : view(view), s(s_first), s_last(s_last) { read(); }

  // The group of this lane in a tile; tiles are asked for in rising order. No key from position `end` on is wanted.
  __device__ __forceinline__ KeyGroup find(int tile, int end, int pool_rows) {
    const int group = tile * (kStreamedKeys / kGroupKeys) + lane_id() / 2;
    KeyGroup found{pool_rows + lane_id() / 2 * kGroupKeys, kNoKey, 0};
    for (;;) {
      int i = 0;  // the lane whose segment has the group, if any has
#pragma unroll
      for (int step = 16; step; step /= 2)
        if (__shfl_sync(~0u, ends, i + step - 1) <= group) i += step;
      const int its_length = __shfl_sync(~0u, length, i), its_start = __shfl_sync(~0u, start, i), its_begin = __shfl_sync(~0u, begin, i);
      const int from = (group - __shfl_sync(~0u, ends, i)) * kGroupKeys + groups_of(its_length) * kGroupKeys;
      if (group < groups && from >= 0 && its_begin + from < end)
        found = {its_start + from, its_begin + from, min(kGroupKeys, its_length - from)};
      if (s >= s_last || !__any_sync(~0u, group >= groups)) return found;
      read();
    }
  }

 private:
  __device__ __forceinline__ static int groups_of(int keys) { return (keys + kGroupKeys - 1) / kGroupKeys; }

  __device__ __forceinline__ void read() {
    const int mine = s + lane_id();
    start = mine < s_last ? int(view.start[mine]) : 0, length = mine < s_last ? int(view.length[mine]) : 0;
    const int end = keys + warp_scan(length);
    begin = end - length, ends = groups + warp_scan(groups_of(length));
    keys = __shfl_sync(~0u, end, 31), groups = __shfl_sync(~0u, ends, 31), s += 32;
  }
};

// The boxes of a [Hkv, R, D] pool.
struct PoolMaps {
  TensorMap quad, group;
};

// Copies the rows of a tile into panels, by a warp: a quad is one box where its rows are side by side.
template <int kPanels>
__device__ __forceinline__ void copy_groups(char* to, const PoolMaps& maps, const KeyGroup& mine, int head, Barrier* full) {
  const unsigned goes_on = __ballot_sync(~0u, __shfl_up_sync(~0u, mine.row, 2) + kGroupKeys == mine.row);
#pragma unroll 1
  for (int lane = 0; lane < 32;) {
    const bool whole = lane % 8 == 0 && (goes_on >> lane & 0xFC) == 0xFC;
    const int row = __shfl_sync(~0u, mine.row, lane);
    if (lane_id() == 0)
      for (int panel = 0; panel < kPanels; ++panel)
        copy_box(to + panel * kStreamedKeys * kPanelRow + lane / 2 * kGroupKeys * kPanelRow, whole ? maps.quad : maps.group,
                 panel * kPanelElements, row, head, full);
    lane += whole ? 8 : 2;
  }
}

}  // namespace diffmas::cuda
