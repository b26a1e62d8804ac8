// cross_attention forward: online softmax of one query block over its tiles (FlashAttention). Reads segments where they lie.
#include "kernels.h"
#include "small_q.h"
#include "tile.h"

extern "C" float logf(float);

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

// The running softmax of a block's rows; o is not yet divided by the sum.
struct State {
  float* o;    // [rows, d], or [panels, d, kPanel] while a large-q task runs
  float* max;  // [rows] of the scaled scores
  float* sum;  // [rows]
};

void rescale(float* o, float alpha, int64_t d) {
  if (alpha == 1.f) return;
  for (int64_t c = 0; c < d; c += W) store(o + c, load(o + c) * alpha);
}

void small_q_tile(const QueryBlock& q, const float* x, const Tile& tile, int64_t count, float* buffer, float* s, State state) {
  const int64_t d = q.d;
  RowTable table;
  find_whole_rows(table, q.args, tile, count, q.args.k_pool, q.head, buffer);
  scores(table, count, d, x, q.rows(), s);
  find_whole_rows(table, q.args, tile, count, q.args.v_pool, q.head, buffer);
  fetch_first(table, d);  // they arrive while the softmax runs
  const int64_t padded = round_up(count, W);
  for (int64_t r = 0; r < q.rows(); ++r) {
    float* sr = s + r * kSmallQKeys;
    for (int64_t i = max(0, min(count, q.limit(r) - tile.view + 1)); i < padded; ++i) sr[i] = -kInf;
    vf mv = splat(state.max[r]);
    for (int64_t i = 0; i < padded; i += W) mv = max(load(sr + i), mv);
    const float m = maximum(mv), base = m == -kInf ? 0 : m;
    vf total = {};
    for (int64_t i = 0; i < padded; i += W) {
      const vf p = exp(load(sr + i) - base);
      store(sr + i, p);
      total += p;
    }
    const float alpha = exp(splat(state.max[r] - base))[0];
    state.max[r] = m;
    state.sum[r] = state.sum[r] * alpha + sum(total);
    rescale(state.o + r * d, alpha, d);
  }
  weighted_sum(table, count, d, s, state.o, q.rows());
}

// o = state.o / sum, lse = max + log(sum). Nothing seen: o = 0, lse = -inf.
void finish_row(const QueryBlock& q, int64_t r, float* o, float max, float sum) {
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t c = 0; c < q.d; c += W) store(o + c, load(o + c) * inverse);
  const ScheduledAttention& args = q.args;
  store_row(row_of(args.o, q.token(r), q.query_head(r)), o, args.o.dtype, args.head_dim);
  args.lse[q.token(r) * args.q_heads + q.query_head(r)] = sum == 0 ? -kInf : max + logf(sum);
}

// Writes the rows of a task that saw all keys to o and lse, those of a split to its partial.
void finish(const QueryBlock& q, const ForwardTask& task, State state) {
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  if (task.partial < 0) {
    for (int64_t r = 0; r < q.rows(); ++r) finish_row(q, r, state.o + r * d, state.max[r], state.sum[r]);
    return;
  }
  float* partial = args.partials + task.partial * args.forward_partial_size();
  for (int64_t i = 0; i < q.rows() * d; ++i) partial[i] = state.o[i];
  partial += args.block_rows * args.padded_dim;
  for (int64_t r = 0; r < q.rows(); ++r) partial[r] = state.max[r], partial[args.block_rows + r] = state.sum[r];
}

void small_q_task(const QueryBlock& q, const ForwardTask& task, float* scratch) {
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kSmallQRows * d);    // queries times the scale of the scores
  float* rotated = take(scratch, kSmallQRows * d);  // and at the current offset
  float* buffer = take(scratch, kSmallQKeys * d);
  float* s = take(scratch, kSmallQRows * kSmallQKeys);
  State state{take(scratch, kSmallQRows * d), take(scratch, kBlockRows), take(scratch, kBlockRows)};
  for (int64_t i = 0; i < q.rows() * d; ++i) state.o[i] = 0;
  for (int64_t i = 0; i < q.rows(); ++i) state.max[i] = -kInf, state.sum[i] = 0;

  q.load_rows(plain, args.q, args.scale);
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    const Tile& tile = args.tiles[t];
    if (tile.rotation >= 0 && (t == task.tile_begin || tile.rotation != args.tiles[t - 1].rotation))
      q.rotate(rotated, plain, tile.rotation, false);
    small_q_tile(q, tile.rotation >= 0 ? rotated : plain, tile, q.visible(tile), buffer, s, state);
  }
  finish(q, task, state);
}

// Replaces the scores [count, NV * W] (row length kPanel) of a panel by exp(score - max) and updates the running state of its lanes;
// alpha gets the rescale factors of o. Before a lane has seen a token its max is -inf: 0 stands in, or -inf - -inf would give NaN.
template <int NV>
void softmax_lanes(float* s, int64_t count, float* row_max, float* row_sum, float* alpha) {
  vf base[NV], total[NV] = {};
  for (int j = 0; j < NV; ++j) base[j] = load(row_max + j * W);
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < NV; ++j) base[j] = max(load(s + i * kPanel + j * W), base[j]);
  for (int j = 0; j < NV; ++j) {
    const vf old = load(row_max + j * W);
    store(row_max + j * W, base[j]);
    base[j] = base[j] == splat(-kInf) ? vf{} : base[j];
    store(alpha + j * W, exp(old - base[j]));
  }
  for (int64_t i = 0; i < count; ++i)
    for (int j = 0; j < NV; ++j) {
      const vf p = exp(load(s + i * kPanel + j * W) - base[j]);
      store(s + i * kPanel + j * W, p);
      total[j] += p;
    }
  for (int j = 0; j < NV; ++j) store(row_sum + j * W, load(row_sum + j * W) * load(alpha + j * W) + total[j]);
}

void softmax(int vectors, float* s, int64_t count, float* row_max, float* row_sum, float* alpha) {
  switch (vectors) {
    case 1: return softmax_lanes<1>(s, count, row_max, row_sum, alpha);
    case 2: return softmax_lanes<2>(s, count, row_max, row_sum, alpha);
    default: return softmax_lanes<3>(s, count, row_max, row_sum, alpha);
  }
}

void large_q_task(const QueryBlock& q, const ForwardTask& task, float* scratch) {
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kBlockRows * d);    // queries times the scale of the scores
  float* rotated = take(scratch, kBlockRows * d);  // and at the current offset
  float* packed = take(scratch, kBlockRows * d);
  float* k_buffer = take(scratch, kTileKeys * d);
  float* v_buffer = take(scratch, kTileKeys * d);
  float* s = take(scratch, kTileKeys * kPanel);
  State state{take(scratch, kBlockRows * d), take(scratch, kBlockRows), take(scratch, kBlockRows)};
  for (int64_t i = 0; i < q.panels() * kPanel * d; ++i) state.o[i] = 0;
  for (int64_t i = 0; i < q.panels() * kPanel; ++i) state.max[i] = -kInf, state.sum[i] = 0;

  q.load_rows(plain, args.q, args.scale);
  int32_t rotation = -2;  // of `packed`
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    const Tile& tile = args.tiles[t];
    if (tile.rotation != rotation) {
      rotation = tile.rotation;
      if (rotation >= 0) q.rotate(rotated, plain, rotation, false);
      q.pack(packed, rotation >= 0 ? rotated : plain);
    }
    const int64_t count = q.visible(tile);
    const FloatRows k = tile_rows(args, tile, count, args.k_pool, task.head, k_buffer);
    const FloatRows v = tile_rows(args, tile, count, args.v_pool, task.head, v_buffer);
    Ahead ahead = t + 1 < task.tile_end ? ahead_of(args.tiles[t + 1], args.k_pool, args.v_pool, q) : Ahead{};
    for (int64_t p = 0; p < q.panels(); ++p) {
      const int64_t seen = q.panel_visible(tile, p);
      if (seen == 0) continue;
      alignas(64) float alpha[kPanel];
      q.panel_product<Into::set>(p, seen, d, {k.data, k.stride, 1}, packed + p * d * kPanel, kPanel, s, kPanel, nullptr, &ahead);
      q.mask(tile, p, s, kPanel, seen);
      softmax(q.panel_vectors(p), s, seen, state.max + p * kPanel, state.sum + p * kPanel, alpha);
      q.panel_product<Into::scaled_add>(p, d, seen, {v.data, 1, v.stride}, s, kPanel, state.o + p * d * kPanel, kPanel, alpha);
    }
  }
  q.unpack(plain, state.o);
  finish(q, task, {plain, state.max, state.sum});
}

}  // namespace

void attention_forward_task(const ScheduledAttention& args, const ForwardTask& task, float* scratch) {
  const QueryBlock q(args, args.blocks[task.block], task.head);
  if (q.rows() <= kSmallQRows) small_q_task(q, task, scratch);
  else large_q_task(q, task, scratch);
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
