// What both backward kernels on Hopper (backward_sm90.cuh, dkv_sm90.cuh) read of query rows, and write to rows of the pools.
#pragma once
#include "launch.cuh"

namespace diffmas::cuda {

// base and delta of up to kQueries query rows from a packed token on, a warp's lanes in turn; zero behind the `rows` that are the
// sequence's own. -> whether there are fewer than `all`, or one's base is NaN, by which it would reach keys of other sequences.
template <int kQueries>
__device__ __forceinline__ bool read_bases(const AttentionLaunch& l, int head, int64_t token, int rows, int all,
                                           float2 (&two)[kQueries / 32]) {
  const int lane = lane_id();
  bool wrong = rows < all;
  const float2* const from = l.bases_of(head) + token * l.group;
#pragma unroll
  for (int j = 0; j < kQueries / 32; ++j) {
    two[j] = lane + 32 * j < rows ? from[lane + 32 * j] : make_float2(0, 0);
    wrong = wrong || two[j].x != two[j].x;
  }
  return __any_sync(~0u, wrong);
}

// Adds factor x to the rows of a pool that have a gradient. x: as wgmma leaves sums of 64 rows; of a lane's two rows, row_of_pool(h) says
// where they are, bit h of has_grad whether they have one.
template <int D, class RowOfPool>
__device__ __forceinline__ void add_to_pool(const AttentionLaunch& l, const Rows& rows, int head, int has_grad, RowOfPool row_of_pool,
                                            const float (&x)[D / 8][4], float factor) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (!(has_grad >> h & 1)) continue;
    float* const to = row_of<float>(rows, row_of_pool(h), head) + lane_id() % 4 * 2;
    Pack<float, 2> old[D / 8];  // all loads are issued before the first store
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      if (8 * j < l.slots.head_dim) old[j] = load<2>(to + 8 * j);
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      if (8 * j < l.slots.head_dim)
        store<2>(to + 8 * j, pack<float>({old[j][0] + factor * x[j][2 * h], old[j][1] + factor * x[j][2 * h + 1]}));
  }
}

}  // namespace diffmas::cuda
