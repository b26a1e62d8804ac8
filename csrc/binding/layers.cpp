// Decoder layers of few rows, one after the other in one call: norm, q, k and v; attention, with the rows' K and V written; output, norm
// and feed-forward. Each part rounds where transformers' layer does.
#include "layers.h"

#include <cstring>
#include <utility>

namespace diffmas::binding {

std::vector<Layer> layers_of(const Tensors& norms, const std::vector<double>& eps, const Tensors& linears, const std::vector<int64_t>& parts,
                             const std::vector<double>& scales, size_t adapters) {
  const size_t count = norms.size() / 2;
  STD_TORCH_CHECK(norms.size() == 2 * count && eps.size() == 2 * count, "eps: expected one for each of two norms a layer, got ", eps.size(),
                  " for ", norms.size());
  STD_TORCH_CHECK(parts.size() == kLinears * count && scales.size() == adapters * parts.size(),
                  "parts, scales: expected one for each of ", kLinears, " linears a layer, and of ", adapters, " adapters, got ", parts.size(),
                  ", ", scales.size());
  std::vector<Layer> layers;
  size_t next = 0;
  const auto take = [&](bool there) { return there ? next < linears.size() ? &linears[next++] : nullptr : nullptr; };
  for (size_t i = 0; i < count; ++i) {
    layers.push_back({&norms[2 * i], &eps[2 * i], &parts[kLinears * i], {}});
    for (size_t j = kLinears * i; j < kLinears * (i + 1); ++j) {
      const Tensor *weight = take(true), *bias = take(parts[j] & kBias);
      bool there = weight && (bias || !(parts[j] & kBias));
      std::vector<Adapter> of_rows;
      for (size_t k = 0; (parts[j] & kLora) && k < adapters; ++k) {
        const Tensor *a = take(true), *b = take(true);
        there = there && b;
        if (b) of_rows.push_back({a, b, scales[j * adapters + k]});
      }
      STD_TORCH_CHECK(there, "linears: expected what parts says, got ", linears.size(), " tensors");
      check(weight->dim() == 2, "weight", "[out, in]", *weight);
      layers.back().linears.push_back({*weight, bias, std::move(of_rows)});
    }
  }
  STD_TORCH_CHECK(next == linears.size(), "linears: expected ", next, " tensors, got ", linears.size());
  return layers;
}

void check_ends(const std::vector<int64_t>& ends, int64_t n) {
  int64_t before = 0;
  for (int64_t end : ends) {
    STD_TORCH_CHECK(before <= end && end <= n, "ends: expected numbers of rows in order, at most ", n, ", got ", end, " after ", before);
    before = end;
  }
  STD_TORCH_CHECK(ends.empty() || before == n, "ends: expected the last one to be ", n, ", got ", before);
}

FewRows few_rows_of(const Tensor& x, std::vector<int64_t> ends) {
  const int64_t length = x.dim() == 3 ? x.size(2) : 0;
  check(length && x.size(0) == 1 && x.is_contiguous() && !x.is_cuda() && length % cpu::kLinearColumns == 0, "x",
        "[1, n, length] in order on the CPU, of a length that is a multiple of 32", x);
  check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, "x", "float32 or bfloat16", x);
  check(x.size(1) <= cpu::kLinearRows, "x", "at most 32 rows", x);
  check_ends(ends, x.size(1));
  return {x.size(1), length, x.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16, std::move(ends)};
}

int64_t FewRows::codes(const Linear& linear) const {
  int64_t codes = 0;
  for (size_t k = 0; k < linear.adapters.size(); ++k) codes += count(k) * linear.adapters[k].rank();
  return codes;
}

int64_t FewRows::floats(const Layer& layer) const {
  int64_t floats = n * (8 * length + 3 * layer.linears[kGate].out());
  for (const Linear& linear : layer.linears) floats += linear.floats(n) + n * linear.out() + codes(linear);
  return floats;
}

namespace {

// Rows [n, length] after those that were taken from a memory, if there is one.
cpu::Matrix next_rows(const FewRows& like, const Tensor* memory, int64_t& taken, int64_t length) {
  char* const data = memory ? static_cast<char*>(memory->data_ptr()) + taken * like.size() : nullptr;
  taken += like.n * length;
  return like.of(data, length);
}

void check_memory(const Tensor* memory, int64_t taken, ScalarType dtype) {
  if (!memory) return;
  check(memory->is_contiguous() && memory->numel() == taken, "kept", "what a step of these layers leaves", *memory);
  check_dtype("kept", *memory, dtype);
}

}  // namespace

PassingPlaces::PassingPlaces(const std::vector<Layer>& of, const FewRows& like, bool heads, const Tensor* memory) {
  const auto take = [&](int64_t length) { return next_rows(like, memory, rows, length); };
  for (const Layer& layer : of) {
    const int64_t inner = layer.linears[kGate].out();
    Passing p{};
    if (!layers.empty()) p.x = take(like.length);
    p.middle = take(like.length), p.gate = take(inner), p.up = take(inner);
    if (heads) p.q = take(layer.linears[kQ].out()), p.k = take(layer.linears[kK].out());
    layers.push_back(p);
  }
  check_memory(memory, rows, like.scalar_type());
}

AdapterPlaces::AdapterPlaces(const std::vector<Layer>& of, const FewRows& like, bool backward, const Tensor* row_memory,
                             const Tensor* float_memory) {
  for (const Layer& layer : of) {
    Adapters a{};
    const auto take = [&](std::initializer_list<int> which) {  // linears that have the same rows
      bool waits = false;
      for (int j : which) waits = waits || layer.waits(j);
      if (!waits) return;
      const Linear& first = layer.linears[*which.begin()];
      const cpu::Matrix m = next_rows(like, row_memory, rows, backward ? first.out() : first.in());
      for (int j : which) a.rows[j] = m;
    };
    if (backward)
      for (int j = 0; j < kLinears; ++j) take({j});
    else
      take({kQ, kK, kV}), take({kGate, kUp}), take({kDown});
    for (int j = 0; j < kLinears; ++j) {
      if (!layer.waits(j)) continue;
      if (float_memory) a.floats[j] = floats_of_own(*float_memory) + floats;
      floats += like.codes(layer.linears[j]);
    }
    layers.push_back(a);
  }
  check_memory(row_memory, rows, like.scalar_type()), check_memory(float_memory, floats, ScalarType::Float);
}

cpu::LinearArgs Parts::args(int which, const cpu::Matrix& x, int64_t length, const cpu::Matrix& y, const cpu::Matrix* residual,
                            bool transposed) {
  const Linear& linear = layer.linears[which];
  float* const own = adapters.floats[which];
  cpu::LinearArgs args = linear.args(rows.n, x, length, y, own ? own : memory.take(rows.n * linear.rank()), memory, transposed);
  if (residual && linear.adapters.size() <= 1) args.residual = *residual;
  return args;
}

void Parts::add_adapters(int which, const cpu::Matrix& x, const cpu::Matrix& y, const cpu::Matrix* residual, bool transposed) {
  const Linear& linear = layer.linears[which];
  if (linear.adapters.size() <= 1) return;
  float* u = adapters.floats[which] ? adapters.floats[which] : memory.take(rows.codes(linear));
  for (size_t k = 0; k < linear.adapters.size(); ++k) {
    const auto own = [&](const cpu::Matrix& m) { return rows.of(static_cast<char*>(m.data) + rows.begin(k) * m.stride * rows.size(), m.stride); };
    cpu::LinearArgs args{};
    args.n = rows.count(k), args.transposed = transposed, args.x = own(x), args.y = own(y);
    args.from = transposed ? linear.out() : linear.in(), args.to = transposed ? linear.in() : linear.out();
    args.lora = linear.lora(linear.adapters[k], u, memory, transposed);
    if (args.n && args.lora.rank) cpu::add_lora(args, threads());
    u += rows.count(k) * linear.adapters[k].rank();
  }
  if (residual) cpu::add({rows.n, transposed ? linear.in() : linear.out(), *residual, y}, threads());
}

cpu::NormArgs Parts::norm(int which, const cpu::Matrix& x, const cpu::Matrix& y) const {
  return {rows.n, rows.length, x, y, vector("norm", layer.norms[which], rows.length, rows.scalar_type()), float(layer.eps[which])};
}

namespace {

void before_attention(Parts& parts, const cpu::Matrix& x, const Tensor* outs) {  // outs: q, k, v [1, n, .]
  const int64_t length = parts.rows.length;
  const cpu::Matrix normed = parts.place(parts.adapters.rows[kQ], length);
  const auto out = [&](int i) { return parts.rows.of(outs[i].data_ptr(), outs[i].size(2)); };
  cpu::LinearArgs linears[3];
  for (int i = 0; i < 3; ++i) linears[i] = parts.args(kQ + i, normed, length, out(i));
  cpu::norm_linears(parts.norm(0, x, normed), linears, 3, threads());
  for (int i = 0; i < 3; ++i) parts.add_adapters(kQ + i, normed, out(i));
}

// o: n rows of `length`. y: may be x, where nothing is kept.
void after_attention(Parts& parts, const Passing& kept, const Tensor& o, int64_t length, const cpu::Matrix& x, const cpu::Matrix& y) {
  const Layer& layer = parts.layer;
  const FewRows& rows = parts.rows;
  const Adapters& adapters = parts.adapters;
  const int64_t inner = layer.linears[kGate].out();
  const cpu::Matrix sum = parts.place(kept.middle, rows.length), normed = parts.place(adapters.rows[kGate], rows.length);
  const cpu::Matrix gated = parts.place(adapters.rows[kDown], inner), gates = kept.gate.data ? kept.gate : gated;
  const cpu::Matrix from = rows.of(o.data_ptr(), length), ups = parts.place(kept.up, inner);
  cpu::linear(parts.args(kOut, from, length, sum, &x), threads());
  parts.add_adapters(kOut, from, sum, &x);
  cpu::norm_linears(parts.norm(1, sum, normed), nullptr, 0, threads());
  const cpu::LinearArgs gate = parts.args(kGate, normed, rows.length, gates), up = parts.args(kUp, normed, rows.length, ups);
  if (layer.linears[kGate].adapters.size() > 1 || layer.linears[kUp].adapters.size() > 1) {
    cpu::linear(gate, threads()), parts.add_adapters(kGate, normed, gates);
    cpu::linear(up, threads()), parts.add_adapters(kUp, normed, ups);
    cpu::gate({rows.n, gates, ups, gated}, inner, threads());
  } else {
    cpu::gated_linears(gate, up, gated, threads());
  }
  cpu::linear(parts.args(kDown, gated, inner, y, &sum), threads());
  parts.add_adapters(kDown, gated, y, &sum);
}

// A layer's part of a tensor [layers, ...] in order.
void put(const Tensor& all, size_t layer, size_t layers, const Tensor& part) {
  const size_t bytes = size_t(part.numel()) * (part.scalar_type() == ScalarType::BFloat16 ? 2 : 4);
  check(size_t(all.numel()) == layers * size_t(part.numel()), "layers", "alike", part);
  std::memcpy(static_cast<char*>(all.data_ptr()) + layer * bytes, part.data_ptr(), bytes);
}

}  // namespace

void check_linears(const std::vector<Layer>& layers, int64_t length, bool alike) {
  STD_TORCH_CHECK(!layers.empty(), "norms: expected two a layer, got none");
  for (const Layer& layer : layers) {
    const std::vector<Linear>& linears = layer.linears;
    const auto is = [&](int which, int64_t out, int64_t in) {
      const Linear& linear = linears[which];
      STD_TORCH_CHECK(linear.out() == out && linear.in() == in && out % cpu::kLinearColumns == 0 && in % cpu::kLinearColumns == 0,
                      "weight: expected [", out, ", ", in, "], of multiples of 32, got shape ", shape_of(linear.weight));
    };
    const int64_t width = linears[kQ].out(), inner = linears[kGate].out(), kv_width = linears[kK].out();
    is(kQ, alike ? layers[0].linears[kQ].out() : width, length), is(kK, kv_width, length), is(kV, kv_width, length);
    is(kOut, length, width), is(kGate, inner, length), is(kUp, inner, length), is(kDown, length, inner);
  }
}

void check_layers(const std::vector<Layer>& layers, const FewRows& rows, bool alike, const Tensors& k_pools, const Tensors& v_pools,
                  const Tensors& head_norms, const Tensors& view, const Tensors& rest, const Tensors& frozen, const Tensors& frozen_view) {
  const size_t count = layers.size();
  check_linears(layers, rows.length, alike);
  STD_TORCH_CHECK(k_pools.size() == count && v_pools.size() == count, "k_pools, v_pools: expected one for each of ", count, " layers, got ",
                  k_pools.size(), ", ", v_pools.size());
  STD_TORCH_CHECK(head_norms.empty() || head_norms.size() == 2 * count, "head_norms: expected none or two a layer, got ", head_norms.size());
  STD_TORCH_CHECK(frozen.empty() || frozen.size() == 4 * count, "frozen: expected none or four a layer, got ", frozen.size());
  const auto check_view = [](const char* name, const Tensors& view, bool there) {
    STD_TORCH_CHECK(!there || view.size() == 4 || view.size() == 5, name, ": expected 4 or 5 tensors, got ", view.size());
  };
  for (size_t i = 0; i < count; ++i) {
    check_dims("k_pool", k_pools[i]);
    const int64_t kv_width = k_pools[i].size(1) * k_pools[i].size(2);
    const Linear& k = layers[i].linears[kK];
    STD_TORCH_CHECK(k.out() == kv_width, "weight: expected [", kv_width, ", ", rows.length, "], got shape ", shape_of(k.weight));
  }
  check_view("view", view, true), check_view("rest", rest, !rest.empty()), check_view("frozen_view", frozen_view, !frozen.empty());
}

Tensors few_rows_layers(const Tensor& x, Tensors norms, std::vector<double> eps, Tensors linears, std::vector<int64_t> parts,
                        std::vector<double> scales, std::vector<int64_t> ends, const Optional& cos, const Optional& sin,
                        const Tensor& slots, Tensors head_norms, double head_eps, bool interleaved, Tensors k_pools,
                        Tensors v_pools, Tensors view, Tensors rest, const Optional& inv_freq, double scale, Tensors frozen,
                        Tensors frozen_view, bool learning) {
  const FewRows rows = few_rows_of(x, ends);
  const std::vector<Layer> layers = layers_of(norms, eps, linears, parts, scales, rows.adapters());
  const size_t count = layers.size();
  check_layers(layers, rows, learning, k_pools, v_pools, head_norms, view, rest, frozen, frozen_view);
  const int64_t n = rows.n;
  const ScalarType dtype = rows.scalar_type();
  Tensors found{empty(x, {1, n, rows.length}, dtype)};
  std::vector<Passing> kept(count);
  std::vector<Adapters> adapters(count);
  if (learning) {
    const bool heads = !head_norms.empty();
    const int64_t width = layers[0].linears[kQ].out(), head_dim = k_pools[0].size(2), all = int64_t(count);
    const AdapterPlaces sizes(layers, rows, false);
    found.insert(found.end(), {empty(x, {all, n, width / head_dim, head_dim}, dtype), empty(x, {all, 1, n, width}, dtype),
                               empty(x, {all, n, width / head_dim}, ScalarType::Float),
                               empty(x, {PassingPlaces(layers, rows, heads).rows}, dtype), empty(x, {sizes.rows}, dtype),
                               empty(x, {sizes.floats}, ScalarType::Float)});
    kept = PassingPlaces(layers, rows, heads, &found[kPassing]).layers;
    adapters = AdapterPlaces(layers, rows, false, &found[kRows], &found[kFloats]).layers;
  }
  cpu::Matrix from = rows.of(x.data_ptr(), rows.length);
  for (size_t i = 0; i < count; ++i) {
    const Layer& layer = layers[i];
    const Tensor &k_pool = k_pools[i], &v_pool = v_pools[i];
    const auto out = [&](int which) { return empty(x, {1, n, layer.linears[which].out()}, dtype); };
    const Tensor qkv[] = {out(kQ), out(kK), out(kV)};
    Parts before(rows, layer, x, adapters[i]);
    before_attention(before, from, qkv);
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
    if (learning) {
      put(found[kRotated], i, count, q), put(found[kO], i, count, std::get<0>(state)), put(found[kLse], i, count, std::get<1>(state));
      if (kept[i].q.data) {
        std::memcpy(kept[i].q.data, qkv[0].data_ptr(), size_t(qkv[0].numel()) * rows.size());
        std::memcpy(kept[i].k.data, qkv[1].data_ptr(), size_t(qkv[1].numel()) * rows.size());
      }
    }
    const cpu::Matrix to = learning && i + 1 < count ? kept[i + 1].x : rows.of(found[0].data_ptr(), rows.length);
    Parts after(rows, layer, x, adapters[i]);
    after_attention(after, kept[i], std::get<0>(state), qkv[0].size(2), from, to);
    from = to;
  }
  return found;
}

}  // namespace diffmas::binding
