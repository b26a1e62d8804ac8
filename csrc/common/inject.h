// The arguments of inject: per-head RMSNorm of q and k, rotary embedding, k and v written into their pool rows.
#pragma once
#include "rows.h"

namespace diffmas {

struct InjectArgs {
  int64_t n, q_heads, kv_heads, head_dim, rotary_dim;
  Rows q, k, v;              // [n, Hq | Hkv, D]; v is unused in backward
  Table cos, sin;            // [n, Dr]
  const int64_t* slots;      // [n], -1: not stored
  Table q_weight, k_weight;  // [D]
  float eps;
  bool interleaved;
  Rows k_pool, v_pool;  // [R, Hkv, D]; backward: the float32 gradient pools
  Rows q_out;           // [n, Hq, D]; backward: dq
  // Backward only.
  Rows dq_rot;             // [n, Hq, D]
  Rows dk, dv;             // [n, Hkv, D]
  float* weight_partials;  // sums of dq_weight and dk_weight over the rows of one block
};

}  // namespace diffmas
