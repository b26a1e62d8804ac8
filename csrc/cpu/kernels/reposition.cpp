// reposition and its backward, move by move.
#include "kernels.h"
#include "rotary.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

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
  Rotation by(args.head_dim, dim, args.interleaved);
  alignas(64) float ones[kMaxHeadDim];
  for (int64_t i = 0; i < args.head_dim; ++i) ones[i] = 1;
  int64_t rotation = -1;
  for (int64_t i = begin; i < end; ++i) {
    if (args.rotation[i] != rotation) {
      rotation = args.rotation[i];
      const float *cos = args.cos + rotation * dim, *sin = args.sin + rotation * dim;
      back ? by.set_transposed(cos, sin) : by.set(cos, sin, ones);
    }
    visit(i, by);
  }
}

}  // namespace

void reposition_range(const RepositionArgs& args, int64_t begin, int64_t end) {
  const int64_t d = args.head_dim;
  alignas(64) float x[kMaxHeadDim], y[kMaxHeadDim];
  for_rotated(args, begin, end, false, [&](int64_t i, const Rotation& by) {
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      const RowWriter out(args.k_pool, args.dst[i], h, y);
      rotate_row(by, row_floats(args.k_pool, args.src[i], h, d, x), [&](int64_t c, auto v) { put(out.floats + c, v); });
      out.done(d);
      copy_row(args.v_pool, args.dst[i], args.v_pool, args.src[i], h, d);
    }
  });
}

// One head. A row may occur in src many times; one thread adds up its sum, in order.
void reposition_backward_head(const RepositionArgs& args, int64_t head) {
  const int64_t d = args.head_dim;
  alignas(64) float rotated_back[kMaxHeadDim];
  const auto floats = [&](const Rows& pool, int64_t row) { return reinterpret_cast<float*>(row_of(pool, row, head)); };
  for_rotated(args, 0, args.m, true, [&](int64_t i, const Rotation& by) {
    float* dk = floats(args.k_pool, args.dst[i]);
    rotate_row(by, dk, [&](int64_t c, auto v) { put(rotated_back + c, v); });
    take_row(floats(args.k_pool, args.src[i]), rotated_back, dk, d);
    float* dv = floats(args.v_pool, args.dst[i]);
    take_row(floats(args.v_pool, args.src[i]), dv, dv, d);
  });
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
