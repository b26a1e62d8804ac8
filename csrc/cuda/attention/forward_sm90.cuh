// cross_attention of many queries on Hopper: products by wgmma, with operands that the copy engine brings.
//
// A block has 128 query rows of a K/V head, 64 a warpgroup, and takes one such tile after the other. One warp of a third warpgroup keeps
// rings of K and V full across tiles, 128 keys a stage (key_groups.cuh); barriers in shared memory count what has arrived and which
// warps are done with it. A warpgroup multiplies q with the next keys and its weights with the last values in the background of the
// softmax in between, and the two warpgroups issue their products in turn, so that one has tensor cores while the other has weights to
// compute. Weights go from accumulators to the left side of P V in registers.
//
// What it takes at D = 128, for 64 query rows and 128 keys, of a multiprocessor that does 2048 MAC a cycle:
//   products  2 of 64 x 128 x 128: 1024 cycles a warpgroup, the bound; 2048 for both.
//   shared    64 KB of K and V and 16 KB of q a warpgroup: 640 cycles at 128 bytes; the copy engine writes 64 KB for both.
//   exp2      8192 at 16 a cycle: 512 cycles.
//   issue     some 6 instructions for each of a lane's 64 scores: 400 a warp and multiprocessor's quarter.
//   L2        64 KB serve two warpgroups, 2048 cycles: 32 bytes a cycle and multiprocessor.
//   registers o 64, scores 64, their halves 32: one block of 2 x 224 and 1 x 56 a multiprocessor.
// At D = 64 products take half of that, exp2 does not: both are 1024 cycles then.
//
// It serves 16-bit types, heads of up to 128 dimensions, groups that fit a tile, positive scales, and no position offsets: these would
// rotate q between its arrival and its use. It does not split a view: a few tiles of queries keep a few multiprocessors busy.
#pragma once
#include "key_groups.cuh"

namespace diffmas::cuda {

template <int D>
struct ForwardForm {
  static constexpr int kGroups = 2, kRows = 64 * kGroups, kKeys = kStreamedKeys, kStages = 3, kPanels = D / kPanelElements;
  static constexpr int kThreads = 128 * (kGroups + 1), kReaders = 4 * kGroups;  // warps that are done with a stage

  // Shared memory: q, the rings of K and of V, where keys of a stage are in the view, what there is to know of it, the tile, barriers.
  static constexpr int kQueryPanel = kRows * kPanelRow, kKeyPanel = kKeys * kPanelRow, kStage = kPanels * kKeyPanel;
  static constexpr int kRing = kPanels * kQueryPanel, kValues = kRing + kStages * kStage, kPositions = kValues + kStages * kStage;
  static constexpr int kFlags = kPositions + kStages * kKeys * int(sizeof(int)), kTile = kFlags + 16, kBarriers = kTile + 32;
  static constexpr int kBytes = kBarriers + (4 * kStages + 2) * int(sizeof(Barrier));
  static_assert(kStages <= 4 && kBytes <= 232448);  // of a block on sm_90
};

struct ForwardLaunch {
  TensorMap q;               // [n, Hq, D] in boxes of `tokens` tokens of a group
  PoolMaps k_pool, v_pool;
  AttentionLaunch attention;
  int tokens, tiles;  // tokens of a tile: as many whole groups as fit; tiles of all sequences
};

// Rows of one sequence and K/V head; rows 0: there is no more work.
struct alignas(16) ForwardTile {
  int rows, token, head;  // the first token, packed
  int last;               // key of the view that the first token sees; all later ones see as many more as they come later, if causal
  bool sees;              // whether a token sees anything
};

// What is to know of a stage: some of its keys are not for all rows; some of its rows are no keys; no stage follows.
enum StageFlags { kMasked = 1, kUnclean = 2, kLast = 4 };

// The stage of a ring that is next, and the parity of its phase.
template <int kStages>
struct RingPlace {
  int stage = 0, parity = 0;

  __device__ __forceinline__ void next() {
    if (++stage == kStages) stage = 0, parity ^= 1;
  }
  // Of `stages` earlier.
  __device__ __forceinline__ RingPlace before(int stages) const {
    return stage < stages ? RingPlace{stage - stages + kStages, parity ^ 1} : RingPlace{stage - stages, parity};
  }
};

// Of the shared memory of a block.
template <int D>
struct ForwardShared {
  using F = ForwardForm<D>;
  char* data;

  __device__ __forceinline__ char* keys(int stage) const { return data + F::kRing + stage * F::kStage; }
  __device__ __forceinline__ char* values(int stage) const { return data + F::kValues + stage * F::kStage; }
  __device__ __forceinline__ int* positions(int stage) const { return reinterpret_cast<int*>(data + F::kPositions) + stage * F::kKeys; }
  __device__ __forceinline__ int& flags(int stage) const { return reinterpret_cast<int*>(data + F::kFlags)[stage]; }
  __device__ __forceinline__ ForwardTile& tile() const { return *reinterpret_cast<ForwardTile*>(data + F::kTile); }

  __device__ __forceinline__ Barrier* barriers() const { return reinterpret_cast<Barrier*>(data + F::kBarriers); }
  __device__ __forceinline__ Barrier* q_full() const { return barriers(); }
  __device__ __forceinline__ Barrier* q_empty() const { return barriers() + 1; }
  __device__ __forceinline__ Barrier* k_full(int stage) const { return barriers() + 2 + stage; }
  __device__ __forceinline__ Barrier* k_empty(int stage) const { return k_full(stage) + F::kStages; }
  __device__ __forceinline__ Barrier* v_full(int stage) const { return k_full(stage) + 2 * F::kStages; }
  __device__ __forceinline__ Barrier* v_empty(int stage) const { return k_full(stage) + 3 * F::kStages; }
};

// ---- the warp that brings it

// The tiles of sequence b begin at q_indptr[b] / tokens + b: they hold all of its rows. -> its sequence; rows <= 0: nothing to do.
__device__ __forceinline__ int find_tile(const ForwardLaunch& launch, int tile, ForwardTile& found) {
  const Segments& view = launch.attention.a.view;
  const auto first_tile = [&](int b) { return int(view.q_indptr[b]) / launch.tokens + b; };
  int sequence = -1;
  for (int b = lane_id(); b - lane_id() < view.batch; b += 32)
    sequence += __popc(__ballot_sync(~0u, b < view.batch && first_tile(b) <= tile));
  const int q_first = int(view.q_indptr[sequence]), first = (tile - first_tile(sequence)) * launch.tokens;
  found.token = q_first + first;
  found.rows = min(launch.tokens, int(view.q_indptr[sequence + 1]) - found.token) * launch.attention.group;
  return sequence;
}

template <int D>
__device__ __forceinline__ void bring_tiles(const ForwardLaunch& launch, const ForwardShared<D>& shared) {
  using F = ForwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  const Segments& view = l.a.view;
  const int lane = lane_id(), heads = int(l.a.kv_heads), work = launch.tiles * heads;
  RingPlace<F::kStages> ring;
  int q_parity = 1;
  // Tiles of late queries see most, so they come first; every other round goes the other way, so that it evens out.
  bool back = false;
  for (int first = 0; first < work; first += int(gridDim.x), back = !back) {
    const int i = first + (back ? int(gridDim.x) - 1 - int(blockIdx.x) : int(blockIdx.x));
    if (i >= work) continue;
    ForwardTile tile;
    const int sequence = find_tile(launch, launch.tiles - 1 - i / heads, tile);
    if (tile.rows <= 0) continue;
    const int s_first = int(view.seg_indptr[sequence]), s_last = int(view.seg_indptr[sequence + 1]);
    int length = 0;
    for (int s = s_first + lane; s < s_last; s += 32) length += int(view.length[s]);
    length = warp_sum(length);
    tile.head = i % heads;
    tile.last = length - 1 - (view.causal ? int(view.q_indptr[sequence + 1]) - 1 - tile.token : 0);
    const int end = min(tile.last + 1 + (view.causal ? tile.rows / l.group - 1 : 0), length);
    tile.sees = end > 0;

    wait_for(shared.q_empty(), q_parity), q_parity ^= 1;
    if (lane == 0) {
      shared.tile() = tile;
      arrive_expecting(shared.q_full(), F::kPanels * launch.tokens * l.group * kPanelRow);
      for (int panel = 0; panel < F::kPanels; ++panel)
        copy_box(shared.data + panel * F::kQueryPanel, launch.q, panel * kPanelElements, tile.head * l.group, tile.token, shared.q_full());
    }
    if (!tile.sees) continue;
    KeyGroups groups(view, s_first, s_last);
    bool last = false;
    for (int t = 0; !last; ++t, ring.next()) {
      const KeyGroup mine = groups.find(t, end, int(l.a.pool_rows));
      const bool masked = mine.keys < kGroupKeys || mine.position + kGroupKeys - 1 > tile.last;
      last = __shfl_sync(~0u, mine.keys == 0 || mine.position + mine.keys >= end, 31);
      const int flags = (__any_sync(~0u, masked) ? kMasked : 0) | (last ? kLast : 0) |
                        (__any_sync(~0u, mine.keys > 0 && mine.keys < kGroupKeys) ? kUnclean : 0);
      wait_for(shared.k_empty(ring.stage), ring.parity ^ 1);
      if (flags & kMasked) {
        const auto position = [&](int i) { return unsigned(lane % 2 * 4 + i < mine.keys ? mine.position + lane % 2 * 4 + i : kNoKey); };
        reinterpret_cast<uint4*>(shared.positions(ring.stage))[lane] = make_uint4(position(0), position(1), position(2), position(3));
      }
      __syncwarp();
      if (lane == 0) shared.flags(ring.stage) = flags, arrive_expecting(shared.k_full(ring.stage), F::kStage);
      copy_groups<F::kPanels>(shared.keys(ring.stage), launch.k_pool, mine, tile.head, shared.k_full(ring.stage));
      wait_for(shared.v_empty(ring.stage), ring.parity ^ 1);
      if (lane == 0) arrive_expecting(shared.v_full(ring.stage), F::kStage);
      copy_groups<F::kPanels>(shared.values(ring.stage), launch.v_pool, mine, tile.head, shared.v_full(ring.stage));
    }
  }
  wait_for(shared.q_empty(), q_parity);
  if (lane == 0) shared.tile().rows = 0, arrive(shared.q_full());
}

// ---- the warpgroups that compute

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
        if (mine_is_no_key)
#pragma unroll 1
          for (int i = 0; i < F::kPanels * kPanelRow / 16; ++i)
            store<4>(reinterpret_cast<float*>(shared.values(v.stage) + i / 8 * F::kKeyPanel + int(threadIdx.x) % 128 * kPanelRow + i % 8 * 16),
                     zeros<float, 4>());
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
