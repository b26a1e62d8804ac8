// cross_attention forward: online softmax of one query block over its tiles (FlashAttention), segments instead of a copy.
#include "few.h"
#include "kernels.h"
#include "tile.h"

extern "C" float logf(float);

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

struct State {
  float* o;    // [rows, d], not yet divided by the sum
  float* max;  // [rows] of the scaled scores
  float* sum;  // [rows]
};

// Turns the scores of one vector of lanes into exp(score - max) and moves the running state; returns the rescale factor of o.
// Before a lane has seen a token its max is -inf: 0 stands in, or -inf - -inf would give NaN.
vf softmax_lanes(float* s, int64_t count, float scale, const int32_t* last, float* row_max, float* row_sum) {
  const vf old = load(row_max);
  vf m = old;
  if (last) {
    const vi limit = *reinterpret_cast<const vi_any*>(last);
    for (int64_t i = 0; i < count; ++i) {
      const vf x = limit < int32_t(i) ? splat(-kInf) : load(s + i * kPanel) * scale;
      store(s + i * kPanel, x);
      m = x > m ? x : m;
    }
  } else {
    for (int64_t i = 0; i < count; ++i) {
      const vf x = load(s + i * kPanel) * scale;
      store(s + i * kPanel, x);
      m = x > m ? x : m;
    }
  }
  const vf base = m == splat(-kInf) ? vf{} : m;
  vf total = {};
  for (int64_t i = 0; i < count; ++i) {
    const vf p = exp(load(s + i * kPanel) - base);
    store(s + i * kPanel, p);
    total += p;
  }
  const vf alpha = exp(old - base);
  store(row_max, m);
  store(row_sum, load(row_sum) * alpha + total);
  return alpha;
}

void rescale(float* o, float alpha, int64_t d) {
  if (alpha == 1.f) return;
  for (int64_t c = 0; c < d; c += W) store(o + c, load(o + c) * alpha);
}

void many_rows(const QueryBlock& q, const float* packed, const Tile& tile, FloatRows k, FloatRows v, int64_t count, float* s, State state) {
  const int64_t d = q.d;
  q.panel_scores(s, packed, k.data, k.stride, count);
  const bool masked = q.limit(0) < tile.view + count - 1;
  for (int64_t p = 0; p < q.panels(); ++p)
    for (int v = 0; v < panel_vectors(q.rows(), p); ++v) {
      const int64_t r0 = p * kPanel + v * W;
      int32_t last[W];
      if (masked)
        for (int64_t i = 0; i < W; ++i) last[i] = int32_t(max(-1, min(kTileKeys, q.limit(min(r0 + i, q.rows() - 1)) - tile.view)));
      const vf alpha = softmax_lanes(s + p * kTileKeys * kPanel + v * W, count, q.args.scale, masked ? last : nullptr, state.max + r0, state.sum + r0);
      for (int64_t i = 0; i < W && r0 + i < q.rows(); ++i) rescale(state.o + (r0 + i) * d, alpha[i], d);
    }
  q.add_weighted(state.o, s, v.data, v.stride, count);
}

void few_rows(const QueryBlock& q, const float* x, const Tile& tile, int64_t count, float* buffer, float* s, State state) {
  const int64_t d = q.d;
  RowTable table;
  find_whole_rows(table, q.args, tile, count, q.args.k_pool, q.head, buffer);
  scores(table, count, d, x, q.rows(), s);
  find_whole_rows(table, q.args, tile, count, q.args.v_pool, q.head, buffer);
  fetch_first(table, d);  // they arrive while the softmax runs
  const int64_t padded = round_up(count, W);
  for (int64_t r = 0; r < q.rows(); ++r) {
    float* sr = s + r * kFewKeys;
    for (int64_t i = max(0, min(count, q.limit(r) - tile.view + 1)); i < padded; ++i) sr[i] = -kInf;
    vf mv = splat(state.max[r]);
    for (int64_t i = 0; i < padded; i += W) {
      const vf y = load(sr + i) * q.args.scale;
      store(sr + i, y);
      mv = y > mv ? y : mv;
    }
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
  const AttentionArgs& args = q.args;
  store_row(row_of(args.o, q.token(r), q.query_head(r)), o, args.o.dtype, args.head_dim);
  args.lse[q.token(r) * args.q_heads + q.query_head(r)] = sum == 0 ? -kInf : max + logf(sum);
}

}  // namespace

void attention_forward_task(const AttentionArgs& args, const ForwardTask& task, float* scratch) {
  const QueryBlock q(args, args.blocks[task.block], task.head);
  const int64_t d = q.d;
  const bool few = q.rows() <= kFewRows;
  float* plain = take(scratch, kBlockRows * d);    // queries as given
  float* turned = take(scratch, kBlockRows * d);   // and at the current shift
  float* packed = take(scratch, kBlockRows * d);
  float* k_buffer = take(scratch, kFewKeys * d);  // [kFewKeys, d] for a few rows, or half of it for K and for V
  float* v_buffer = k_buffer + kTileKeys * d;
  float* s = take(scratch, kBlockRows * kTileKeys);
  State state{take(scratch, kBlockRows * d), take(scratch, kBlockRows), take(scratch, kBlockRows)};
  for (int64_t i = 0; i < q.rows() * d; ++i) state.o[i] = 0;
  for (int64_t i = 0; i < (few ? q.rows() : q.panels() * kPanel); ++i) state.max[i] = -kInf, state.sum[i] = 0;

  q.load_rows(plain, args.q);
  int32_t rotation = -2;  // of `packed`
  const float* x = plain;
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    const Tile& tile = args.tiles[t];
    if (tile.rotation != rotation) {
      rotation = tile.rotation;
      x = plain;
      if (rotation >= 0) q.rotate(turned, plain, rotation, false), x = turned;
      if (!few) q.pack(packed, x);
    }
    const int64_t count = q.visible(tile);
    if (few) {
      few_rows(q, x, tile, count, k_buffer, s, state);
      continue;
    }
    const FloatRows k = tile_rows(args, tile, count, args.k_pool, task.head, k_buffer);
    const FloatRows v = tile_rows(args, tile, count, args.v_pool, task.head, v_buffer);
    many_rows(q, packed, tile, k, v, count, s, state);
  }

  if (task.partial < 0) {
    for (int64_t r = 0; r < q.rows(); ++r) finish_row(q, r, state.o + r * d, state.max[r], state.sum[r]);
    return;
  }
  float* partial = args.partials + task.partial * args.forward_partial_size();
  for (int64_t i = 0; i < q.rows() * d; ++i) partial[i] = state.o[i];
  partial += args.block_rows * args.padded_dim;
  for (int64_t r = 0; r < q.rows(); ++r) partial[r] = state.max[r], partial[args.block_rows + r] = state.sum[r];
}

// Joins the states of a block's splits, in order.
void attention_merge_task(const AttentionArgs& args, const MergeTask& task) {
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
