// The online softmax of a block of few query rows, and how a task of a forward ends.
#pragma once
#include "tile.h"

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

// Turns the scores [rows, kSmallQKeys] of `count` keys into p, Elements, in place.
template <class N>
void small_q_softmax(const QueryBlock& q, const Tile& tile, int64_t count, float* s, State state) {
  const float factor = N::of_scores(q.args.scale);
  const int64_t padded = round_up(count, W);
  for (int64_t r = 0; r < q.rows(); ++r) {
    float* sr = s + r * kSmallQKeys;
    for (int64_t i = max(0, min(count, q.limit(r) - tile.view + 1)); i < padded; ++i) sr[i] = -kInf;
    vf mv = splat(state.max[r]);
    for (int64_t i = 0; i < padded; i += W) mv = max(load(sr + i) * factor, mv);
    const float m = maximum(mv), base = m == -kInf ? 0 : m;
    vf total = {};
    for (int64_t i = 0; i < padded; i += W) {
      const vf p = exp(load(sr + i) * factor - base);
      if constexpr (N::kNumbers == 1) store(sr + i, p);
      else *reinterpret_cast<vh_any*>(&reinterpret_cast<Pair*>(sr)->first + i) = narrow(p);
      total += p;
    }
    const float alpha = exp(splat(state.max[r] - base))[0];
    state.max[r] = m;
    state.sum[r] = state.sum[r] * alpha + sum(total);
    rescale(state.o + r * q.d, alpha, q.d);
  }
}

// o = state.o / sum, lse = max + log(sum). Nothing seen: o = 0, lse = -inf.
void finish_row(const QueryBlock& q, int64_t r, float* o, float max, float sum) {
  const float inverse = sum == 0 ? 0 : 1 / sum;
  for (int64_t c = 0; c < q.d; c += W) store(o + c, load(o + c) * inverse);
  const ScheduledAttention& args = q.args;
  store_row(row_of(args.o, q.token(r), q.query_head(r)), o, args.o.dtype, args.head_dim);
  args.lse[q.token(r) * args.q_heads + q.query_head(r)] = sum == 0 ? -kInf : max + __builtin_logf(sum);
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

}  // namespace
}  // namespace diffmas::cpu::DIFFMAS_ISA
