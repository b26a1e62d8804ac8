// The small ops on what attention leaves: its states merged, stored keys moved to other positions.
#pragma once
#include "rows.h"

namespace diffmas::cpu {

// (o, lse) of two disjoint views -> of their union. o [n, H, D], lse [n, H].
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

// Rows src -> rows dst of the pools, keys rotated on by shift positions. No row is both, dst are distinct.
struct RepositionArgs {
  int64_t m, kv_heads, head_dim, half_rotary;
  const int64_t *src, *dst, *shift;  // [m]
  const float* inv_freq;             // [Dr/2]
  bool interleaved;
  Rows k_pool, v_pool;  // [R, Hkv, D]; backward: the float32 gradient pools
  // Filled in before the kernels run: a rotation per distinct shift.
  const int64_t* rotation;  // [m]
  const float *cos, *sin;   // [rotations, Dr]
};

void merge_states(const MergeArgs& args, const Threads& threads);
void merge_states_backward(const MergeArgs& args, const Threads& threads);
void reposition(RepositionArgs args, const Threads& threads);
void reposition_backward(RepositionArgs args, const Threads& threads);

}  // namespace diffmas::cpu
