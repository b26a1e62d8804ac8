// cross_attention backward: one query block against the tiles of one chunk of the pool. The caller gives each (chunk, kv head) to
// one thread, which therefore owns these rows of dK and dV; dq is left as one partial per chunk and summed in order.
#include "few.h"
#include "kernels.h"
#include "tile.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

struct Queries {
  const float* x;          // [rows, d], at the tile's shift
  const float* x_packed;   // [panels, d, kPanel]
  const float* d_o;        // [rows, d]
  const float* d_o_packed;
  const float* lse;        // [rows]; +inf for rows that saw nothing and for idle lanes, so that p = 0
  const float* delta;      // [rows] sum(do * o) - dlse
};

struct Products {
  float* p;   // probabilities, then ds in dp's place: [panels, kTileKeys, kPanel] or, for few rows, [rows, kFewKeys]
  float* dp;
};

void many_rows(const QueryBlock& q, const Queries& in, const Tile& tile, FloatRows k, FloatRows v, int64_t count, Products t) {
  q.panel_scores(t.p, in.x_packed, k.data, k.stride, count);
  q.panel_scores(t.dp, in.d_o_packed, v.data, v.stride, count);
  const bool masked = q.limit(0) < tile.view + count - 1;
  const float scale = q.args.scale;
  for (int64_t panel = 0; panel < q.panels(); ++panel)
    for (int j = 0; j < panel_vectors(q.rows(), panel); ++j) {
      const int64_t r0 = panel * kPanel + j * W;
      const vf lse = load(in.lse + r0), delta = load(in.delta + r0);
      vi limit = vi{} + int32_t(kTileKeys);
      if (masked)
        for (int64_t i = 0; i < W; ++i) limit[i] = int32_t(max(-1, min(kTileKeys, q.limit(min(r0 + i, q.rows() - 1)) - tile.view)));
      float* p = t.p + panel * kTileKeys * kPanel + j * W;
      float* dp = t.dp + panel * kTileKeys * kPanel + j * W;
      for (int64_t i = 0; i < count; ++i, p += kPanel, dp += kPanel) {
        const vf w = limit < int32_t(i) ? vf{} : exp(load(p) * scale - lse);
        store(p, w);
        store(dp, limit < int32_t(i) ? vf{} : w * (load(dp) - delta) * scale);
      }
    }
}

void few_rows(const QueryBlock& q, const Queries& in, const Tile& tile, int64_t count, float* dq, float* k_buffer, float* v_buffer, Products t) {
  const AttentionArgs& args = q.args;
  const int64_t rows = q.rows(), d = q.d;
  RowTable k, v, dk, dv;
  find_whole_rows(k, args, tile, count, args.k_pool, q.head, k_buffer);
  find_whole_rows(v, args, tile, count, args.v_pool, q.head, v_buffer);
  scores(v, count, d, in.d_o, rows, t.dp);
  scores(k, count, d, in.x, rows, t.p);
  for (int64_t r = 0; r < rows; ++r) {
    float* p = t.p + r * kFewKeys;
    float* dp = t.dp + r * kFewKeys;
    for (int64_t i = 0; i < count; i += W) {
      const vf w = exp(load(p + i) * args.scale - in.lse[r]);
      store(p + i, w);
      store(dp + i, w * (load(dp + i) - in.delta[r]) * args.scale);
    }
    for (int64_t i = max(0, q.limit(r) - tile.view + 1); i < count; ++i) p[i] = dp[i] = 0;
  }
  if (dq) weighted_sum(k, count, d, t.dp, dq, rows);
  if (!tile.learns) return;
  find_rows(dk, args, tile, count, args.dk_pool, q.head);
  find_rows(dv, args, tile, count, args.dv_pool, q.head);
  outer_sum(dv, count, args.head_dim, t.p, in.d_o, rows, d);
  outer_sum(dk, count, args.head_dim, t.dp, in.x, rows, d);
}

// pool rows of the tile += weights . x
void add_to_pool(const QueryBlock& q, const Tile& tile, int64_t count, const Rows& pool, const float* weights, const float* x, float* buffer) {
  const AttentionArgs& args = q.args;
  const bool direct = in_place(args, tile, pool);
  float* out = direct ? reinterpret_cast<float*>(row_of(pool, tile.row, q.head)) : buffer;
  const int64_t ldo = direct ? pool.stride_row : q.d;
  if (!direct)
    for (int64_t i = 0; i < count * q.d; ++i) buffer[i] = 0;
  q.add_outer(out, ldo, weights, x, count);
  if (direct) return;
  for_rows(args, tile, count, [&](int64_t i, int64_t row) {
    float* dst = reinterpret_cast<float*>(row_of(pool, row, q.head));
    for (int64_t c = 0; c < args.head_dim; ++c) dst[c] += buffer[i * q.d + c];
  });
}

}  // namespace

void attention_backward_unit(const AttentionArgs& args, const BackwardUnit& unit, int64_t head, float* scratch) {
  const QueryBlock q(args, args.blocks[unit.block], head);
  const int64_t d = q.d;
  const bool few = q.rows() <= kFewRows;
  float* plain = take(scratch, kBlockRows * d);
  float* turned = take(scratch, kBlockRows * d);
  float* x_packed = take(scratch, kBlockRows * d);
  float* d_o = take(scratch, kBlockRows * d);
  float* d_o_packed = take(scratch, kBlockRows * d);
  float* dq_turned = take(scratch, kBlockRows * d);  // dq at the current shift
  float* spare = take(scratch, kBlockRows * d);
  float* k_buffer = take(scratch, 2 * kFewKeys * d);  // a few rows: K and V [kFewKeys, d] each
  float* v_buffer = k_buffer + kTileKeys * d;
  float* grad_buffer = v_buffer + kTileKeys * d;
  Products t{take(scratch, kBlockRows * kTileKeys), take(scratch, kBlockRows * kTileKeys)};
  float* lse = take(scratch, kBlockRows);
  float* delta = take(scratch, kBlockRows);
  const bool want_dq = unit.partial >= 0;
  float* dq = want_dq ? args.partials + unit.partial * args.backward_partial_size() + head * args.block_rows * args.padded_dim : nullptr;

  q.load_rows(plain, args.q);
  q.load_rows(d_o, args.d_o);
  q.load_rows(spare, args.o);
  if (!few) q.pack(d_o_packed, d_o);
  for (int64_t r = 0; r < kBlockRows; ++r) {
    lse[r] = kInf;
    delta[r] = 0;
    if (r >= q.rows()) continue;
    const int64_t at = q.token(r) * args.q_heads + q.query_head(r);
    vf dot = {};
    for (int64_t c = 0; c < d; c += W) dot += load(d_o + r * d + c) * load(spare + r * d + c);
    delta[r] = sum(dot) - (args.dlse ? args.dlse[at] : 0);
    if (args.lse[at] != -kInf) lse[r] = args.lse[at];
  }
  for (int64_t i = 0; want_dq && i < q.rows() * d; ++i) dq[i] = 0;

  int32_t rotation = -2;
  Queries in{plain, x_packed, d_o, d_o_packed, lse, delta};
  float* dq_now = dq;
  const auto leave_shift = [&] {
    if (rotation < 0 || !want_dq) return;
    q.rotate(spare, dq_turned, rotation, true);
    for (int64_t i = 0; i < q.rows() * d; i += W) store(dq + i, load(dq + i) + load(spare + i));
  };
  for (int64_t i = unit.tile_begin; i < unit.tile_end; ++i) {
    const Tile& tile = args.tiles[i];
    if (tile.rotation != rotation) {
      leave_shift();
      rotation = tile.rotation;
      in.x = plain, dq_now = dq;
      if (rotation >= 0) {
        q.rotate(turned, plain, rotation, false);
        in.x = turned, dq_now = want_dq ? dq_turned : nullptr;
        for (int64_t j = 0; j < q.rows() * d; ++j) dq_turned[j] = 0;
      }
      if (!few) q.pack(x_packed, in.x);
    }
    const int64_t count = q.visible(tile);
    if (few) {
      few_rows(q, in, tile, count, dq_now, k_buffer, k_buffer + kFewKeys * d, t);
      continue;
    }
    const FloatRows k = tile_rows(args, tile, count, args.k_pool, head, k_buffer);
    const FloatRows v = tile_rows(args, tile, count, args.v_pool, head, v_buffer);
    many_rows(q, in, tile, k, v, count, t);
    if (want_dq) q.add_weighted(dq_now, t.dp, k.data, k.stride, count);
    if (!tile.learns) continue;
    add_to_pool(q, tile, count, args.dv_pool, t.p, d_o, grad_buffer);
    add_to_pool(q, tile, count, args.dk_pool, t.dp, in.x, grad_buffer);
  }
  leave_shift();
}

void attention_backward_reduce_task(const AttentionArgs& args, const MergeTask& task) {
  const QueryBlock q(args, args.blocks[task.block], task.head);
  const int64_t size = args.backward_partial_size();
  const float* first = args.partials + task.partial * size + task.head * args.block_rows * args.padded_dim;
  for (int64_t r = 0; r < q.rows(); ++r) {
    alignas(64) float total[kMaxHeadDim] = {};
    for (int64_t s = 0; s < task.count; ++s)
      for (int64_t c = 0; c < q.d; c += W) store(total + c, load(total + c) + load(first + s * size + r * q.d + c));
    store_row(row_of(args.dq, q.token(r), q.query_head(r)), total, args.dq.dtype, args.head_dim);
  }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
