// The gradient of q. A block walks the keys as in the forward (forward.cuh), with a dq in the place of the softmax state.
#pragma once
#include "merge.cuh"
#include "pool_rows.cuh"

namespace diffmas::cuda {

// dq is summed in the frame of the current segment's position offset, and rotated when that changes.
template <class T, int D, bool kVectors>
__global__ void __launch_bounds__(32 * Form<T, D>::kWarps, Form<T, D>::kBlocks)
    attention_bwd_kernel_dq(const __grid_constant__ AttentionLaunch launch) {
  using R = PoolRows<T, D, kVectors>;
  using F = typename R::F;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const Work work = find_work(launch, F::kWarps * kTileKeys);
  if (work.rows <= 0) return;
  const int lane = lane_id();
  float2* const table = F::table(shared);
  KeyStream<R> stream(launch, work, shared);
  auto q = F::queries(shared, warp_id()), d_o = F::queries(shared, F::kWarps);
  put_rows<T, D, kVectors>(q, launch, work, launch.a.q, nullptr);
  if (F::kInRegisters) put_rows<T, D, kVectors>(d_o, launch, work, launch.a.d_o, nullptr);
  else put_rows<T, D, kVectors>(d_o, launch, work, launch.a.d_o, nullptr, warp_id(), F::kWarps);
  RowNumbers* const numbers = reinterpret_cast<RowNumbers*>(shared + F::kNumbers);
  for (int i = warp_id(); i < kTileRows; i += F::kWarps) {
    const QueryRow row = work.row(launch, min(i, work.rows - 1));
    const RowNumbers mine = numbers_of<T, kVectors>(launch, row.token, row.head, i < work.rows ? work.last(launch, i) : -1);
    if (lane == 0) numbers[i] = mine;
  }
  __syncthreads();
  const float scale = launch.a.scale * kLog2e;

  float dq[D / 8][4] = {};
  int rotated = 0;  // how many positions q and dq are rotated back
  const auto rotate_dq = [&](int positions) {
    make_table(table, launch.a.view, positions);
    const int lane = hidden(lane_id());
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      float *x = &dq[i / 2 * 2][i % 2 * 2], *y = &dq[i / 2 * 2 + 1][i % 2 * 2];
      rotate_unit(x[0], x[1], y[0], y[1], i / 2, lane, launch, table);
    }
  };
  stream.for_each([&](const Tile<T, D>& k, const Tile<T, D>& v, int position, int keys, int offsets) {
    for (unsigned left = (1u << keys) - 1; left;) {
      int offset;
      const unsigned same = take_offset(offsets, left, offset);
      if (offset != rotated) {
        rotate_dq(rotated - offset);
        make_table(table, launch.a.view, -offset);
        put_rows<T, D, kVectors>(q, launch, work, launch.a.q, table);
        rotated = offset;
        __syncwarp();
      }
      float s[2][4] = {}, dp[2][4] = {};
      add_scores<T, D>(s, q, k);
      add_scores<T, D>(dp, d_o, v);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const RowNumbers row = numbers[lane / 4 + 8 * h];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
          float& x = s[i / 2][2 * h + i % 2];
          const float p = same >> key & 1 && position + key <= row.last ? exp2f(x * scale - row.base) : 0;
          x = p * (dp[i / 2][2 * h + i % 2] - row.delta);
        }
      }
      add_product<T, D>(dq, s, k);
    }
  });
  if (rotated) rotate_dq(rotated);

  const float none[2] = {};
  merge_all<F, false>(launch, work, shared, dq, none, none, [&](int i, int slot, float (&x)[4], float, float) {
    const QueryRow row = work.row(launch, i);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= launch.a.scale;
    R::write(launch, launch.a.dq, row, slot, x);
  });
}

}  // namespace diffmas::cuda
