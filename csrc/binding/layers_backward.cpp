// The backward of decoder layers of few rows, from the last one to the first, and the gradients of their adapters' weights in a run of
// steps. The ops are those of the layers' parts one by one, in the order in which autograd runs them and adds up: to the bit the same.
#include <algorithm>
#include <cstring>

#include "layers.h"

namespace diffmas::binding {
namespace {

// A layer's part of a tensor [layers, ...] in order, in a shape of its own. Not torch::stable::select, which looks the op up by its name.
Tensor part_of(const Tensor& all, size_t layer, size_t layers, std::initializer_list<int64_t> shape) {
  int64_t strides[4], stride = 1;
  for (size_t i = shape.size(); i--; stride *= shape.begin()[i]) strides[i] = stride;
  check(all.is_contiguous() && all.numel() == int64_t(layers) * stride, "kept", "what these layers leave", all);
  AtenTensorHandle handle = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(all.get(), int64_t(shape.size()), shape.begin(), strides,
                                                               all.storage_offset() + int64_t(layer) * stride, &handle));
  return Tensor(handle);
}

void copy(void* to, const Tensor& from, const FewRows& rows) { std::memcpy(to, from.data_ptr(), size_t(from.numel() * rows.size())); }

// dx [n, in] of dy [n, out], plus `more`, where there is some.
cpu::Matrix backward(Parts& parts, int which, const cpu::Matrix& dy, const cpu::Matrix& dx, const cpu::Matrix* more, const Tensor& like) {
  const Linear& linear = parts.layer.linears[which];
  cpu::LinearArgs args = parts.args(which, dy, linear.out(), dx, more, true);
  if (parts.rows.n == 1 && parts.rows.dtype == DType::f32) {  // torch reads W at the rate of memory (diffmas/ops/linear.py)
    const Tensor row = empty(like, {1, linear.out()}, ScalarType::Float);
    std::memcpy(row.data_ptr(), dy.data, size_t(linear.out()) * sizeof(float));
    const Tensor product = torch::stable::matmul(row, linear.weight);
    check_dtype("weight", product, ScalarType::Float);  // autocast would have made it another
    std::memcpy(dx.data, product.data_ptr(), size_t(linear.in()) * sizeof(float));
    args.x_floats = nullptr, args.residual = {};
    if (linear.rank()) cpu::add_lora(args, threads());
    if (more && linear.adapters.size() <= 1) cpu::add({1, linear.in(), *more, dx}, threads());
  } else {
    cpu::linear(args, threads());
  }
  parts.add_adapters(which, dy, dx, more, true);
  return dx;
}

}  // namespace

Tensors few_rows_layers_backward(const Tensor& dy, const Tensor& x, Tensors kept, Tensors norms, std::vector<double> eps, Tensors linears,
                                 std::vector<int64_t> parts, std::vector<double> scales, std::vector<int64_t> ends, const Optional& cos,
                                 const Optional& sin, const Tensor& slots, Tensors head_norms, double head_eps, bool interleaved, Tensors k_pools,
                                 Tensors v_pools, Tensors view, Tensors rest, const Optional& inv_freq, double scale, Tensors frozen,
                                 Tensors frozen_view, Tensors dk_pools, Tensors dv_pools, std::vector<int64_t> own_rows_only,
                                 const Tensor& tail, const Optional& no_tail) {
  const FewRows rows = few_rows_of(x, ends), of_dy = few_rows_of(dy, ends);
  const std::vector<Layer> layers = layers_of(norms, eps, linears, parts, scales, rows.adapters());
  const size_t count = layers.size();
  STD_TORCH_CHECK(own_rows_only.size() == count, "own_rows_only: expected one for each of ", count, " layers, got ", own_rows_only.size());
  STD_TORCH_CHECK(kept.size() == kFound - 1, "kept: expected ", kFound - 1, " tensors, got ", kept.size());
  check_layers(layers, rows, true, k_pools, v_pools, head_norms, view, rest, frozen, frozen_view);
  check_layers(layers, rows, true, dk_pools, dv_pools, head_norms, view, rest, frozen, frozen_view);
  check(of_dy.n == rows.n && of_dy.length == rows.length && of_dy.dtype == rows.dtype, "dy", "what x is like", dy);
  const int64_t n = rows.n, width = layers[0].linears[kQ].out(), length = rows.length;
  const ScalarType dtype = rows.scalar_type();
  const Tensor &rotated = kept[kRotated - 1], &os = kept[kO - 1], &lses = kept[kLse - 1];
  check_dtype("kept", rotated, dtype), check_dtype("kept", os, dtype);
  const PassingPlaces forward(layers, rows, !head_norms.empty(), &kept[kPassing - 1]);
  const AdapterPlaces sizes(layers, rows, true);
  // What is left: dx; of all layers the gradients of o; of adapters.
  const Tensors found{empty(x, {1, n, length}, dtype), empty(x, {int64_t(count), 1, n, width}, dtype), empty(x, {sizes.rows}, dtype),
                      empty(x, {sizes.floats}, ScalarType::Float)};
  const AdapterPlaces adapters(layers, rows, true, &found[2], &found[3]);
  const Tensor passed = empty(x, {2, n, length}, dtype);  // from layer to layer, to and fro
  const auto passing = [&](size_t i) { return rows.of(static_cast<char*>(passed.data_ptr()) + int64_t(i % 2) * n * length * rows.size(), length); };

  const auto given = [&](size_t i) { return adapters.layers[i].rows[kDown].data ? adapters.layers[i].rows[kDown] : passing(i); };
  copy(given(count - 1).data, dy, rows);
  for (size_t i = count; i--;) {
    const Layer& layer = layers[i];
    const Passing& was = forward.layers[i];
    const Adapters& own = adapters.layers[i];
    Parts parts(rows, layer, x, own);
    const auto place = [&](int which) { return parts.place(own.rows[which], layer.linears[which].out()); };
    const int64_t inner = layer.linears[kGate].out();
    const cpu::Matrix dy = given(i);

    const cpu::Matrix dgated = backward(parts, kDown, dy, parts.take(inner), nullptr, x), dgate = place(kGate), dup = place(kUp);
    cpu::gate_backward({{n, was.gate, was.up, dgated}, dgate, dup}, inner, threads());
    const cpu::Matrix of_up = backward(parts, kUp, dup, parts.take(length), nullptr, x);
    const cpu::Matrix dnormed = backward(parts, kGate, dgate, parts.take(length), &of_up, x);
    const cpu::Matrix dmiddle = place(kOut);
    cpu::norm_backward({parts.norm(1, was.middle, dnormed), dmiddle}, threads());
    cpu::add({n, length, dy, dmiddle}, threads());
    const Tensor d_o = part_of(found[1], i, count, {1, n, width});
    backward(parts, kOut, dmiddle, rows.of(d_o.data_ptr(), width), nullptr, x);

    const Tensor &k_pool = k_pools[i], &v_pool = v_pools[i], &dk_pool = dk_pools[i], &dv_pool = dv_pools[i];
    const int64_t head_dim = k_pool.size(2), kv_heads = k_pool.size(1), heads = width / head_dim;
    const Tensor q_rot = part_of(rotated, i, count, {n, heads, head_dim}), o = part_of(os, i, count, {1, n, width});
    const Tensor lse = part_of(lses, i, count, {n, heads});
    const auto attention = [&](const Tensors& seen, bool causal, const Optional& newest) {
      return cross_attention_backward(d_o, {}, q_rot, o, lse, k_pool, v_pool, seen[0], seen[1], seen[2], seen[3], offset_of(seen), inv_freq,
                                      scale, causal, interleaved, dk_pool, dv_pool, own_rows_only[i] ? newest : Optional(), true);
    };
    const auto heads_of = [&](const Tensor& t) { return rows.of(t.data_ptr(), width); };
    const Tensor dq_rot = attention(view, rest.empty(), rest.empty() ? Optional(tail) : no_tail);
    const auto add = [&](const Tensor& more) { cpu::add({n, width, heads_of(more), heads_of(dq_rot)}, threads()); };
    if (!rest.empty()) add(attention(rest, true, tail));
    if (!frozen.empty()) {
      const Tensor *quantised = &frozen[4 * i], *seen = frozen_view.data();
      add(cross_attention_quantized_backward(d_o, q_rot, o, lse, quantised[0], quantised[1], quantised[2], quantised[3], seen[0], seen[1],
                                             seen[2], seen[3], offset_of(frozen_view), inv_freq, scale, interleaved));
    }
    const auto head_norm = [&](size_t which) { return head_norms.empty() ? Optional() : Optional(head_norms[2 * i + which]); };
    const auto before_norm = [&](const cpu::Matrix& m, int64_t heads) {  // without norms q and k only tell shape and dtype
      const Tensor t = empty(x, {n, heads, head_dim}, dtype);
      if (m.data) std::memcpy(t.data_ptr(), m.data, size_t(t.numel() * rows.size()));
      return t;
    };
    const auto [dq, dk, dv] = inject_heads_backward(dq_rot, before_norm(was.q, heads), before_norm(was.k, kv_heads), n, head_dim, true, cos,
                                                    sin, slots, head_norm(0), head_norm(1), head_eps, interleaved, dk_pool, dv_pool, {}, {});

    const Tensor* gradients[] = {&dq, &dk, &dv};
    cpu::Matrix sum{};
    for (int j = kV; j >= kQ; --j) {
      const Tensor& gradient = *gradients[j];
      if (own.rows[j].data) copy(own.rows[j].data, gradient, rows);
      const cpu::Matrix more = sum;
      sum = backward(parts, j, rows.of(gradient.data_ptr(), gradient.size(2)), parts.take(length), more.data ? &more : nullptr, x);
    }
    const cpu::Matrix dx = i ? given(i - 1) : rows.of(found[0].data_ptr(), length);
    cpu::norm_backward({parts.norm(0, i ? was.x : rows.of(x.data_ptr(), length), sum), dx}, threads());
    cpu::add({n, length, dmiddle, dx}, threads());
  }
  return found;
}

Tensors few_rows_lora_grads(Tensors norms, std::vector<double> eps, Tensors linears, std::vector<int64_t> parts, std::vector<double> scales,
                            std::vector<int64_t> ends, Tensors os, Tensors xs, Tensors us, Tensors dys, Tensors vs) {
  const std::vector<Layer> layers = layers_of(norms, eps, linears, parts, scales, std::max<size_t>(1, ends.size()));
  const size_t steps = os.size(), count = layers.size();
  STD_TORCH_CHECK(steps && xs.size() == steps && us.size() == steps && dys.size() == steps && vs.size() == steps,
                  "expected as many tensors of each kind, at least one, got ", steps, ", ", xs.size(), ", ", us.size(), ", ", dys.size(), ", ",
                  vs.size());
  check(os[0].dim() == 4, "o", "[layers, 1, n, heads * D]", os[0]);
  const int64_t n = os[0].size(2);
  check_ends(ends, n);
  check_linears(layers, layers.empty() ? 0 : layers[0].linears[kQ].in(), false);
  const FewRows rows{n, layers[0].linears[kQ].in(), os[0].scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16, ends};
  std::vector<std::vector<Adapters>> forward, backward;
  for (size_t t = 0; t < steps; ++t) {
    check(os[t].dim() == 4 && os[t].is_contiguous() && os[t].numel() == os[0].numel(), "o", "of one shape, in order", os[t]);
    check_dtype("o", os[t], rows.scalar_type());
    forward.push_back(AdapterPlaces(layers, rows, false, &xs[t], &us[t]).layers);
    backward.push_back(AdapterPlaces(layers, rows, true, &dys[t], &vs[t]).layers);
  }
  Tensors found;
  for (size_t i = 0; i < count; ++i)
    for (int j = 0; j < kLinears; ++j) {
      const Linear& linear = layers[i].linears[j];
      if (!layers[i].waits(j)) continue;
      const int64_t in = linear.in(), out = linear.out();
      check(j != kOut || os[0].numel() == int64_t(count) * n * in, "o", "what these layers leave", os[0]);
      int64_t codes = 0;  // of the adapters before, in a step
      for (size_t k = 0; k < linear.adapters.size(); ++k) {
        const int64_t rank = linear.adapters[k].rank(), begin = rows.begin(k), own_rows = rows.count(k), all = int64_t(steps) * own_rows;
        const float scale = float(linear.adapters[k].scale);
        Memory memory(os[0], all * (in + out + 2 * rank) + rank * out);
        float *x = memory.take(all * in), *dy = memory.take(all * out), *u = memory.take(all * rank), *v = memory.take(all * rank);
        for (size_t t = 0; t < steps; ++t) {
          const auto gather = [&](void* to, const void* from, int64_t first, int64_t length, int64_t size) {
            std::memcpy(static_cast<char*>(to) + int64_t(t) * own_rows * length * size, static_cast<const char*>(from) + first * size,
                        size_t(own_rows * length * size));
          };
          const Adapters &was = forward[t][i], &own = backward[t][i];
          const void* const o = static_cast<char*>(os[t].data_ptr()) + int64_t(i) * n * in * rows.size();
          gather(x, j == kOut ? o : was.rows[j].data, begin * in, in, rows.size());
          gather(dy, own.rows[j].data, begin * out, out, rows.size());
          gather(u, was.floats[j], codes, rank, sizeof(float)), gather(v, own.floats[j], codes, rank, sizeof(float));
        }
        codes += own_rows * rank;
        const Tensor da = empty(os[0], {rank, in}, ScalarType::Float), db = empty(os[0], {out, rank}, ScalarType::Float);
        float *across = memory.take(rank * out), *to = floats_of_own(db);
        cpu::lora_grad({all, rank, in, scale, v, rows.of(x, in), floats_of_own(da)}, threads());
        cpu::lora_grad({all, rank, out, scale, u, rows.of(dy, out), across}, threads());
        for (int64_t c = 0; c < out; ++c)
          for (int64_t r = 0; r < rank; ++r) to[c * rank + r] = across[r * out + c];
        found.insert(found.end(), {da, db});
      }
    }
  return found;
}

}  // namespace diffmas::binding
