// merge_states and its backward, row by row.
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

}  // namespace diffmas::cpu::DIFFMAS_ISA
