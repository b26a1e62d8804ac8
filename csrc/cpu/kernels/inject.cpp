// inject and its backward, token by token. A head takes one pass for its sums and one from source to destination.
#include "../inject.h"
#include "kernels.h"
#include "rotary.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

// Heads at a time: their sums are all taken before the first is needed, and the rows are still in L1 then.
constexpr int64_t kHeads = 8;

void load_table(float* dst, const Table& table, int64_t row, int64_t d) {
  load_row(dst, static_cast<const char*>(table.data) + row * table.stride * element_size(table.dtype), table.dtype, d);
}

void zero(float* x, int64_t d) {
  for (int64_t i = 0; i < d; ++i) x[i] = 0;
}

Rotation rotation_of(const InjectArgs& args) { return {args.head_dim, args.cos.data ? args.rotary_dim : 0, args.interleaved}; }

// squares -> 1 / rms, of kHeads rows
void inverse_rms(float* r, int64_t d, float eps) {
  for (int64_t h = 0; h < kHeads; ++h) r[h] = 1 / __builtin_sqrtf(r[h] / float(d) + eps);
}

// dst = src, rotated and normed, for all heads of a token.
void rotate_rows(const Rows& dst, int64_t dst_row, const Rows& src, int64_t token, int64_t heads, const Rotation& rotation, bool norm,
                 float eps) {
  const int64_t d = rotation.size;
  alignas(64) float from[kHeads * kMaxHeadDim], to[kMaxHeadDim];
  const float* x[kHeads];
  float r[kHeads];
  for (int64_t first = 0; first < heads; first += kHeads) {
    const int64_t count = min(kHeads, heads - first);
    for (int64_t h = 0; h < kHeads; ++h) r[h] = 1;
    for (int64_t h = 0; h < count; ++h) x[h] = row_floats(src, token, first + h, d, from + h * d);
    if (norm) {
      for (int64_t h = 0; h < count; ++h) r[h] = sum_of_squares(x[h], d);
      inverse_rms(r, d, eps);
    }
    for (int64_t h = 0; h < count; ++h) {
      const RowWriter out(dst, dst_row, first + h, to);
      rotate_row(rotation, x[h], [&](int64_t i, auto y) { put(out.floats + i, y * r[h]); });
      out.done(d);
    }
  }
}

// The tables of the current token, and the norm weights (ones without a norm).
struct Tables {
  alignas(64) float cos[kMaxHeadDim], sin[kMaxHeadDim], q_weight[kMaxHeadDim], k_weight[kMaxHeadDim];
  const InjectArgs& args;

  explicit Tables(const InjectArgs& args) : args(args) {
    load_weight(q_weight, args.q_weight);
    load_weight(k_weight, args.k_weight);
  }

  void load_weight(float* weight, const Table& table) {
    if (table.data) return load_table(weight, table, 0, args.head_dim);
    for (int64_t i = 0; i < args.head_dim; ++i) weight[i] = 1;
  }

  void load(int64_t token) {
    if (!args.cos.data) return;
    load_table(cos, args.cos, token, args.rotary_dim);
    load_table(sin, args.sin, token, args.rotary_dim);
  }
};

// From the gradient u of the normed row to dx, the gradient of x; d_weight += u * xhat. With r = 1/rms: dx = r w u - x r^3 mean(w u x).
template <class V>
DIFFMAS_INLINE void norm_sums(const float* u, const float* x, const float* w, V& squares, V& dot) {
  const V xi = get<V>(x);
  squares += xi * xi;
  dot += get<V>(u) * get<V>(w) * xi;
}

template <class V>
DIFFMAS_INLINE void norm_gradient(float* dx, float* dw, const float* u, const float* x, const float* w, float r, float c) {
  const V ui = get<V>(u), xi = get<V>(x);
  put(dx, r * get<V>(w) * ui - c * xi);
  put(dw, get<V>(dw) + ui * (xi * r));
}

// squares = x.x, dot = (u w).x
void norm_sums_row(const float* u, const float* x, const float* w, int64_t d, float& squares, float& dot) {
  vf squares0 = {}, dot0 = {}, squares1 = {}, dot1 = {};
  int64_t i = 0;
  for (; i + 2 * W <= d; i += 2 * W) {
    norm_sums(u + i, x + i, w + i, squares0, dot0);
    norm_sums(u + i + W, x + i + W, w + i + W, squares1, dot1);
  }
  for (; i + W <= d; i += W) norm_sums(u + i, x + i, w + i, squares0, dot0);
  squares = sum(squares0 + squares1), dot = sum(dot0 + dot1);
  for (; i < d; ++i) norm_sums(u + i, x + i, w + i, squares, dot);
}

// dx = gradient of a token's rows, from the gradient dy of their rotated norm. weight is null without a norm.
void rotate_rows_backward(const Rows& dx, int64_t token, const Rows& dy, int64_t dy_row, const Rows& x, int64_t heads, const Rotation& back,
                          const float* weight, float* d_weight, float eps) {
  const int64_t d = back.size;
  alignas(64) float from[kHeads * kMaxHeadDim], u[kHeads * kMaxHeadDim], to[kMaxHeadDim];
  for (int64_t first = 0; first < heads; first += kHeads) {
    const int64_t count = min(kHeads, heads - first);
    const float* row[kHeads];
    float r[kHeads] = {}, dot[kHeads] = {};
    for (int64_t h = 0; h < count; ++h) {
      float* uh = u + h * d;
      rotate_row(back, row_floats(dy, dy_row, first + h, d, to), [&](int64_t i, auto y) { put(uh + i, y); });
      if (!weight) {
        store_row(row_of(dx, token, first + h), uh, dx.dtype, d);
        continue;
      }
      row[h] = row_floats(x, token, first + h, d, from + h * d);
      norm_sums_row(uh, row[h], weight, d, r[h], dot[h]);
    }
    if (!weight) continue;
    inverse_rms(r, d, eps);
    for (int64_t h = 0; h < count; ++h) {
      const RowWriter out(dx, token, first + h, to);
      const float* uh = u + h * d;
      const float c = r[h] * r[h] * (dot[h] / float(d)) * r[h];
      int64_t i = 0;
      for (; i + W <= d; i += W) norm_gradient<vf>(out.floats + i, d_weight + i, uh + i, row[h] + i, weight + i, r[h], c);
      for (; i < d; ++i) norm_gradient<float>(out.floats + i, d_weight + i, uh + i, row[h] + i, weight + i, r[h], c);
      out.done(d);
    }
  }
}

}  // namespace

void inject_forward_range(const InjectArgs& args, int64_t token_begin, int64_t token_end) {
  Tables tables(args);
  Rotation q_rotation = rotation_of(args), k_rotation = rotation_of(args);
  const bool q_norm = args.q_weight.data, k_norm = args.k_weight.data;
  for (int64_t t = token_begin; t < token_end; ++t) {
    if (t == token_begin || args.cos.data) {
      tables.load(t);
      q_rotation.set(tables.cos, tables.sin, tables.q_weight);
      k_rotation.set(tables.cos, tables.sin, tables.k_weight);
    }
    rotate_rows(args.q_out, t, args.q, t, args.q_heads, q_rotation, q_norm, args.eps);
    const int64_t slot = args.slots[t];
    if (slot < 0) continue;
    rotate_rows(args.k_pool, slot, args.k, t, args.kv_heads, k_rotation, k_norm, args.eps);
    for (int64_t h = 0; h < args.kv_heads; ++h) copy_row(args.v_pool, slot, args.v, t, h, args.head_dim);
  }
}

void inject_backward_block(const InjectArgs& args, int64_t block) {
  const int64_t d = args.head_dim, begin = block * kInjectBlock, end = min(args.n, begin + kInjectBlock);
  Tables tables(args);
  Rotation back = rotation_of(args);
  float* dq_weight = args.weight_partials + block * 2 * d;
  float* dk_weight = dq_weight + d;
  zero(dq_weight, 2 * d);
  const float* q_weight = args.q_weight.data ? tables.q_weight : nullptr;
  const float* k_weight = args.k_weight.data ? tables.k_weight : nullptr;
  alignas(64) float zeros[kMaxHeadDim];
  zero(zeros, d);
  for (int64_t t = begin; t < end; ++t) {
    if (t == begin || args.cos.data) {
      tables.load(t);
      back.set_transposed(tables.cos, tables.sin);
    }
    rotate_rows_backward(args.q_out, t, args.dq_rot, t, args.q, args.q_heads, back, q_weight, dq_weight, args.eps);
    const int64_t slot = args.slots[t];
    // Takes rows out of the gradient pools, which are float32.
    if (slot >= 0) rotate_rows_backward(args.dk, t, args.k_pool, slot, args.k, args.kv_heads, back, k_weight, dk_weight, args.eps);
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      if (slot < 0) {
        store_row(row_of(args.dk, t, h), zeros, args.dk.dtype, d);
        store_row(row_of(args.dv, t, h), zeros, args.dv.dtype, d);
        continue;
      }
      float* dv = reinterpret_cast<float*>(row_of(args.v_pool, slot, h));
      store_row(row_of(args.dv, t, h), dv, args.dv.dtype, d);
      zero(reinterpret_cast<float*>(row_of(args.k_pool, slot, h)), d);
      zero(dv, d);
    }
  }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
