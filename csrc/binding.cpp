// Every schema of the extension, its checks, and the way from tensors to raw pointers. LibTorch stable ABI: one binary for
// torch 2.10 and newer. Fake and autograd are registered in Python (diffmas/ops.py).
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>
#include <tuple>
#include <vector>

#include "cpu/attention.h"
#include "cpu/inject.h"
#include "cpu/states.h"
#ifdef DIFFMAS_CUDA
#include <dlfcn.h>

#include "cuda/attention.h"
#include "cuda/inject.h"
#endif

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

std::string list(const int64_t* sizes, int64_t count) {
  std::string s = "[";
  for (int64_t i = 0; i < count; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

std::string shape_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return list(sizes.data(), t.dim());
}

// Where all tensors of a call are.
struct Where {
  bool cuda;
  int32_t index;
};
constexpr Where kCpu{false, 0};

Where where_of(const Tensor& t) { return {t.is_cuda(), t.is_cuda() ? int32_t(t.get_device_index()) : 0}; }

void check_device(const char* name, const Tensor& t, Where where) {
  if (where.cuda) {
    STD_TORCH_CHECK(t.is_cuda() && int32_t(t.get_device_index()) == where.index, name, ": expected a tensor on CUDA device ", where.index,
                    ", got one on another device");
  } else {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && t.size(i++) == size;
  STD_TORCH_CHECK(same, name, ": expected shape ", list(shape.begin(), int64_t(shape.size())), ", got ", shape_of(t));
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
cpu::Rows rows(const char* name, const Tensor& t, Where where = kCpu) {
  check_device(name, t, where);
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions [rows, heads, D], got shape ", shape_of(t));
  const cpu::DType dtype = dtype_of(name, t);
  STD_TORCH_CHECK(t.stride(2) == 1 || t.size(2) <= 1 || t.numel() == 0, name, ": expected last stride 1, got ", t.stride(2));
  return {t.data_ptr(), t.stride(0), t.stride(1), dtype};
}

cpu::Rows rows(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t d, Where where = kCpu) {
  check_shape(name, t, {n, heads, d});
  return rows(name, t, where);
}

// Where a [rows, heads, D] tensor lies: its dimensions beside D with the wider stride first.
struct Box {
  const char* begin;
  int64_t outer, outer_stride, inner, inner_stride, d, element;

  Box(const Tensor& t, const cpu::Rows& r)
      : begin(static_cast<const char*>(r.data)), outer(t.size(0)), outer_stride(r.stride_row), inner(t.size(1)), inner_stride(r.stride_head),
        d(t.size(2)), element(r.dtype == cpu::DType::f32 ? 4 : 2) {
    if (inner_stride > outer_stride) std::swap(outer, inner), std::swap(outer_stride, inner_stride);
  }
  // Of [rows, D] or [D].
  Box(const Tensor& t, const cpu::Table& table)
      : begin(static_cast<const char*>(table.data)), outer(t.dim() > 1 ? t.size(0) : 1), outer_stride(table.stride), inner(1),
        inner_stride(0), d(t.size(t.dim() - 1)), element(table.dtype == cpu::DType::f32 ? 4 : 2) {}

  bool empty() const { return outer == 0 || inner == 0 || d == 0; }
  int64_t inner_extent() const { return (inner - 1) * inner_stride + d; }
  const char* end() const { return begin + ((outer - 1) * outer_stride + inner_extent()) * element; }
  bool overlaps_itself() const { return (inner > 1 && inner_stride < d) || (outer > 1 && outer_stride < inner_extent()); }
};

// Whether two boxes share an element; `a` does not overlap itself. Exact for two of one shape and layout (K and V interleaved in
// one allocation); a box of another layout inside the other's range counts as shared.
bool overlap(const Box& a, const Box& b) {
  if (a.empty() || b.empty() || a.begin >= b.end() || b.begin >= a.end()) return false;
  const int64_t bytes = b.begin - a.begin;
  if (a.outer_stride != b.outer_stride || a.inner_stride != b.inner_stride || a.element != b.element || bytes % a.element) return true;
  const int64_t delta = bytes / a.element;
  const auto steps = [](int64_t distance, int64_t stride, int64_t count, const auto& visit) {
    if (count <= 1 || stride == 0) return visit(distance);
    for (int64_t step = distance / stride - 1; step <= distance / stride + 1; ++step)
      if (std::abs(step) < count && visit(distance - step * stride)) return true;
    return false;
  };
  return steps(delta, a.outer_stride, std::max(a.outer, b.outer), [&](int64_t rest) {
    return steps(rest, a.inner_stride, std::max(a.inner, b.inner), [&](int64_t x) { return std::abs(x) < std::max(a.d, b.d); });
  });
}

// The two pools that a call writes. No element of theirs may be written twice, or be read under another name.
struct WrittenPools {
  const char *k_name, *v_name;
  Box k, v;

  WrittenPools(const char* k_name, const Tensor& k_pool, const cpu::Rows& k_rows, const char* v_name, const Tensor& v_pool,
               const cpu::Rows& v_rows)
      : k_name(k_name), v_name(v_name), k(k_pool, k_rows), v(v_pool, v_rows) {
    check_single(k_name, k);
    check_single(v_name, v);
    check_apart(k_name, k, v_name, v);
  }

  void check_apart_from(const char* name, const Tensor& t, const cpu::Rows& rows) const { check_apart_from(name, Box(t, rows)); }
  void check_apart_from(const char* name, const Optional& t, const cpu::Table& table) const {
    if (t) check_apart_from(name, Box(*t, table));
  }

 private:
  void check_apart_from(const char* name, const Box& box) const {
    check_apart(k_name, k, name, box);
    check_apart(v_name, v, name, box);
  }
  static void check_single(const char* name, const Box& box) {
    STD_TORCH_CHECK(!box.overlaps_itself(), name, ": expected rows and heads that do not overlap, got strides ", box.outer_stride, ", ",
                    box.inner_stride);
  }
  static void check_apart(const char* name, const Box& written, const char* other_name, const Box& other) {
    STD_TORCH_CHECK(!overlap(written, other), name, ": expected memory of its own, got a tensor that overlaps ", other_name);
  }
};

const int64_t* indices(const char* name, const Tensor& t, int64_t size, Where where = kCpu) {
  check_device(name, t, where);
  check_dtype(name, t, ScalarType::Long);
  check_shape(name, t, {size});
  STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor, got stride ", t.stride(0));
  return static_cast<const int64_t*>(t.data_ptr());
}

const int64_t* indptr(const char* name, const Tensor& t, int64_t size, int64_t end, Where where) {
  STD_TORCH_CHECK(size >= 1, name, ": expected at least one element, got shape ", shape_of(t));
  const int64_t* p = indices(name, t, size, where);
  if (where.cuda) {  // looking at its values would wait for the device
    STD_TORCH_CHECK(size > 1 || end == 0, name, ": expected 0 and ", end, ", got one element");
    return p;
  }
  STD_TORCH_CHECK(p[0] == 0, name, ": expected 0 at the start, got ", p[0]);
  for (int64_t i = 1; i < size; ++i)
    STD_TORCH_CHECK(p[i] >= p[i - 1], name, ": expected non-decreasing values, got ", p[i - 1], " then ", p[i], " at ", i);
  STD_TORCH_CHECK(p[size - 1] == end, name, ": expected ", end, " at the end, got ", p[size - 1]);
  return p;
}

const float* floats(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Where where = kCpu) {
  if (!t) return nullptr;
  check_device(name, *t, where);
  check_dtype(name, *t, ScalarType::Float);
  check_shape(name, *t, shape);
  STD_TORCH_CHECK(t->is_contiguous(), name, ": expected a contiguous tensor");
  return static_cast<const float*>(t->data_ptr());
}

// cos, sin [n, Dr] or a norm weight [D].
cpu::Table table(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Where where) {
  if (!t) return {nullptr, 0, cpu::DType::f32};
  check_device(name, *t, where);
  check_shape(name, *t, shape);
  const cpu::DType dtype = dtype_of(name, *t);
  const int64_t last = t->dim() - 1;
  STD_TORCH_CHECK(t->stride(last) == 1 || t->size(last) <= 1 || t->numel() == 0, name, ": expected last stride 1, got ", t->stride(last));
  return {t->data_ptr(), last ? t->stride(0) : 0, dtype};
}

const float* frequencies(const Tensor& t, int64_t head_dim, Where where = kCpu) {
  STD_TORCH_CHECK(t.dim() == 1 && 2 * t.size(0) <= head_dim, "inv_freq: expected up to ", head_dim / 2, " frequencies, got shape ", shape_of(t));
  return floats("inv_freq", t, {t.size(0)}, where);
}

void check_head_dim(const char* name, int64_t head_dim) {
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= cpu::kMaxHeadDim, name, ": expected a head size from 1 to ", cpu::kMaxHeadDim, ", got ", head_dim);
}

void check_heads(const Tensor& q, const char* kv_name, int64_t kv_heads, int64_t head_dim) {
  check_head_dim("q", head_dim);
  STD_TORCH_CHECK(q.size(1) >= 1, "q: expected at least one head, got shape ", shape_of(q));
  STD_TORCH_CHECK(kv_heads >= 1 && q.size(1) % kv_heads == 0, kv_name, ": expected a number of heads that divides ", q.size(1), ", got ",
                  kv_heads);
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

// Partial results of the attention kernels, in a tensor.
struct Partials {
  const Tensor& like;
  std::optional<Tensor> held;

  cpu::Workspace workspace() {
    return {this, [](void* context, int64_t floats) {
              Partials& self = *static_cast<Partials*>(context);
              self.held = empty(self.like, {floats}, ScalarType::Float);
              return static_cast<float*>(self.held->data_ptr());
            }};
  }
};

#ifdef DIFFMAS_CUDA
void check_cuda(int error) { STD_TORCH_CHECK(error == 0, "CUDA: ", diffmas_cuda_error(error)); }

std::tuple<int64_t, int64_t> cuda_versions() {
  int driver = 0, runtime = 0;
  check_cuda(diffmas_cuda_versions(&driver, &runtime));
  return {driver, runtime};
}

// torch's own; the function lives in libtorch_cuda, which a CPU build of torch does not have.
void* current_stream(Where where) {
  using Get = int32_t (*)(int32_t device, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library ? reinterpret_cast<Get>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get && get(where.index, &stream) == 0, "CUDA: torch has no current stream for device ", where.index);
  return stream;
}
#endif

// Allocations, copies and launches go to the tensor's GPU, whichever is current.
struct OnDevice {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const Tensor& t) {
    if (t.is_cuda()) guard.emplace(int32_t(t.get_device_index()));
  }
};

cpu::InjectArgs inject_args(const Tensor& q, const Tensor& k, const Optional& cos, const Optional& sin, const Tensor& slots,
                            const Optional& q_weight, const Optional& k_weight, double eps, bool interleaved, const Tensor& k_pool,
                            const Tensor& v_pool, const char* k_pool_name, const char* v_pool_name) {
  const Where where = where_of(q);
  cpu::InjectArgs a{};
  a.q = rows("q", q, where);
  a.n = q.size(0), a.q_heads = q.size(1), a.head_dim = q.size(2);
  STD_TORCH_CHECK(k.dim() == 3, "k: expected 3 dimensions [n, Hkv, D], got shape ", shape_of(k));
  a.kv_heads = k.size(1);
  a.k = rows("k", k, a.n, a.kv_heads, a.head_dim, where);
  check_dtype("k", k, q.scalar_type());
  STD_TORCH_CHECK(std::isfinite(float(eps)) && eps >= 0, "eps: expected a finite float32 >= 0, got ", eps);
  check_heads(q, "k", a.kv_heads, a.head_dim);
  STD_TORCH_CHECK(!where.cuda || a.n * a.q_heads < INT32_MAX, "q: expected fewer than 2^31 rows of heads, got shape ", shape_of(q));
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), "cos, sin: expected both or neither, got one");
  if (cos) {
    STD_TORCH_CHECK(cos->dim() == 2, "cos: expected 2 dimensions [n, Dr], got shape ", shape_of(*cos));
    a.rotary_dim = cos->size(1);
    STD_TORCH_CHECK(a.rotary_dim % 2 == 0 && a.rotary_dim <= a.head_dim, "cos: expected an even rotary size up to ", a.head_dim, ", got ",
                    a.rotary_dim);
    a.cos = table("cos", cos, {a.n, a.rotary_dim}, where);
    a.sin = table("sin", sin, {a.n, a.rotary_dim}, where);
  }
  a.q_weight = table("q_weight", q_weight, {a.head_dim}, where);
  a.k_weight = table("k_weight", k_weight, {a.head_dim}, where);
  a.eps = float(eps);
  a.interleaved = interleaved;
  STD_TORCH_CHECK(k_pool.dim() == 3, k_pool_name, ": expected 3 dimensions [R, Hkv, D], got shape ", shape_of(k_pool));
  a.k_pool = rows(k_pool_name, k_pool, k_pool.size(0), a.kv_heads, a.head_dim, where);
  a.v_pool = rows(v_pool_name, v_pool, k_pool.size(0), a.kv_heads, a.head_dim, where);
  check_dtype(v_pool_name, v_pool, k_pool.scalar_type());
  // Looking at slots on a GPU would wait for it.
  a.slots = where.cuda ? indices("slots", slots, a.n, where) : check_slots(slots, a.n, k_pool.size(0));
  return a;
}

WrittenPools inject_pools(const cpu::InjectArgs& a, const Tensor& q, const Tensor& k, const Optional& cos, const Optional& sin,
                          const Optional& q_weight, const Optional& k_weight, const Tensor& k_pool, const Tensor& v_pool,
                          const char* k_pool_name, const char* v_pool_name) {
  const WrittenPools pools(k_pool_name, k_pool, a.k_pool, v_pool_name, v_pool, a.v_pool);
  pools.check_apart_from("q", q, a.q);
  pools.check_apart_from("k", k, a.k);
  pools.check_apart_from("cos", cos, a.cos);
  pools.check_apart_from("sin", sin, a.sin);
  pools.check_apart_from("q_weight", q_weight, a.q_weight);
  pools.check_apart_from("k_weight", k_weight, a.k_weight);
  return pools;
}

Tensor inject(Tensor q, Tensor k, Tensor v, Optional cos, Optional sin, Tensor slots, Optional q_weight, Optional k_weight, double eps,
              bool interleaved, Tensor k_pool, Tensor v_pool) {
  const OnDevice on(q);
  cpu::InjectArgs a = inject_args(q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, k_pool, v_pool, "k_pool", "v_pool");
  a.v = rows("v", v, a.n, a.kv_heads, a.head_dim, where_of(q));
  check_dtype("v", v, q.scalar_type());
  inject_pools(a, q, k, cos, sin, q_weight, k_weight, k_pool, v_pool, "k_pool", "v_pool").check_apart_from("v", v, a.v);
  Tensor out = empty(q, {a.n, a.q_heads, a.head_dim}, q.scalar_type());
  a.q_out = rows("out", out, where_of(q));
#ifdef DIFFMAS_CUDA
  if (const Where where = where_of(q); where.cuda) {
    check_cuda(diffmas_cuda_inject_forward(&a, where.index, current_stream(where)));
    return out;
  }
#endif
  cpu::inject_forward(a, threads());
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> inject_backward(Tensor dq_rot, Tensor q, Tensor k, Optional cos, Optional sin,
                                                                   Tensor slots, Optional q_weight, Optional k_weight, double eps,
                                                                   bool interleaved, Tensor dk_pool, Tensor dv_pool) {
  const OnDevice on(q);
  cpu::InjectArgs a = inject_args(q, k, cos, sin, slots, q_weight, k_weight, eps, interleaved, dk_pool, dv_pool, "dk_pool", "dv_pool");
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_dtype("dv_pool", dv_pool, ScalarType::Float);
  check_shape("dq_rot", dq_rot, {a.n, a.q_heads, a.head_dim});
  dq_rot = torch::stable::contiguous(dq_rot);  // autograd may hand over an expanded tensor
  a.dq_rot = rows("dq_rot", dq_rot, where_of(q));
  inject_pools(a, q, k, cos, sin, q_weight, k_weight, dk_pool, dv_pool, "dk_pool", "dv_pool").check_apart_from("dq_rot", dq_rot, a.dq_rot);
  Tensor dq = empty(q, {a.n, a.q_heads, a.head_dim}, q.scalar_type());
  Tensor dk = empty(q, {a.n, a.kv_heads, a.head_dim}, q.scalar_type());
  Tensor dv = empty(q, {a.n, a.kv_heads, a.head_dim}, q.scalar_type());
  Tensor dq_weight = empty(q, {q_weight ? a.head_dim : 0}, ScalarType::Float);
  Tensor dk_weight = empty(q, {k_weight ? a.head_dim : 0}, ScalarType::Float);
  const Where where = where_of(q);
  a.q_out = rows("dq", dq, where), a.dk = rows("dk", dk, where), a.dv = rows("dv", dv, where);
  float* const dqw = q_weight ? static_cast<float*>(dq_weight.data_ptr()) : nullptr;
  float* const dkw = k_weight ? static_cast<float*>(dk_weight.data_ptr()) : nullptr;
#ifdef DIFFMAS_CUDA
  if (where.cuda) {
    Tensor partials = empty(q, {diffmas_cuda_inject_partials(&a, where.index)}, ScalarType::Float);
    a.weight_partials = static_cast<float*>(partials.data_ptr());
    check_cuda(diffmas_cuda_inject_backward(&a, dqw, dkw, where.index, current_stream(where)));
    return {dq, dk, dv, dq_weight, dk_weight};
  }
#endif
  cpu::inject_backward(a, dqw, dkw, threads());
  return {dq, dk, dv, dq_weight, dk_weight};
}

struct AttentionCall {
  cpu::AttentionArgs args{};
  cpu::Segments segments{};

  AttentionCall(const Tensor& q, const Tensor& k_pool, const Tensor& v_pool, const Tensor& q_indptr, const Tensor& seg_indptr,
                const Tensor& seg_start, const Tensor& seg_len, const Optional& seg_shift, const Optional& inv_freq, double scale,
                bool causal, bool interleaved) {
    const Where where = where_of(q);
    args.q = rows("q", q, where);
    args.q_heads = q.size(1), args.head_dim = q.size(2);
    STD_TORCH_CHECK(k_pool.dim() == 3, "k_pool: expected 3 dimensions [R, Hkv, D], got shape ", shape_of(k_pool));
    const int64_t pool_rows = k_pool.size(0);
    args.kv_heads = k_pool.size(1);
    args.k_pool = rows("k_pool", k_pool, pool_rows, args.kv_heads, args.head_dim, where);
    args.v_pool = rows("v_pool", v_pool, pool_rows, args.kv_heads, args.head_dim, where);
    check_dtype("v_pool", v_pool, k_pool.scalar_type());
    check_heads(q, "k_pool", args.kv_heads, args.head_dim);
    STD_TORCH_CHECK(std::isfinite(float(scale)), "scale: expected a finite float32, got ", scale);
    args.scale = float(scale);
    args.interleaved = interleaved;

    STD_TORCH_CHECK(q_indptr.dim() == 1 && seg_indptr.dim() == 1, "q_indptr, seg_indptr: expected 1 dimension, got shapes ",
                    shape_of(q_indptr), ", ", shape_of(seg_indptr));
    STD_TORCH_CHECK(seg_start.dim() == 1, "seg_start: expected 1 dimension, got shape ", shape_of(seg_start));
    const int64_t batch = q_indptr.size(0) - 1, count = seg_start.size(0);
    segments.batch = batch;
    segments.q_indptr = indptr("q_indptr", q_indptr, batch + 1, q.size(0), where);
    segments.seg_indptr = indptr("seg_indptr", seg_indptr, batch + 1, count, where);
    segments.start = args.seg_start = indices("seg_start", seg_start, count, where);
    segments.length = args.seg_length = indices("seg_len", seg_len, count, where);
    if (!where.cuda) check_segments(pool_rows);
    STD_TORCH_CHECK(!seg_shift || inv_freq, "inv_freq: expected the frequencies that seg_shift needs, got none");
    if (seg_shift) segments.shift = indices("seg_shift", *seg_shift, count, where);
    if (inv_freq) {
      segments.inv_freq = frequencies(*inv_freq, args.head_dim, where);
      segments.half_rotary = args.half_rotary = inv_freq->size(0);
    }
    segments.causal = causal;
  }

  void check_segments(int64_t pool_rows) const {
    for (int64_t i = 0; i < segments.seg_indptr[segments.batch]; ++i) {
      const int64_t start = segments.start[i], length = segments.length[i];
      STD_TORCH_CHECK(length >= 1, "seg_len: expected lengths >= 1, got ", length, " at ", i);
      STD_TORCH_CHECK(start >= 0 && start <= pool_rows && length <= pool_rows - start, "seg_start, seg_len: expected rows inside the pool's ",
                      pool_rows, ", got ", start, " + ", length, " at ", i);
    }
    for (int64_t b = 0; b < segments.batch; ++b) check_disjoint(segments.seg_indptr[b], segments.seg_indptr[b + 1]);
  }

  // A row that a sequence read twice would get its gradient from two places at once.
  void check_disjoint(int64_t first, int64_t last) const {
    const int64_t *start = segments.start, *length = segments.length;
    bool rising = true;
    for (int64_t i = first + 1; i < last; ++i) rising = rising && start[i] >= start[i - 1] + length[i - 1];
    if (rising) return;
    std::vector<int64_t> order;
    for (int64_t i = first; i < last; ++i) order.push_back(i);
    std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return start[a] < start[b]; });
    for (size_t i = 1; i < order.size(); ++i) {
      const int64_t a = order[i - 1], b = order[i];
      STD_TORCH_CHECK(start[b] >= start[a] + length[a], "seg_start: expected disjoint segments within a sequence, got rows ", start[b],
                      " and on in segments ", a, " and ", b);
    }
  }
};

#ifdef DIFFMAS_CUDA
void attention_on_cuda(const AttentionCall& call, const Tensor& q, const Tensor& k_pool, const Tensor& seg_start, bool backward) {
  const cpu::AttentionArgs& c = call.args;
  check_dtype("k_pool", k_pool, q.scalar_type());
  STD_TORCH_CHECK(c.head_dim <= diffmas::cuda::kMaxAttentionDim, "q: expected a head size up to ", diffmas::cuda::kMaxAttentionDim, ", got ",
                  c.head_dim);
  STD_TORCH_CHECK(q.size(0) * c.q_heads < INT32_MAX, "q: expected fewer than 2^31 rows of heads, got shape ", shape_of(q));
  STD_TORCH_CHECK(k_pool.size(0) < INT32_MAX, "k_pool: expected fewer than 2^31 rows, got shape ", shape_of(k_pool));
  diffmas::cuda::AttentionArgs a{q.size(0), c.q_heads, c.kv_heads, c.head_dim, k_pool.size(0), seg_start.size(0), call.segments};
  a.q = c.q, a.k_pool = c.k_pool, a.v_pool = c.v_pool, a.o = c.o, a.lse = c.lse, a.scale = c.scale, a.interleaved = c.interleaved;
  a.d_o = c.d_o, a.dlse = c.dlse, a.dq = c.dq, a.dk_pool = c.dk_pool, a.dv_pool = c.dv_pool;
  const Where where = where_of(q);
  const diffmas::cuda::AttentionMemory memory = diffmas_cuda_attention_memory(&a, backward, where.index);
  Tensor workspace = empty(q, {memory.floats}, ScalarType::Float), counters = empty(q, {memory.counters}, ScalarType::Int);
  if (memory.counters) torch::stable::zero_(counters);
  a.workspace = static_cast<float*>(workspace.data_ptr()), a.counters = static_cast<unsigned*>(counters.data_ptr());
  const auto run = backward ? diffmas_cuda_attention_backward : diffmas_cuda_attention_forward;
  check_cuda(run(&a, where.index, current_stream(where)));
}
#endif

std::tuple<Tensor, Tensor> cross_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor q_indptr, Tensor seg_indptr, Tensor seg_start,
                                           Tensor seg_len, Optional seg_shift, Optional inv_freq, double scale, bool causal,
                                           bool interleaved) {
  const OnDevice on(q);
  AttentionCall call(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale, causal, interleaved);
  Tensor o = empty(q, {q.size(0), q.size(1), q.size(2)}, q.scalar_type());
  Tensor lse = empty(q, {q.size(0), q.size(1)}, ScalarType::Float);
  call.args.o = rows("o", o, where_of(q));
  call.args.lse = static_cast<float*>(lse.data_ptr());
#ifdef DIFFMAS_CUDA
  if (q.is_cuda()) {
    attention_on_cuda(call, q, k_pool, seg_start, false);
    return {o, lse};
  }
#endif
  Partials partials{q, {}};
  cpu::attention_forward(call.args, call.segments, threads(), partials.workspace());
  return {o, lse};
}

Tensor cross_attention_backward(Tensor d_o, Optional dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, Tensor v_pool, Tensor q_indptr,
                                Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Optional seg_shift, Optional inv_freq, double scale,
                                bool causal, bool interleaved, Tensor dk_pool, Tensor dv_pool, Optional newest, bool want_dq) {
  const OnDevice on(q);
  const Where where = where_of(q);
  AttentionCall call(q, k_pool, v_pool, q_indptr, seg_indptr, seg_start, seg_len, seg_shift, inv_freq, scale, causal, interleaved);
  cpu::AttentionArgs& a = call.args;
  const int64_t n = q.size(0);
  check_shape("do_", d_o, {n, a.q_heads, a.head_dim});
  d_o = torch::stable::contiguous(d_o);  // autograd may hand over an expanded tensor
  if (dlse) {
    check_shape("dlse", *dlse, {n, a.q_heads});
    dlse = torch::stable::contiguous(*dlse);
  }
  if (where.cuda) {
    check_dtype("do_", d_o, q.scalar_type());
    check_dtype("o", o, q.scalar_type());
  }
  a.d_o = rows("do_", d_o, where);
  a.dlse = floats("dlse", dlse, {n, a.q_heads}, where);
  a.o = rows("o", o, n, a.q_heads, a.head_dim, where);
  a.lse = const_cast<float*>(floats("lse", lse, {n, a.q_heads}, where));
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  check_dtype("dv_pool", dv_pool, ScalarType::Float);
  a.dk_pool = rows("dk_pool", dk_pool, k_pool.size(0), a.kv_heads, a.head_dim, where);
  a.dv_pool = rows("dv_pool", dv_pool, k_pool.size(0), a.kv_heads, a.head_dim, where);
  const WrittenPools pools("dk_pool", dk_pool, a.dk_pool, "dv_pool", dv_pool, a.dv_pool);
  pools.check_apart_from("k_pool", k_pool, a.k_pool);
  pools.check_apart_from("v_pool", v_pool, a.v_pool);
  pools.check_apart_from("q", q, a.q);
  pools.check_apart_from("o", o, a.o);
  pools.check_apart_from("do_", d_o, a.d_o);
  if (newest) {
    call.segments.newest = indices("newest", *newest, call.segments.batch, where);
    for (int64_t b = 0; !where.cuda && b < call.segments.batch; ++b)
      STD_TORCH_CHECK(call.segments.newest[b] >= 0, "newest: expected counts >= 0, got ", call.segments.newest[b], " at ", b);
  }
  Tensor dq = want_dq ? empty(q, {n, a.q_heads, a.head_dim}, q.scalar_type()) : empty(q, {0}, q.scalar_type());
  if (want_dq) a.dq = rows("dq", dq, where);
#ifdef DIFFMAS_CUDA
  if (where.cuda) {
    attention_on_cuda(call, q, k_pool, seg_start, true);
    return dq;
  }
#endif
  Partials partials{q, {}};
  cpu::attention_backward(a, call.segments, threads(), partials.workspace());
  return dq;
}

cpu::MergeArgs merge_args(const Tensor& o_a, const Tensor& lse_a, const Tensor& o_b, const Tensor& lse_b) {
  cpu::MergeArgs a{};
  a.o_a = rows("o_a", o_a);
  a.n = o_a.size(0), a.heads = o_a.size(1), a.head_dim = o_a.size(2);
  check_head_dim("o_a", a.head_dim);
  a.o_b = rows("o_b", o_b, a.n, a.heads, a.head_dim);
  a.lse_a = floats("lse_a", lse_a, {a.n, a.heads});
  a.lse_b = floats("lse_b", lse_b, {a.n, a.heads});
  return a;
}

std::tuple<Tensor, Tensor> merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) {
  lse_a = torch::stable::contiguous(lse_a), lse_b = torch::stable::contiguous(lse_b);
  cpu::MergeArgs a = merge_args(o_a, lse_a, o_b, lse_b);
  Tensor o = empty(o_a, {a.n, a.heads, a.head_dim}, o_a.scalar_type());
  Tensor lse = empty(o_a, {a.n, a.heads}, ScalarType::Float);
  a.o = rows("o", o);
  a.lse = static_cast<float*>(lse.data_ptr());
  cpu::merge_states(a, threads());
  return {o, lse};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> merge_states_backward(Tensor d_o, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b,
                                                                 Tensor o, Tensor lse) {
  lse_a = torch::stable::contiguous(lse_a), lse_b = torch::stable::contiguous(lse_b);
  cpu::MergeArgs a = merge_args(o_a, lse_a, o_b, lse_b);
  check_shape("do_", d_o, {a.n, a.heads, a.head_dim});
  d_o = torch::stable::contiguous(d_o), dlse = torch::stable::contiguous(dlse);  // autograd may hand over expanded tensors
  a.d_o = rows("do_", d_o);
  a.dlse = floats("dlse", dlse, {a.n, a.heads});
  a.o = rows("o", o, a.n, a.heads, a.head_dim);
  check_shape("lse", lse, {a.n, a.heads});
  Tensor do_a = empty(o_a, {a.n, a.heads, a.head_dim}, o_a.scalar_type()), dlse_a = empty(o_a, {a.n, a.heads}, ScalarType::Float);
  Tensor do_b = empty(o_a, {a.n, a.heads, a.head_dim}, o_b.scalar_type()), dlse_b = empty(o_a, {a.n, a.heads}, ScalarType::Float);
  a.do_a = rows("do_a", do_a), a.dlse_a = static_cast<float*>(dlse_a.data_ptr());
  a.do_b = rows("do_b", do_b), a.dlse_b = static_cast<float*>(dlse_b.data_ptr());
  cpu::merge_states_backward(a, threads());
  return {do_a, dlse_a, do_b, dlse_b};
}

// src, dst [m]: rows of the pool; dst distinct, none of them in src.
void check_moves(const int64_t* src, const int64_t* dst, int64_t m, int64_t pool_rows) {
  for (int64_t i = 0; i < m; ++i) {
    STD_TORCH_CHECK(src[i] >= 0 && src[i] < pool_rows, "src: expected values in [0, ", pool_rows, "), got ", src[i], " at ", i);
    STD_TORCH_CHECK(dst[i] >= 0 && dst[i] < pool_rows, "dst: expected values in [0, ", pool_rows, "), got ", dst[i], " at ", i);
  }
  std::vector<int64_t> sorted(dst, dst + m);
  std::sort(sorted.begin(), sorted.end());
  for (int64_t i = 1; i < m; ++i) STD_TORCH_CHECK(sorted[i] != sorted[i - 1], "dst: expected every row once, got ", sorted[i], " twice");
  for (int64_t i = 0; i < m; ++i)
    STD_TORCH_CHECK(!std::binary_search(sorted.begin(), sorted.end(), src[i]), "dst: expected rows that are not read, got ", src[i],
                    ", which is also in src");
}

cpu::RepositionArgs reposition_args(const Tensor& src, const Tensor& dst, const Tensor& shift, const Tensor& inv_freq, bool interleaved,
                                    const char* k_name, const Tensor& k_pool, const char* v_name, const Tensor& v_pool) {
  cpu::RepositionArgs a{};
  a.k_pool = rows(k_name, k_pool);
  a.kv_heads = k_pool.size(1), a.head_dim = k_pool.size(2);
  check_head_dim(k_name, a.head_dim);
  STD_TORCH_CHECK(a.kv_heads >= 1, k_name, ": expected at least one head, got shape ", shape_of(k_pool));
  a.v_pool = rows(v_name, v_pool, k_pool.size(0), a.kv_heads, a.head_dim);
  check_dtype(v_name, v_pool, k_pool.scalar_type());
  WrittenPools(k_name, k_pool, a.k_pool, v_name, v_pool, a.v_pool);
  STD_TORCH_CHECK(src.dim() == 1, "src: expected 1 dimension, got shape ", shape_of(src));
  a.m = src.size(0);
  a.src = indices("src", src, a.m);
  a.dst = indices("dst", dst, a.m);
  a.shift = indices("shift", shift, a.m);
  check_moves(a.src, a.dst, a.m, k_pool.size(0));
  a.inv_freq = frequencies(inv_freq, a.head_dim);
  a.half_rotary = inv_freq.size(0);
  a.interleaved = interleaved;
  return a;
}

void reposition(Tensor src, Tensor dst, Tensor shift, Tensor inv_freq, bool interleaved, Tensor k_pool, Tensor v_pool) {
  cpu::reposition(reposition_args(src, dst, shift, inv_freq, interleaved, "k_pool", k_pool, "v_pool", v_pool), threads());
}

void reposition_backward(Tensor src, Tensor dst, Tensor shift, Tensor inv_freq, bool interleaved, Tensor dk_pool, Tensor dv_pool) {
  check_dtype("dk_pool", dk_pool, ScalarType::Float);
  cpu::reposition_backward(reposition_args(src, dst, shift, inv_freq, interleaved, "dk_pool", dk_pool, "dv_pool", dv_pool), threads());
}

}  // namespace

// The same schemas for every backend.
#define DIFFMAS_INJECT                                                                                                                \
  "inject(Tensor q, Tensor k, Tensor v, Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, float eps, "      \
  "bool interleaved, Tensor(a!) k_pool, Tensor(b!) v_pool) -> Tensor"
#define DIFFMAS_INJECT_BACKWARD                                                                                                       \
  "inject_backward(Tensor dq_rot, Tensor q, Tensor k, Tensor? cos, Tensor? sin, Tensor slots, Tensor? q_weight, Tensor? k_weight, "   \
  "float eps, bool interleaved, Tensor(a!) dk_pool, Tensor(b!) dv_pool) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dq_weight, "      \
  "Tensor dk_weight)"

#define DIFFMAS_ATTENTION                                                                                                             \
  "cross_attention(Tensor q, Tensor k_pool, Tensor v_pool, Tensor q_indptr, Tensor seg_indptr, Tensor seg_start, Tensor seg_len, "    \
  "Tensor? seg_shift, Tensor? inv_freq, float scale, bool causal, bool interleaved) -> (Tensor o, Tensor lse)"
#define DIFFMAS_ATTENTION_BACKWARD                                                                                                    \
  "cross_attention_backward(Tensor do_, Tensor? dlse, Tensor q, Tensor o, Tensor lse, Tensor k_pool, Tensor v_pool, Tensor q_indptr, " \
  "Tensor seg_indptr, Tensor seg_start, Tensor seg_len, Tensor? seg_shift, Tensor? inv_freq, float scale, bool causal, "              \
  "bool interleaved, Tensor(a!) dk_pool, Tensor(b!) dv_pool, Tensor? newest=None, bool want_dq=True) -> Tensor dq"

STABLE_TORCH_LIBRARY(diffmas_cpu, m) {
  m.def(DIFFMAS_INJECT);
  m.def(DIFFMAS_INJECT_BACKWARD);
  m.def(DIFFMAS_ATTENTION);
  m.def(DIFFMAS_ATTENTION_BACKWARD);
  m.def("merge_states(Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b) -> (Tensor o, Tensor lse)");
  m.def(
      "merge_states_backward(Tensor do_, Tensor dlse, Tensor o_a, Tensor lse_a, Tensor o_b, Tensor lse_b, Tensor o, Tensor lse) -> "
      "(Tensor do_a, Tensor dlse_a, Tensor do_b, Tensor dlse_b)");
  m.def(
      "reposition(Tensor src, Tensor dst, Tensor shift, Tensor inv_freq, bool interleaved, Tensor(a!) k_pool, Tensor(b!) v_pool) -> ()");
  m.def(
      "reposition_backward(Tensor src, Tensor dst, Tensor shift, Tensor inv_freq, bool interleaved, Tensor(a!) dk_pool, "
      "Tensor(b!) dv_pool) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(diffmas_cpu, CPU, m) {
  m.impl("inject", TORCH_BOX(&inject));
  m.impl("inject_backward", TORCH_BOX(&inject_backward));
  m.impl("cross_attention", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_attention_backward));
  m.impl("merge_states", TORCH_BOX(&merge_states));
  m.impl("merge_states_backward", TORCH_BOX(&merge_states_backward));
  m.impl("reposition", TORCH_BOX(&reposition));
  m.impl("reposition_backward", TORCH_BOX(&reposition_backward));
}

#ifdef DIFFMAS_CUDA
STABLE_TORCH_LIBRARY(diffmas_cuda, m) {
  m.def(DIFFMAS_INJECT);
  m.def(DIFFMAS_INJECT_BACKWARD);
  m.def(DIFFMAS_ATTENTION);
  m.def(DIFFMAS_ATTENTION_BACKWARD);
  m.def("versions() -> (int driver, int runtime)");
}

STABLE_TORCH_LIBRARY_IMPL(diffmas_cuda, CompositeExplicitAutograd, m) { m.impl("versions", TORCH_BOX(&cuda_versions)); }

STABLE_TORCH_LIBRARY_IMPL(diffmas_cuda, CUDA, m) {
  m.impl("inject", TORCH_BOX(&inject));
  m.impl("inject_backward", TORCH_BOX(&inject_backward));
  m.impl("cross_attention", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_attention_backward));
}
#endif
