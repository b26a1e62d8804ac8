// A small kernel that prepares dK and dV: it finds the pool rows that need gradients, and the numbers of every query row.
#pragma once
#include "row_numbers.cuh"
#include "work.cuh"

namespace diffmas::cuda {

constexpr int kRangesWarps = 4;

// One warp for every (token, head), then one for every sequence.
template <class T, bool kVectors>
__global__ void __launch_bounds__(32 * kRangesWarps) attention_bwd_kernel_ranges(const __grid_constant__ AttentionLaunch launch) {
  const Segments& view = launch.a.view;
  const int64_t rows = launch.a.n * launch.a.q_heads, i = int64_t(blockIdx.x) * kRangesWarps + warp_id();
  if (i < rows) {
    const int64_t token = i / launch.a.q_heads;
    const int head = int(i % launch.a.q_heads);
    const RowNumbers row = numbers_of<T, kVectors>(launch, token, head, 0);
    // A base of NaN stands for the whole row, which is taken out of the products (clear_not_finite).
    const bool finite = fabsf(row.base) < INFINITY && fabsf(row.delta) < INFINITY;
    const float2 two = finite ? make_float2(row.base, row.delta) : make_float2(NAN, 0);
    if (lane_id() == 0) launch.bases_of(head / launch.group)[token * launch.group + head % launch.group] = two;
  } else if (i - rows < view.batch) {
    const int b = int(i - rows), s_first = int(view.seg_indptr[b]), s_last = int(view.seg_indptr[b + 1]);
    const int length = view_length(view, s_first, s_last);
    int needs_grad = 0;  // from this position on
    if (view.grad_tail) needs_grad = length - int(min(view.grad_tail[b], int64_t(length)));
    if (view.q_indptr[b] == view.q_indptr[b + 1]) needs_grad = length;
    for (int first = s_first, before = 0; first < s_last; first += 32) {
      const int s = first + lane_id(), size = s < s_last ? int(view.length[s]) : 0, end = before + warp_scan(size), begin = end - size;
      if (s < s_last) {
        const int start = int(view.start[s]);
        launch.ranges[s] = {start + min(max(needs_grad - begin, 0), size), start + size, begin - start, b, length};
      }
      before = __shfl_sync(~0u, end, 31);
    }
  }
}

}  // namespace diffmas::cuda
