// The numbers of a query row that every gradient needs.
#pragma once
#include "launch.cuh"

namespace diffmas::cuda {

// base: lse in log2 (0 where the row sees nothing); delta: do . o - dlse; last: the last token of the view that the row sees.
struct alignas(16) RowNumbers {
  float base, delta;
  int last;
};

// do . o - dlse of a query row, in all lanes of a warp.
template <class T, bool kVectors>
__device__ __forceinline__ float delta_of(const AttentionLaunch& launch, int64_t token, int head) {
  const auto d_o = row_of<T, kVectors>(launch.a.d_o, token, head), o = row_of<T, kVectors>(launch.a.o, token, head);
  float sum = 0;
  for (int d = lane_id(); d < launch.slots.head_dim; d += 32) sum += element(d_o, d) * element(o, d);
  return group_sum(sum) - (launch.a.dlse ? launch.a.dlse[token * launch.a.q_heads + head] : 0);
}

template <class T, bool kVectors>
__device__ __forceinline__ RowNumbers numbers_of(const AttentionLaunch& launch, int64_t token, int head, int last) {
  const float lse = launch.a.lse[token * launch.a.q_heads + head], delta = delta_of<T, kVectors>(launch, token, head);
  return {lse == -INFINITY ? 0 : lse * kLog2e, delta, last};
}

}  // namespace diffmas::cuda
