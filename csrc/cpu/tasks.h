// The tasks that a call of attention is cut into (schedule.h cuts it), as the kernels see them. No STL.
#pragma once
#include "common/attention.h"

namespace diffmas::cpu {

// Rows of a query block are (token, head of the GQA group) pairs, token-major: the whole group reads each K/V row once.
// 96 is a multiple of every instruction set's panel (12, 24, 48 lanes).
inline constexpr int64_t kBlockRows = 96;
inline constexpr int64_t kTileKeys = 64;
// A sequence of up to this many query rows takes the small-q kernels (small_q.h). They like longer tiles: every change between K
// and V stops the stream from memory.
inline constexpr int64_t kSmallQRows = 12;
inline constexpr int64_t kSmallQKeys = 256;
// Those of one query row in bfloat16 pairs, whose products take so little that 13 % more arrive from memory and from L3. (1024: 5 % more
// from memory, none from L3, and a view is cut into fewer parts. With more rows the longer ones are slower.)
inline constexpr int64_t kOneRowKeys = 512;

// Up to kTileKeys (small-q: kSmallQKeys) consecutive tokens of one view, all read at the same position offset.
struct Tile {
  int64_t view;  // index of its first token in the view
  int64_t row;   // first pool row when the rows are consecutive, else -1: gather them, beginning with token `skip` of the segment
  int64_t skip;
  int32_t segment;
  int32_t count;
  int32_t rotation;  // row of the rotation tables, -1: no offset
  bool needs_grad;   // backward: its rows get dK and dV
};

// Query rows [row, row + rows) of one sequence, for one kv head.
struct Block {
  int64_t token;  // the sequence's first packed token
  int64_t row;
  int64_t limit;  // last view token that the sequence's first query sees; it grows by one per query (causal)
  int32_t rows;
  bool causal;
};

struct ForwardTask {
  int64_t block;
  int64_t head;  // kv head
  int64_t tile_begin, tile_end;
  int64_t partial;  // where an unfinished state goes; -1: the task finishes its rows itself
};

struct MergeTask {
  int64_t block, head, partial, count;
};

// A block against its tiles of one chunk of the pool.
struct BackwardUnit {
  int64_t block;
  int64_t tile_begin, tile_end;
  int64_t partial;
};

// A low-rank part as products take it, rows of whole vectors: what a kernel multiplies a row's code with.
__attribute__((always_inline)) inline int64_t padded_rank(int64_t rank) { return (rank + 15) / 16 * 16; }
struct PackedPart {
  const float* by_code;    // [Hkv, rank, padded D]
  const float* by_column;  // [Hkv, padded D, padded rank]
  float* grads;            // of by_code, from each chunk of a backward
};

// A call of attention with what its tasks refer to.
struct ScheduledAttention : AttentionArgs {
  const float* rotation_cos;  // [rotations, Dr/2], of the angle -offset * inv_freq
  const float* rotation_sin;
  const Tile* tiles;
  const Block* blocks;
  float* partials;
  int64_t padded_dim;  // row length of partials and scratch rows, a multiple of 32
  int64_t block_rows;  // of the largest block: room for rows in a partial
  PackedPart low_k, low_v;

  // always_inline: no copy compiled for one instruction set may be shared with another (kernels.h).
  __attribute__((always_inline)) int64_t group() const { return q_heads / kv_heads; }
  // Forward: o [rows, D], maximum [rows], sum [rows]. Backward: dq [kv_heads, rows, D].
  __attribute__((always_inline)) int64_t forward_partial_size() const { return block_rows * (padded_dim + 2); }
  __attribute__((always_inline)) int64_t backward_partial_size() const { return kv_heads * block_rows * padded_dim; }
};

// A multiple of every form's rows.
inline int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 31) / 32 * 32; }

// Floats of scratch that a thread needs for one task. The buffers of K and V of a large-q task fit where a small-q task has one.
static_assert(3 * kTileKeys <= kSmallQKeys && kSmallQRows * kSmallQKeys <= kBlockRows * kTileKeys && kOneRowKeys <= 2 * kSmallQKeys);
inline int64_t forward_scratch_size(int64_t d) { return 4 * kBlockRows * d + kSmallQKeys * d + kBlockRows * kTileKeys + 8 * kBlockRows; }
inline int64_t backward_scratch_size(int64_t d) {
  return 8 * kBlockRows * d + 2 * kSmallQKeys * d + 3 * kBlockRows * kTileKeys + 8 * kBlockRows;
}
// Of either direction, with low-rank parts.
inline int64_t low_rank_scratch_size(int64_t d, const LowRank& low) {
  const int64_t k = padded_rank(low.k.rank), v = padded_rank(low.v.rank);
  return kSmallQKeys * (3 * d + 2 * k + 3 * v + 2) + kSmallQRows * (6 * d + 2 * v + 2 * kSmallQKeys) + 2 * kBlockRows;
}

}  // namespace diffmas::cpu
