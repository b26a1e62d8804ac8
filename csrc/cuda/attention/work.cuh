// Which query rows, and which part of a view, a block of the forward or dq works on.
#pragma once
#include "launch.cuh"

namespace diffmas::cuda {

struct QueryRow {
  int64_t token;  // packed
  int head;
};

struct Work {
  int sequence, q_first, queries;  // of the sequence
  int row_first, rows;             // of the tile, among the sequence's queries * G; rows <= 0: nothing to do
  int s_first, s_last, length;     // the view's segments, and its tokens
  int n_first, n_end;              // the part of them that this block looks at

  __device__ __forceinline__ QueryRow row(const AttentionLaunch& launch, int i) const {
    const int r = row_first + i;
    return {q_first + r / launch.group, int(blockIdx.y) * launch.group + r % launch.group};
  }
  // The last token of the view that a row sees.
  __device__ __forceinline__ int last(const AttentionLaunch& launch, int i) const {
    return !launch.a.view.causal ? length - 1 : length - queries + (row_first + i) / launch.group;
  }
};

__device__ __forceinline__ int view_length(const Segments& view, int s_first, int s_last) {
  int length = 0;
  for (int s = s_first + lane_id(); s < s_last; s += 32) length += int(view.length[s]);
  return warp_sum(length);
}

// Up to `tokens` tokens of one sequence, a tile of the kernels for sm_90.
struct TokenTile {
  int sequence, first, count;  // the first token, packed; count <= 0: there is none
};

// The tiles of sequence b begin at q_indptr[b] / tokens + b: they hold all of its tokens.
__device__ __forceinline__ int first_tile(const Segments& view, int sequence, int tokens) {
  return int(view.q_indptr[sequence]) / tokens + sequence;
}
__device__ __forceinline__ TokenTile find_tile(const Segments& view, int tile, int tokens) {
  int sequence = -1;
  for (int b = lane_id(); b - lane_id() < view.batch; b += 32)
    sequence += __popc(__ballot_sync(~0u, b < view.batch && first_tile(view, b, tokens) <= tile));
  const int first = int(view.q_indptr[sequence]) + (tile - first_tile(view, sequence, tokens)) * tokens;
  return {sequence, first, min(tokens, int(view.q_indptr[sequence + 1]) - first)};
}

// The tiles of sequence b begin at q_indptr[b] G / 16 + b: they hold all of its rows, and no other sequence is looked at. Every warp finds
// its work itself. Parts are whole tiles of `keys` keys.
__device__ __forceinline__ Work find_work(const AttentionLaunch& launch, int keys) {
  const Segments& view = launch.a.view;
  const int lane = lane_id(), tile = int(blockIdx.x);
  const auto first_tile = [&](int b) { return int(view.q_indptr[b] * launch.group / kTileRows) + b; };
  Work w;
  w.sequence = -1;
  for (int b = lane; b - lane < view.batch; b += 32) w.sequence += __popc(__ballot_sync(~0u, b < view.batch && first_tile(b) <= tile));
  w.q_first = int(view.q_indptr[w.sequence]), w.queries = int(view.q_indptr[w.sequence + 1]) - w.q_first;
  w.row_first = (tile - first_tile(w.sequence)) * kTileRows;
  w.rows = min(kTileRows, w.queries * launch.group - w.row_first);
  if (w.rows <= 0) return w;
  w.s_first = int(view.seg_indptr[w.sequence]), w.s_last = int(view.seg_indptr[w.sequence + 1]);
  w.length = view_length(view, w.s_first, w.s_last);
  const int end = min(max(w.last(launch, w.rows - 1) + 1, 0), w.length), parts = int(gridDim.z);
  const int share = ((end + parts - 1) / parts + keys - 1) / keys * keys;
  w.n_first = min(int(blockIdx.z) * share, end), w.n_end = min(w.n_first + share, end);
  return w;
}

}  // namespace diffmas::cuda
