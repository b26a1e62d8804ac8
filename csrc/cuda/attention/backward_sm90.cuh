// The backward of many queries on Hopper, its five products in one kernel: by wgmma, with operands that the copy engine brings.
//
// A block owns 128 pool rows of a K/V head, 64 a warpgroup. K, V and a ring of tiles of q and do are in shared memory, the sums of dK and
// dV in registers. A product takes 64 query rows. One warp of a third warpgroup keeps the ring full (backward_feed.cuh); barriers in
// shared memory count what has arrived and which warps are done with it. S and dP are transposed, with keys as rows, so p and ds leave the
// accumulators as the left side of the next product; ds goes to shared memory, too, for dQ of all 128 keys. At D = 128 each warpgroup
// computes half of dQ's columns, at D = 64 they take tiles in turn. A tile's dQ comes after the next tile's scores were issued, so that a
// warpgroup may be half a tile ahead of the other, and has tensor cores while the other computes p and ds.
//
// dQ is summed in memory: blocks add to a tile of query rows in the order of their pool rows, whatever order they run in, so its bits do
// not change. A mark of each tile says which block was the last; a warp waits for the block before, lets the copy engine add (or, as the
// first, store), and sets the mark, while the warpgroups go on. Blocks take their rows in the order in which they begin, so whoever is
// waited for has begun. (backward_sums.cuh)
//
// What it takes at D = 128, for 64 keys and 64 query rows, of a multiprocessor that does 2048 MAC a cycle:
//   products  5 of 64 x 64 x 128: 1280 cycles a warpgroup, 2560 for both.
//   shared    128 KB read by products, 8 KB of ds and 16 KB of dQ written, which the copy engine reads, half of 32 KB that it writes:
//             184 KB, 1472 cycles at 128 bytes, the bound.
//   exp2      4096 at 16 a cycle: 256 cycles.
//   L2        32 KB of q and do come and 32 KB of dQ go in 2944 cycles: 22 bytes a cycle and multiprocessor.
//   registers dK and dV 128, two of S, dP and dQ 64, halves of p and ds 32.
//
// It serves what dkv_sm90.cuh does.
#pragma once
#include "backward_sums.cuh"

namespace diffmas::cuda {

template <class T, int D>
__device__ __forceinline__ void compute_gradients(const BackwardLaunch& launch, const BackwardShared<D>& shared, int warpgroup) {
  using F = BackwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  const int lane = lane_id();
  const auto thread = [] { return hidden(int(threadIdx.x)) % 128; };  // of the warpgroup
  const auto mine = [&](int h) { return thread() / 32 * 16 + thread() % 32 / 4 + 8 * h; };  // the lane's two keys, of the warpgroup's
  const auto release = [&](Barrier* barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  };
  const float scale = l.a.scale * kLog2e;
  float dk[D / 8][4] = {}, dv[D / 8][4] = {}, s[8][4];
  int has_grad = 0;  // a bit for each of my keys

  // Rows of K that are not finite must not reach dQ of queries that do not see them. (Those that do have no finite base or delta.)
  const auto clean_keys = [&] {
    constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7F80 : 0x7C00;
    char* const key = shared.data + (64 * warpgroup + thread() / 2) * kPanelRow;
    bool finite = true;
#pragma unroll 1
    for (int i = thread() % 2; i < F::kPanels * 8; i += 2) {
      const uint4 x = *reinterpret_cast<const uint4*>(key + i / 8 * F::kKeyPanel + i % 8 * 16);
      for (const uint32_t two : {x.x, x.y, x.z, x.w})
        finite = finite && (two & kExponent) != kExponent && (two >> 16 & kExponent) != kExponent;
    }
    finite = int(finite) & __shfl_xor_sync(~0u, int(finite), 1);
#pragma unroll 1
    for (int i = thread() % 2; i < F::kPanels * 8; i += 2)
      if (!finite) store<4>(reinterpret_cast<float*>(key + i / 8 * F::kKeyPanel + i % 8 * 16), zeros<float, 4>());
    publish_to_async();
    barrier_sync(1 + warpgroup, 128);
  };
  // Waits for a stage, and writes zeros to those of its rows of q and do that are no queries of the tile, or not finite. -> whether there
  // is a tile.
  const auto wait_for_queries = [&](int i) {
    const int stage = i % F::kStages;
    wait_for(shared.full(stage), i / F::kStages & 1);
    const int unclean = shared.unclean(stage);
    if (unclean) {
#pragma unroll 1
      for (int i = thread(); i < F::kQueryPanel / 16; i += 128) {
        const int row = i / (kPanelRow / 16);
        if (row < unclean && shared.bases(stage)[row] == shared.bases(stage)[row]) continue;
#pragma unroll 1
        for (int panel = 0; panel < 2 * F::kPanels; ++panel)
          store<4>(reinterpret_cast<float*>(shared.queries(stage) + panel * F::kQueryPanel + i * 16), zeros<float, 4>());
      }
      publish_to_async();
      barrier_sync(1 + warpgroup, 128);
    }
    return !(shared.tile(stage).flags & kNoTile);
  };
  const auto keys = [&] { return unsigned(hidden(int(shared_address(shared.data)))); };
  const auto multiply = [&](float (&x)[8][4], int from, int to) {
    const Operand left(keys() + unsigned(from + 64 * warpgroup * kPanelRow)), right(keys() + unsigned(to));
#pragma unroll
    for (int unit = 0; unit < D / 16; ++unit)
      add_product_async<T>(x, left + (unit / 4 * F::kKeyPanel + unit % 4 * 32), right + (unit / 4 * F::kQueryPanel + unit % 4 * 32),
                           unit > 0);
    commit_products();
  };
  const auto ring = [&](int i) { return F::kRing + i % F::kStages * 2 * F::kOne; };
  const auto add_pairs = [&](float (&sum)[D / 8][4], const uint32_t (&left)[4][4], int right) {
#pragma unroll
    for (int t = 0; t < 4; ++t) add_product_async<T>(sum, left[t], Operand(keys() + unsigned(right), F::kQueryPanel) + t * 2 * kPanelEight);
    commit_products();
  };

  wait_for(shared.keys_full(), 0);
  clean_keys();
  wait_for_queries(0);
  begin_products(s);
  multiply(s, 0, ring(0));
  wait_for_products<0>(s);
  bool goes_on = true;
#pragma unroll 1
  for (int i = 0; goes_on; ++i) {
    const int stage = i % F::kStages;
    const int flags = shared.tile(stage).flags >> warpgroup;
    // The first query row of the tile that sees a key.
    const auto sees = [&](int key) {
      const int position = shared.positions(stage)[64 * warpgroup + key];
      if (position == kNotThere) return F::kQueries;
      return l.a.view.causal ? min(max(position - shared.tile(stage).last, 0), F::kQueries) * l.group : 0;
    };
    const auto learns = [&](int key) {
      const int position = shared.positions(stage)[64 * warpgroup + key];
      return position != kNotThere && position >= shared.tile(stage).learns;
    };
#pragma unroll
    for (int h = 0; h < 2; ++h) has_grad |= int(learns(mine(h))) << h;
    const auto leave_out = [&](uint32_t (&x)[4][4]) {  // keys that do not learn
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (!learns(mine(h)))
#pragma unroll
          for (int t = 0; t < 8; ++t) x[t / 2][t % 2 * 2 + h] = 0;
    };

    float ds[8][4];
    uint32_t p16[4][4], ds16[4][4];
    begin_products(ds);
    multiply(ds, F::kValues, ring(i) + F::kOne);
    const float* const base = shared.bases(stage) + lane % 4 * 2;  // of the lane's two rows of every eight; the deltas follow
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Pack<float, 2> two = load<2>(base + 8 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) s[j][e] = exp2_approximate(s[j][e] * scale - two[e % 2]);
    }
    if (flags & kHidden) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int from = sees(mine(h));
#pragma unroll
        for (int j = 0; j < 8; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e)
            if (8 * j + lane % 4 * 2 + e < from) s[j][2 * h + e] = 0;
      }
    }
    as_left_side<T>(p16, s);
    if (flags & kMixed) leave_out(p16);
    if (flags & kLearn) {
      begin_products(dv, p16);
      add_pairs(dv, p16, ring(i) + F::kOne);
      wait_for_products<1>(ds);
    } else {
      wait_for_products<0>(ds);
    }
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const Pack<float, 2> two = load<2>(base + F::kQueries + 8 * j);
#pragma unroll
      for (int e = 0; e < 4; ++e) ds[j][e] = s[j][e] * (ds[j][e] - two[e % 2]);
    }
    if (flags & kHidden) {  // a row of V that is no key may hold NaN
#pragma unroll
      for (int j = 0; j < 8; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (s[j][e] == 0) ds[j][e] = 0;
    }
    as_left_side<T>(ds16, ds);
    char* const to = shared.scores(i) + (64 * warpgroup + mine(0)) * kPanelRow + lane % 4 * 4;
#pragma unroll
    for (int j = 0; j < 16; ++j)
      *reinterpret_cast<uint32_t*>(to + j % 2 * kPanelEight + (j / 2 ^ lane / 4) * 16) = ds16[j / 4][j % 4];
    publish_to_async();
    release(shared.scores_full(i));
    if (flags & kMixed) leave_out(ds16);
    if (flags & kLearn) {
      begin_products(dk, ds16);
      add_pairs(dk, ds16, ring(i));
    }

    goes_on = wait_for_queries(i + 1);
    begin_products(s);
    multiply(s, 0, ring(i + 1));  // of any queries if there is no tile
    wait_for_products<1>(dv, dk, p16, ds16);
    release(shared.empty(stage));

    wait_for(shared.scores_full(i), i / 2 & 1);
    if (F::kPanels == 2 || i % 2 == warpgroup) {
      float dq[8][4];
      const Operand left(keys() + unsigned(F::kScores + i % 2 * F::kKeyPanel));
      const Operand right(keys() + unsigned((F::kPanels - 1) * warpgroup * F::kKeyPanel));
      begin_products(dq);
#pragma unroll
      for (int t = 0; t < F::kKeys / 16; ++t)
        add_product_of_columns_async<T>(dq, left + t * 2 * kPanelEight, right + t * 2 * kPanelEight, t > 0);
      commit_products();
      wait_for(shared.sums_empty(warpgroup), ~(i / (3 - F::kPanels)) & 1);
      wait_for_products<0>(s, dq);
#pragma unroll
      for (int j = 0; j < 8; ++j) store<4>(shared.query_sums(warpgroup) + (j * 128 + thread()) * 4, pack<float>(dq[j]));
      publish_to_async();
      release(shared.sums_full(warpgroup));
    } else {
      wait_for_products<0>(s);
    }
  }

  const int head = shared.work() % int(l.a.kv_heads), row = shared.work() / int(l.a.kv_heads) * F::kKeys;
  const auto place = [&](int h) { return row + 64 * warpgroup + mine(h); };
  add_to_pool<D>(l, l.a.dk_pool, head, has_grad, place, dk, l.a.scale);
  add_to_pool<D>(l, l.a.dv_pool, head, has_grad, place, dv, 1);
}

template <class T, int D>
__global__ void __launch_bounds__(BackwardForm<D>::kThreads, 1) attention_bwd_kernel_sm90(const __grid_constant__ BackwardLaunch launch) {
  using F = BackwardForm<D>;
  DIFFMAS_DYNAMIC_SHARED(data);
  const BackwardShared<D> shared{data};
  const AttentionLaunch& l = launch.attention;
  const int warpgroup = __shfl_sync(~0u, warp_id() / 4, 0);  // the shuffle tells the compiler that all lanes have the same
  if (threadIdx.x == 0) {
    if (shared_address(data) % kPanelEight) __trap();
    shared.work() = int(atomicInc(launch.begun, gridDim.x - 1));
    for (int i = 0; i < F::kStages; ++i) init_barrier(shared.full(i), 65), init_barrier(shared.empty(i), F::kReaders);
    for (int i = 0; i < 2; ++i) init_barrier(shared.scores_full(i), F::kReaders);
    for (int i = 0; i < F::kGroups; ++i) init_barrier(shared.sums_full(i), 4), init_barrier(shared.sums_empty(i), 1);
    init_barrier(shared.keys_full(), 1);
    barriers_ready();
  }
  for (int i = int(threadIdx.x); i < F::kStages * 2 * F::kOne / 16; i += F::kThreads)  // rows that no box covers must not hold NaN
    store<4>(reinterpret_cast<float*>(data + F::kRing + i * 16), zeros<float, 4>());
  publish_to_async();
  __syncthreads();
  const int block = shared.work() / int(l.a.kv_heads), head = shared.work() % int(l.a.kv_heads), batch = int(l.a.view.batch);
  bool is_read = false;
  for (int b = lane_id(); b < batch; b += 32) is_read = is_read || launch.readers.of(block, b).token != kNobody;
  if (!__any_sync(~0u, is_read)) return;

  if (warpgroup == F::kGroups) {
    setmaxnreg_dec<24>();
    const int warp = __shfl_sync(~0u, warp_id() % 4, 0);
    if (warp < F::kGroups) carry_sums<D>(launch, shared, block, head, warp);
    else if (warp == F::kGroups) bring_queries<D>(launch, shared, block, head);
    else find_keys<D>(launch, shared, block);
  } else {
    setmaxnreg_inc<240>();
    compute_gradients<T, D>(launch, shared, warpgroup);
  }
}

}  // namespace diffmas::cuda
