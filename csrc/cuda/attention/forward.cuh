// cross_attention of few queries over long views: bound by the memory that K and V come from.
//
// A block has up to 16 query rows, (token, head of the GQA group) pairs of one sequence and one K/V head, and a part of the view's
// keys; grid (tiles of rows, K/V heads, parts). Each of its warps walks every kWarps-th tile of 16 keys on its own, through a ring of
// asynchronous copies, and has its own softmax state. A block merges its warps, and the last block to arrive merges the blocks, always in
// one order: one launch, the same bits in every run.
//
// What it takes, D = 128 in 16-bit types at 4.3 TB/s on 132 multiprocessors of 1.75 GHz, 18.6 bytes a cycle and multiprocessor:
//   products  2 D of 16 rows a key of 512 bytes: 16 MAC a byte padded to 16 rows, 300 a cycle. mma.sync does 1024 and more, at any G;
//             FMA (128 a cycle) would do 2 G: 19 a cycle at G = 1, 149 at G = 8, and 0.5 conversions a byte and the sums over lanes.
//   issue     a tile of 16 keys (8 KB, 440 cycles): 16 ldmatrix, 32 mma, 16 copies, some 200 others, of 1760 slots.
//   latency   a warp takes some 700 cycles for a tile, so eight (two blocks) could do 94 bytes a cycle.
//   copies    a warp has kStages - 1 tiles under way: 128 KB a multiprocessor. One microsecond of latency needs 33 KB.
#pragma once
#include "merge.cuh"
#include "pool_rows.cuh"

namespace diffmas::cuda {

// Rows of kind R (pool_rows.cuh, payload_rows.cuh), with products in T.
template <class T, class R>
__device__ __forceinline__ void attend(const AttentionLaunch& launch) {
  using F = typename R::F;
  using Keys = typename F::Keys;
  constexpr int D = F::kDim;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const Work work = find_work(launch, F::kWarps * kTileKeys);
  if (work.rows <= 0) return;
  const int lane = lane_id();
  const int last[2] = {work.last(launch, lane / 4), work.last(launch, lane / 4 + 8)};
  const float scale = launch.a.scale * kLog2e;
  KeyStream<R> stream(launch, work, shared);
  auto q = F::queries(shared, warp_id());
  int rotated = 0;  // how many positions q is rotated back
  R::read_queries(q, launch, work, nullptr);

  float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  stream.for_each([&](const Keys& k, const Keys& v, int position, int keys, int offsets) {
    float s[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = -INFINITY;
    for (unsigned left = (1u << keys) - 1; left;) {
      int offset;
      const unsigned same = take_offset(offsets, left, offset);
      if (offset != rotated) {
        make_table(F::table(shared), launch.a.view, -offset);
        R::read_queries(q, launch, work, F::table(shared));
        rotated = offset;
        __syncwarp();
      }
      float x[2][4] = {};
      add_scores<T, D>(x, q, k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (same >> key & 1 && position + key <= last[i / 2 % 2]) s[i / 4][i % 4] = x[i / 4][i % 4] * R::score_scale(k, scale, key);
      }
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float mine = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
      const float higher = fmaxf(top[h], group_max(mine, 4));
      const float base = higher == -INFINITY ? 0 : higher;  // a row that has seen nothing yet
      shrink[h] = exp2f(top[h] - base);
      top[h] = higher, sum[h] *= shrink[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& p = s[i / 2][2 * h + i % 2];
        p = exp2f(p - base), sum[h] += p;
      }
    }
    if (__any_sync(~0u, shrink[0] < 1 || shrink[1] < 1)) {  // seldom, once the largest score is found
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i / 4][i % 4] *= shrink[i / 2 % 2];
    }
    add_product<T, D>(o, s, v);
  });

#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = group_sum(sum[h], 4);
  merge_all<F, true>(launch, work, shared, o, top, sum, [&](int i, int slot, float (&x)[4], float top, float sum) {
    const QueryRow row = work.row(launch, i);
    const float share = sum == 0 ? 0 : 1 / sum;  // a NaN sum is not an empty row
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= share;
    R::write(launch, launch.a.o, row, slot, x);
    if (slot == 0) launch.a.lse[row.token * launch.a.q_heads + row.head] = sum == 0 ? -INFINITY : (top + log2f(sum)) * kLn2;
  });
}

template <class T, int D, bool kVectors>
__global__ void __launch_bounds__(32 * Form<T, D>::kWarps, Form<T, D>::kBlocks)
    attention_fwd_kernel(const __grid_constant__ AttentionLaunch launch) {
  attend<T, PoolRows<T, D, kVectors>>(launch);
}

}  // namespace diffmas::cuda
