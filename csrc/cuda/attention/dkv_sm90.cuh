// dK and dV of many queries on Hopper: the work of attention_bwd_kernel_dkv on wgmma, with operands that the copy engine brings.
//
// A block owns 128 pool rows of a K/V head, 64 a warpgroup. K, V and a ring of tiles of q and do are in shared memory, the sums of dK and
// dV in registers. A product takes 64 query rows. One warp of a third warpgroup keeps the ring full; barriers in shared memory count what
// has arrived and which warps are done with it. Products are transposed, with keys as rows, so p and ds leave the accumulators as the left
// side of the next product.
//
// What it takes at D = 128, for 64 keys and 64 query rows, of a multiprocessor that does 2048 MAC a cycle:
//   products  4 of 64 x 64 x 128: 1024 cycles a warpgroup, the bound; the other one computes p and ds meanwhile.
//   shared    96 KB read by products, half of 32 KB written by the copy engine: 900 cycles at 128 bytes.
//   exp2      4096 at 16 a cycle: 256 cycles.
//   issue     some 40 instructions for each of a lane's 32 scores: 320 a warp and multiprocessor's quarter.
//   L2        32 KB of q and do serve two warpgroups, 2048 cycles: 16 bytes a cycle and multiprocessor.
//   registers dK and dV 128, scores 64, their halves 32: one block of 2 x 240 and 1 x 24 a multiprocessor.
//
// It serves 16-bit types, heads of up to 128 dimensions, groups that fit a tile, and no position offsets: these would rotate q between
// its arrival and its use.
#pragma once
#include "cuda/sm90.h"
#include "gradient_rows.cuh"

namespace diffmas::cuda {

template <class T, int D>
struct Sm90Form {
  static constexpr int kGroups = 2, kKeys = 64 * kGroups, kQueries = 8192 / D, kStages = 3, kPanels = D / kPanelElements;
  static constexpr int kThreads = 128 * (kGroups + 1), kReaders = 4 * kGroups;  // warps that are done with a stage

  // Shared memory: K, V, the ring of q and do, base and delta of its rows, how many of them are its own (0: all), barriers.
  static constexpr int kKeyPanel = kKeys * kPanelRow, kQueryPanel = kQueries * kPanelRow, kOne = kPanels * kQueryPanel;
  static constexpr int kValues = kPanels * kKeyPanel, kRing = 2 * kValues, kNumbers = kRing + kStages * 2 * kOne;
  static constexpr int kUnclean = kNumbers + kStages * kQueries * int(sizeof(float2)), kBarriers = kUnclean + (kStages + 1) / 2 * 8;
  static constexpr int kBytes = kBarriers + (2 * kStages + 1) * int(sizeof(Barrier));
  static_assert(kBytes <= 232448);  // of a block on sm_90
};

struct Sm90Launch {
  TensorMap q, d_o;          // [n, Hq, D] in boxes of `tokens` tokens of a group
  TensorMap k_pool, v_pool;  // [Hkv, R, D] in boxes of a block's rows
  AttentionLaunch attention;
  int tokens;  // of a tile: as many whole groups as fit
};

// Query tokens [first, first + tokens) of a sequence that reads a range of pool rows.
struct QueryTile {
  KVRange range;
  int q_first, queries, first;  // of the sequence

  __device__ __forceinline__ QueryTile(const AttentionLaunch& l, int segment, int first) : range(l.ranges[segment]), first(first) {
    q_first = int(l.a.view.q_indptr[range.sequence]), queries = int(l.a.view.q_indptr[range.sequence + 1]) - q_first;
  }
  // The first token of the sequence that sees a pool row.
  __device__ __forceinline__ int sees(int row, bool causal) const { return causal ? row + range.to_view - (range.length - queries) : 0; }
};

// Whether a range has rows of [row, row + kKeys).
template <int kKeys>
__device__ __forceinline__ bool meets(const KVRange& range, int row) {
  return range.row < row + kKeys && range.end > max(range.row, row);
}

// Calls visit(tile) for the query tiles that see pool rows [row, row + kKeys), always in one order, on all lanes of a warp.
template <int kKeys, class Visit>
__device__ __forceinline__ void for_each_query_tile(const Sm90Launch& launch, int row, Visit visit) {
  const AttentionLaunch& l = launch.attention;
  for (int s0 = 0; s0 < l.a.segments; s0 += 32) {
    const int mine = s0 + lane_id();
    for (unsigned left = __ballot_sync(~0u, mine < l.a.segments && meets<kKeys>(l.ranges[mine], row)); left; left &= left - 1) {
      const int segment = s0 + __ffs(int(left)) - 1;
      const QueryTile any(l, segment, 0);
      // A tile's range is read again for every tile: there are no registers left to keep it.
      for (int first = max(any.sees(max(row, any.range.row), l.a.view.causal), 0); first < QueryTile(l, hidden(segment), 0).queries;
           first += launch.tokens)
        visit(QueryTile(l, hidden(segment), first));
    }
  }
}

template <class T, int D>
__global__ void __launch_bounds__(Sm90Form<T, D>::kThreads, 1) attention_bwd_kernel_dkv_sm90(const __grid_constant__ Sm90Launch launch) {
  using F = Sm90Form<T, D>;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const AttentionLaunch& l = launch.attention;
  const AttentionArgs& a = l.a;
  const int group = l.group, head = int(blockIdx.y), row = int(blockIdx.x) * F::kKeys;
  const int warpgroup = __shfl_sync(~0u, warp_id() / 4, 0);  // the shuffle tells the compiler that all lanes have the same
  Barrier* const full = reinterpret_cast<Barrier*>(shared + F::kBarriers);
  Barrier *const empty = full + F::kStages, *const keys_here = empty + F::kStages;
  const auto d_q = [&](int stage) { return shared + F::kRing + stage * 2 * F::kOne; };
  const auto bases = [&](int stage) { return reinterpret_cast<float*>(shared + F::kNumbers) + stage * 2 * F::kQueries; };
  int* const unclean = reinterpret_cast<int*>(shared + F::kUnclean);
  // Writes zeros to some rows of q and do: rows that are no queries of this tile must not hold NaN.
  const auto clear = [&](int stage, int thread, int threads, auto is_to_be) {
#pragma unroll 1
    for (int i = thread; i < F::kQueryPanel / 16; i += threads) {
      if (!is_to_be(i / (kPanelRow / 16))) continue;
#pragma unroll 1
      for (int panel = 0; panel < 2 * F::kPanels; ++panel)
        store<4>(reinterpret_cast<float*>(d_q(stage) + panel * F::kQueryPanel + i * 16), zeros<float, 4>());
    }
    publish_to_async();
  };

  bool needs_grad = false;  // any row of this block; in a long trace most blocks have none
  for (int s = lane_id(); s - lane_id() < l.a.segments; s += 32)
    needs_grad = needs_grad || (s < l.a.segments && meets<F::kKeys>(l.ranges[s], row));
  if (!__any_sync(~0u, needs_grad)) return;
  if (threadIdx.x == 0) {
    if (shared_address(shared) % kPanelEight) __trap();
    for (int i = 0; i < F::kStages; ++i) init_barrier(full + i, 33), init_barrier(empty + i, F::kReaders);
    init_barrier(keys_here, 1);
    barriers_ready();
  }
  for (int stage = 0; stage < F::kStages; ++stage)  // rows that no box covers
    clear(stage, int(threadIdx.x), F::kThreads, [&](int r) { return r >= launch.tokens * group; });
  __syncthreads();

  if (warpgroup == F::kGroups) {
    setmaxnreg_dec<24>();
    if (warp_id() % 4) return;
    const int lane = lane_id();
    int i = 0;
    for_each_query_tile<F::kKeys>(launch, row, [&](const QueryTile& tile) {
      if (i == 0 && lane == 0) {
        arrive_expecting(keys_here, 2 * F::kValues);
        for (int panel = 0; panel < F::kPanels; ++panel) {
          copy_box(shared + panel * F::kKeyPanel, launch.k_pool, panel * kPanelElements, row, head, keys_here);
          copy_box(shared + F::kValues + panel * F::kKeyPanel, launch.v_pool, panel * kPanelElements, row, head, keys_here);
        }
      }
      // Rows behind the sequence's end belong to the next one.
      const int rows = min(launch.tokens, tile.queries - tile.first) * group;
      float2 two[F::kQueries / 32];
      const bool wrong = read_bases<F::kQueries>(l, head, tile.q_first + tile.first, rows, launch.tokens * group, two);
      const int stage = i % F::kStages;
      wait_for(empty + stage, ~(i++ / F::kStages) & 1);
      if (lane == 0) {
        arrive_expecting(full + stage, 2 * F::kPanels * launch.tokens * group * kPanelRow);
        for (int panel = 0; panel < F::kPanels; ++panel) {
          char* const to = d_q(stage) + panel * F::kQueryPanel;
          copy_box(to, launch.q, panel * kPanelElements, head * group, tile.q_first + tile.first, full + stage);
          copy_box(to + F::kOne, launch.d_o, panel * kPanelElements, head * group, tile.q_first + tile.first, full + stage);
        }
      }
#pragma unroll
      for (int j = 0; j < F::kQueries / 32; ++j)
        bases(stage)[lane + 32 * j] = two[j].x, bases(stage)[F::kQueries + lane + 32 * j] = two[j].y;
      if (lane == 0) unclean[stage] = wrong ? rows : 0;
      arrive(full + stage);
    });
    return;
  }

  setmaxnreg_inc<240>();
  const int lane = lane_id(), first_key = row + 64 * warpgroup;
  const auto mine = [](int h) {
    const int thread = hidden(int(threadIdx.x));
    return (thread >> 5) * 16 + thread % 32 / 4 + 8 * h;
  };  // the lane's two keys
  const float scale = a.scale * kLog2e;
  float dk[D / 8][4] = {}, dv[D / 8][4] = {};
  int has_grad = 0;  // a bit for each of my keys
  int i = 0;
  for_each_query_tile<F::kKeys>(launch, row, [&](const QueryTile& tile) {
    const KVRange& range = tile.range;
    // The first query row of the tile that sees the key, clamped to the tile.
    const auto sees = [&](int key) { return min(max(tile.sees(key, a.view.causal) - tile.first, -1), F::kQueries) * group; };
    const int from_key = max(first_key, range.row), end_key = min(first_key + 64, range.end);
    for (int h = 0; h < 2; ++h) has_grad |= int(row + mine(h) >= range.row && row + mine(h) < range.end) << h;
    const int stage = i % F::kStages;
    if (i == 0) wait_for(keys_here, 0);
    wait_for(full + stage, i++ / F::kStages & 1);
    if (from_key < end_key && sees(from_key) < launch.tokens * group) {
      if (unclean[stage]) {
        clear(stage, hidden(int(threadIdx.x)) % 128, 128, [&](int r) { return r >= unclean[stage] || bases(stage)[r] != bases(stage)[r]; });
        barrier_sync(1 + warpgroup, 128);
      }
#pragma unroll 1
      for (int at = 0; at < F::kQueries; at += 64) {
        if (sees(from_key) >= at + 64 || (tile.queries - tile.first) * int64_t(group) <= at) continue;
        const unsigned keys = unsigned(hidden(int(shared_address(shared)))) + unsigned(64 * warpgroup * kPanelRow);
        const unsigned q = shared_address(d_q(stage)) + unsigned(at * kPanelRow);
        float p[8][4], ds[8][4];
        uint32_t p16[4][4], ds16[4][4];
        begin_products(p, ds);
        const auto scores = [](float (&x)[8][4], Operand left, Operand right) {
#pragma unroll
          for (int unit = 0; unit < D / 16; ++unit)
            add_product_async<T>(x, left + (unit / 4 * F::kKeyPanel + unit % 4 * 32), right + (unit / 4 * F::kQueryPanel + unit % 4 * 32),
                                 unit > 0);
          commit_products();
        };
        scores(p, Operand(keys), Operand(q));
        scores(ds, Operand(keys + F::kValues), Operand(q + F::kOne));

        const float* const base = bases(stage) + at + lane % 4 * 2;  // of the lane's two rows of every eight; the deltas follow
        wait_for_products<1>(p);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const Pack<float, 2> two = load<2>(base + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) p[j][e] = exp2_approximate(p[j][e] * scale - two[e % 2]);
        }
        if (end_key - from_key < 64 || sees(end_key - 1) > at) {
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int key = row + mine(h), from = key >= from_key && key < end_key ? sees(key) - at : INT32_MAX;
#pragma unroll
            for (int j = 0; j < 8; ++j)
#pragma unroll
              for (int e = 0; e < 2; ++e)
                if (8 * j + lane % 4 * 2 + e < from)
                  p[j][2 * h + e] = 0;  // ds becomes 0 too; rows of K and V that hold NaN are never written
          }
        }
        as_left_side<T>(p16, p);
        begin_products(dv, p16);
#pragma unroll
        for (int t = 0; t < 4; ++t) add_product_async<T>(dv, p16[t], Operand(q + F::kOne, F::kQueryPanel) + t * 2 * kPanelEight);
        commit_products();

        wait_for_products<1>(ds);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const Pack<float, 2> two = load<2>(base + F::kQueries + 8 * j);
#pragma unroll
          for (int e = 0; e < 4; ++e) ds[j][e] = p[j][e] * (ds[j][e] - two[e % 2]);
        }
        as_left_side<T>(ds16, ds);
        begin_products(dk, ds16);
#pragma unroll
        for (int t = 0; t < 4; ++t) add_product_async<T>(dk, ds16[t], Operand(q, F::kQueryPanel) + t * 2 * kPanelEight);
        commit_products();
        wait_for_products<0>(dv, dk, p16, ds16);
      }
    }
    __syncwarp();
    if (lane == 0) arrive(empty + stage);
  });

  const auto place = [&](int h) { return row + mine(h); };
  add_to_pool<D>(l, a.dk_pool, head, has_grad, place, dk, a.scale);
  add_to_pool<D>(l, a.dv_pool, head, has_grad, place, dv, 1);
}

}  // namespace diffmas::cuda
