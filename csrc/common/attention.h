// The arguments of cross_attention over segmented views, and of its backward.
#pragma once
#include "low_rank.h"
#include "rows.h"

namespace diffmas {

// The views of a batch of sequences: the segments that each sequence reads, in order.
struct Segments {
  int64_t batch;
  const int64_t* q_indptr;    // [B+1]
  const int64_t* seg_indptr;  // [B+1]
  const int64_t* start;       // [S]
  const int64_t* length;      // [S]
  const int64_t* offset;      // [S] or null: positions that are added to a segment's keys
  const float* inv_freq;      // [Dr/2] or null
  int64_t half_rotary;        // Dr/2
  bool causal;
  const int64_t* grad_tail;  // [B] or null; backward: only the last grad_tail[b] tokens of view b get dK and dV
};

struct AttentionArgs {
  int64_t n, q_heads, kv_heads, head_dim;
  int64_t pool_rows, segments;  // R, S
  Segments view;
  Rows q, k_pool, v_pool;
  Rows o;      // [n, Hq, D]
  float* lse;  // [n, Hq]
  float scale;
  bool interleaved;
  Scales k_scale, v_scale;  // of pools in 8 bits
  const LowRank* low;       // on the CPU, of few query rows, which all see all of their views; null: rows are the pools'
  // Backward only.
  Rows d_o;
  const float* dlse;      // [n, Hq] or null
  Rows dq;                // no data: not wanted
  Rows dk_pool, dv_pool;  // float32; no data where no row gets a gradient
};

}  // namespace diffmas
