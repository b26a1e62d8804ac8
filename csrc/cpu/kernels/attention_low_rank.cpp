// Attention of few query rows over rows that have a low-rank part beside what a pool has (common/low_rank.h), of which no row is
// written anywhere. A tile's K is built in cache, since its low-rank part turns with a row's position. V never is: with P the weights,
// P V = P v + (P z_v) b_v', and dO V' = dO v' + (dO b_v) z_v'.
#include "kernels.h"
#include "large_q_backward.h"
#include "low_rank.h"
#include "softmax.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

// What a backward adds up beside dq.
struct CodeGradients {
  const Codes& codes;
  float *dk, *dz;     // of a tile: [count, d], [count, padded rank]
  float *d_o_b, *pz;  // of the block's rows [rows, padded rank]: dO b_v, and P z_v of all tiles
  float* z_columns;   // of a tile [padded rank, kSmallQKeys]

  CodeGradients(const Codes& codes, const float* d_o, float*& scratch)
      : codes(codes), dk(take(scratch, kSmallQKeys * codes.q.d)), dz(take(scratch, kSmallQKeys * max(codes.k_pad, codes.v_pad))),
        d_o_b(take(scratch, kSmallQRows * codes.v_pad)), pz(take(scratch, kSmallQRows * codes.v_pad)),
        z_columns(take(scratch, kSmallQKeys * codes.v_pad)) {
    const QueryBlock& q = codes.q;
    const int64_t pad = codes.v_pad;
    for (int64_t i = 0; i < q.rows() * pad; ++i) pz[i] = 0;
    const float* b = q.args.low_v.by_column + q.head * q.args.padded_dim * pad;
    if (codes.values()) product<Into::set>(q.rows(), pad, q.d, {d_o, q.d, 1}, b, pad, d_o_b, pad);
  }

  // dP [rows, kSmallQKeys] += dO b_v z_v'
  void add_dp(int64_t count, float* dp) const {
    if (!codes.values()) return;
    transpose(z_columns, kSmallQKeys, codes.z_v, codes.v_pad, count, codes.v_pad);
    product<Into::add>(codes.q.rows(), round_up(count, W), codes.low.v.rank, {d_o_b, codes.v_pad, 1}, z_columns, kSmallQKeys, dp,
                       kSmallQKeys);
  }

  void add_to_codes(const LowRankPart& part, int64_t pad, int64_t i) const {
    for (int64_t j = 0; j < part.rank; ++j) part.dz[codes.code[i] * part.rank + j] += dz[i * pad + j];
  }

  // p [rows, kSmallQKeys]
  void of_values(const Tile& tile, int64_t count, const float* p, const float* d_o) const {
    const QueryBlock& q = codes.q;
    const LowRankPart& v = codes.low.v;
    const int64_t pad = codes.v_pad;
    if (v.dz) {
      product<Into::add>(q.rows(), pad, count, {p, kSmallQKeys, 1}, codes.z_v, pad, pz, pad);
      product<Into::set>(count, pad, q.rows(), {p, 1, kSmallQKeys}, d_o_b, pad, dz, pad);
      for (int64_t i = 0; i < count; ++i) add_to_codes(v, pad, i);
    }
    if (!q.args.dv_pool.data) return;
    RowTable dv;
    find_rows(dv, q.args, tile, count, q.args.dv_pool, {}, q.head, false);
    outer_sum(dv, count, q.args.head_dim, p, d_o, q.rows(), q.d);
  }

  // ds, x: as the kernels have them. chunk: of the pool.
  void of_keys(const Tile& tile, int64_t count, const float* ds, const float* x, int64_t chunk) const {
    const QueryBlock& q = codes.q;
    const ScheduledAttention& args = q.args;
    const LowRank& low = codes.low;
    const int64_t d = q.d, pad = codes.k_pad, D = args.head_dim;
    if (!low.k.dz && !args.dk_pool.data) return;
    alignas(64) float spare[kMaxHeadDim];
    product<Into::set>(count, d, q.rows(), {ds, 1, kSmallQKeys}, x, d, dk, d);
    for_rows(args, tile, count, [&](int64_t i, int64_t row) __attribute__((always_inline)) {
      float* dki = dk + i * d;
      if (args.dk_pool.data) {
        float* out = reinterpret_cast<float*>(row_of(args.dk_pool, row, q.head));
        const float keep = codes.factor(low.keep, i);
        for (int64_t c = 0; c < D; ++c) out[c] += keep * dki[c];
      }
      if (low.d_keep) {
        const float* own = row_floats(args.k_pool, row, q.head, D, spare);
        float sum = 0;
        for (int64_t c = 0; c < D; ++c) sum += own[c] * dki[c];
        low.d_keep[codes.code[i] * args.kv_heads + q.head] += sum;
      }
      if (low.k.dz) codes.turn_row<true>(dki, i);
    });
    if (!low.k.dz) return;
    product<Into::set>(count, pad, d, {dk, d, 1}, args.low_k.by_column + q.head * args.padded_dim * pad, pad, dz, pad);
    for (int64_t i = 0; i < count; ++i) {
      if (low.add) {
        const float add = codes.factor(low.add, i);
        float sum = 0, *z = codes.z_k + i * pad, *dzi = dz + i * pad;
        for (int64_t j = 0; j < low.k.rank; ++j) sum += z[j] * dzi[j], dzi[j] *= add, z[j] *= add;
        low.d_add[codes.code[i] * args.kv_heads + q.head] += sum;
      }
      add_to_codes(low.k, pad, i);
    }
    float* db = args.low_k.grads + (chunk * args.kv_heads + q.head) * low.k.rank * args.padded_dim;
    product<Into::add>(low.k.rank, d, count, {codes.z_k, 1, pad}, dk, d, db, args.padded_dim);
  }

  // After the last tile.
  void finish(const float* d_o, int64_t chunk) const {
    const QueryBlock& q = codes.q;
    const int64_t rank = codes.low.v.rank;
    if (!codes.low.v.dz) return;
    float* db = q.args.low_v.grads + (chunk * q.args.kv_heads + q.head) * rank * q.args.padded_dim;
    product<Into::add>(rank, q.d, q.rows(), {pz, 1, codes.v_pad}, d_o, q.d, db, q.args.padded_dim);
  }
};

}  // namespace

void low_rank_forward_task(const ScheduledAttention& args, const ForwardTask& task, float* scratch) {
  const QueryBlock q(args, args.blocks[task.block], task.head);
  const int64_t d = q.d;
  float* plain = take(scratch, kSmallQRows * d);
  float* rotated = take(scratch, kSmallQRows * d);
  float* k_buffer = take(scratch, kSmallQKeys * d);
  float* v_buffer = take(scratch, kSmallQKeys * d);
  float* s = take(scratch, kSmallQRows * kSmallQKeys);
  State state{take(scratch, kSmallQRows * d), take(scratch, kBlockRows), take(scratch, kBlockRows)};
  Codes codes(q, scratch);
  float* pz = take(scratch, kSmallQRows * codes.v_pad);
  for (int64_t i = 0; i < q.rows() * d; ++i) state.o[i] = 0;
  for (int64_t i = 0; i < q.rows(); ++i) state.max[i] = -kInf, state.sum[i] = 0;

  q.load_rows(plain, args.q, Floats::of_queries(args.scale));
  RowTable k, v;
  int32_t rotation = -1;
  for (int64_t t = task.tile_begin; t < task.tile_end; ++t) {
    const int32_t now = args.tiles[t].rotation;
    if (now >= 0 && now != rotation) q.rotate(rotated, plain, rotation = now, false);
    for_parts(args, args.tiles[t], [&](const Tile& tile) __attribute__((always_inline)) {
      const int64_t count = tile.count;
      codes.find(tile, count);
      codes.find_keys(k, tile, count, k_buffer);
      scores(k, count, d, tile.rotation >= 0 ? rotated : plain, q.rows(), s);
      find_whole_rows<Floats>(v, args, tile, count, args.v_pool, {}, q.head, W, v_buffer);
      fetch_first(v, d);
      small_q_softmax<Floats>(q, tile, count, s, state);
      weighted_sum(v, count, d, s, state.o, q.rows());
      if (!codes.values()) return;
      product<Into::set>(q.rows(), codes.v_pad, count, {s, kSmallQKeys, 1}, codes.z_v, codes.v_pad, pz, codes.v_pad);
      product<Into::add>(q.rows(), d, codes.low.v.rank, {pz, codes.v_pad, 1}, codes.v_by_code(), args.padded_dim, state.o, d);
    });
  }
  finish(q, task, state);
}

void low_rank_backward_unit(const ScheduledAttention& args, const BackwardUnit& unit, int64_t head, int64_t chunk, float* scratch) {
  const QueryBlock q(args, args.blocks[unit.block], head);
  const int64_t d = q.d, rows = q.rows();
  float* plain = take(scratch, kSmallQRows * d);
  float* rotated = take(scratch, kSmallQRows * d);
  float* d_o = take(scratch, kSmallQRows * d);
  float* dq_rotated = take(scratch, kSmallQRows * d);
  float* spare = take(scratch, kSmallQRows * d);
  float* k_buffer = take(scratch, kSmallQKeys * d);
  float* v_buffer = take(scratch, kSmallQKeys * d);
  float* p = take(scratch, kSmallQRows * kSmallQKeys);  // weights
  float* ds = take(scratch, kSmallQRows * kSmallQKeys);
  float* lse = take(scratch, kBlockRows);
  float* delta = take(scratch, kBlockRows);
  float* dq = args.partials + unit.partial * args.backward_partial_size() + head * args.block_rows * args.padded_dim;
  for (int64_t i = 0; i < rows * d; ++i) dq[i] = 0;

  q.load_rows(plain, args.q);
  q.load_rows(d_o, args.d_o);
  q.load_rows(spare, args.o);
  load_statistics(q, d_o, spare, 1, lse, delta);
  take_out_what_is_not_finite(q, plain, d_o, lse);
  Codes codes(q, scratch);
  const CodeGradients grads(codes, d_o, scratch);

  RowTable k, v;
  int32_t rotation = -1;
  const auto leave_offset = [&] {
    if (rotation < 0) return;
    q.rotate(spare, dq_rotated, rotation, true);
    for (int64_t i = 0; i < rows * d; i += W) store(dq + i, load(dq + i) + load(spare + i));
  };
  for (int64_t t = unit.tile_begin; t < unit.tile_end; ++t) {
    if (args.tiles[t].rotation != rotation) {
      leave_offset();
      rotation = args.tiles[t].rotation;
      if (rotation >= 0) q.rotate(rotated, plain, rotation, false);
      for (int64_t i = 0; i < rows * d; ++i) dq_rotated[i] = 0;
    }
    const float* x = rotation >= 0 ? rotated : plain;
    for_parts(args, args.tiles[t], [&](const Tile& tile) __attribute__((always_inline)) {
      const int64_t count = tile.count;
      codes.find(tile, count);
      find_whole_rows<Floats>(v, args, tile, count, args.v_pool, {}, head, W, v_buffer);
      scores(v, count, d, d_o, rows, ds);
      grads.add_dp(count, ds);
      codes.find_keys(k, tile, count, k_buffer);
      scores(k, count, d, x, rows, p);
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = r * kSmallQKeys; i < r * kSmallQKeys + count; i += W) {  // what is past the scores is never read
          const vf w = exp(load(p + i) * args.scale - lse[r]);
          store(p + i, w);
          store(ds + i, w * (load(ds + i) - delta[r]) * args.scale);
        }
      weighted_sum(k, count, d, ds, rotation >= 0 ? dq_rotated : dq, rows);
      grads.of_values(tile, count, p, d_o);
      grads.of_keys(tile, count, ds, x, chunk);
    });
  }
  leave_offset();
  grads.finish(d_o, chunk);
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
