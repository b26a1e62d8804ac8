// The gradients of K and V. A block keeps 64 keys and streams the query rows past them, in tiles of 32; the next tile is fetched while one
// is computed. With many queries, 16 keys and 16 rows of one warp take at D = 128:
//   products  64 mma: 128 cycles of a multiprocessor at mma.sync's 1024 MAC a cycle (sm_80); sm_90 has dkv_sm90.cuh.
//   shared    36 ldmatrix of 512 bytes: 144 cycles, the bound, 910 MAC a cycle. 32 of them load q and do, which 16 keys use once;
//             the rest load the half of V that does not fit in registers. 32 keys a warp would need 256 registers for their sums.
//   issue     some 300 instructions a warp, of four a cycle: 76 cycles.
//   L2        8 KB of q and do serve four warps: 14 bytes a cycle and multiprocessor, of 24 and more.
#pragma once
#include "query_stream.cuh"

namespace diffmas::cuda {

// Calls visit(i) for each thread i whose `yes` is true, in order, on all threads. All threads return before the votes may be reused.
template <class Visit>
__device__ __forceinline__ void for_each_vote(bool yes, unsigned* votes, Visit visit) {
  const unsigned mine = __ballot_sync(~0u, yes);
  if (lane_id() == 0) votes[warp_id()] = mine;
  __syncthreads();
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp)
    for (unsigned left = votes[warp]; left; left &= left - 1) visit(warp * 32 + __ffs(int(left)) - 1);
  __syncthreads();
}

// A block owns every gridDim.x-th tile of pool rows of a K/V head. It looks at 128 of its tiles at a time for those that need gradients;
// in a latent step only one or two in the whole pool do. Products are transposed: their rows are keys.
template <class T, int D, bool kVectors>
__global__ void __launch_bounds__(32 * PoolForm<T, D>::kWarps, PoolForm<T, D>::kBlocks)
    attention_bwd_kernel_dkv(const __grid_constant__ AttentionLaunch launch) {
  using F = PoolForm<T, D>;
  using Keys = typename F::Keys;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const AttentionArgs& a = launch.a;
  const int lane = lane_id(), thread = int(threadIdx.x), threads = int(blockDim.x), head = int(blockIdx.y);
  const int group = warp_id() / F::kHalves, first_slot = warp_id() % F::kHalves * F::kSlots;
  float2* const table = reinterpret_cast<float2*>(shared + F::kTable);
  unsigned* const votes = reinterpret_cast<unsigned*>(shared + F::kVotes);
  const float scale = a.scale * kLog2e;
  const auto meets = [&](const KVRange& range, int tile) {
    return range.row < (tile + 1) * F::kRows && range.end > max(range.row, tile * F::kRows);
  };
  const auto owned = [&](int i) { return Keys{shared + (i * F::kGroups + group) * Keys::kBytes}; };

  const auto compute = [&](int tile) {
    for (int i = thread; i < F::kRows * Keys::kChunks; i += threads) {
      const int key = i / Keys::kChunks, chunk = i % Keys::kChunks, row = tile * F::kRows + key;
      const bool there = row < a.pool_rows;  // rows that were never written may hold NaN, which stays in its own row
      const Keys k{shared + key / 16 * Keys::kBytes}, v{shared + (F::kGroups + key / 16) * Keys::kBytes};
      const auto k_row = row_of<T, kVectors>(a.k_pool, there ? row : 0, head), v_row = row_of<T, kVectors>(a.v_pool, there ? row : 0, head);
      copy_chunk<T, kVectors>(k.at(key % 16, chunk), k_row, there, chunk * Keys::kElements, launch);
      copy_chunk<T, kVectors>(v.at(key % 16, chunk), v_row, there, chunk * Keys::kElements, launch);
    }
    copy_async_commit();

    float dk[F::kSlots / 8][4] = {}, dv[F::kSlots / 8][4] = {};
    HeldTile<T, D, F::kHeldKeys> k{owned(0)};
    HeldTile<T, D, F::kHeldValues> v{owned(1)};
    bool here = false, has_grad[2] = {};
    int stage = 0;
    const int warp_row = tile * F::kRows + 16 * group, my_row = warp_row + lane / 4;  // and the one eight further
    for (int s0 = 0; s0 < a.segments; s0 += threads) {
      const int mine = s0 + thread;
      for_each_vote(mine < a.segments && meets(launch.ranges[mine], tile), votes + F::kWarps, [&](int i) {
        const KVRange range = launch.ranges[s0 + i];
        const int offset = a.view.offset ? int(a.view.offset[s0 + i]) : 0;
        const int q_first = int(a.view.q_indptr[range.sequence]), queries = int(a.view.q_indptr[range.sequence + 1]) - q_first;
        const int rows = queries * launch.group;
        // The first query row that sees a pool row.
        const auto sees = [&](int row) { return !a.view.causal ? 0 : (row + range.to_view - (range.length - queries)) * launch.group; };
        const int warp_first = max(warp_row, range.row),
                  warp_from = warp_first < min(warp_row + 16, range.end) ? sees(warp_first) : INT32_MAX;
        int from[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool in_range = my_row + 8 * h >= range.row && my_row + 8 * h < range.end;
          has_grad[h] |= in_range;
          from[h] = in_range ? sees(my_row + 8 * h) : INT32_MAX;
        }
        if (offset) {
          if (warp_id() == 0) make_table(table, a.view, -offset);  // all threads have rotated the previous rows
          if constexpr (F::kAsync) __syncthreads();
        }
        const int first = max(sees(max(range.row, tile * F::kRows)), 0);
        if constexpr (F::kAsync)
          if (first < rows) QueryCopies<T, D>::issue(shared, stage, launch, q_first, first, rows);
        for (int row = first; row < rows; row += F::kQueries) {
          copy_async_wait<0>();
          if constexpr (F::kAsync) {
            if (offset) QueryCopies<T, D>::rotate(shared, stage, launch, table);
          } else {
            __syncthreads();  // the table is written, and all threads are done with the previous rows
            put_queries<T, D, kVectors>(shared, launch, q_first, row, rows, offset ? table : nullptr);
          }
          __syncthreads();  // K, V and the rows have arrived, and all threads are done with the rows that the next copies overwrite
          const Keys q{shared + F::kRing + stage * 2 * F::kOne}, d_o{q.data + F::kOne};
          const float* const numbers = reinterpret_cast<const float*>(shared + F::kNumbers) + 2 * stage * F::kQueries;
          clear_not_finite<T, D>(q.data, numbers);
          if constexpr (F::kAsync) {
            stage = 1 - stage;
            if (row + F::kQueries < rows) QueryCopies<T, D>::issue(shared, stage, launch, q_first, row + F::kQueries, rows);
          }
          if (!here) k.hold(), v.hold(), here = true;

#pragma unroll 1
          for (int sixteen = 0; sixteen < F::kQueries; sixteen += 16) {
            const int at = row + sixteen;
            if (at >= rows) break;
            if (at + 15 < warp_from) continue;
            const Keys q16{q.data + sixteen / 16 * Keys::kBytes}, d_o16{d_o.data + sixteen / 16 * Keys::kBytes};
            float p[2][4] = {}, ds[2][4] = {};
            add_scores<T, D>(p, k, q16);
            add_scores<T, D>(ds, v, d_o16);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int query = sixteen + 8 * c + lane % 4 * 2;
              const Pack<float, 4> two = load<4>(numbers + 2 * query);  // base and delta of both; zeros behind the last row, as in q and do
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const bool seen = row + query + i % 2 >= from[i / 2];
                float &x = p[c][i], &y = ds[c][i];
                x = seen ? exp2f(x * scale - two[i % 2 * 2]) : 0;
                y = seen ? x * (y - two[i % 2 * 2 + 1]) : 0;
              }
            }
            add_product<T, D>(dv, p, d_o16, first_slot);
            add_product<T, D>(dk, ds, q16, first_slot);
          }
        }
      });
    }
    copy_async_wait<0>();

    const int to_slot = first_slot + hidden(lane_id()) % 4 * 2;
    const auto add = [&](const Rows& rows, const float (&x)[F::kSlots / 8][4], float factor) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!has_grad[h]) continue;
        float* const to = row_of<float>(rows, my_row + 8 * h, head);
        if constexpr (kVectors) {
#pragma unroll
          for (int j0 = 0; j0 < F::kSlots / 8; j0 += F::kAtOnce) {
            Pack<float, 2> old[F::kAtOnce];
#pragma unroll
            for (int j = 0; j < F::kAtOnce; ++j) old[j] = load<2>(to + max(launch.slots.dim(hidden(to_slot) + 8 * (j0 + j)), 0));
#pragma unroll
            for (int j = 0; j < F::kAtOnce; ++j)
              if (const int d = launch.slots.dim(hidden(to_slot) + 8 * (j0 + j)); d >= 0)
                store<2>(to + d, pack<float>({old[j][0] + factor * x[j0 + j][2 * h], old[j][1] + factor * x[j0 + j][2 * h + 1]}));
          }
        } else {
#pragma unroll
          for (int j = 0; j < 2 * (F::kSlots / 8); ++j) {
            const int d = launch.slots.dim(to_slot + 8 * (j / 2) + j % 2);
            if (d >= 0) to[d] += factor * x[j / 2][2 * h + j % 2];
          }
        }
      }
    };
    add(a.dk_pool, dk, a.scale);
    add(a.dv_pool, dv, 1);
  };

  const int64_t tiles = (a.pool_rows + F::kRows - 1) / F::kRows;
  for (int64_t first = blockIdx.x; first < tiles; first += int64_t(threads) * gridDim.x) {
    const int64_t mine = first + int64_t(thread) * gridDim.x;
    int needs_grad = 0;
    if (mine < tiles)
      for (int s = 0; s < a.segments; ++s) needs_grad |= int(meets(launch.ranges[s], int(mine)));
    for_each_vote(needs_grad, votes, [&](int i) { compute(int(first) + i * int(gridDim.x)); });
  }
}

}  // namespace diffmas::cuda
