// Low-rank parts of K and V beside the rows of a pool, on the CPU (diffmas/ops/low_rank.py):
// K = keep k + add RoPE(z_k b_k'), V = v + z_v b_v'.
#pragma once
#include <cstdint>

namespace diffmas {

// A code for each row, and what codes are multiplied with. Rank 0: K or V is the pool's.
struct LowRankPart {
  int64_t rank;
  const float* z;  // [codes, rank]
  const float* b;  // [Hkv * D, rank]
  // Backward: to be added to; null where they are constants.
  float* dz;
  float* db;
};

struct LowRank {
  const int64_t* code;  // [S], of each segment's first row
  LowRankPart k, v;
  // Of keys.
  int64_t rotary;           // Dr
  const float *cos, *sin;   // [codes, Dr / 2] of each pair, where the rows were written; null: nothing turns
  const float *keep, *add;  // [codes, Hkv]; null: 1
  float *d_keep, *d_add;    // backward, as dz
};

}  // namespace diffmas
