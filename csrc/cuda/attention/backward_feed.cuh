// What a block of backward_sm90.cuh works on, where it lies in shared memory, and the warps that bring it there. They have few registers,
// so what there is to know of a sequence is read again for every tile.
#pragma once
#include "cuda/sm90.h"
#include "block_readers.cuh"
#include "gradient_rows.cuh"

namespace diffmas::cuda {

constexpr int kNotThere = INT32_MAX;  // the position of a pool row that a sequence does not read

template <int D>
struct BackwardForm {
  static constexpr int kGroups = 2, kKeys = kBlockRows, kQueries = 64, kStages = 256 / D, kPanels = D / kPanelElements;
  static constexpr int kThreads = 128 * (kGroups + 1), kReaders = 4 * kGroups;  // warps that are done with a stage
  static constexpr int kSums = kQueries * kPanelElements;                       // floats of dQ that a warpgroup computes at a time

  // Shared memory: K, V, the ring of q and do, two tiles of dS, dQ of each warpgroup; of a stage positions of keys, base and delta of
  // rows, what else is to know; barriers; which piece of work this is.
  static constexpr int kKeyPanel = kKeys * kPanelRow, kQueryPanel = kQueries * kPanelRow, kOne = kPanels * kQueryPanel;
  static constexpr int kValues = kPanels * kKeyPanel, kRing = 2 * kValues, kScores = kRing + kStages * 2 * kOne;
  static constexpr int kQuerySums = kScores + 2 * kKeyPanel, kPositions = kQuerySums + kGroups * kSums * int(sizeof(float));
  static constexpr int kNumbers = kPositions + kStages * kKeys * int(sizeof(int));
  static constexpr int kTiles = kNumbers + kStages * kQueries * int(sizeof(float2)), kUnclean = kTiles + kStages * 12;
  static constexpr int kBarriers = kUnclean + kStages * 4;
  static constexpr int kWork = kBarriers + (2 * kStages + 3 + 2 * kGroups) * int(sizeof(Barrier)), kBytes = kWork + 8;
  static_assert(kBytes <= 232448 && kBarriers % 8 == 0);  // of a block on sm_90
};

struct BackwardLaunch {
  TensorMap q, d_o;          // [n, Hq, D] in boxes of `tokens` tokens of a group
  TensorMap k_pool, v_pool;  // [Hkv, R, D] in boxes of a block's rows
  AttentionLaunch attention;
  BlockReaders readers;
  int tokens;  // of a tile: as many whole groups as fit
  float* sums;      // [tiles, Hkv, panels, kSums]: dQ, as the threads of a warpgroup have it
  unsigned* marks;  // [tiles, Hkv, panels]: 1 + the last block of pool rows that added to it, 0 before the first has; and
  unsigned* begun;  // how many blocks have begun

  __device__ __forceinline__ int64_t place(int tile, int head, int panel, int panels) const {
    return (int64_t(tile) * attention.a.kv_heads + head) * panels + panel;
  }
};

// What there is to know of a stage's keys.
struct BackwardTile {
  int last;    // key of the view that the first token sees; all later ones see as many more as they come later, if causal
  int learns;  // from this key of the view on
  int flags;
};
// Of a warpgroup's keys: not all are for all rows; some learn; some do not learn. The second warpgroup's are shifted by one. And: there is
// no tile.
enum BackwardFlags { kHidden = 1, kLearn = 4, kMixed = 16, kNoTile = 64 };

// Of the shared memory of a block.
template <int D>
struct BackwardShared {
  using F = BackwardForm<D>;
  char* data;

  __device__ __forceinline__ char* queries(int stage) const { return data + F::kRing + stage * 2 * F::kOne; }  // then do
  __device__ __forceinline__ char* scores(int i) const { return data + F::kScores + i % 2 * F::kKeyPanel; }
  __device__ __forceinline__ float* query_sums(int warpgroup) const {
    return reinterpret_cast<float*>(data + F::kQuerySums) + warpgroup * F::kSums;
  }
  __device__ __forceinline__ int* positions(int stage) const { return reinterpret_cast<int*>(data + F::kPositions) + stage * F::kKeys; }
  __device__ __forceinline__ float* bases(int stage) const {  // then deltas
    return reinterpret_cast<float*>(data + F::kNumbers) + stage * 2 * F::kQueries;
  }
  __device__ __forceinline__ BackwardTile& tile(int stage) const { return reinterpret_cast<BackwardTile*>(data + F::kTiles)[stage]; }
  // How many rows are the tile's own, if others or some of these must be taken out of the products; else 0.
  __device__ __forceinline__ int& unclean(int stage) const { return reinterpret_cast<int*>(data + F::kUnclean)[stage]; }
  __device__ __forceinline__ int& work() const { return *reinterpret_cast<int*>(data + F::kWork); }

  __device__ __forceinline__ Barrier* full(int stage) const { return reinterpret_cast<Barrier*>(data + F::kBarriers) + stage; }
  __device__ __forceinline__ Barrier* empty(int stage) const { return full(F::kStages + stage); }
  __device__ __forceinline__ Barrier* scores_full(int i) const { return full(2 * F::kStages + i % 2); }
  __device__ __forceinline__ Barrier* keys_full() const { return full(2 * F::kStages + 2); }
  __device__ __forceinline__ Barrier* sums_full(int warpgroup) const { return full(2 * F::kStages + 3 + warpgroup); }
  __device__ __forceinline__ Barrier* sums_empty(int warpgroup) const { return full(2 * F::kStages + 3 + F::kGroups + warpgroup); }
};

// Calls visit(sequence, tile, is_new) for every tile of query rows that sees some of a block's keys, always in one order, on all lanes of a
// warp. Late tiles come first: every block begins with them, so that in the order of blocks each waits for the one before it only at
// first. is_new: the sequence is another one than before.
template <class Visit>
__device__ __forceinline__ void for_each_tile(const BackwardLaunch& launch, int block, Visit visit) {
  const Segments& view = launch.attention.a.view;
  for (int b0 = 0; b0 < view.batch; b0 += 32) {
    const int mine = b0 + hidden(lane_id());
    for (unsigned left = __ballot_sync(~0u, mine < view.batch && launch.readers.of(block, mine).token != kNobody); left; left &= left - 1) {
      const int b = b0 + __ffs(int(left)) - 1, first = launch.readers.of(block, b).token / launch.tokens;
      const int last = (int(view.q_indptr[b + 1] - view.q_indptr[b]) - 1) / launch.tokens;
      for (int tile = last; tile >= first; --tile) visit(b, tile, tile == last);
    }
  }
}

// K, V, and the tiles of query rows of a block, by a warp.
template <int D>
__device__ __forceinline__ void bring_queries(const BackwardLaunch& launch, const BackwardShared<D>& shared, int block, int head) {
  using F = BackwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  const int lane = lane_id(), group = l.group;
  if (lane == 0) {
    arrive_expecting(shared.keys_full(), 2 * F::kValues);
    for (int panel = 0; panel < F::kPanels; ++panel) {
      char* const to = shared.data + panel * F::kKeyPanel;
      copy_box(to, launch.k_pool, panel * kPanelElements, block * F::kKeys, head, shared.keys_full());
      copy_box(to + F::kValues, launch.v_pool, panel * kPanelElements, block * F::kKeys, head, shared.keys_full());
    }
  }
  int i = 0;
  for_each_tile(launch, block, [&](int b, int tile, bool) {
    // Rows behind the sequence's end belong to the next one.
    const int token = int(l.a.view.q_indptr[b]) + tile * launch.tokens;
    const int rows = min(launch.tokens, int(l.a.view.q_indptr[b + 1]) - token) * group;
    float2 two[F::kQueries / 32];
    const bool wrong = read_bases<F::kQueries>(l, head, token, rows, launch.tokens * group, two);
    const int stage = i % F::kStages;
    wait_for(shared.empty(stage), ~(i++ / F::kStages) & 1);
    if (lane == 0) {
      arrive_expecting(shared.full(stage), 2 * F::kPanels * launch.tokens * group * kPanelRow);
      for (int panel = 0; panel < F::kPanels; ++panel) {
        char* const to = shared.queries(stage) + panel * F::kQueryPanel;
        copy_box(to, launch.q, panel * kPanelElements, head * group, token, shared.full(stage));
        copy_box(to + F::kOne, launch.d_o, panel * kPanelElements, head * group, token, shared.full(stage));
      }
      shared.unclean(stage) = wrong ? rows : 0;
    }
#pragma unroll
    for (int j = 0; j < F::kQueries / 32; ++j)
      shared.bases(stage)[lane + 32 * j] = two[j].x, shared.bases(stage)[F::kQueries + lane + 32 * j] = two[j].y;
    arrive(shared.full(stage));
  });
  const int stage = i % F::kStages;
  wait_for(shared.empty(stage), ~(i / F::kStages) & 1);
  if (lane == 0) shared.unclean(stage) = 0, arrive_expecting(shared.full(stage), 0);
  arrive(shared.full(stage));
}

// Where the block's keys are in the view of each tile's sequence, and what follows from that, by another warp.
template <int D>
__device__ __forceinline__ void find_keys(const BackwardLaunch& launch, const BackwardShared<D>& shared, int block) {
  using F = BackwardForm<D>;
  const AttentionLaunch& l = launch.attention;
  const Segments& view = l.a.view;
  const int lane = lane_id(), row = block * F::kKeys + 4 * lane;
  int i = 0, flags = 0, positions[4];  // of pool row `row` and the next three
  const auto of_groups = [](bool x) {
    const unsigned all = __ballot_sync(~0u, x);
    return int((all & 0xFFFF) != 0) | int(all >> 16 != 0) << 1;
  };
  for_each_tile(launch, block, [&](int b, int tile, bool is_new) {
    const int s_first = int(view.seg_indptr[b]), length = l.ranges[s_first].length;
    const int learns = view.grad_tail ? length - int(min(view.grad_tail[b], int64_t(length))) : 0;
    if (is_new) {
#pragma unroll
      for (int& position : positions) position = kNotThere;
      for (int s0 = s_first; s0 < int(view.seg_indptr[b + 1]); s0 += 32) {
        const int mine = min(s0 + lane, int(view.seg_indptr[b + 1]) - 1);
        const bool meets = int(view.start[mine]) < (block + 1) * F::kKeys && l.ranges[mine].end > block * F::kKeys;
        for (unsigned left = __ballot_sync(~0u, s0 + lane == mine && meets); left; left &= left - 1) {
          const int s = s0 + __ffs(int(left)) - 1;
#pragma unroll
          for (int j = 0; j < 4; ++j)
            if (row + j >= int(view.start[s]) && row + j < l.ranges[s].end) positions[j] = row + j + l.ranges[s].to_view;
        }
      }
      bool some_learn = false, some_do_not = false;
#pragma unroll
      for (const int position : positions) {
        some_learn = some_learn || (position != kNotThere && position >= learns);
        some_do_not = some_do_not || position < learns;
      }
      flags = of_groups(some_learn) * kLearn | of_groups(some_do_not) * kMixed;
    }
    const int last = length - (view.causal ? int(view.q_indptr[b + 1] - view.q_indptr[b]) - tile * launch.tokens : 1);
    const int hides = of_groups(max(max(positions[0], positions[1]), max(positions[2], positions[3])) > last);
    const int stage = i % F::kStages;
    wait_for(shared.empty(stage), ~(i++ / F::kStages) & 1);
    if (lane == 0) shared.tile(stage) = {last, learns, flags | hides * kHidden};
    reinterpret_cast<uint4*>(shared.positions(stage))[lane] =
        make_uint4(unsigned(positions[0]), unsigned(positions[1]), unsigned(positions[2]), unsigned(positions[3]));
    arrive(shared.full(stage));
  });
  const int stage = i % F::kStages;
  wait_for(shared.empty(stage), ~(i / F::kStages) & 1);
  if (lane == 0) shared.tile(stage) = {0, 0, kNoTile};
  arrive(shared.full(stage));
}

}  // namespace diffmas::cuda
