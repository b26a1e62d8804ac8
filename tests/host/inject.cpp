// inject and its backward as csrc/cuda/inject.cu launches them.
#include "cuda/inject.cu"

#include "tensors.h"

namespace {

using diffmas::DType, diffmas::Rows, diffmas::Table;
using diffmas::host::Tensors;

DType dtype_of(const Tensors& t, const char* name) {
  const std::string& dtype = t.dtype(name);
  return dtype == "float32" ? DType::f32 : dtype == "bfloat16" ? DType::bf16 : DType::f16;
}
Rows rows(const Tensors& t, const char* name) {
  if (!t.has(name)) return {};
  return {t.data(name), t.stride(name, 0), t.stride(name, 1), dtype_of(t, name)};
}
Table table(const Tensors& t, const char* name, bool vector = false) {
  if (!t.has(name)) return {};
  return {t.data(name), vector ? 0 : t.stride(name, 0), dtype_of(t, name)};
}

}  // namespace

int main() {
  Tensors t;
  diffmas::host::options.processors = int(t.number("processors"));
  const bool backward = t.number("backward");
  InjectArgs a{};
  a.n = t.size("q", 0), a.q_heads = t.size("q", 1), a.head_dim = t.size("q", 2), a.kv_heads = t.size("k", 1);
  a.rotary_dim = t.has("cos") ? t.size("cos", 1) : 0;
  a.q = rows(t, "q"), a.k = rows(t, "k"), a.v = rows(t, "v");
  a.cos = table(t, "cos"), a.sin = table(t, "sin"), a.slots = t.data<int64_t>("slots");
  a.q_weight = table(t, "q_weight", true), a.k_weight = table(t, "k_weight", true);
  a.eps = float(t.number("eps")), a.interleaved = t.number("interleaved");
  a.k_pool = rows(t, "k_pool"), a.v_pool = rows(t, "v_pool"), a.q_out = rows(t, "q_out");
  a.dq_rot = rows(t, "dq_rot"), a.dk = rows(t, "dk"), a.dv = rows(t, "dv");
  if (int(t.number("vectors")) != int(in_vectors(a, backward))) diffmas::host::fail("another form than the test expects");
  if (backward) {
    std::vector<float> partials(size_t(diffmas_cuda_inject_partials(&a, 0)), NAN);
    a.weight_partials = partials.data();
    diffmas_cuda_inject_backward(&a, t.data<float>("dq_weight"), t.data<float>("dk_weight"), 0, nullptr);
  } else {
    diffmas_cuda_inject_forward(&a, 0, nullptr);
  }
  t.finish();
}
