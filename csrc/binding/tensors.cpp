#include "tensors.h"

#include <vector>

namespace diffmas::binding {
namespace {

std::string list(const int64_t* sizes, int64_t count) {
  std::string s = "[";
  for (int64_t i = 0; i < count; ++i) s += (i ? ", " : "") + std::to_string(sizes[i]);
  return s + "]";
}

void check_device(const char* name, const Tensor& t, Device device) {
  if (device.cuda) {
    STD_TORCH_CHECK(t.is_cuda() && int32_t(t.get_device_index()) == device.index, name, ": expected a tensor on CUDA device ", device.index,
                    ", got one on another device");
  } else {
    STD_TORCH_CHECK(t.is_cpu(), name, ": expected a CPU tensor, got one on another device");
  }
}

void check_last_stride(const char* name, const Tensor& t) {
  const int64_t last = t.dim() - 1;
  STD_TORCH_CHECK(t.stride(last) == 1 || t.size(last) <= 1 || t.numel() == 0, name, ": expected last stride 1, got ", t.stride(last));
}

// That of a dimension of size 1, which nobody walks along, may be anything: here it is one that keeps rows in whole packs.
int64_t stride_of(const Tensor& t, int64_t dim) { return t.size(dim) > 1 ? t.stride(dim) : t.size(t.dim() - 1); }

void check_contiguous(const char* name, const Tensor& t) { STD_TORCH_CHECK(t.is_contiguous(), name, ": expected a contiguous tensor"); }

DType dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return DType::f32;
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::f16;
    default:
      STD_TORCH_CHECK(false, name, ": expected dtype float32, bfloat16 or float16, got ", torch::headeronly::toString(t.scalar_type()));
  }
  return DType::f32;
}

}  // namespace

Device device_of(const Tensor& t) { return {t.is_cuda(), t.is_cuda() ? int32_t(t.get_device_index()) : 0}; }

OnDevice::OnDevice(const Tensor& t) {
  if (t.is_cuda()) guard.emplace(int32_t(t.get_device_index()));
}

std::string shape_of(const Tensor& t) {
  std::vector<int64_t> sizes;
  for (int64_t i = 0; i < t.dim(); ++i) sizes.push_back(t.size(i));
  return list(sizes.data(), t.dim());
}

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == int64_t(shape.size());
  int64_t i = 0;
  for (int64_t size : shape) same = same && t.size(i++) == size;
  STD_TORCH_CHECK(same, name, ": expected shape ", list(shape.begin(), int64_t(shape.size())), ", got ", shape_of(t));
}

void check_dtype(const char* name, const Tensor& t, ScalarType expected) {
  STD_TORCH_CHECK(t.scalar_type() == expected, name, ": expected dtype ", torch::headeronly::toString(expected), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
}

void check_head_dim(const char* name, int64_t head_dim) {
  STD_TORCH_CHECK(head_dim >= 1 && head_dim <= kMaxHeadDim, name, ": expected a head size from 1 to ", kMaxHeadDim, ", got ", head_dim);
}

void check_heads(int64_t q_heads, const char* kv_name, int64_t kv_heads, int64_t head_dim) {
  check_head_dim("q", head_dim);
  STD_TORCH_CHECK(q_heads >= 1, "q: expected at least one head, got none");
  STD_TORCH_CHECK(kv_heads >= 1 && q_heads % kv_heads == 0, kv_name, ": expected a number of heads that divides ", q_heads, ", got ",
                  kv_heads);
}

void check_rows_fit(const char* name, int64_t rows) {
  STD_TORCH_CHECK(rows < INT32_MAX, name, ": expected fewer than 2^31 rows, got ", rows);
}

void check_dims(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions [rows, heads, D], got shape ", shape_of(t));
}

Rows rows(const char* name, const Tensor& t, Device device) {
  check_device(name, t, device);
  check_dims(name, t);
  const DType dtype = dtype_of(name, t);
  check_last_stride(name, t);
  return {t.data_ptr(), stride_of(t, 0), stride_of(t, 1), dtype};
}

Rows rows(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t head_dim, Device device) {
  check_shape(name, t, {n, heads, head_dim});
  return rows(name, t, device);
}

Rows payload(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t head_dim, Device device) {
  check_device(name, t, device);
  check_dims(name, t);
  check_shape(name, t, {n, heads, head_dim});
  const bool bytes = t.scalar_type() == ScalarType::Char;
  STD_TORCH_CHECK(bytes || t.scalar_type() == ScalarType::Float8_e4m3fn, name, ": expected dtype int8 or float8_e4m3fn, got ",
                  torch::headeronly::toString(t.scalar_type()));
  check_last_stride(name, t);
  return {t.data_ptr(), stride_of(t, 0), stride_of(t, 1), bytes ? DType::i8 : DType::e4m3};
}

Scales scales(const char* name, const Tensor& t, int64_t n, int64_t heads, Device device) {
  check_device(name, t, device);
  check_dtype(name, t, ScalarType::Float);
  check_shape(name, t, {n, heads});
  return {static_cast<const float*>(t.data_ptr()), t.stride(0), t.stride(1)};
}

bool is_flat(const Tensor& t, int64_t n) { return t.dim() == 3 && t.size(0) == 1 && t.size(1) == n; }

Heads heads(const char* name, const Tensor& t, int64_t n, int64_t head_dim, Device device) {
  if (!is_flat(t, n) || head_dim < 1 || t.size(2) % head_dim) {
    const Rows r = rows(name, t, device);
    check_shape(name, t, {n, t.size(1), head_dim});
    return {r, n, t.size(1), head_dim, false};
  }
  check_device(name, t, device);
  check_last_stride(name, t);
  return {{t.data_ptr(), stride_of(t, 1), head_dim, dtype_of(name, t)}, n, t.size(2) / head_dim, head_dim, true};
}

Heads heads(const char* name, const Tensor& t, int64_t n, int64_t count, int64_t head_dim, Device device) {
  const Heads h = heads(name, t, n, head_dim, device);
  STD_TORCH_CHECK(h.heads == count, name, ": expected ", count, " heads of ", head_dim, ", got shape ", shape_of(t));
  return h;
}

Pools pools(const char* k_name, const Tensor& k_pool, const char* v_name, const Tensor& v_pool, int64_t kv_heads, int64_t head_dim,
            Device device) {
  Pools p{};
  p.k = rows(k_name, k_pool, device);
  p.rows = k_pool.size(0);
  p.kv_heads = kv_heads < 0 ? k_pool.size(1) : kv_heads;
  p.head_dim = head_dim < 0 ? k_pool.size(2) : head_dim;
  check_shape(k_name, k_pool, {p.rows, p.kv_heads, p.head_dim});
  p.v = rows(v_name, v_pool, p.rows, p.kv_heads, p.head_dim, device);
  check_dtype(v_name, v_pool, k_pool.scalar_type());
  return p;
}

Table table(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Device device) {
  if (!t) return {nullptr, 0, DType::f32};
  check_device(name, *t, device);
  const int64_t dims = int64_t(shape.size()), lead = dims == 2 && t->dim() == 3 && t->size(0) == 1 ? 1 : 0;
  bool same = t->dim() == dims + lead;
  for (int64_t i = 0; same && i < dims; ++i) same = t->size(i + lead) == shape.begin()[i];
  STD_TORCH_CHECK(same, name, ": expected shape ", list(shape.begin(), dims), ", got ", shape_of(*t));
  const DType dtype = dtype_of(name, *t);
  check_last_stride(name, *t);
  return {t->data_ptr(), dims > 1 ? stride_of(*t, lead) : 0, dtype};
}

const float* floats(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Device device) {
  if (!t) return nullptr;
  check_device(name, *t, device);
  check_dtype(name, *t, ScalarType::Float);
  check_shape(name, *t, shape);
  check_contiguous(name, *t);
  return static_cast<const float*>(t->data_ptr());
}

const float* frequencies(const Tensor& t, int64_t head_dim, Device device) {
  const int64_t count = length_of("inv_freq", t);
  STD_TORCH_CHECK(2 * count <= head_dim, "inv_freq: expected up to ", head_dim / 2, " frequencies, got shape ", shape_of(t));
  return floats("inv_freq", t, {count}, device);
}

int64_t length_of(const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.dim() == 1, name, ": expected 1 dimension, got shape ", shape_of(t));
  return t.size(0);
}

const int64_t* indices(const char* name, const Tensor& t, int64_t size, Device device) {
  check_device(name, t, device);
  check_dtype(name, t, ScalarType::Long);
  check_shape(name, t, {size});
  check_contiguous(name, t);
  return static_cast<const int64_t*>(t.data_ptr());
}

void check_bounds(const char* name, const int64_t* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; ++i)
    STD_TORCH_CHECK(index[i] >= low && index[i] < high, name, ": expected values in [", low, ", ", high, "), got ", index[i], " at ", i);
}

Tensor packed(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  // Not torch::stable::new_empty, which looks the op up by its name: four times the time.
  int64_t strides[4], stride = 1;
  STD_TORCH_CHECK(shape.size() <= 4, "expected at most 4 dimensions, got ", shape.size());
  for (size_t i = shape.size(); i--; stride *= shape.begin()[i]) strides[i] = stride;
  const bool cuda = like.is_cuda();
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(shape.size()), shape.begin(), strides, torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      cuda ? aoti_torch_device_type_cuda() : aoti_torch_device_type_cpu(), cuda ? int32_t(like.get_device_index()) : -1, &handle));
  return Tensor(handle);
}

Tensor empty_heads(const Tensor& like, int64_t n, int64_t heads, int64_t head_dim, bool flat) {
  return flat ? empty(like, {1, n, heads * head_dim}, like.scalar_type()) : empty(like, {n, heads, head_dim}, like.scalar_type());
}

Rows rows_of_own(const Tensor& t, int64_t heads, int64_t head_dim, DType dtype) {
  return {t.data_ptr(), heads * head_dim, head_dim, dtype};
}

float* floats_of_own(const Tensor& t) { return static_cast<float*>(t.data_ptr()); }

cpu::Threads threads() {
  return {int64_t(torch::stable::get_num_threads()), [](int64_t count, void (*body)(int64_t, int64_t, void*), void* context) {
            torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
          }};
}

}  // namespace diffmas::binding
