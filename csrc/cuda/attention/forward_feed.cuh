// What a block of forward_sm90.cuh works on, where it lies in shared memory, and the warp that brings it there.
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
  TensorMap q;  // [n, Hq, D] in boxes of `tokens` tokens of a group
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
    const TokenTile tokens = find_tile(view, launch.tiles - 1 - i / heads, launch.tokens);
    if (tokens.count <= 0) continue;
    ForwardTile tile;
    tile.rows = tokens.count * l.group, tile.token = tokens.first;
    const int sequence = tokens.sequence, s_first = int(view.seg_indptr[sequence]), s_last = int(view.seg_indptr[sequence + 1]);
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
  if (lane == 0) shared.tile() = {}, arrive(shared.q_full());
}

}  // namespace diffmas::cuda
