// cross_attention forward: online softmax of one query block over its tiles (FlashAttention). Reads segments where they lie.
#include "kernels.h"
#include "small_q.h"
#include "softmax.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

template <class N>
void small_q_task(const QueryBlock& q, const ForwardTask& task, float* scratch) {
  using E = typename N::Element;
  constexpr int64_t kVector = N::kNumbers * W;
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kSmallQRows * d);    // queries times their part of the scale
  float* rotated = take(scratch, kSmallQRows * d);  // and at the current offset
  E* x_buffer = take<E>(scratch, kSmallQRows * d);
  float* k_buffer = take(scratch, kSmallQKeys * round_up(d, kVector));
  float* v_buffer = take(scratch, kSmallQKeys * d);
  float* s = take(scratch, kSmallQRows * kSmallQKeys);
  State state{take(scratch, kSmallQRows * d), take(scratch, kBlockRows), take(scratch, kBlockRows)};
  for (int64_t i = 0; i < q.rows() * d; ++i) state.o[i] = 0;
  for (int64_t i = 0; i < q.rows(); ++i) state.max[i] = -kInf, state.sum[i] = 0;

  q.load_rows(plain, args.q, N::of_queries(args.scale));
  int32_t rotation = -2;  // of x
  const E* x = nullptr;
  RowTable k, v;
  const auto find_k = [&](int64_t t) {
    find_whole_rows<N>(k, args, args.tiles[t], q.visible(args.tiles[t]), args.k_pool, args.k_scale, q.head, kVector, k_buffer);
  };
  const auto find_v = [&](int64_t t) {
    find_whole_rows<N>(v, args, args.tiles[t], q.visible(args.tiles[t]), args.v_pool, args.v_scale, q.head, N::kRowLength, v_buffer);
  };
  const bool asks = N::kNumbers == 2 && q.rows() > 1;  // for V during the scores, and for the next tile's K during the sums
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    const Tile& tile = args.tiles[t];
    const int64_t count = q.visible(tile);
    if (tile.rotation != rotation) {
      rotation = tile.rotation;
      if (rotation >= 0) q.rotate(rotated, plain, rotation, false);
      x = as_elements(q, rotation >= 0 ? rotated : plain, x_buffer);
    }
    if (!asks || t == task.tile_begin) find_k(t);
    if (asks) find_v(t), k.next = &v;
    scores(k, count, round_up(d, kVector), x, q.rows(), s);
    times_scales(k, count, s, q.rows());
    if (!asks) find_v(t);
    fetch_first(v, d);  // they arrive while the softmax runs
    small_q_softmax<N>(q, tile, count, s, state);
    times_scales(v, count, s, q.rows());  // which the sum of the weights has nothing to do with
    v.next = nullptr;
    if (asks && t + 1 < task.tile_end) find_k(t + 1), v.next = &k;
    weighted_sum(v, count, d, reinterpret_cast<const E*>(s), state.o, q.rows());
  }
  finish(q, task, state);
}

// Replaces the scores [count, NV * W] (row length kPanel) of a panel by exp(factor * score - max) as a right operand of keys, and updates
// the running state of its lanes; alpha gets the rescale factors of o. Before a lane has seen a token its max is -inf: 0 stands in, or
// -inf - -inf would give NaN.
template <class N, int NV>
void softmax_lanes(float* s, int64_t count, float factor, float* row_max, float* row_sum, float* alpha) {
  const auto scaled = [&](int64_t i, int j) __attribute__((always_inline)) {
    const vf x = load(s + i * kPanel + j * W);
    return N::kNumbers == 1 ? x : x * factor;
  };
  vf base[NV], total[NV] = {};
  for (int j = 0; j < NV; ++j) base[j] = load(row_max + j * W);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < NV; ++j) base[j] = max(scaled(i, j), base[j]);
  for (int j = 0; j < NV; ++j) {
    const vf old = load(row_max + j * W);
    store(row_max + j * W, base[j]);
    base[j] = base[j] == splat(-kInf) ? vf{} : base[j];
    store(alpha + j * W, exp(old - base[j]));
  }
  if constexpr (N::kNumbers == 1) {
    for (int64_t i = 0; i < count; ++i)
      for (int j = 0; j < NV; ++j) {
        const vf p = exp(scaled(i, j) - base[j]);
        store(s + i * kPanel + j * W, p);
        total[j] += p;
      }
  } else {
    const int64_t end = round_up(count, N::kDepth);
    for (int64_t i = count; i < end; ++i)
      for (int j = 0; j < NV; ++j) store(s + i * kPanel + j * W, splat(-kInf));
    for (int64_t i = 0; i < end; i += 2)
      for (int j = 0; j < NV; ++j) {
        const vf p = exp(scaled(i, j) - base[j]), next = exp(scaled(i + 1, j) - base[j]);
        store(reinterpret_cast<Pair*>(s) + i / 2 * kPanel + j * W, narrow(p, next));
        total[j] += p + next;
      }
  }
  for (int j = 0; j < NV; ++j) store(row_sum + j * W, load(row_sum + j * W) * load(alpha + j * W) + total[j]);
}

template <class N>
void softmax(int vectors, float* s, int64_t count, float factor, float* row_max, float* row_sum, float* alpha) {
  switch (vectors) {
    case 1: return softmax_lanes<N, 1>(s, count, factor, row_max, row_sum, alpha);
    case 2: return softmax_lanes<N, 2>(s, count, factor, row_max, row_sum, alpha);
    default: return softmax_lanes<N, 3>(s, count, factor, row_max, row_sum, alpha);
  }
}

template <class N>
void large_q_task(const QueryBlock& q, const ForwardTask& task, float* scratch) {
  using E = typename N::Element;
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kBlockRows * d);    // queries times their part of the scale
  float* rotated = take(scratch, kBlockRows * d);  // and at the current offset
  E* packed = take<E>(scratch, kBlockRows * d);
  E* k_buffer = take<E>(scratch, kTileKeys * d);
  E* v_buffer = take<E>(scratch, kTileKeys * d);
  E* v_columns = take<E>(scratch, kTileKeys * d);
  float* s = take(scratch, kTileKeys * kPanel);
  State state{take(scratch, kBlockRows * d), take(scratch, kBlockRows), take(scratch, kBlockRows)};
  for (int64_t i = 0; i < q.panels() * kPanel * d; ++i) state.o[i] = 0;
  for (int64_t i = 0; i < q.panels() * kPanel; ++i) state.max[i] = -kInf, state.sum[i] = 0;

  q.load_rows(plain, args.q, N::of_queries(args.scale));
  const float factor = N::of_scores(args.scale);
  const UsingTiles<N> tiles;
  int32_t rotation = -2;  // of `packed`
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    const Tile& tile = args.tiles[t];
    if (tile.rotation != rotation) {
      rotation = tile.rotation;
      if (rotation >= 0) q.rotate(rotated, plain, rotation, false);
      q.pack(packed, rotation >= 0 ? rotated : plain, reinterpret_cast<float*>(k_buffer));
    }
    const int64_t count = q.visible(tile);
    const TileRows<E> k = tile_rows<N>(args, tile, count, args.k_pool, args.k_scale, task.head, d, k_buffer);
    const TileRows<E> v = tile_rows<N>(args, tile, count, args.v_pool, args.v_scale, task.head, d, v_buffer);
    const Left<E> v_left = columns(v, count, d, v_columns);
    Ahead ahead = t + 1 < task.tile_end ? ahead_of(args.tiles[t + 1], args.k_pool, args.v_pool, q) : Ahead{};
    for (int64_t p = 0; p < q.panels(); ++p) {
      const int64_t seen = q.panel_visible(tile, p);
      if (seen == 0) continue;
      alignas(64) float alpha[kPanel];
      const E* right = packed + p * d * kPanel / N::kNumbers;
      q.panel_product<N, Into::set>(p, seen, d, k.left(), right, kPanel, s, kPanel, nullptr, &ahead);
      q.mask(tile, p, s, kPanel, seen);
      softmax<N>(q.panel_vectors(p), s, seen, factor, state.max + p * kPanel, state.sum + p * kPanel, alpha);
      right = reinterpret_cast<const E*>(s);
      q.panel_product<N, Into::scaled_add>(p, d, seen, v_left, right, kPanel, state.o + p * d * kPanel, kPanel, alpha);
    }
  }
  q.unpack(plain, state.o);
  finish(q, task, {plain, state.max, state.sum});
}

}  // namespace

int64_t attention_one_row_keys(const AttentionArgs& args) { return in_bfloats(args) ? kOneRowKeys : kSmallQKeys; }

void attention_forward_task(const ScheduledAttention& args, const ForwardTask& task, float* scratch) {
  const QueryBlock q(args, args.blocks[task.block], task.head);
  const bool small = q.rows() <= kSmallQRows;
#if defined(DIFFMAS_DOTS)
  if (in_bfloats(args)) return (small ? small_q_task<Bfloats> : large_q_task<Bfloats>)(q, task, scratch);
#endif
  (small ? small_q_task<Floats> : large_q_task<Floats>)(q, task, scratch);
}

// Joins the states of a block's splits, in order.
void attention_merge_task(const ScheduledAttention& args, const MergeTask& task) {
  const QueryBlock q(args, args.blocks[task.block], task.head);
  const int64_t d = q.d, size = args.forward_partial_size();
  const float* first = args.partials + task.partial * size;
  const float* maxima = first + args.block_rows * args.padded_dim;
  const float* sums = maxima + args.block_rows;
  for (int64_t r = 0; r < q.rows(); ++r) {
    float m = -kInf;
    for (int64_t s = 0; s < task.count; ++s) m = maxima[s * size + r] > m ? maxima[s * size + r] : m;
    const float base = m == -kInf ? 0 : m;
    alignas(64) float o[kMaxHeadDim] = {};
    float total = 0;
    for (int64_t s = 0; s < task.count; ++s) {
      const float weight = exp(splat(maxima[s * size + r] - base))[0];
      total += weight * sums[s * size + r];
      for (int64_t c = 0; c < d; c += W) store(o + c, load(o + c) + weight * load(first + s * size + r * d + c));
    }
    finish_row(q, r, o, m, total);
  }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
