// From tensors to the raw pointers that kernels take. Every function checks what its pointer relies on (device, dtype, shape, strides)
// and refuses with a message that names the argument, what is expected and what was given. What the values mean is checked before, by
// the public functions (diffmas/checks.py).
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <string>

#include "common/rows.h"
#include "cpu/threads.h"

namespace diffmas::binding {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Where all tensors of a call are.
struct Device {
  bool cuda;
  int32_t index;
};
Device device_of(const Tensor& t);

// Allocations, copies and launches go to the tensor's GPU, whichever is current.
struct OnDevice {
  std::optional<torch::stable::accelerator::DeviceGuard> guard;
  explicit OnDevice(const Tensor& t);
};

std::string shape_of(const Tensor& t);

void check_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> shape);
void check_dtype(const char* name, const Tensor& t, ScalarType expected);
// [rows, heads, D].
void check_dims(const char* name, const Tensor& t);
// The sizes of query and K/V heads, head sizes up to kMaxHeadDim.
void check_head_dim(const char* name, int64_t head_dim);
void check_heads(int64_t q_heads, const char* kv_name, int64_t kv_heads, int64_t head_dim);
// Rows of heads and pool rows are counted in 32 bits on a GPU.
void check_rows_fit(const char* name, int64_t rows);

// [rows, heads, D] with last stride 1, in float32, bfloat16 or float16.
Rows rows(const char* name, const Tensor& t, Device device);
Rows rows(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t head_dim, Device device);
// Quantised rows [n, heads, D] with last stride 1, in int8 or float8_e4m3fn, and what they are multiplied with, float32 [n, heads].
Rows payload(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t head_dim, Device device);
Scales scales(const char* name, const Tensor& t, int64_t n, int64_t heads, Device device);
// Tokens' heads, in either of two layouts: [n, heads, D], or flat, as projections give and take them, [1, n, heads * D]. No view is made:
// that would take as long as the rest of the call's checks.
struct Heads {
  Rows rows;
  int64_t n, heads, head_dim;
  bool flat;
};
bool is_flat(const Tensor& t, int64_t n);
Heads heads(const char* name, const Tensor& t, int64_t n, int64_t head_dim, Device device);
Heads heads(const char* name, const Tensor& t, int64_t n, int64_t heads, int64_t head_dim, Device device);
// k_pool and v_pool, or their gradients: of one shape and dtype. kv_heads, head_dim: -1 where anything goes.
struct Pools {
  Rows k, v;
  int64_t rows, kv_heads, head_dim;
};
Pools pools(const char* k_name, const Tensor& k_pool, const char* v_name, const Tensor& v_pool, int64_t kv_heads, int64_t head_dim,
            Device device);

// cos, sin [n, Dr], a leading 1 aside, or a norm weight [D]; null when absent.
Table table(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Device device);
// Contiguous float32; null when absent.
const float* floats(const char* name, const Optional& t, std::initializer_list<int64_t> shape, Device device);
// inv_freq: contiguous float32 [Dr/2], Dr up to the head size.
const float* frequencies(const Tensor& t, int64_t head_dim, Device device);

// Elements of a 1-D tensor.
int64_t length_of(const char* name, const Tensor& t);
// Contiguous int64 [size].
const int64_t* indices(const char* name, const Tensor& t, int64_t size, Device device);
// Memory safety, not validation: on the CPU, where looking costs no device sync, every index is in [low, high).
void check_bounds(const char* name, const int64_t* index, int64_t count, int64_t low, int64_t high);

// The tensor, or a copy in order: autograd may hand over an expanded one.
Tensor packed(const Tensor& t);
// A tensor of this call's own, contiguous, on the device of `like`; it may hold anything.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype);
// Such a tensor of heads, in the layout that is asked for, and its rows.
Tensor empty_heads(const Tensor& like, int64_t n, int64_t heads, int64_t head_dim, bool flat);
Rows rows_of_own(const Tensor& t, int64_t heads, int64_t head_dim, DType dtype);
float* floats_of_own(const Tensor& t);

// torch's threads.
cpu::Threads threads();

}  // namespace diffmas::binding
