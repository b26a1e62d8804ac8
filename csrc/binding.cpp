// Every schema of the extension, its checks, and the way from tensors to raw pointers. LibTorch stable ABI: one binary for
// torch 2.10 and newer. Fake and autograd are registered in Python (diffmas/ops.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/inject.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;
namespace cpu = diffmas::cpu;

cpu::Threads threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

// Checks. The message names the argument, what is expected and what was given.

std::string shape_of(const Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

void check_cpu(const char* name, const Tensor& t) { STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got one on another device"); }

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  std::string expected = "[";
  bool same = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) {
    expected += (i ? ", " : "") + std::to_string(size);
    same = same && t.size(i) == size;
    ++i;
  }
  STD_TORCH_CHECK(same, name, ": expected shape ", expected, "], got ", shape_of(t));
}

cpu::DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return cpu::DType::f32;
    case ScalarType::BFloat16: return cpu::DType::bf16;
    case ScalarType::Half: return cpu::DType::f16;
    default: STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16 or float16, got ", torch::headeronly::toString(t.scalar_type()));
  }
  return cpu::DType::f32;
}

void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, name, ": expected dtype ", torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

// [rows, heads, D] with last stride 1.
cpu::Rows rows(const char* name, const Tensor& t) {
  check_cpu(name, t);
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions [rows, heads, D], got shape ", shape_of(t));
  const cpu::DType dtype = dtype_of(name, t);
  STD_TORCH_CHECK(t.stride(2) == 1 || t.size(2) <= 1 || t.numel() == 0, name, ": expected last stride 1, got ", t.stride(2));
  return {t.data_ptr(), t.stride(0), t.stride(1), dtype};
}

cpu::Rows rows(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t d) {
  check_shape(name, t, {n, heads, d});
  return rows(name, t);
}

void check_pool(const char* name, const Tensor& pool, const Tensor& like) {
  check_shape(name, pool, {like.size(0), like.size(1), like.size(2)});
  // Rows of different slots must not overlap in a pool that is written.
  STD_TORCH_CHECK(pool.size(0) <= 1 || pool.stride(0) != 0, name, ": expected rows that do not overlap, got stride 0");
  STD_TORCH_CHECK(pool.size(1) <= 1 || pool.stride(1) != 0, name, ": expected heads that do not overlap, got stride 0");
}

const int64_t* indices(const char* name, const Tensor& t, int64_t size) {
  check_cpu(name, t);
  check_dtype(name, t, ScalarType::Long);
  check_shape(name, t, {size});
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got stride ", t.stride(0));
  return static_cast<const int64_t*>(t.data_ptr());
}

const int64_t* indptr(const char* name, const Tensor& t, int64_t size, int64_t end) {
  STD_TORCH_CHECK(size >= 1, name, ": expected at least one element, got shape ", shape_of(t));
  const int64_t* p = indices(name, t, size);
  STD_TORCH_CHECK(p[0] == 0, name, ": expected 0 at the start, got ", p[0]);
  for (int64_t i = 1; i < size; ++i)
    STD_TORCH_CHECK(p[i] >= p[i - 1], name, ": expected non-decreasing values, got ", p[i - 1], " then ", p[i], " at ", i);
  STD_TORCH_CHECK(p[size - 1] == end, name, ": expected ", end, " at the end, got ", p[size - 1]);
  return p;
}

const float* floats(const char* name, const Optional& t, std::initializer_list<int64_t> shape) {
  if (!t) return nullptr;
  check_cpu(name, *t);
  check_dtype(name, *t, ScalarType::Float);
  check_shape(name, *t, shape);
  STD_TORCH_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
  return static_cast<const float*>(t->data_ptr());
}

// cos, sin [n, Dr] or a norm weight [D].
cpu::Table table(const char* name, const Optional& t, std::initializer_list<int64_t> shape) {
  if (!t) return {nullptr, 0, cpu::DType::f32};
  check_cpu(name, *t);
  check_shape(name, *t, shape);
  const cpu::DType dtype = dtype_of(name, *t);
  const int64_t last = t->dim() - 1;
  STD_TORCH_CHECK(t->stride(last) == 1 || t->size(last) <= 1 || t->numel() == 0, name, ": expected last stride 1, got ", t->stride(last));
  return {t->data_ptr(), last ? t->stride(0) : 0, dtype};
}

void check_heads(const Tensor& q, int64_t kv_heads, int64_t head_dim) {
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= cpu::kMaxHeadDim, "q: expected a head size from 1 to ", cpu::kMaxHeadDim, ", got ", head_dim);
  STD_TORCH_CHECK(kv_heads >= 1 && q.size(1) >= 1 && q.size(1) % kv_heads == 0, "q: expected a multiple of ", kv_heads,
                  " heads (the kv heads), got ", q.size(1));
}

const int64_t* check_slots(const Tensor& slots, int64_t n, int64_t pool_rows) {
  const int64_t* s = indices("slots", slots, n);
  bool increasing = true;
  int64_t previous = -1;
  for (int64_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(s[i] >= -1 && s[i] < pool_rows, "slots: expected values in [-1, ", pool_rows, "), got ", s[i], " at ", i);
    if (s[i] < 0) continue;
    increasing = increasing && s[i] > previous;
    previous = s[i];
  }
  if (!increasing) {
    std::vector<int64_t> sorted(s, s + n);
    std::sort(sorted.begin(), sorted.end());
    for (int64_t i = 1; i < n; ++i)
      STD_TORCH_CHECK(sorted[i] < 0 || sorted[i] != sorted[i - 1], "slots: expected every row once, got ", sorted[i], " twice");
  }
  return s;
}

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  return torch::stable::new_empty(like, torch::headeronly::IntHeaderOnlyArrayRef(shape.begin(), shape.size()), dtype);
}

cpu::InjectArgs inject_args(const Tensor& q, const Tensor& k, const Optional& cos, const Optional& sin, const Tensor& slots,
                            const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
                            const Tensor& v_pool, const char* k_pool_name, const char* v_pool_name) {
  cpu::InjectArgs a{};
  a.q = rows("q", q);
  a.n = q.size(0), a.q_heads = q.size(1), a.head_dim = q.size(2);
  STD_TORCH_CHECK(k.dim() == 3, "k: expected 3 dimensions [n, Hkv, D], got shape ", shape_of(k));
  a.kv_heads = k.size(1);
  a.k = rows("k", k, a.n, a.kv_heads, a.head_dim);
  check_dtype("k", k, q.scalar_type());
  check_heads(q, a.kv_heads, a.head_dim);
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither, got one");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 2, "cos: expected 2 dimensions [n, Dr], got shape ", shape_of(*cos));
    a.rotary_dim = cos->size(1);
    STD_TORCH_CHECK(a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim, "cos: expected an even rotary size up to ", a.head_dim, ", got ",
                    a.rotary_dim);
    a.cos = table("cos", cos, {a.n, a.rotary_dim});
    a.sin = table("sin", sin, {a.n, a.rotary_dim});
  }
  a.q_weight = table("q_weight", q_weight, {a.head_dim});
  a.k_weight = table("k_weight", k_weight, {a.head_dim});
  a.eps = float(eps);
  a.interleaved = interleaved;
  STD_TORCH_CHECK(k_pool.dim() == 3, k_pool_name, ": expected 3 dimensions [R, Hkv, D], got shape ", shape_of(k_pool));
  a.k_pool = rows(k_pool_name, k_pool, k_pool.size(0), a.kv_heads, a.head_dim);
  a.v_pool = rows(v_pool_name, v_pool, k_pool.size(0), a.kv_heads, a.head_dim);
  check_pool(k_pool_name, k_pool, k_pool);
  check_pool(v_pool_name, v_pool, k_pool);
  a.slots = check_slots(slots, a.n, k_pool.size(0));
  return a;
}

Tensor inject(Tensor q, Tensor k, Tensor v, Optional cos, Optional sin, Tensor slots, Optional q_weight, Optional k_weight, double eps,
              bool interleaved, Tensor k_pool, Tensor v_pool) {
  cpu::InjectArgs a = inject_args(q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, "k_pool", "v_pool");
  a.v = rows("v", v, a.n, a.kv_heads, a.head_dim);
  Tensor out = empty(q, {a.n, a.q_heads, a.head_dim}, q.scalar_type());
  a.q_out = rows("out", out);
  cpu::inject_forward(a, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(Tensor dq_rot, Tensor q, Tensor k, Optional cos, Optional sin,
                                                                   Tensor slots, Optional q_weight, Optional k_weight, double eps,
                                                                   bool interleaved, Tensor dk_pool, Tensor dv_pool) {
  cpu::InjectArgs a = inject_args(q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool, "dk_pool", "dv_pool");
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_dtype("dv_pool", dv_pool, ScalarType::Float);
  check_shape("dq_rot", dq_rot, {a.n, a.q_heads, a.head_dim});
  dq_rot = torch::stable::contiguous(dq_rot);  // autograd may hand over an expanded tensor
  a.dq_rot = rows("dq_rot", dq_rot);
  Tensor dq = empty(q, {a.n, a.q_heads, a.head_dim}, q.scalar_type());
  Tensor dk = empty(q, {a.n, a.kv_heads, a.head_dim}, q.scalar_type());
  Tensor dv = empty(q, {a.n, a.kv_heads, a.head_dim}, q.scalar_type());
  Tensor dq_weight = empty(q, {q_weight ? a.head_dim : 0}, ScalarType::Float);
  Tensor dk_weight = empty(q, {k_weight ? a.head_dim : 0}, ScalarType::Float);
  a.q_out = rows("dq", dq), a.dk = rows("dk", dk), a.dv = rows("dv", dv);
  cpu::inject_backward(a, q_weight ? static_cast<float*>(dq_weight.data_ptr()) : nullptr,
                       k_weight ? static_cast<float*>(dk_weight.data_ptr()) : nullptr, threads());
  return {dq, dk, dv, dq_weight, dk_weight};
}

struct AttentionCall {
  cpu::AttentionArgs args{};
  cpu::Segments segments{};

  AttentionCall(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_shift, const Optional& inv_freq, double scale,
                bool causal, bool interleaved) {
    args.q = rows("q", q);
    args.q_heads = q.size(1), args.head_dim = q.size(2);
    STD_TORCH_CHECK(k_pool.dim() == 3, "k_pool: expected 3 dimensions [R, Hkv, D], got shape ", shape_of(k_pool));
    const int64_t pool_rows = k_pool.size(0);
    args.kv_heads = k_pool.size(1);
    args.k_pool = rows("k_pool", k_pool, pool_rows, args.kv_heads, args.head_dim);
    args.v_pool = rows("v_pool", v_pool, pool_rows, args.kv_heads, args.head_dim);
    check_heads(q, args.kv_heads, args.head_dim);
    args.scale = float(scale);
    args.interleaved = interleaved;

    STD_TORCH_CHECK(q_indptr.dim() == 1 && seg_indptr.dim() == 1, "q_indptr, seg_indptr: expected 1 dimension, got shapes ",
                    shape_of(q_indptr), ", ", shape_of(seg_indptr));
    STD_TORCH_CHECK(seg_start.dim() == 1, "seg_start: expected 1 dimension, got shape ", shape_of(seg_start));
    const int64_t batch = q_indptr.size(0) - 1, count = seg_start.size(0);
    segments.batch = batch;
    segments.q_indptr = indptr("q_indptr", q_indptr, batch + 1, q.size(0));
    segments.seg_indptr = indptr("seg_indptr", seg_indptr, batch + 1, count);
    segments.start = args.seg_start = indices("seg_start", seg_start, count);
    segments.length = args.seg_length = indices("seg_len", seg_len, count);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t start = segments.start[i], length = segments.length[i];
      STD_TORCH_CHECK(length >= 0, "seg_len: expected lengths >= 0, got ", length, " at ", i);
      STD_TORCH_CHECK(start >= 0 && start <= pool_rows && length <= pool_rows - start, "seg_start, seg_len: expected rows inside the pool's ",
                      pool_rows, ", got ", start, " + ", length, " at ", i);
    }
    if (seg_shift) segments.shift = indices("seg_shift", *seg_shift, count);
    if (inv_freq) {
      STD_TORCH_CHECK(inv_freq->dim() == 1 && 2 * inv_freq->size(0) <= args.head_dim, "inv_freq: expected up to ", args.head_dim / 2,
                      " frequencies, got shape ", shape_of(*inv_freq));
      segments.inv_freq = floats("inv_freq", inv_freq, {inv_freq->size(0)});
      segments.half_rotary = args.half_rotary = inv_freq->size(0);
    }
    segments.causal = causal;
  }
};

std::tuple<Tensor, Tensor> cross_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor q_indptr, Tensor seg_indptr, Tensor seg_start,
                                           Tensor seg_len, Optional seg_shift, Optional inv_freq, double scale, bool causal,
                                           bool interleaved) {
  AttentionCall call(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale, causal, interleaved);
  Tensor o = empty(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  call.args.o = rows("o", o);
  call.args.lse = static_cast<float*>(lse.data_ptr());
  cpu::attention_forward(call.args, call.segments, threads());
  return {o, lse};
}

Tensor cross_attention_backward(Tensor d_o, Optional dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, Tensor v_pool, Tensor q_indptr,
                                Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Optional seg_shift, Optional inv_freq, double scale,
                                bool causal, bool interleaved, Tensor dk_pool, Tensor dv_pool, Optional newest, bool want_dq) {
  AttentionCall call(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale, causal, interleaved);
  cpu::AttentionArgs& a = call.args;
  const int64_t n = q.size(0);
  check_shape("do_", d_o, {n, a.q_heads, a.head_dim});
  d_o = torch::stable::contiguous(d_o);  // autograd may hand over an expanded tensor
  if (dlse) {
    check_shape("dlse", *dlse, {n, a.q_heads});
    dlse = torch::stable::contiguous(*dlse);
  }
  a.d_o = rows("do_", d_o);
  a.dlse = floats("dlse", dlse, {n, a.q_heads});
  a.o = rows("o", o, n, a.q_heads, a.head_dim);
  a.lse = const_cast<float*>(floats("lse", lse, {n, a.q_heads}));
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_dtype("dv_pool", dv_pool, ScalarType::Float);
  check_pool("dk_pool", dk_pool, k_pool);
  check_pool("dv_pool", dv_pool, k_pool);
  a.dk_pool = rows("dk_pool", dk_pool);
  a.dv_pool = rows("dv_pool", dv_pool);
  if (newest) {
    call.segments.newest = indices("newest", *newest, call.segments.batch);
    for (int64_t b = 0; b < call.segments.batch; ++b)
      STD_TORCH_CHECK(call.segments.newest[b] >= 0, "newest: expected counts >= 0, got ", call.segments.newest[b], " at ", b);
  }
  Tensor dq = want_dq ? empty(q, {n, a.q_heads, a.head_dim}, q.scalar_type()) : empty(q, {0}, q.scalar_type());
  if (want_dq) a.dq = rows("dq", dq);
  cpu::attention_backward(a, call.segments, threads());
  return dq;
}

}  // namespace

STABLE_TORCH_LIBRARY(diffmas_cpu, m) {
  m.def(
      "inject(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, float eps, "
      "bool interleaved, Tensor(a!) k_pool, Tensor(b!) v_pool) -> Tensor");
  m.def(
      "inject_backward(Tensor dq_rot, Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, "
      "float eps, bool interleaved, Tensor(a!) dk_pool, Tensor(b!) dv_pool) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, "
      "Tensor dk_weight)");
  m.def(
      "cross_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor q_indptr, Tensor seg_indptr, Tensor seg_start, Tensor seg_len, "
      "Tensor? seg_shift, Tensor? inv_freq, float scale, bool causal, bool interleaved) -> (Tensor o, Tensor lse)");
  m.def(
      "cross_attention_backward(Tensor do_, Tensor? dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, Tensor v_pool, Tensor q_indptr, "
      "Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Tensor? seg_shift, Tensor? inv_freq, float scale, bool causal, "
      "bool interleaved, Tensor(a!) dk_pool, Tensor(b!) dv_pool, Tensor? newest=None, bool want_dq=True) -> Tensor dq");
}

STABLE_TORCH_LIBRARY_IMPL(diffmas_cpu, CPU, m) {
  m.impl("inject", TORCH_BOX(&inject));
  m.impl("inject_backward", TORCH_BOX(&inject_backward));
  m.impl("cross_attention", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_attention_backward));
}
