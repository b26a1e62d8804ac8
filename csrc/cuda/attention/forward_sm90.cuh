// cross_attention of many queries on Hopper: products by wgmma, with operands that the copy engine brings.
//
// A block has 128 query rows of a K/V head, 64 a warpgroup, and takes one such tile after the other. One warp of a third warpgroup keeps
// rings of K and V full across tiles, 128 keys a stage (forward_feed.cuh); barriers in shared memory count what has arrived and which
// warps are done with it. A warpgroup multiplies q with the next keys and its weights with the last values in the background of the
// softmax in between, and the two warpgroups issue their products in turn, so that one has tensor cores while the other has weights to
// compute. Weights go from accumulators to the left side of P V in registers.
//
// What it takes at D = 128, for 64 query rows and 128 keys, of a multiprocessor that does 2048 MAC a cycle:
//   products  2 of 64 x 128 x 128: 1024 cycles a warpgroup, the bound; 2048 for both.
//   shared    64 KB of K and V and 16 KB of q are read, half of 64 KB written by the copy engine: 900 cycles at 128 bytes.
//   exp2      8192 at 16 a cycle: 512 cycles.
//   issue     some 8 instructions for each of a lane's 64 scores: 509 a warp and multiprocessor's quarter, 722 with a mask.
//   L2        64 KB serve two warpgroups, 2048 cycles: 32 bytes a cycle and multiprocessor.
//   registers o 64, scores 64, their halves 32: one block of 2 x 224 and 1 x 56 a multiprocessor.
// At D = 64 products take half of that, exp2 does not: both are 1024 cycles then.
//
// It serves 16-bit types, heads of up to 128 dimensions, groups that fit a tile, positive scales, and no position offsets: these would
// rotate q between its arrival and its use. It does not split a view: a few tiles of queries keep a few multiprocessors busy.
#pragma once
#include "forward_feed.cuh"

namespace diffmas::cuda {

// Products of a row with keys, of which -inf are not for it, become weights; shrink: what earlier sums are to be multiplied with.
template <int N>
__device__ __forceinline__ void as_weights(float (&x)[N][4], float scale, float (&top)[2], float (&sum)[2], float (&shrink)[2]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    float mine = x[0][2 * h];
#pragma unroll
    for (int i = 1; i < 2 * N; ++i) mine = fmaxf(mine, x[i / 2][2 * h + i % 2]);
    const float higher = fmaxf(top[h], group_max(mine, 4));
    const float base = higher == -INFINITY ? 0 : higher * scale;  // a row that has seen nothing yet
    shrink[h] = exp2_approximate(top[h] * scale - base);
    top[h] = higher, sum[h] *= shrink[h];
#pragma unroll
    for (int i = 0; i < 2 * N; ++i) {
      float& p = x[i / 2][2 * h + i % 2];
      p = exp2_approximate(p * scale - base), sum[h] += p;
    }
  }
}

template <class T, int D>
__device__ __forceinline__ void compute_tiles(const ForwardLaunch& launch, const ForwardShared<D>& shared, int warpgroup) {
  using F = ForwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  const int lane = lane_id(), row = 64 * warpgroup + warp_id() % 4 * 16 + lane / 4;  // and the one eight below it
  const float scale = l.a.scale * kLog2e;
  RingPlace<F::kStages> k;
  int q_parity = 0;
  const auto release = [&](Barrier* barrier) {
    __syncwarp();
    if (lane == 0) arrive(barrier);
  };
  // Whose turn it is to issue products.
  const auto take_turn = [&] { barrier_sync(3 + warpgroup, 256); };
  const auto give_turn = [&] { barrier_arrive(3 + (warpgroup ^ 1), 256); };
  if (warpgroup == 1) give_turn();

  for (;;) {
    wait_for(shared.q_full(), q_parity), q_parity ^= 1;
    const ForwardTile tile = shared.tile();
    if (!tile.rows) break;
    float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
    if (tile.sees) {
      float s[F::kKeys / 8][4], shrink[2];
      uint32_t p[F::kKeys / 16][4];
      int flags;
      bool mine_is_no_key = false;  // of key threadIdx.x % 128
      const auto scores = [&] {
        const unsigned from = unsigned(hidden(int(shared_address(shared.data)))) + unsigned(64 * warpgroup * kPanelRow);
        const unsigned to = shared_address(shared.keys(k.stage));
#pragma unroll
        for (int unit = 0; unit < D / 16; ++unit)
          add_product_async<T>(s, Operand(from) + (unit / 4 * F::kQueryPanel + unit % 4 * 32),
                               Operand(to) + (unit / 4 * F::kKeyPanel + unit % 4 * 32), unit > 0);
        commit_products();
      };
      const auto add_values = [&] {
        const Operand values(shared_address(shared.values(k.before(1).stage)), F::kKeyPanel);
#pragma unroll
        for (int t = 0; t < F::kKeys / 16; ++t) add_product_async<T>(o, p[t], values + t * 2 * kPanelEight);
        commit_products();
      };
      // Rows of V that are no keys may hold NaN, and their weights of 0 would not stop it. Each warpgroup writes zeros before it reads.
      const auto wait_for_values = [&] {
        const RingPlace v = k.before(1);
        wait_for(shared.v_full(v.stage), v.parity);
        if (!(flags & kUnclean)) return;
        if (mine_is_no_key) {
          char* const mine = shared.values(v.stage) + int(threadIdx.x) % 128 * kPanelRow;
#pragma unroll 1
          for (int i = 0; i < F::kPanels * kPanelRow / 16; ++i)
            store<4>(reinterpret_cast<float*>(mine + i / 8 * F::kKeyPanel + i % 8 * 16), zeros<float, 4>());
        }
        publish_to_async();
        barrier_sync(1 + warpgroup, 128);
      };
      // Scores of the stage that is next become weights, and the stage is given back.
      const auto weigh = [&] {
        flags = shared.flags(k.stage);
        if (flags & kMasked) {
          mine_is_no_key = shared.positions(k.stage)[threadIdx.x % 128] == kNoKey;
#pragma unroll
          for (int h = 0; h < 2; ++h) {
            const int last = tile.last + (l.a.view.causal ? (row + 8 * h) / l.group : 0);
#pragma unroll
            for (int j = 0; j < F::kKeys / 8; ++j) {
              const uint2 two = *reinterpret_cast<const uint2*>(shared.positions(k.stage) + 8 * j + lane % 4 * 2);
              if (int(two.x) > last) s[j][2 * h] = -INFINITY;
              if (int(two.y) > last) s[j][2 * h + 1] = -INFINITY;
            }
          }
        }
        release(shared.k_empty(k.stage));
        if (flags & kLast) release(shared.q_empty());
        k.next();
        as_weights(s, scale, top, sum, shrink);
      };

      wait_for(shared.k_full(k.stage), k.parity);
      begin_products(s);
      scores();
      wait_for_products<0>(s);
      weigh();
      as_left_side<T>(p, s);
      while (!(flags & kLast)) {
        wait_for(shared.k_full(k.stage), k.parity);
        wait_for_values();
        take_turn();
        begin_products(s, o, p);
        scores();
        add_values();
        give_turn();
        wait_for_products<1>(s);
        weigh();
        if (sum[0] + sum[1] < 0) __trap();  // never: but ptxas would wait for P V before it computes what no branch hangs on
        wait_for_products<0>(o, p);
        release(shared.v_empty(k.before(2).stage));
#pragma unroll
        for (int i = 0; i < D / 2; ++i) o[i / 4][i % 4] *= shrink[i / 2 % 2];
        as_left_side<T>(p, s);
      }
      wait_for_values();
      begin_products(o, p);
      add_values();
      wait_for_products<0>(o, p);
      release(shared.v_empty(k.before(1).stage));
    } else {
      release(shared.q_empty());
    }

#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      const float total = group_sum(sum[h], 4), share = total == 0 ? 0 : 1 / total;  // a NaN total is not an empty row
      if (r >= tile.rows) continue;
      const int64_t token = tile.token + r / l.group;
      const int head = tile.head * l.group + r % l.group;
      T* const to = row_of<T>(l.a.o, token, head) + lane % 4 * 2;
#pragma unroll
      for (int j = 0; j < D / 8; ++j)
        if (8 * j < l.a.head_dim) store<2>(to + 8 * j, pack<T>({o[j][2 * h] * share, o[j][2 * h + 1] * share}));
      if (lane % 4 == 0) l.a.lse[token * l.a.q_heads + head] = total == 0 ? -INFINITY : (top[h] * scale + log2f(total)) * kLn2;
    }
  }
  if (warpgroup == 0) take_turn();  // the last that was given
}

template <class T, int D>
__global__ void __launch_bounds__(ForwardForm<D>::kThreads, 1) attention_fwd_kernel_sm90(const __grid_constant__ ForwardLaunch launch) {
  using F = ForwardForm<D>;
  DIFFMAS_DYNAMIC_SHARED(data);
  const ForwardShared<D> shared{data};
  const int warpgroup = __shfl_sync(~0u, warp_id() / 4, 0);  // the shuffle tells the compiler that all lanes have the same
  if (threadIdx.x == 0) {
    if (shared_address(data) % kPanelEight) __trap();
    init_barrier(shared.q_full(), 1), init_barrier(shared.q_empty(), F::kReaders);
    for (int i = 0; i < F::kStages; ++i) {
      init_barrier(shared.k_full(i), 1), init_barrier(shared.v_full(i), 1);
      init_barrier(shared.k_empty(i), F::kReaders), init_barrier(shared.v_empty(i), F::kReaders);
    }
    barriers_ready();
  }
  __syncthreads();
  if (warpgroup == F::kGroups) {
    setmaxnreg_dec<56>();
    if (warp_id() % 4 == 0) bring_tiles<D>(launch, shared);
  } else {
    setmaxnreg_inc<224>();
    compute_tiles<T, D>(launch, shared, warpgroup);
  }
}

}  // namespace diffmas::cuda
