// The launch of kernels that walk keys, on the host: arguments, and the number of parts that a view is cut into.
#pragma once
#include "key_stream.cuh"

namespace diffmas::cuda {

constexpr int kMaxParts = 64;

inline bool aligned(const Rows& rows) {
  const int64_t elements = rows.dtype == DType::f32 ? 4 : rows.dtype == DType::i8 || rows.dtype == DType::e4m3 ? 16 : 8;
  return !rows.data ||
         (reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_row % elements == 0 && rows.stride_head % elements == 0);
}

inline AttentionLaunch launch_of(const AttentionArgs& a) {
  AttentionLaunch l{};
  l.a = a;
  l.group = int(a.q_heads / a.kv_heads);
  if (!a.view.offset) l.a.view.half_rotary = 0;
  l.slots = {int(a.head_dim), a.interleaved ? 0 : int(l.a.view.half_rotary)};
  return l;
}

// Tiles, K/V heads, parts. Follows from shapes alone, nothing is read from the device: the fewest parts that fill whole waves of blocks,
// each at least a tile per warp if the view were all of the pool.
template <class F>
dim3 grid_of(const AttentionLaunch& l, int device) {
  const int64_t tiles = l.a.n * l.group / kTileRows + l.a.view.batch, work = tiles * l.a.kv_heads, places = F::kBlocks * processors(device);
  const int64_t keys = F::kWarps * kTileKeys, most = max(int64_t(1), min(int64_t(kMaxParts), l.a.pool_rows / keys));
  int64_t parts = 1;
  const auto fill = [&](int64_t p) { return double(work * p) / double((work * p + places - 1) / places * places); };
  for (int64_t p = 2; p <= most && fill(parts) < 0.95; ++p)
    if (fill(p) > fill(parts)) parts = p;
  return dim3(unsigned(tiles), unsigned(l.a.kv_heads), unsigned(parts));
}

// The memory that merge_all needs.
template <class F>
AttentionSizes part_sizes(const AttentionLaunch& l, int device) {
  const dim3 grid = grid_of<F>(l, device);
  const int64_t tiles = int64_t(grid.x) * grid.y;
  return {grid.z == 1 ? 0 : tiles * grid.z * kTileRows * (F::kDim + 2), grid.z == 1 ? 0 : tiles};
}

}  // namespace diffmas::cuda
