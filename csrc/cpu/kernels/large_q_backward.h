// Backward of many query rows: the products of one block with the tiles of a chunk, panel by panel.
#pragma once
#include "tile.h"

namespace diffmas::cpu::DIFFMAS_ISA {

struct Weights {
  vf p, ds;
};

// Of scores that are -inf where the row does not see the token: zeros there, also of a row that is not finite.
DIFFMAS_INLINE Weights weights(vf score, vf dp, vf lse, vf delta) {
  const vi hidden = score == splat(-kInf);
  const vf p = hidden ? vf{} : exp(score - lse);
  return {p, hidden ? vf{} : p * (dp - delta)};
}

// What becomes of a panel's scores and dp, [key, lane]: p and ds, left operands of products over the block's rows, and ds as a right
// operand of one over the keys. r0: the panel's first lane.
template <class N>
struct Gradients;

template <>
struct Gradients<Floats> {
  float *p, *ds;  // [kTileKeys, kBlockRows]; scores and dp before
  static constexpr int64_t kLength = kBlockRows;

  explicit Gradients(float*& scratch) : p(take(scratch, kTileKeys * kBlockRows)), ds(take(scratch, kTileKeys * kBlockRows)) {}

  float* scores(int64_t r0) const { return p + r0; }
  float* dp(int64_t r0) const { return ds + r0; }
  const float* right(int64_t r0) const { return ds + r0; }
  void clear(int64_t, int64_t, int64_t) const {}

  template <int NV>
  void turn(int64_t r0, int64_t count, const float* lse, const float* delta, float) const {
    float *pi = p + r0, *dsi = ds + r0;
    for (int64_t i = 0; i < count; ++i, pi += kBlockRows, dsi += kBlockRows)
      for (int j = 0; j < NV * W; j += W) {
        const Weights w = weights(load(pi + j), load(dsi + j), load(lse + j), load(delta + j));
        store(pi + j, w.p);
        store(dsi + j, w.ds);
      }
  }
};

#if defined(DIFFMAS_DOTS)
template <>
struct Gradients<Bfloats> {
  float *s, *t;    // scores and dp of one panel [kTileKeys, kPanel]
  Pair *p, *ds;    // [kTileKeys, kBlockRows numbers]
  Pair* ds_right;  // [kTileKeys / 2, kPanel]
  static constexpr int64_t kLength = kPanel;

  explicit Gradients(float*& scratch)
      : s(take(scratch, kTileKeys * kPanel)),
        t(take(scratch, kTileKeys * kPanel)),
        p(take<Pair>(scratch, kTileKeys * kBlockRows / 2)),
        ds(take<Pair>(scratch, kTileKeys * kBlockRows / 2)),
        ds_right(take<Pair>(scratch, kTileKeys * kPanel / 2)) {
    // Lanes that no panel writes.
    if (kHasTiles) __builtin_memset(p, 0, kTileKeys * kBlockRows * 2), __builtin_memset(ds, 0, kTileKeys * kBlockRows * 2);
  }

  float* scores(int64_t) const { return s; }
  float* dp(int64_t) const { return t; }
  const Pair* right(int64_t) const { return ds_right; }

  uint16_t* at(Pair* weights, int64_t key, int64_t lane) const { return &weights[key * kBlockRows / 2].first + lane; }
  // A panel's p and ds of the keys from `begin` on: it does not see them.
  void clear(int64_t r0, int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) __builtin_memset(at(p, i, r0), 0, kPanel * 2), __builtin_memset(at(ds, i, r0), 0, kPanel * 2);
  }

  // ds comes with the scores' factor, and so does delta.
  template <int NV>
  void turn(int64_t r0, int64_t count, const float* lse, const float* delta, float factor) const {
    const int64_t end = round_up(count, Bfloats::kDepth);
    for (int64_t i = count * kPanel; i < end * kPanel; i += W) store(s + i, splat(-kInf)), store(t + i, vf{});
    for (int64_t i = 0; i < end; i += 2)
      for (int j = 0; j < NV * W; j += W) {
        Weights w[2];
        for (int k = 0; k < 2; ++k) {
          const int64_t from = (i + k) * kPanel + j;
          w[k] = weights(load(s + from) * factor, load(t + from) * factor, load(lse + j), load(delta + j));
          *reinterpret_cast<vh_any*>(at(p, i + k, r0 + j)) = narrow(w[k].p);
          *reinterpret_cast<vh_any*>(at(ds, i + k, r0 + j)) = narrow(w[k].ds);
        }
        store(ds_right + i / 2 * kPanel + j, narrow(w[0].ds, w[1].ds));
      }
  }
};
#endif

// Has add(out, row length) add to the tile's pool rows: where they lie, or by way of the buffer.
template <class N, class F>
void add_to_pool(const QueryBlock& q, const Tile& tile, int64_t count, const Rows& pool, float* buffer, const F& add) {
  const ScheduledAttention& args = q.args;
  if (tile.row >= 0 && args.head_dim == q.d && count % N::kRows == 0)
    return add(reinterpret_cast<float*>(row_of(pool, tile.row, q.head)), pool.stride_row);
  for (int64_t i = 0; i < round_up(count, N::kRows) * q.d; ++i) buffer[i] = 0;
  add(buffer, q.d);
  for_rows(args, tile, count, [&](int64_t i, int64_t row) {
    float* dst = reinterpret_cast<float*>(row_of(pool, row, q.head));
    for (int64_t c = 0; c < args.head_dim; ++c) dst[c] += buffer[i * q.d + c];
  });
}

// lse and delta of the rows (delta times `factor`); idle lanes get lse = +inf.
static void load_statistics(const QueryBlock& q, const float* d_o, const float* o, float factor, float* lse, float* delta) {
  const ScheduledAttention& args = q.args;
  for (int64_t r = 0; r < kBlockRows; ++r) {
    lse[r] = kInf;
    delta[r] = 0;
    if (r >= q.rows()) continue;
    const int64_t at = q.token(r) * args.q_heads + q.query_head(r);
    vf dot = {};
    for (int64_t c = 0; c < q.d; c += W) dot += load(d_o + r * q.d + c) * load(o + r * q.d + c);
    delta[r] = (sum(dot) - (args.dlse ? args.dlse[at] : 0)) * factor;
    if (args.lse[at] != -kInf) lse[r] = args.lse[at];
  }
}

// A query row x or d_o that is not finite makes NaN of what it sees, by its lse, and of nothing else: zeros stand in for it.
static void take_out_what_is_not_finite(const QueryBlock& q, float* x, float* d_o, float* lse) {
  for (int64_t r = 0; r < q.rows(); ++r, x += q.d, d_o += q.d) {
    vf zeros = {};  // NaN where a factor is not finite
    for (int64_t c = 0; c < q.d; c += W) zeros += load(x + c) * 0.f + load(d_o + c) * 0.f;
    if (sum(zeros) == 0) continue;
    if (lse[r] != kInf) lse[r] = __builtin_nanf("");
    for (int64_t c = 0; c < q.d; ++c) x[c] = d_o[c] = 0;
  }
}

template <class N>
static void large_q_unit(const QueryBlock& q, const BackwardUnit& unit, float* dq, float* scratch) {
  using E = typename N::Element;
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kBlockRows * d);    // queries times their part of the scale
  float* rotated = take(scratch, kBlockRows * d);  // and at the current offset
  float* d_o = take(scratch, kBlockRows * d);
  float* dq_lanes = take(scratch, kBlockRows * d);  // [panels, d, kPanel], at the current offset
  float* spare = take(scratch, kBlockRows * d);
  E* x_panels = take<E>(scratch, kBlockRows * d / N::kNumbers);  // right operands: [panels, d, kPanel]
  E* d_o_panels = take<E>(scratch, kBlockRows * d / N::kNumbers);
  E* x_buffer = take<E>(scratch, kBlockRows * d / 2);
  E* d_o_buffer = take<E>(scratch, kBlockRows * d / 2);
  E* k_buffer = take<E>(scratch, kTileKeys * d);
  E* v_buffer = take<E>(scratch, kTileKeys * d);
  E* k_columns = take<E>(scratch, kTileKeys * d);
  float* grad_buffer = take(scratch, kTileKeys * d);
  const Gradients<N> t(scratch);
  float* lse = take(scratch, kBlockRows);
  float* delta = take(scratch, kBlockRows);

  const float factor = N::of_scores(args.scale), of_dq = N::of_dq(args.scale);
  q.load_rows(plain, args.q, N::of_queries(args.scale));
  q.load_rows(d_o, args.d_o);
  q.load_rows(spare, args.o);
  load_statistics(q, d_o, spare, factor, lse, delta);
  take_out_what_is_not_finite(q, plain, d_o, lse);
  q.pack(d_o_panels, d_o, grad_buffer);
  const E* d_o_right = by_rows(d_o, q.rows(), d, d_o_buffer);
  const E* x_right = nullptr;
  const UsingTiles<N> tiles;

  int32_t rotation = -2;  // of x and dq_lanes
  const auto leave_offset = [&] {
    if (rotation == -2 || !dq) return;
    q.unpack(spare, dq_lanes);
    if (rotation >= 0) q.rotate(rotated, spare, rotation, true);
    const float* from = rotation >= 0 ? rotated : spare;
    for (int64_t i = 0; i < q.rows() * d; i += W) store(dq + i, load(dq + i) + load(from + i) * of_dq);
  };
  for (int64_t i = unit.tile_begin; i < unit.tile_end; ++i) {
    const Tile& tile = args.tiles[i];
    if (tile.rotation != rotation) {
      leave_offset();
      rotation = tile.rotation;
      if (rotation >= 0) q.rotate(rotated, plain, rotation, false);
      const float* x = rotation >= 0 ? rotated : plain;
      q.pack(x_panels, x, grad_buffer);
      x_right = by_rows(x, q.rows(), d, x_buffer);
      for (int64_t j = 0; j < q.panels() * kPanel * d; ++j) dq_lanes[j] = 0;
    }
    const int64_t count = q.visible(tile);
    const TileRows<E> k = tile_rows<N>(args, tile, count, args.k_pool, args.k_scale, q.head, d, k_buffer);
    const TileRows<E> v = tile_rows<N>(args, tile, count, args.v_pool, args.v_scale, q.head, d, v_buffer);
    const Left<E> k_left = dq ? columns(k, count, d, k_columns) : Left<E>{};
    // Asked for meanwhile: the rows of the gradient pools, and the next tile.
    Ahead grads = tile.needs_grad ? ahead_of(tile, args.dk_pool, args.dv_pool, q) : Ahead{};
    Ahead next = i + 1 < unit.tile_end ? ahead_of(args.tiles[i + 1], args.k_pool, args.v_pool, q) : Ahead{};
    int64_t seen[kBlockRows / kPanel];
    for (int64_t p = 0; p < q.panels(); ++p) {
      const int64_t r0 = p * kPanel;
      seen[p] = q.panel_visible(tile, p);
      if (kPanel % N::kDepth) t.clear(r0, round_up(seen[p], N::kDepth), round_up(count, N::kRows));
      if (seen[p] == 0) continue;
      const int64_t right = r0 * d / N::kNumbers;
      q.panel_product<N, Into::set>(p, seen[p], d, k.left(), x_panels + right, kPanel, t.scores(r0), t.kLength, nullptr, &grads);
      q.panel_product<N, Into::set>(p, seen[p], d, v.left(), d_o_panels + right, kPanel, t.dp(r0), t.kLength, nullptr, &next);
      q.mask(tile, p, t.scores(r0), t.kLength, seen[p]);
      switch (q.panel_vectors(p)) {
        case 1: t.template turn<1>(r0, seen[p], lse + r0, delta + r0, factor); break;
        case 2: t.template turn<2>(r0, seen[p], lse + r0, delta + r0, factor); break;
        default: t.template turn<3>(r0, seen[p], lse + r0, delta + r0, factor);
      }
      if (dq) q.panel_product<N, Into::add>(p, d, seen[p], k_left, t.right(r0), t.kLength, dq_lanes + r0 * d, kPanel);
    }
    if (!tile.needs_grad) continue;
    const auto add = [&](const Rows& pool, const E* weights, const E* right) {
      add_to_pool<N>(q, tile, count, pool, grad_buffer, [&](float* out, int64_t ldo) { q.add_outer<N>(out, ldo, weights, right, seen); });
    };
    add(args.dv_pool, t.p, d_o_right);
    add(args.dk_pool, t.ds, x_right);
  }
  leave_offset();
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
