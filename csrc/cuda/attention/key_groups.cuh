// A view as groups of eight keys, which boxes of the copy engine bring to shared memory.
#pragma once
#include "cuda/sm90.h"
#include "work.cuh"

namespace diffmas::cuda {

constexpr int kGroupKeys = 8;       // rows whose chunks the swizzle permutes: where a box can begin in a panel
constexpr int kQuadKeys = 32;       // of four groups side by side in the pool
constexpr int kStreamedKeys = 128;  // of a tile: two lanes a group
constexpr int kNoKey = INT32_MAX;   // the position of what is no key

// Up to eight pool rows of one segment.
struct KeyGroup {
  int row, position, keys;  // in the pool, in the view; keys 0: none, a row outside of the pool
};

// Cuts each segment of a view into groups, the last of them with what is left. A tile is 16 groups, so its keys are rows of several
// segments where segments are short. One warp walks along the view, with 32 segments in its lanes at a time.
class KeyGroups {
  struct Segment {
    int start, begin, length;  // in the pool, in the view
    int end;                   // groups of the view up to its end

    __device__ __forceinline__ int groups() const { return (length + kGroupKeys - 1) / kGroupKeys; }
    __device__ __forceinline__ Segment of(int lane) const {
      return {__shfl_sync(~0u, start, lane), __shfl_sync(~0u, begin, lane), __shfl_sync(~0u, length, lane), __shfl_sync(~0u, end, lane)};
    }
  };
  const Segments& view;
  int s, s_last;                // the next segments to look at
  int groups = 0, keys = 0;     // of the view before these
  Segment in_lane, found = {};  // the segment that this lane has for others, the one that its last group is of

  __device__ __forceinline__ void read() {
    const int mine = s + lane_id();
    in_lane.start = mine < s_last ? int(view.start[mine]) : 0, in_lane.length = mine < s_last ? int(view.length[mine]) : 0;
    const int end = keys + warp_scan(in_lane.length);
    in_lane.begin = end - in_lane.length, in_lane.end = groups + warp_scan(in_lane.groups());
    keys = __shfl_sync(~0u, end, 31), groups = __shfl_sync(~0u, in_lane.end, 31), s += 32;
  }

 public:
  __device__ __forceinline__ KeyGroups(const Segments& view, int s_first, int s_last) : view(view), s(s_first), s_last(s_last) { read(); }

  // The group of this lane in a tile; tiles are asked for in rising order. No key from position `end` on is wanted.
  __device__ __forceinline__ KeyGroup find(int tile, int end, int pool_rows) {
    const int group = tile * (kStreamedKeys / kGroupKeys) + lane_id() / 2;
    if (__any_sync(~0u, group >= found.end)) {
      for (;;) {
        int lane = 0;  // that has the group's segment, if any has
#pragma unroll
        for (int step = 16; step; step /= 2)
          if (__shfl_sync(~0u, in_lane.end, lane + step - 1) <= group) lane += step;
        const Segment its = in_lane.of(lane);
        if (group >= found.end && group < groups) found = its;
        if (s >= s_last || !__any_sync(~0u, group >= groups)) break;
        read();
      }
    }
    const int from = (group - found.end + found.groups()) * kGroupKeys;
    if (group >= found.end || found.begin + from >= end) return {pool_rows + lane_id() / 2 * kGroupKeys, kNoKey, 0};
    return {found.start + from, found.begin + from, min(kGroupKeys, found.length - from)};
  }
};

// A [Hkv, R, D] pool in boxes of a tile's rows, a quad's, a group's.
struct PoolMaps {
  TensorMap tile, quad, group;
};

// Copies the rows of a tile into panels, by a warp, in the largest boxes whose rows are side by side.
template <int kPanels>
__device__ __forceinline__ void copy_groups(char* to, const PoolMaps& maps, const KeyGroup& mine, int head, Barrier* full) {
  const unsigned goes_on = __ballot_sync(~0u, __shfl_up_sync(~0u, mine.row, 2) + kGroupKeys == mine.row);
#pragma unroll 1
  for (int lane = 0; lane < 32;) {
    const bool whole = lane == 0 && goes_on >> 2 == ~0u >> 2, quad = lane % 8 == 0 && (goes_on >> lane & 0xFC) == 0xFC;
    const int row = __shfl_sync(~0u, mine.row, lane);
    if (lane_id() == 0)
      for (int panel = 0; panel < kPanels; ++panel)
        copy_box(to + panel * kStreamedKeys * kPanelRow + lane / 2 * kGroupKeys * kPanelRow,
                 whole  ? maps.tile
                 : quad ? maps.quad
                        : maps.group,
                 panel * kPanelElements, row, head, full);
    lane += whole ? 32 : quad ? 8 : 2;
  }
}

}  // namespace diffmas::cuda
