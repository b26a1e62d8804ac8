// merge_states and reposition, row by row.
#include "kernels.h"
#include "rotary.h"

extern "C" float expf(float);
extern "C" float log1pf(float);

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

// The share of each state in the union, and the union's lse. Both empty: no share, lse = -inf.
struct Shares {
  float a, b, lse;

  Shares(float lse_a, float lse_b) : a(0), b(0), lse(-kInf) {
    if (lse_a == -kInf && lse_b == -kInf) return;
    const bool a_first = lse_a > lse_b;
    const float e = expf(a_first ? lse_b - lse_a : lse_a - lse_b), larger = 1 / (1 + e);
    a = a_first ? larger : e * larger;
    b = a_first ? e * larger : larger;
    lse = (a_first ? lse_a : lse_b) + log1pf(e);
  }
};

template <class V>
DIFFMAS_INLINE void mix(float* o, const float* a, const float* b, Shares s) {
  put(o, s.a * get<V>(a) + s.b * get<V>(b));
}

// dx = w dy, returns dy . (x - y)
float share_gradient(float* dx, const float* dy, const float* x, const float* y, float w, int64_t d) {
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) {
    const vf g = load(dy + i);
    acc += g * (load(x + i) - load(y + i));
    store(dx + i, w * g);
  }
  float total = sum(acc);
  for (; i < d; ++i) {
    total += dy[i] * (x[i] - y[i]);
    dx[i] = w * dy[i];
  }
  return total;
}

// sum += from, row = 0. row may be from.
void take_row(float* sum, const float* from, float* row, int64_t d) {
  int64_t c = 0;
  for (; c + W <= d; c += W) {
    store(sum + c, load(sum + c) + load(from + c));
    store(row + c, vf{});
  }
  for (; c < d; ++c) {
    sum[c] += from[c];
    row[c] = 0;
  }
}

// Calls visit(i, its rotation) for the moves [begin, end).
template <class F>
DIFFMAS_INLINE void for_rotated(const RepositionArgs& args, int64_t begin, int64_t end, bool back, const F& visit) {
  const int64_t dim = 2 * args.half_rotary;
  Turn turn(args.head_dim, dim, args.interleaved);
  alignas(64) float ones[kMaxHeadDim];
  for (int64_t i = 0; i < args.head_dim; ++i) ones[i] = 1;
  int64_t rotation = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (args.rotation[i] != rotation) {
      rotation = args.rotation[i];
      const float *cos = args.cos + rotation * dim, *sin = args.sin + rotation * dim;
      back ? turn.set_transposed(cos, sin) : turn.set(cos, sin, ones);
    }
    visit(i, turn);
  }
}

}  // namespace

void merge_states_range(const MergeArgs& args, int64_t token_begin, int64_t token_end) {
  const int64_t d = args.head_dim;
  alignas(64) float a[kMaxHeadDim], b[kMaxHeadDim], o[kMaxHeadDim];
  for (int64_t t = token_begin; t < token_end; ++t)
    for (int64_t h = 0; h < args.heads; ++h) {
      const int64_t i = t * args.heads + h;
      const Shares s(args.lse_a[i], args.lse_b[i]);
      const float* from_a = row_floats(args.o_a, t, h, d, a);
      const float* from_b = row_floats(args.o_b, t, h, d, b);
      const RowWriter out(args.o, t, h, o);
      int64_t c = 0;
      for (; c + W <= d; c += W) mix<vf>(out.floats + c, from_a + c, from_b + c, s);
      for (; c < d; ++c) mix<float>(out.floats + c, from_a + c, from_b + c, s);
      out.done(d);
      args.lse[i] = s.lse;
    }
}

// With w = exp(lse_x - lse): do_x = w do, dlse_x = w (do . (o_x - o) + dlse).
void merge_states_backward_range(const MergeArgs& args, int64_t token_begin, int64_t token_end) {
  const int64_t d = args.head_dim;
  alignas(64) float dy[kMaxHeadDim], y[kMaxHeadDim], x[kMaxHeadDim], dx[kMaxHeadDim];
  for (int64_t t = token_begin; t < token_end; ++t)
    for (int64_t h = 0; h < args.heads; ++h) {
      const int64_t i = t * args.heads + h;
      const Shares s(args.lse_a[i], args.lse_b[i]);
      const float* d_o = row_floats(args.d_o, t, h, d, dy);
      const float* o = row_floats(args.o, t, h, d, y);
      const RowWriter out_a(args.do_a, t, h, dx);
      args.dlse_a[i] = s.a * (share_gradient(out_a.floats, d_o, row_floats(args.o_a, t, h, d, x), o, s.a, d) + args.dlse[i]);
      out_a.done(d);
      const RowWriter out_b(args.do_b, t, h, dx);
      args.dlse_b[i] = s.b * (share_gradient(out_b.floats, d_o, row_floats(args.o_b, t, h, d, x), o, s.b, d) + args.dlse[i]);
      out_b.done(d);
    }
}

void reposition_range(const RepositionArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.head_dim;
  alignas(64) float x[kMaxHeadDim], y[kMaxHeadDim];
  for_rotated(args, begin, end, false, [&](int64_t i, const Turn& turn) {
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      const RowWriter out(args.k_pool, args.dst[i], h, y);
      turned(turn, row_floats(args.k_pool, args.src[i], h, d, x), [&](int64_t c, auto v) { put(out.floats + c, v); });
      out.done(d);
      copy_row(args.v_pool, args.dst[i], args.v_pool, args.src[i], h, d);
    }
  });
}

// One head: a row of src may occur many times, its sum is taken by one thread, in order.
void reposition_backward_head(const RepositionArgs& args, int64_t head) {
  const int64_t d = args.head_dim;
  alignas(64) float turned_back[kMaxHeadDim];
  const auto floats = [&](const Rows& pool, int64_t row) { return reinterpret_cast<float*>(row_of(pool, row, head)); };
  for_rotated(args, 0, args.m, true, [&](int64_t i, const Turn& turn) {
    float* dk = floats(args.k_pool, args.dst[i]);
    turned(turn, dk, [&](int64_t c, auto v) { put(turned_back + c, v); });
    take_row(floats(args.k_pool, args.src[i]), turned_back, dk, d);
    float* dv = floats(args.v_pool, args.dst[i]);
    take_row(floats(args.v_pool, args.src[i]), dv, dv, d);
  });
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
