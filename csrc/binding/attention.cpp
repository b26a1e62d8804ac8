#include "attention.h"

#include <vector>

#include "ops.h"
#ifdef DIFFMAS_CUDA
#include "cuda.h"
#include "cuda/attention.h"
#endif

namespace diffmas::binding {
namespace {

const int64_t* indptr(const char* name, const Tensor& t, int64_t batch, int64_t end, Device device) {
  STD_TORCH_CHECK(batch > 0 || end == 0, name, ": expected 0 and ", end, ", got one element");
  return indices(name, t, batch + 1, device);
}

// Memory safety, not validation: one look at every index of a view on the CPU, so that kernels stay inside of q and the pools.
void check_inside(const AttentionArgs& a) {
  const Segments& view = a.view;
  const auto check_rising = [&](const char* name, const int64_t* p, int64_t end) {
    STD_TORCH_CHECK(p[0] == 0 && p[view.batch] == end, name, ": expected values from 0 to ", end, ", got ", p[0], " to ", p[view.batch]);
    for (int64_t b = 0; b < view.batch; ++b)
      STD_TORCH_CHECK(p[b] <= p[b + 1], name, ": expected rising values, got ", p[b], " then ", p[b + 1], " at ", b + 1);
  };
  check_rising("q_indptr", view.q_indptr, a.n);
  check_rising("seg_indptr", view.seg_indptr, a.segments);
  for (int64_t s = 0; s < a.segments; ++s) {
    const int64_t start = view.start[s], length = view.length[s];
    STD_TORCH_CHECK(start >= 0 && length >= 0 && start <= a.pool_rows && length <= a.pool_rows - start,
                    "seg_start, seg_len: expected rows inside the pool's ", a.pool_rows, ", got ", start, " + ", length, " at ", s);
  }
}

#ifdef DIFFMAS_CUDA
void run_on_cuda(const AttentionArgs& args, const Tensor& q, bool backward) {
  STD_TORCH_CHECK(args.head_dim <= cuda::kMaxAttentionDim, "q: expected a head size up to ", cuda::kMaxAttentionDim, ", got ",
                  args.head_dim);
  check_rows_fit("q", args.n * args.q_heads);
  check_rows_fit("k_pool", args.pool_rows);
  const bool quantized = args.k_pool.dtype == DType::i8 || args.k_pool.dtype == DType::e4m3;
  if (quantized) {
    STD_TORCH_CHECK(args.q.dtype != DType::f32, "q: expected bfloat16 or float16 with rows of 8 bits on a GPU, got float32");
    STD_TORCH_CHECK(args.head_dim % 16 == 0, "q: expected a head size that divides by 16 with rows of 8 bits on a GPU, got ",
                    args.head_dim);
  }
  const Device device = device_of(q);
  const cuda::AttentionSizes sizes = quantized ? diffmas_cuda_quantized_memory(&args, device.index)
                                               : diffmas_cuda_attention_memory(&args, backward, device.index);
  Tensor memory = empty(q, {sizes.floats}, ScalarType::Float), counters = empty(q, {sizes.counters}, ScalarType::Int);
  if (sizes.counters) torch::stable::zero_(counters);
  const auto launch = quantized  ? diffmas_cuda_quantized_forward
                      : backward ? diffmas_cuda_attention_backward
                                 : diffmas_cuda_attention_forward;
  check_cuda(launch(&args, {floats_of_own(memory), static_cast<unsigned*>(counters.data_ptr())}, device.index, current_stream(device)));
}
#endif

}  // namespace

AttentionArgs attention_args(const Tensor& q, const KV& kv, const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
                             const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale, bool causal,
                             bool interleaved) {
  const Device device = device_of(q);
  AttentionArgs a{};
  a.q = rows("q", q, device);
  a.n = q.size(0), a.q_heads = q.size(1), a.head_dim = q.size(2);
  if (kv.k_scale) {
    check_dims("k_pool", kv.k_pool);
    a.pool_rows = kv.k_pool.size(0), a.kv_heads = kv.k_pool.size(1);
    a.k_pool = payload("k_pool", kv.k_pool, a.pool_rows, a.kv_heads, a.head_dim, device);
    a.v_pool = payload("v_pool", kv.v_pool, a.pool_rows, a.kv_heads, a.head_dim, device);
    check_dtype("v_pool", kv.v_pool, kv.k_pool.scalar_type());
    a.k_scale = scales("k_scale", *kv.k_scale, a.pool_rows, a.kv_heads, device);
    a.v_scale = scales("v_scale", *kv.v_scale, a.pool_rows, a.kv_heads, device);
  } else {
    const Pools p = pools("k_pool", kv.k_pool, "v_pool", kv.v_pool, -1, a.head_dim, device);
    a.k_pool = p.k, a.v_pool = p.v, a.pool_rows = p.rows, a.kv_heads = p.kv_heads;
  }
  check_heads(a.q_heads, "k_pool", a.kv_heads, a.head_dim);
  a.scale = float(scale);
  a.interleaved = interleaved;

  Segments& view = a.view;
  view.batch = length_of("q_indptr", q_indptr) - 1;
  STD_TORCH_CHECK(view.batch >= 0, "q_indptr: expected at least one element, got none");
  a.segments = length_of("seg_start", seg_start);
  view.q_indptr = indptr("q_indptr", q_indptr, view.batch, a.n, device);
  view.seg_indptr = indptr("seg_indptr", seg_indptr, view.batch, a.segments, device);
  view.start = indices("seg_start", seg_start, a.segments, device);
  view.length = indices("seg_len", seg_len, a.segments, device);
  STD_TORCH_CHECK(!seg_offset || inv_freq, "inv_freq: expected the frequencies that seg_offset needs, got none");
  if (seg_offset) view.offset = indices("seg_offset", *seg_offset, a.segments, device);
  if (inv_freq) {
    view.inv_freq = frequencies(*inv_freq, a.head_dim, device);
    view.half_rotary = inv_freq->size(0);
  }
  view.causal = causal;
  if (!device.cuda) check_inside(a);
  return a;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr,
                                  const Tensor& seg_indptr, const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                  const Optional& inv_freq, double scale, bool causal, bool interleaved, bool flat) {
  const OnDevice on(q);
  AttentionArgs a =
      attention_args(q, {k_pool, v_pool}, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved);
  if (q.is_cuda()) check_dtype("k_pool", k_pool, q.scalar_type());
  return forward(a, q, flat);
}

std::tuple<Tensor, Tensor> forward(AttentionArgs& a, const Tensor& q, bool flat) {
  Tensor o = empty_heads(q, a.n, a.q_heads, a.head_dim, flat);
  Tensor lse = empty(q, {a.n, a.q_heads}, ScalarType::Float);
  a.o = rows_of_own(o, a.q_heads, a.head_dim, a.q.dtype);
  a.lse = floats_of_own(lse);
#ifdef DIFFMAS_CUDA
  if (q.is_cuda()) {
    run_on_cuda(a, q, false);
    return {o, lse};
  }
#endif
  Partials partials{q, {}};
  cpu::attention_forward(a, threads(), partials.workspace());
  return {o, lse};
}

std::tuple<Tensor, Tensor> cross_attention_quantized(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& k_scale,
                                                     const Tensor& v_scale, const Tensor& q_indptr, const Tensor& seg_indptr,
                                                     const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset,
                                                     const Optional& inv_freq, double scale, bool interleaved) {
  const OnDevice on(q);
  AttentionArgs a = attention_args(q, {k_pool, v_pool, &k_scale, &v_scale}, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
                                   scale, false, interleaved);
  return forward(a, q, false);
}

Tensor cross_attention_quantized_backward(const Tensor& d_o, const Tensor& q, const Tensor& o, const Tensor& lse, const Tensor& k_pool,
                                          const Tensor& v_pool, const Tensor& k_scale, const Tensor& v_scale, const Tensor& q_indptr,
                                          const Tensor& seg_indptr, const Tensor& seg_start, const Tensor& seg_len,
                                          const Optional& seg_offset, const Optional& inv_freq, double scale, bool interleaved) {
  const Device device = device_of(q);
  AttentionArgs a = attention_args(q, {k_pool, v_pool, &k_scale, &v_scale}, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq,
                                   scale, false, interleaved);
  const Tensor grad = packed(d_o);
  a.d_o = heads("do", grad, a.n, a.q_heads, a.head_dim, device).rows;
  a.o = heads("o", o, a.n, a.q_heads, a.head_dim, device).rows;
  a.lse = const_cast<float*>(floats("lse", lse, {a.n, a.q_heads}, device));
  const std::vector<int64_t> no_rows(size_t(a.view.batch), 0);  // none gets a gradient
  a.view.grad_tail = no_rows.data();
  Tensor dq = empty_heads(q, a.n, a.q_heads, a.head_dim, false);
  a.dq = rows_of_own(dq, a.q_heads, a.head_dim, a.q.dtype);
  Partials partials{q, {}};
  cpu::attention_backward(a, threads(), partials.workspace());
  return dq;
}

std::tuple<Tensor, Tensor> cross_attention(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr,
                                           const Tensor& seg_indptr, const Tensor& seg_start, const Tensor& seg_len,
                                           const Optional& seg_offset, const Optional& inv_freq, double scale, bool causal,
                                           bool interleaved) {
  return attend(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved, false);
}

Tensor cross_attention_backward(const Tensor& d_o, const Optional& dlse, const Tensor& q, const Tensor& o, const Tensor& lse,
                                const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                                const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq,
                                double scale, bool causal, bool interleaved, const Tensor& dk_pool, const Tensor& dv_pool,
                                const Optional& grad_tail, bool want_dq) {
  const OnDevice on(q);
  const Device device = device_of(q);
  AttentionArgs a =
      attention_args(q, {k_pool, v_pool}, q_indptr, seg_indptr, seg_start, seg_len, seg_offset, inv_freq, scale, causal, interleaved);
  const Tensor grad = packed(d_o);
  Optional packed_dlse;
  if (dlse) {
    check_shape("dlse", *dlse, {a.n, a.q_heads});
    packed_dlse = packed(*dlse);
  }
  if (device.cuda) {
    check_dtype("k_pool", k_pool, q.scalar_type());
    check_dtype("do", d_o, q.scalar_type());
    check_dtype("o", o, q.scalar_type());
  }
  a.d_o = heads("do", grad, a.n, a.q_heads, a.head_dim, device).rows;
  a.dlse = floats("dlse", packed_dlse, {a.n, a.q_heads}, device);
  a.o = heads("o", o, a.n, a.q_heads, a.head_dim, device).rows;
  a.lse = const_cast<float*>(floats("lse", lse, {a.n, a.q_heads}, device));
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_shape("dk_pool", dk_pool, {a.pool_rows, a.kv_heads, a.head_dim});
  const Pools grads = pools("dk_pool", dk_pool, "dv_pool", dv_pool, a.kv_heads, a.head_dim, device);
  a.dk_pool = grads.k, a.dv_pool = grads.v;
  if (grad_tail) a.view.grad_tail = indices("grad_tail", *grad_tail, a.view.batch, device);
  Tensor dq = want_dq ? empty_heads(q, a.n, a.q_heads, a.head_dim, false) : empty(q, {0}, q.scalar_type());
  if (want_dq) a.dq = rows_of_own(dq, a.q_heads, a.head_dim, a.q.dtype);
#ifdef DIFFMAS_CUDA
  if (device.cuda) {
    run_on_cuda(a, q, true);
    return dq;
  }
#endif
  Partials partials{q, {}};
  cpu::attention_backward(a, threads(), partials.workspace());
  return dq;
}

}  // namespace diffmas::binding
