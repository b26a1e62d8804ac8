// cross_attention backward: one query block against the tiles of one chunk of the pool. The caller gives each (chunk, kv head) to
// one thread, which therefore owns these rows of dK and dV; dq is left as one partial per chunk and summed in order.
#include "kernels.h"
#include "small_q.h"
#include "tile.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

struct Queries {
  const float* x;         // [rows, d], at the tile's offset
  const float* x_packed;  // [panels, d, kPanel]
  const float* d_o;       // [rows, d]
  const float* d_o_packed;
  const float* lse;    // [rows]; +inf for rows that saw nothing and for idle lanes, so that p = 0
  const float* delta;  // [rows] sum(do * o) - dlse
};

struct Products {
  float* p;  // probabilities, then ds in dp's place: [kTileKeys, kBlockRows] or, small-q, [rows, kSmallQKeys]
  float* dp;
};

// Scores and dp of `count` tokens of one panel into p and ds; masked scores are -inf.
template <int NV>
void probabilities(float* p, float* dp, int64_t count, const float* lse, const float* delta) {
  for (int64_t i = 0; i < count; ++i, p += kBlockRows, dp += kBlockRows)
    for (int j = 0; j < NV * W; j += W) {
      const vf w = exp(load(p + j) - load(lse + j));
      store(p + j, w);
      store(dp + j, w * (load(dp + j) - load(delta + j)));
    }
}

// P, dS and dQ of the rows of panel p against the first `seen` tokens of a tile; dq [d, kPanel] of the panel. Meanwhile the rows of
// the gradient pools and the next tile are prefetched.
void panel_gradients(const QueryBlock& q, int64_t p, const Queries& in, const Tile& tile, FloatRows k, FloatRows v, int64_t seen,
                     Products t, float* dq, Ahead* grads, Ahead* next) {
  const int64_t d = q.d, r0 = p * kPanel;
  float* probability = t.p + r0;
  float* ds = t.dp + r0;
  q.panel_product<Into::set>(p, seen, d, {k.data, k.stride, 1}, in.x_packed + r0 * d, kPanel, probability, kBlockRows, nullptr, grads);
  q.panel_product<Into::set>(p, seen, d, {v.data, v.stride, 1}, in.d_o_packed + r0 * d, kPanel, ds, kBlockRows, nullptr, next);
  q.mask(tile, p, probability, kBlockRows, seen);
  switch (q.panel_vectors(p)) {
    case 1: probabilities<1>(probability, ds, seen, in.lse + r0, in.delta + r0); break;
    case 2: probabilities<2>(probability, ds, seen, in.lse + r0, in.delta + r0); break;
    default: probabilities<3>(probability, ds, seen, in.lse + r0, in.delta + r0);
  }
  if (dq) q.panel_product<Into::add>(p, d, seen, {k.data, 1, k.stride}, ds, kBlockRows, dq, kPanel);
}

void small_q_tile(const QueryBlock& q, const Queries& in, const Tile& tile, int64_t count, float* dq, float* k_buffer, float* v_buffer,
                  Products t) {
  const ScheduledAttention& args = q.args;
  const int64_t rows = q.rows(), d = q.d;
  RowTable k, v, dk, dv;
  find_whole_rows(k, args, tile, count, args.k_pool, q.head, k_buffer);
  find_whole_rows(v, args, tile, count, args.v_pool, q.head, v_buffer);
  scores(v, count, d, in.d_o, rows, t.dp);
  scores(k, count, d, in.x, rows, t.p);
  for (int64_t r = 0; r < rows; ++r) {
    float* p = t.p + r * kSmallQKeys;
    float* dp = t.dp + r * kSmallQKeys;
    for (int64_t i = 0; i < count; i += W) {  // lanes of the last vector past the scores are never read
      const vf w = exp(load(p + i) * args.scale - in.lse[r]);
      store(p + i, w);
      store(dp + i, w * (load(dp + i) - in.delta[r]) * args.scale);
    }
    for (int64_t i = max(0, q.limit(r) - tile.view + 1); i < count; ++i) p[i] = dp[i] = 0;
  }
  if (dq) weighted_sum(k, count, d, t.dp, dq, rows);
  if (!tile.needs_grad) return;
  find_rows(dk, args, tile, count, args.dk_pool, q.head);
  find_rows(dv, args, tile, count, args.dv_pool, q.head);
  outer_sum(dv, count, args.head_dim, t.p, in.d_o, rows, d);
  outer_sum(dk, count, args.head_dim, t.dp, in.x, rows, d);
}

// Has add(out, row length) add to the tile's pool rows: where they lie, or by way of the buffer.
template <class F>
void add_to_pool(const QueryBlock& q, const Tile& tile, int64_t count, const Rows& pool, float* buffer, const F& add) {
  const ScheduledAttention& args = q.args;
  if (in_place(args, tile, pool)) return add(reinterpret_cast<float*>(row_of(pool, tile.row, q.head)), pool.stride_row);
  for (int64_t i = 0; i < count * q.d; ++i) buffer[i] = 0;
  add(buffer, q.d);
  for_rows(args, tile, count, [&](int64_t i, int64_t row) {
    float* dst = reinterpret_cast<float*>(row_of(pool, row, q.head));
    for (int64_t c = 0; c < args.head_dim; ++c) dst[c] += buffer[i * q.d + c];
  });
}

// lse and delta of the rows; idle lanes get lse = +inf.
void load_statistics(const QueryBlock& q, const float* d_o, const float* o, float* lse, float* delta) {
  const ScheduledAttention& args = q.args;
  for (int64_t r = 0; r < kBlockRows; ++r) {
    lse[r] = kInf;
    delta[r] = 0;
    if (r >= q.rows()) continue;
    const int64_t at = q.token(r) * args.q_heads + q.query_head(r);
    vf dot = {};
    for (int64_t c = 0; c < q.d; c += W) dot += load(d_o + r * q.d + c) * load(o + r * q.d + c);
    delta[r] = sum(dot) - (args.dlse ? args.dlse[at] : 0);
    if (args.lse[at] != -kInf) lse[r] = args.lse[at];
  }
}

void small_q_unit(const QueryBlock& q, const BackwardUnit& unit, float* dq, float* scratch) {
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kSmallQRows * d);
  float* rotated = take(scratch, kSmallQRows * d);
  float* d_o = take(scratch, kSmallQRows * d);
  float* dq_rotated = take(scratch, kSmallQRows * d);  // dq at the current offset
  float* spare = take(scratch, kSmallQRows * d);
  float* k_buffer = take(scratch, kSmallQKeys * d);
  float* v_buffer = take(scratch, kSmallQKeys * d);
  Products t{take(scratch, kSmallQRows * kSmallQKeys), take(scratch, kSmallQRows * kSmallQKeys)};
  float* lse = take(scratch, kBlockRows);
  float* delta = take(scratch, kBlockRows);

  q.load_rows(plain, args.q);
  q.load_rows(d_o, args.d_o);
  q.load_rows(spare, args.o);
  load_statistics(q, d_o, spare, lse, delta);

  int32_t rotation = -2;
  Queries in{plain, nullptr, d_o, nullptr, lse, delta};
  float* dq_now = dq;
  const auto leave_offset = [&] {
    if (rotation < 0 || !dq) return;
    q.rotate(spare, dq_rotated, rotation, true);
    for (int64_t i = 0; i < q.rows() * d; i += W) store(dq + i, load(dq + i) + load(spare + i));
  };
  for (int64_t i = unit.tile_begin; i < unit.tile_end; ++i) {
    const Tile& tile = args.tiles[i];
    if (tile.rotation != rotation) {
      leave_offset();
      rotation = tile.rotation;
      in.x = plain, dq_now = dq;
      if (rotation >= 0) {
        q.rotate(rotated, plain, rotation, false);
        in.x = rotated, dq_now = dq ? dq_rotated : nullptr;
        for (int64_t j = 0; j < q.rows() * d; ++j) dq_rotated[j] = 0;
      }
    }
    small_q_tile(q, in, tile, q.visible(tile), dq_now, k_buffer, v_buffer, t);
  }
  leave_offset();
}

void large_q_unit(const QueryBlock& q, const BackwardUnit& unit, float* dq, float* scratch) {
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kBlockRows * d);    // queries times the scale of the scores: ds needs no scale for dk, dq gets it at the end
  float* rotated = take(scratch, kBlockRows * d);  // and at the current offset
  float* x_packed = take(scratch, kBlockRows * d);
  float* d_o = take(scratch, kBlockRows * d);
  float* d_o_packed = take(scratch, kBlockRows * d);
  float* dq_lanes = take(scratch, kBlockRows * d);  // [panels, d, kPanel], at the current offset
  float* spare = take(scratch, kBlockRows * d);
  float* k_buffer = take(scratch, kTileKeys * d);
  float* v_buffer = take(scratch, kTileKeys * d);
  float* grad_buffer = take(scratch, kTileKeys * d);
  Products t{take(scratch, kBlockRows * kTileKeys), take(scratch, kBlockRows * kTileKeys)};
  float* lse = take(scratch, kBlockRows);
  float* delta = take(scratch, kBlockRows);

  q.load_rows(plain, args.q, args.scale);
  q.load_rows(d_o, args.d_o);
  q.pack(d_o_packed, d_o);
  q.load_rows(spare, args.o);
  load_statistics(q, d_o, spare, lse, delta);

  int32_t rotation = -2;  // of x_packed and dq_lanes
  Queries in{plain, x_packed, d_o, d_o_packed, lse, delta};
  const auto leave_offset = [&] {
    if (rotation == -2 || !dq) return;
    q.unpack(spare, dq_lanes);
    if (rotation >= 0) q.rotate(rotated, spare, rotation, true);
    const float* from = rotation >= 0 ? rotated : spare;
    for (int64_t i = 0; i < q.rows() * d; i += W) store(dq + i, load(dq + i) + load(from + i) * args.scale);
  };
  for (int64_t i = unit.tile_begin; i < unit.tile_end; ++i) {
    const Tile& tile = args.tiles[i];
    if (tile.rotation != rotation) {
      leave_offset();
      rotation = tile.rotation;
      if (rotation >= 0) q.rotate(rotated, plain, rotation, false);
      in.x = rotation >= 0 ? rotated : plain;
      q.pack(x_packed, in.x);
      for (int64_t j = 0; j < q.panels() * kPanel * d; ++j) dq_lanes[j] = 0;
    }
    const int64_t count = q.visible(tile);
    const FloatRows k = tile_rows(args, tile, count, args.k_pool, q.head, k_buffer);
    const FloatRows v = tile_rows(args, tile, count, args.v_pool, q.head, v_buffer);
    Ahead grads = tile.needs_grad ? ahead_of(tile, args.dk_pool, args.dv_pool, q) : Ahead{};
    Ahead next = i + 1 < unit.tile_end ? ahead_of(args.tiles[i + 1], args.k_pool, args.v_pool, q) : Ahead{};
    int64_t seen[kBlockRows / kPanel];
    for (int64_t p = 0; p < q.panels(); ++p) {
      seen[p] = q.panel_visible(tile, p);
      if (seen[p] > 0) panel_gradients(q, p, in, tile, k, v, seen[p], t, dq ? dq_lanes + p * kPanel * d : nullptr, &grads, &next);
    }
    if (!tile.needs_grad) continue;
    add_to_pool(q, tile, count, args.dv_pool, grad_buffer, [&](float* out, int64_t ldo) { q.add_outer(out, ldo, t.p, d_o, seen); });
    add_to_pool(q, tile, count, args.dk_pool, grad_buffer, [&](float* out, int64_t ldo) { q.add_outer(out, ldo, t.dp, in.x, seen); });
  }
  leave_offset();
}

}  // namespace

void attention_backward_unit(const ScheduledAttention& args, const BackwardUnit& unit, int64_t head, float* scratch) {
  const QueryBlock q(args, args.blocks[unit.block], head);
  float* dq = nullptr;  // not wanted
  if (unit.partial >= 0) {
    dq = args.partials + unit.partial * args.backward_partial_size() + head * args.block_rows * args.padded_dim;
    for (int64_t i = 0; i < q.rows() * q.d; ++i) dq[i] = 0;
  }
  if (q.rows() <= kSmallQRows) small_q_unit(q, unit, dq, scratch);
  else large_q_unit(q, unit, dq, scratch);
}

void attention_backward_reduce_task(const ScheduledAttention& args, const MergeTask& task) {
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
