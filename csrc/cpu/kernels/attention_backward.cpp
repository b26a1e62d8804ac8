// cross_attention backward: one query block against the tiles of one chunk of the pool. The caller gives each (chunk, kv head) to
// one thread, which therefore owns these rows of dK and dV; dq is left as one partial per chunk and summed in order.
#include "kernels.h"
#include "large_q_backward.h"
#include "small_q.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

template <class N>
struct Queries {
  const float* x;    // [rows, d], at the tile's offset
  const float* d_o;  // [rows, d]
  const typename N::Element *x_elements, *d_o_elements;
  const float* lse;    // [rows]; +inf for rows that saw nothing, so that p = 0
  const float* delta;  // [rows] sum(do * o) - dlse
};

template <class N>
struct Products {
  float* p;  // probabilities, then ds in dp's place: [rows, kSmallQKeys]
  float* dp;
  typename N::Element* ds_elements;  // [rows, kSmallQKeys]: of keys, for dq
};

DIFFMAS_INLINE const float* keys_of(const float* ds, int64_t, int64_t, float*) { return ds; }
#if defined(DIFFMAS_DOTS)
const Pair* keys_of(const float* ds, int64_t rows, int64_t count, Pair* buffer) {
  for (int64_t r = 0; r < rows; ++r) narrow_row(buffer + r * kSmallQKeys, ds + r * kSmallQKeys, count);
  return buffer;
}
#endif

template <class N>
void small_q_tile(const QueryBlock& q, const Queries<N>& in, const Tile& tile, int64_t count, float* dq, float* k_buffer, float* v_buffer,
                  Products<N> t) {
  constexpr int64_t kVector = N::kNumbers * W;
  const ScheduledAttention& args = q.args;
  const int64_t rows = q.rows(), d = q.d;
  RowTable k, v, dk, dv;
  find_whole_rows<N>(k, args, tile, count, args.k_pool, args.k_scale, q.head, kVector, k_buffer);
  find_whole_rows<N>(v, args, tile, count, args.v_pool, args.v_scale, q.head, kVector, v_buffer);
  scores(v, count, round_up(d, kVector), in.d_o_elements, rows, t.dp);
  scores(k, count, round_up(d, kVector), in.x_elements, rows, t.p);
  times_scales(v, count, t.dp, rows);
  times_scales(k, count, t.p, rows);
  for (int64_t r = 0; r < rows; ++r) {
    float* p = t.p + r * kSmallQKeys;
    float* dp = t.dp + r * kSmallQKeys;
    for (int64_t i = 0; i < count; i += W) {  // lanes of the last vector past the scores are never read
      const vf w = exp(load(p + i) * args.scale - in.lse[r]);
      store(p + i, w);
      store(dp + i, w * (load(dp + i) - in.delta[r]) * args.scale);
    }
    for (int64_t i = max(0, min(count, q.limit(r) - tile.view + 1)); i < round_up(count, N::kNumbers); ++i) p[i] = dp[i] = 0;
  }
  times_scales(k, count, t.dp, rows);
  if (dq) weighted_sum(k, count, d, keys_of(t.dp, rows, count, t.ds_elements), dq, rows);
  if (!tile.needs_grad) return;
  find_rows(dk, args, tile, count, args.dk_pool, {}, q.head, false);
  find_rows(dv, args, tile, count, args.dv_pool, {}, q.head, false);
  outer_sum(dv, count, args.head_dim, t.p, in.d_o, rows, d);
  outer_sum(dk, count, args.head_dim, t.dp, in.x, rows, d);
}

template <class N>
void small_q_unit(const QueryBlock& q, const BackwardUnit& unit, float* dq, float* scratch) {
  using E = typename N::Element;
  const ScheduledAttention& args = q.args;
  const int64_t d = q.d;
  float* plain = take(scratch, kSmallQRows * d);
  float* rotated = take(scratch, kSmallQRows * d);
  float* d_o = take(scratch, kSmallQRows * d);
  E* x_elements = take<E>(scratch, kSmallQRows * d);
  E* d_o_elements = take<E>(scratch, kSmallQRows * d);
  float* dq_rotated = take(scratch, kSmallQRows * d);  // dq at the current offset
  float* spare = take(scratch, kSmallQRows * d);
  float* k_buffer = take(scratch, kSmallQKeys * round_up(d, N::kNumbers * W));
  float* v_buffer = take(scratch, kSmallQKeys * round_up(d, N::kNumbers * W));
  Products<N> t{take(scratch, kSmallQRows * kSmallQKeys), take(scratch, kSmallQRows * kSmallQKeys),
                take<E>(scratch, kSmallQRows * kSmallQKeys)};
  float* lse = take(scratch, kBlockRows);
  float* delta = take(scratch, kBlockRows);

  q.load_rows(plain, args.q);
  q.load_rows(d_o, args.d_o);
  q.load_rows(spare, args.o);
  load_statistics(q, d_o, spare, 1, lse, delta);
  take_out_what_is_not_finite(q, plain, d_o, lse);

  int32_t rotation = -2;
  Queries<N> in{plain, d_o, nullptr, as_elements(q, d_o, d_o_elements), lse, delta};
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
      in.x_elements = as_elements(q, in.x, x_elements);
    }
    small_q_tile(q, in, tile, q.visible(tile), dq_now, k_buffer, v_buffer, t);
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
  const bool small = q.rows() <= kSmallQRows;
#if defined(DIFFMAS_DOTS)
  if (in_bfloats(args)) return (small ? small_q_unit<Bfloats> : large_q_unit<Bfloats>)(q, unit, dq, scratch);
#endif
  (small ? small_q_unit<Floats> : large_q_unit<Floats>)(q, unit, dq, scratch);
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
