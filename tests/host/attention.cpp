// cross_attention and its backward as csrc/cuda/attention.cu launches them.
#include "cuda/attention.cu"
#include "cuda/attention_sm90.cu"

#include "tensors.h"

namespace {

using diffmas::DType, diffmas::Rows;
using diffmas::host::Tensors;

Rows rows(const Tensors& t, const char* name) {
  if (!t.has(name)) return {};
  const std::string& dtype = t.dtype(name);
  return {t.data(name), t.stride(name, 0), t.stride(name, 1),
          dtype == "float32"    ? DType::f32
          : dtype == "bfloat16" ? DType::bf16
                                : DType::f16};
}

}  // namespace

int main() {
  Tensors t;
  diffmas::host::options.processors = int(t.number("processors"));
  diffmas::host::options.max_shared = size_t(t.number("max_shared"));
  diffmas::host::options.sm90 = t.number("warpgroups");
  const bool backward = t.number("backward");
  AttentionArgs a{};
  a.n = t.size("q", 0), a.q_heads = t.size("q", 1), a.head_dim = t.size("q", 2);
  a.pool_rows = t.size("k_pool", 0), a.kv_heads = t.size("k_pool", 1), a.segments = t.size("seg_start", 0);
  a.view.batch = t.size("q_indptr", 0) - 1;
  a.view.q_indptr = t.data<int64_t>("q_indptr"), a.view.seg_indptr = t.data<int64_t>("seg_indptr");
  a.view.start = t.data<int64_t>("seg_start"), a.view.length = t.data<int64_t>("seg_len"), a.view.offset = t.data<int64_t>("seg_offset");
  a.view.inv_freq = t.data<float>("inv_freq"), a.view.half_rotary = t.has("inv_freq") ? t.size("inv_freq", 0) : 0;
  a.view.grad_tail = t.data<int64_t>("grad_tail"), a.view.causal = t.number("causal");
  a.q = rows(t, "q"), a.k_pool = rows(t, "k_pool"), a.v_pool = rows(t, "v_pool"), a.o = rows(t, "o");
  a.lse = t.data<float>("lse"), a.scale = float(t.number("scale")), a.interleaved = t.number("interleaved");
  a.d_o = rows(t, "do"), a.dlse = t.data<float>("dlse"), a.dq = rows(t, "dq");
  a.dk_pool = rows(t, "dk_pool"), a.dv_pool = rows(t, "dv_pool");
  if (int(t.number("vectors")) != int(in_vectors(launch_of(a)))) diffmas::host::fail("another form than the test expects");

  const AttentionSizes sizes = diffmas_cuda_attention_memory(&a, backward, 0);
  std::vector<float> floats(size_t(sizes.floats), NAN);
  std::vector<unsigned> counters(size_t(sizes.counters));
  const auto launch = backward ? diffmas_cuda_attention_backward : diffmas_cuda_attention_forward;
  const int error = launch(&a, {floats.data(), counters.data()}, 0, nullptr);
  if (error) diffmas::host::fail("error %d", error);
  bool by_warpgroups = false;
  for (const dim3& threads : diffmas::host::launches) by_warpgroups = by_warpgroups || threads.x == Sm90Form<bf16, 64>::kThreads;
  if (backward && by_warpgroups != bool(t.number("warpgroups"))) diffmas::host::fail("dK and dV by another kernel than the test expects");
  for (unsigned counter : counters)
    if (counter) diffmas::host::fail("a counter is left at %u", counter);
  t.finish();
}
