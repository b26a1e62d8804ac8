// Decoder layers of few rows: what they are made of, and the parts of one, for the ops that run them forward and backward.
#pragma once
#include <vector>

#include "linear.h"
#include "ops.h"

namespace diffmas::binding {

using Tensors = std::vector<Tensor>;

enum { kQ, kK, kV, kOut, kGate, kUp, kDown, kLinears };  // of a layer
enum { kBias = 1, kLora = 2, kWaits = 4 };  // what a linear has beside its weight; whether the gradients of a and b are made later

// What a step with gradients returns: y [1, n, hidden]; of all layers together rotated q [L, n, Hq, D], o [L, 1, n, Hq * D] and lse
// [L, n, Hq]; the memory of PassingPlaces and of AdapterPlaces.
enum { kY, kRotated, kO, kLse, kPassing, kRows, kFloats, kFound };

struct Layer {
  const Tensor* norms;  // before attention, and before the feed-forward part
  const double* eps;
  const int64_t* parts;
  std::vector<Linear> linears;

  bool waits(int which) const { return parts[which] & kWaits; }
};

// linears: the tensors of each, weight, bias, a and b, as far as `parts` says that it has them; a, b and scale of `adapters`, one after the
// other.
std::vector<Layer> layers_of(const Tensors& norms, const std::vector<double>& eps, const Tensors& linears, const std::vector<int64_t>& parts,
                             const std::vector<double>& scales, size_t adapters);

// n rows of a body's hidden states. ends: where the rows of each of several adapters end; empty where one has them all.
struct FewRows {
  int64_t n, length;
  DType dtype;
  std::vector<int64_t> ends;

  size_t adapters() const { return ends.empty() ? 1 : ends.size(); }
  int64_t begin(size_t adapter) const { return adapter ? ends[adapter - 1] : 0; }
  int64_t count(size_t adapter) const { return ends.empty() ? n : ends[adapter] - begin(adapter); }
  // Numbers of all rows' u.
  int64_t codes(const Linear& linear) const;

  ScalarType scalar_type() const { return dtype == DType::f32 ? ScalarType::Float : ScalarType::BFloat16; }
  int64_t size() const { return dtype == DType::f32 ? 4 : 2; }
  cpu::Matrix of(void* data, int64_t length) const { return {data, length, dtype}; }
  // What a layer takes of its memory at most, forward or backward.
  int64_t floats(const Layer& layer) const;
};

// x [1, n, hidden].
FewRows few_rows_of(const Tensor& x, std::vector<int64_t> ends);
// Memory safety: that ends are those of n rows.
void check_ends(const std::vector<int64_t>& ends, int64_t n);

// What a step's backward reads of a layer, beside attention's: rows [n, .]. q and k, before their norm, where the heads have one.
struct Passing {
  cpu::Matrix x, middle, gate, up, q, k;
};

// What the gradients of adapters, which are made later, need of a step's linears: x [n, in] and u [n, r], of its backward dy [n, out] and
// v [n, r]; of several adapters u or v of each one's rows, one after the other. Without data where an adapter is not waited for.
struct Adapters {
  cpu::Matrix rows[kLinears];
  float* floats[kLinears];
};

// Where each layer's lie in the memory of a step, the first one's x aside; without memory, how much there is of them.
struct PassingPlaces {
  std::vector<Passing> layers;
  int64_t rows = 0;

  PassingPlaces(const std::vector<Layer>& of, const FewRows& like, bool heads, const Tensor* memory = nullptr);
};

// The same, output's x aside, which is attention's o; backward: of the step's backward.
struct AdapterPlaces {
  std::vector<Adapters> layers;
  int64_t rows = 0, floats = 0;

  AdapterPlaces(const std::vector<Layer>& of, const FewRows& like, bool backward, const Tensor* rows = nullptr, const Tensor* floats = nullptr);
};

// A view as `cross_attention` takes it: q_indptr, seg_indptr, seg_start, seg_len and, where there are some, seg_offset.
inline Optional offset_of(const Tensors& view) { return view.size() > 4 ? Optional(view[4]) : Optional(); }
// Memory safety: that a layer's linears follow on each other, from rows of `length` and to such.
void check_linears(const std::vector<Layer>& layers, int64_t length, bool alike);
// The same of layers, and that pools fit them, and views are there. alike: and that heads are of one number.
void check_layers(const std::vector<Layer>& layers, const FewRows& rows, bool alike, const Tensors& k_pools, const Tensors& v_pools,
                  const Tensors& head_norms, const Tensors& view, const Tensors& rest, const Tensors& frozen, const Tensors& frozen_view);

// The parts of one layer, over the same memory.
struct Parts {
  const FewRows& rows;
  const Layer& layer;
  const Adapters& adapters;
  Memory memory;

  Parts(const FewRows& rows, const Layer& layer, const Tensor& like, const Adapters& adapters)
      : rows(rows), layer(layer), adapters(adapters), memory(like, rows.floats(layer)) {}

  cpu::Matrix take(int64_t length) { return rows.of(memory.take(rows.n * length), length); }
  // Where it is kept, or in the memory.
  cpu::Matrix place(const cpu::Matrix& kept, int64_t length) { return kept.data ? kept : take(length); }
  // Of a linear with one adapter or none all that it does; with several the product alone, and `add_adapters` does the rest.
  cpu::LinearArgs args(int which, const cpu::Matrix& x, int64_t length, const cpu::Matrix& y, const cpu::Matrix* residual = nullptr,
                       bool transposed = false);
  // x, y: of n rows, as they were in args.
  void add_adapters(int which, const cpu::Matrix& x, const cpu::Matrix& y, const cpu::Matrix* residual = nullptr, bool transposed = false);
  cpu::NormArgs norm(int which, const cpu::Matrix& x, const cpu::Matrix& y) const;
};

}  // namespace diffmas::binding
