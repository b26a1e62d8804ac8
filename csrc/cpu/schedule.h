// Cuts one attention call into tasks. Every choice here follows from shapes and indices, never from the number of threads: the
// same call gives the same bits on any machine width.
#pragma once
#include <cstdint>
#include <vector>

#include "tasks.h"

namespace diffmas::cpu {

// Rotations of queries by -offset: one row of cos and sin per distinct non-zero offset.
struct Rotations {
  std::vector<int64_t> offsets;  // sorted
  std::vector<float> cos, sin;   // [offsets, Dr/2]

  explicit Rotations(const Segments& segments);
  int32_t find(int64_t offset) const;  // -1 for no offset
};

// Query rows of the largest block.
int64_t largest_block(const Segments& segments, int64_t group);

struct ForwardSchedule {
  std::vector<Tile> tiles;
  std::vector<Block> blocks;
  std::vector<ForwardTask> tasks;
  std::vector<MergeTask> merges;
  int64_t partials = 0;
  int64_t pairs = 0;  // of a query row and a key, at most

  // one_row_keys: of a tile where a sequence has one query row.
  ForwardSchedule(const Segments& segments, const Rotations& rotations, int64_t group, int64_t kv_heads, int64_t one_row_keys);
};

// Backward runs in phases over consecutive query blocks, so that the partial dq of all chunks stays small.
struct BackwardPhase {
  std::vector<BackwardUnit> units;    // ordered by chunk, then by block
  std::vector<int64_t> chunk_indptr;  // units of each chunk
  std::vector<MergeTask> reduces;     // one per (block, kv head)
  int64_t partials = 0;
};

struct BackwardSchedule {
  std::vector<Tile> tiles;
  std::vector<Block> blocks;
  std::vector<BackwardPhase> phases;

  // heads_apart: of a chunk, which are tasks of their own.
  BackwardSchedule(const Segments& segments, const Rotations& rotations, int64_t group, int64_t kv_heads, int64_t padded_dim,
                   int64_t one_row_keys, bool want_dq, int64_t heads_apart);
};

}  // namespace diffmas::cpu
