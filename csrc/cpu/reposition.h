// reposition on the CPU: stored rows are copied to other rows, their keys rotated to other positions.
#pragma once
#include "common/rows.h"
#include "threads.h"

namespace diffmas::cpu {

// Rows src -> rows dst of the pools, keys rotated by offset positions. No row is in both, dst are distinct.
struct RepositionArgs {
  int64_t m, kv_heads, head_dim, half_rotary;
  const int64_t *src, *dst, *offset;  // [m]
  const float* inv_freq;              // [Dr/2]
  bool interleaved;
  Rows k_pool, v_pool;  // [R, Hkv, D]; backward: the float32 gradient pools
  // Filled in before the kernels run: a rotation per distinct offset.
  const int64_t* rotation;  // [m]
  const float *cos, *sin;   // [rotations, Dr]
};

void reposition(RepositionArgs args, const Threads& threads);
void reposition_backward(RepositionArgs args, const Threads& threads);

}  // namespace diffmas::cpu
