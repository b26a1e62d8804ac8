// cross_attention over segmented views: the arguments of a call and the plan it is cut into.
#pragma once
#include "rows.h"

namespace diffmas::cpu {

// Rows of a query block are (token, head of the GQA group) pairs, token-major: the whole group reads each K/V row once.
// 96 is a multiple of every instruction set's panel (12, 24, 48 lanes).
inline constexpr int64_t kBlockRows = 96;
inline constexpr int64_t kTileKeys = 64;
// A sequence of up to this many query rows takes the forms of few.h, which like longer tiles: every change between K and V stops
// the stream from memory.
inline constexpr int64_t kFewRows = 12;
inline constexpr int64_t kFewKeys = 256;

struct Segments {
  int64_t batch;
  const int64_t* q_indptr;    // [B+1]
  const int64_t* seg_indptr;  // [B+1]
  const int64_t* start;       // [S]
  const int64_t* length;      // [S]
  const int64_t* shift;       // [S] or null
  const float* inv_freq;      // [Dr/2] or null
  int64_t half_rotary;        // Dr/2
  bool causal;
  const int64_t* newest;  // [B] or null; backward: only the last newest[b] tokens of view b get dK and dV
};

// Up to kTileKeys (kFewKeys in a sequence of few query rows) consecutive tokens of one view, all read at the same shift.
struct Tile {
  int64_t view;      // index of its first token in the view
  int64_t row;       // first pool row when the rows are consecutive, else -1: gather from (segment, offset) on
  int64_t offset;
  int32_t segment;
  int32_t count;
  int32_t rotation;  // row of the rotation tables, -1: no shift
  bool learns;       // backward: its rows get dK and dV
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

struct AttentionArgs {
  int64_t q_heads, kv_heads, head_dim;
  int64_t half_rotary;
  Rows q, k_pool, v_pool;
  const int64_t* seg_start;
  const int64_t* seg_length;
  const float* rotation_cos;  // [rotations, Dr/2], of the angle -shift * inv_freq
  const float* rotation_sin;
  float scale;
  bool interleaved;
  Rows o;      // [n, Hq, D]
  float* lse;  // [n, Hq]
  // Backward only.
  Rows d_o;
  const float* dlse;  // [n, Hq] or null
  Rows dq;  // no data: not wanted
  Rows dk_pool, dv_pool;  // float32
  // The plan.
  const Tile* tiles;
  const Block* blocks;
  const ForwardTask* tasks;
  const MergeTask* merges;
  const BackwardUnit* units;
  float* partials;
  int64_t padded_dim;  // row length of partials and scratch rows, a multiple of 16
  int64_t block_rows;  // of the largest block: room for rows in a partial

  // always_inline: no copy compiled for one instruction set may be shared with another (kernels.h).
  __attribute__((always_inline)) int64_t group() const { return q_heads / kv_heads; }
  // Forward: o [rows, D], maximum [rows], sum [rows]. Backward: dq [kv_heads, rows, D].
  __attribute__((always_inline)) int64_t forward_partial_size() const { return block_rows * (padded_dim + 2); }
  __attribute__((always_inline)) int64_t backward_partial_size() const { return kv_heads * block_rows * padded_dim; }
};

inline int64_t padded_head_dim(int64_t head_dim) { return (head_dim + 15) / 16 * 16; }

// Floats of scratch a thread needs for one task: the K and V buffers of many rows take no more than the one of a few.
static_assert(2 * kTileKeys <= kFewKeys && kFewRows * kFewKeys <= kBlockRows * kTileKeys);
inline int64_t forward_scratch_size(int64_t d) {
  return 4 * kBlockRows * d + kFewKeys * d + kBlockRows * kTileKeys + 8 * kBlockRows;
}
inline int64_t backward_scratch_size(int64_t d) {
  return 7 * kBlockRows * d + 2 * kFewKeys * d + 2 * kBlockRows * kTileKeys + 8 * kBlockRows;
}

void attention_forward(AttentionArgs args, const Segments& segments, const Threads& threads, const Workspace& workspace);
void attention_backward(AttentionArgs args, const Segments& segments, const Threads& threads, const Workspace& workspace);

}  // namespace diffmas::cpu
