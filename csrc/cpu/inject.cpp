// inject and its backward, token by token.
#include "kernels.h"
#include "simd.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

void load_table(float* dst, const Table& table, int64_t row, int64_t d) {
  load_row(dst, static_cast<const char*>(table.data) + row * table.stride * element_size(table.dtype), table.dtype, d);
}

void zero(float* x, int64_t d) {
  for (int64_t i = 0; i < d; ++i) x[i] = 0;
}

float dot(const float* x, const float* y, int64_t d) {
  vf acc = {};
  int64_t i = 0;
  for (; i + W <= d; i += W) acc += load(x + i) * load(y + i);
  float total = sum(acc);
  for (; i < d; ++i) total += x[i] * y[i];
  return total;
}

struct Rotary {
  float cos[kMaxHeadDim], sin[kMaxHeadDim];
  int64_t dim;  // 0: no rotation
  bool interleaved;

  Rotary(const InjectArgs& args) : dim(args.cos.data ? args.rotary_dim : 0), interleaved(args.interleaved) {}

  void load(const InjectArgs& args, int64_t token) {
    if (!dim) return;
    load_table(cos, args.cos, token, dim);
    load_table(sin, args.sin, token, dim);
  }

  // Pairs (x, y): x' = x cos_x - y sin_x, y' = y cos_y + x sin_y.
  void apply(float* x) const {
    const int64_t half = dim / 2;
    if (interleaved) {
      for (int64_t i = 0; i < dim; i += 2) {
        const float a = x[i], b = x[i + 1];
        x[i] = a * cos[i] - b * sin[i];
        x[i + 1] = b * cos[i + 1] + a * sin[i + 1];
      }
      return;
    }
    float* y = x + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = y[i];
      x[i] = a * cos[i] - b * sin[i];
      y[i] = b * cos[half + i] + a * sin[half + i];
    }
  }

  // The transpose of apply.
  void apply_transposed(float* x) const {
    const int64_t half = dim / 2;
    if (interleaved) {
      for (int64_t i = 0; i < dim; i += 2) {
        const float a = x[i], b = x[i + 1];
        x[i] = a * cos[i] + b * sin[i + 1];
        x[i + 1] = b * cos[i + 1] - a * sin[i];
      }
      return;
    }
    float* y = x + half;
    for (int64_t i = 0; i < half; ++i) {
      const float a = x[i], b = y[i];
      x[i] = a * cos[i] + b * sin[half + i];
      y[i] = b * cos[half + i] - a * sin[i];
    }
  }
};

float inverse_rms(const float* x, int64_t d, float eps) { return 1 / __builtin_sqrtf(dot(x, x, d) / float(d) + eps); }

void norm(float* x, const float* weight, int64_t d, float eps) {
  const float r = inverse_rms(x, d, eps);
  for (int64_t i = 0; i < d; ++i) x[i] = x[i] * r * weight[i];
}

// g: gradient of the normed row -> of x, in place. d_weight += g * xhat.
void norm_backward(float* g, const float* x, const float* weight, float* d_weight, int64_t d, float eps) {
  const float r = inverse_rms(x, d, eps);
  alignas(64) float xhat[kMaxHeadDim];
  for (int64_t i = 0; i < d; ++i) {
    xhat[i] = x[i] * r;
    d_weight[i] += g[i] * xhat[i];
    g[i] *= weight[i];
  }
  const float mean = dot(g, xhat, d) / float(d);
  for (int64_t i = 0; i < d; ++i) g[i] = r * (g[i] - xhat[i] * mean);
}

struct Norms {
  alignas(64) float q[kMaxHeadDim];
  alignas(64) float k[kMaxHeadDim];

  Norms(const InjectArgs& args) {
    if (args.q_weight.data) load_table(q, args.q_weight, 0, args.head_dim);
    if (args.k_weight.data) load_table(k, args.k_weight, 0, args.head_dim);
  }
};

}  // namespace

void inject_forward_range(const InjectArgs& args, int64_t token_begin, int64_t token_end) {
  const int64_t d = args.head_dim;
  const Norms norms(args);
  Rotary rotary(args);
  alignas(64) float x[kMaxHeadDim];
  for (int64_t t = token_begin; t < token_end; ++t) {
    rotary.load(args, t);
    for (int64_t h = 0; h < args.q_heads; ++h) {
      load_row(x, row_of(args.q, t, h), args.q.dtype, d);
      if (args.q_weight.data) norm(x, norms.q, d, args.eps);
      rotary.apply(x);
      store_row(row_of(args.q_out, t, h), x, args.q_out.dtype, d);
    }
    const int64_t slot = args.slots[t];
    if (slot < 0) continue;
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      load_row(x, row_of(args.k, t, h), args.k.dtype, d);
      if (args.k_weight.data) norm(x, norms.k, d, args.eps);
      rotary.apply(x);
      store_row(row_of(args.k_pool, slot, h), x, args.k_pool.dtype, d);
      load_row(x, row_of(args.v, t, h), args.v.dtype, d);
      store_row(row_of(args.v_pool, slot, h), x, args.v_pool.dtype, d);
    }
  }
}

void inject_backward_block(const InjectArgs& args, int64_t block) {
  const int64_t d = args.head_dim, begin = block * kInjectBlock, end = min(args.n, begin + kInjectBlock);
  const Norms norms(args);
  Rotary rotary(args);
  float* dq_weight = args.weight_partials + block * 2 * d;
  float* dk_weight = dq_weight + d;
  zero(dq_weight, 2 * d);
  alignas(64) float g[kMaxHeadDim];
  alignas(64) float x[kMaxHeadDim];
  for (int64_t t = begin; t < end; ++t) {
    rotary.load(args, t);
    for (int64_t h = 0; h < args.q_heads; ++h) {
      load_row(g, row_of(args.dq_rot, t, h), args.dq_rot.dtype, d);
      rotary.apply_transposed(g);
      if (args.q_weight.data) {
        load_row(x, row_of(args.q, t, h), args.q.dtype, d);
        norm_backward(g, x, norms.q, dq_weight, d, args.eps);
      }
      store_row(row_of(args.q_out, t, h), g, args.q_out.dtype, d);
    }
    const int64_t slot = args.slots[t];
    for (int64_t h = 0; h < args.kv_heads; ++h) {
      if (slot < 0) {
        zero(g, d);
        store_row(row_of(args.dk, t, h), g, args.dk.dtype, d);
        store_row(row_of(args.dv, t, h), g, args.dv.dtype, d);
        continue;
      }
      float* dk = reinterpret_cast<float*>(row_of(args.k_pool, slot, h));
      float* dv = reinterpret_cast<float*>(row_of(args.v_pool, slot, h));
      store_row(row_of(args.dv, t, h), dv, args.dv.dtype, d);
      load_row(g, dk, DType::f32, d);
      zero(dk, d);
      zero(dv, d);
      rotary.apply_transposed(g);
      if (args.k_weight.data) {
        load_row(x, row_of(args.k, t, h), args.k.dtype, d);
        norm_backward(g, x, norms.k, dk_weight, d, args.eps);
      }
      store_row(row_of(args.dk, t, h), g, args.dk.dtype, d);
    }
  }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
