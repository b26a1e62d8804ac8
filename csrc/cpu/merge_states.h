// merge_states on the CPU: the attention states (o, lse) of two disjoint views become the state of their union.
#pragma once
#include "common/rows.h"
#include "threads.h"

namespace diffmas::cpu {

// o [n, H, D], lse [n, H]
struct MergeArgs {
  int64_t n, heads, head_dim;
  Rows o_a, o_b;
  const float *lse_a, *lse_b;
  Rows o;      // forward: written, backward: read
  float* lse;  // forward only
  // Backward only.
  Rows d_o;
  const float* dlse;
  Rows do_a, do_b;
  float *dlse_a, *dlse_b;
};

void merge_states(const MergeArgs& args, const Threads& threads);
void merge_states_backward(const MergeArgs& args, const Threads& threads);

}  // namespace diffmas::cpu
