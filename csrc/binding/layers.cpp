// Decoder layers of few rows, one after the other in one call: norm, q, k and v; attention, with the rows' K and V written; output, norm
// and feed-forward. Each part rounds where transformers' layer does.
#include <vector>

#include "linear.h"
#include "ops.h"

namespace diffmas::binding {
namespace {

using Tensors = std::vector<Tensor>;

enum { kQ, kK, kV, kOut, kGate, kUp, kDown, kLinears };  // of a layer
enum { kBias = 1, kLora = 2 };                           // what a linear has beside its weight

struct Layer {
  const Tensor* norms;  // before attention, and before the feed-forward part
  const double* eps;
  std::vector<Linear> linears;
};

// linears: the tensors of each, weight, bias, a and b, as far as `parts` says that it has them.
std::vector<Layer> layers_of(const Tensors& norms, const std::vector<double>& eps, const Tensors& linears, const std::vector<int64_t>& parts,
                             const std::vector<double>& scales) {
  const size_t count = norms.size() / 2;
  STD_TORCH_CHECK(norms.size() == 2 * count && eps.size() == 2 * count, "eps: expected one for each of two norms a layer, got ", eps.size(),
                  " for ", norms.size());
  STD_TORCH_CHECK(parts.size() == kLinears * count && scales.size() == parts.size(), "parts, scales: expected one for each of ", kLinears,
                  " linears a layer, got ", parts.size(), ", ", scales.size());
  std::vector<Layer> layers;
  size_t next = 0;
  const auto take = [&](bool there) { return there ? next < linears.size() ? &linears[next++] : nullptr : nullptr; };
  for (size_t i = 0; i < count; ++i) {
    layers.push_back({&norms[2 * i], &eps[2 * i], {}});
    for (size_t j = kLinears * i; j < kLinears * (i + 1); ++j) {
      const Tensor *weight = take(true), *bias = take(parts[j] & kBias), *a = take(parts[j] & kLora), *b = take(parts[j] & kLora);
      STD_TORCH_CHECK(weight && (bias || !(parts[j] & kBias)) && (b || !(parts[j] & kLora)), "linears: expected what parts says, got ",
                      linears.size(), " tensors");
      check(weight->dim() == 2, "weight", "[out, in]", *weight);
      layers.back().linears.push_back({*weight, bias, a, b, scales[j]});
    }
  }
  STD_TORCH_CHECK(next == linears.size(), "linears: expected ", next, " tensors, got ", linears.size());
  return layers;
}

// x [1, n, hidden], and memory for what a layer makes of it, which all layers take anew.
struct Rows {
  int64_t n, length;
  cpu::Matrix x;

  explicit Rows(const Tensor& t) : length(t.dim() == 3 ? t.size(2) : 0) {
    check(length && t.size(0) == 1 && t.is_contiguous() && !t.is_cuda() && length % cpu::kLinearColumns == 0, "x",
          "[1, n, length] in order on the CPU, of a length that is a multiple of 32", t);
    check(t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16, "x", "float32 or bfloat16", t);
    check(t.size(1) <= cpu::kLinearRows, "x", "at most 32 rows", t);
    n = t.size(1), x = {t.data_ptr(), length, t.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16};
  }
  int64_t floats(const Layer& layer) const {
    int64_t floats = 2 * n * length;
    for (const Linear& linear : layer.linears) floats += linear.floats(n) + n * (linear.out() + linear.rank());
    return floats;
  }
};

cpu::Matrix rows_of(const Tensor& t, int64_t length, DType dtype) { return {t.data_ptr(), length, dtype}; }

// The parts of one layer, over the same memory.
struct Parts {
  const Rows& rows;
  const Layer& layer;
  Memory memory;

  Parts(const Rows& rows, const Layer& layer, const Tensor& like) : rows(rows), layer(layer), memory(like, rows.floats(layer)) {}

  cpu::Matrix take(int64_t length) { return {memory.take(rows.n * length), length, rows.x.dtype}; }
  cpu::LinearArgs args(int which, const cpu::Matrix& x, int64_t length, const cpu::Matrix& y) {
    const Linear& linear = layer.linears[which];
    return linear.args(rows.n, x, length, y, memory.take(rows.n * linear.rank()), memory);
  }
  cpu::NormArgs norm(int which, const cpu::Matrix& x, const cpu::Matrix& y) const {
    const ScalarType dtype = rows.x.dtype == DType::f32 ? ScalarType::Float : ScalarType::BFloat16;
    return {rows.n, rows.length, x, y, vector("norm", layer.norms[which], rows.length, dtype), float(layer.eps[which])};
  }

  // outs: q, k, v [1, n, .]
  void before_attention(const cpu::Matrix& x, const Tensor* outs) {
    const cpu::Matrix normed = take(rows.length);
    cpu::LinearArgs linears[3];
    for (int i = 0; i < 3; ++i) linears[i] = args(kQ + i, normed, rows.length, rows_of(outs[i], outs[i].size(2), x.dtype));
    cpu::norm_linears(norm(0, x, normed), linears, 3, threads());
  }

  // o: n rows of `length`. y: may be x.
  void after_attention(const Tensor& o, int64_t length, const cpu::Matrix& x, const cpu::Matrix& y) {
    const int64_t inner = layer.linears[kGate].out();
    check(layer.linears[kOut].out() == rows.length && layer.linears[kDown].out() == rows.length, "weight",
          "o's and down's of as many rows as x is long", layer.linears[kOut].weight);
    check(layer.linears[kUp].out() == inner, "weight", "up's of gate's shape", layer.linears[kUp].weight);
    const cpu::Matrix sum = take(rows.length), normed = take(rows.length), gated = take(inner), ups = take(inner);
    cpu::LinearArgs first = args(kOut, rows_of(o, length, x.dtype), length, sum), last = args(kDown, gated, inner, y);
    first.residual = x, last.residual = sum;
    const cpu::LinearArgs gate = args(kGate, normed, rows.length, gated), up = args(kUp, normed, rows.length, ups);
    cpu::linear(first, threads());
    cpu::norm_linears(norm(1, sum, normed), nullptr, 0, threads());
    cpu::gated_linears(gate, up, threads());
    cpu::linear(last, threads());
  }
};

// A view as `cross_attention` takes it: q_indptr, seg_indptr, seg_start, seg_len and, where there are some, seg_offset.
Optional offset_of(const Tensors& view) { return view.size() > 4 ? Optional(view[4]) : Optional(); }

void check_view(const char* name, const Tensors& view) {
  STD_TORCH_CHECK(view.size() == 4 || view.size() == 5, name, ": expected 4 or 5 tensors, got ", view.size());
}

}  // namespace

Tensor few_rows_layers(const Tensor& x, Tensors norms, std::vector<double> eps, Tensors linears, std::vector<int64_t> parts,
                       std::vector<double> scales, const Optional& cos, const Optional& sin, const Tensor& slots, Tensors head_norms,
                       double head_eps, bool interleaved, Tensors k_pools, Tensors v_pools, Tensors view, Tensors rest,
                       const Optional& inv_freq, double scale, Tensors frozen, Tensors frozen_view) {
  const std::vector<Layer> layers = layers_of(norms, eps, linears, parts, scales);
  const size_t count = layers.size();
  STD_TORCH_CHECK(k_pools.size() == count && v_pools.size() == count, "k_pools, v_pools: expected one for each of ", count, " layers, got ",
                  k_pools.size(), ", ", v_pools.size());
  STD_TORCH_CHECK(head_norms.empty() || head_norms.size() == 2 * count, "head_norms: expected none or two a layer, got ", head_norms.size());
  STD_TORCH_CHECK(frozen.empty() || frozen.size() == 4 * count, "frozen: expected none or four a layer, got ", frozen.size());
  check_view("view", view);
  if (!rest.empty()) check_view("rest", rest);
  if (!frozen.empty()) check_view("frozen_view", frozen_view);
  const Rows rows(x);
  const int64_t n = rows.n;
  const Tensor y = empty(x, {1, n, rows.length}, x.scalar_type());
  cpu::Matrix from = rows.x;
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers[i];
    const Tensor &k_pool = k_pools[i], &v_pool = v_pools[i];
    check_dims("k_pool", k_pool);
    const auto out = [&](int which) { return empty(x, {1, n, layer.linears[which].out()}, x.scalar_type()); };
    const Tensor qkv[] = {out(kQ), out(kK), out(kV)};
    Parts(rows, layer, x).before_attention(from, qkv);
    const auto head_norm = [&](size_t which) { return head_norms.empty() ? Optional() : Optional(head_norms[2 * i + which]); };
    const Tensor q = inject_heads(qkv[0], qkv[1], qkv[2], n, k_pool.size(2), cos, sin, slots, head_norm(0), head_norm(1), head_eps,
                                  interleaved, k_pool, v_pool);
    // Where there is a rest, the first view is of rows that all queries see.
    auto state = attend(q, k_pool, v_pool, view[0], view[1], view[2], view[3], offset_of(view), inv_freq, scale, rest.empty(), interleaved, false);
    const auto merge = [&](const std::tuple<Tensor, Tensor>& other) {
      state = merge_states(std::get<0>(state), std::get<1>(state), std::get<0>(other), std::get<1>(other));
    };
    if (!rest.empty())
      merge(attend(q, k_pool, v_pool, rest[0], rest[1], rest[2], rest[3], offset_of(rest), inv_freq, scale, true, interleaved, false));
    if (!frozen.empty()) {
      const Tensor *own = &frozen[4 * i], *seen = frozen_view.data();
      merge(cross_attention_quantized(q, own[0], own[1], own[2], own[3], seen[0], seen[1], seen[2], seen[3], offset_of(frozen_view), inv_freq,
                                      scale, interleaved));
    }
    const cpu::Matrix to = rows_of(y, rows.length, from.dtype);
    Parts(rows, layer, x).after_attention(std::get<0>(state), qkv[0].size(2), from, to);
    from = to;
  }
  return y;
}

}  // namespace diffmas::binding
