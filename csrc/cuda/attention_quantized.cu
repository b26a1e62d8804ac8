// Launches the forward of few queries over rows of 8 bits.
#include "attention.h"

#include "attention/forward.cuh"
#include "attention/grid.cuh"
#include "attention/payload_rows.cuh"

namespace diffmas::cuda {

template <class T, int D, class P>
__global__ void __launch_bounds__(32 * Form<T, D>::kWarps, Form<T, D>::kBlocks)
    attention_fwd_kernel_quantized(const __grid_constant__ AttentionLaunch launch) {
  attend<T, PayloadRows<T, D, P>>(launch);
}

namespace {

// Calls visit(T, D, format) with the instantiation that serves the arguments; -> cudaErrorInvalidValue where there is none.
template <class T, class P, class Visit>
int pick_size(const AttentionLaunch& l, const Visit& visit) {
  const auto with = [&](auto d) { return visit(T{}, d, P{}); };
  if (l.a.head_dim <= 64) return with(std::integral_constant<int, 64>{});
  return l.a.head_dim <= 128 ? with(std::integral_constant<int, 128>{}) : with(std::integral_constant<int, kMaxAttentionDim>{});
}
template <class Visit>
int pick_quantized(const AttentionLaunch& l, const Visit& visit) {
  const AttentionArgs& a = l.a;
  bool fits = a.head_dim % 16 == 0 && a.head_dim <= kMaxAttentionDim && l.slots.half % 4 == 0 && !a.view.causal &&
              (a.q.dtype == DType::bf16 || a.q.dtype == DType::f16) && a.v_pool.dtype == a.k_pool.dtype;
  for (const Rows* rows : {&a.q, &a.k_pool, &a.v_pool}) fits = fits && aligned(*rows);
  if (!fits) return 1;
  const bool bfloats = a.q.dtype == DType::bf16;
  if (a.k_pool.dtype == DType::i8) return bfloats ? pick_size<bf16, int8>(l, visit) : pick_size<f16, int8>(l, visit);
  if (a.k_pool.dtype != DType::e4m3) return 1;
  return bfloats ? pick_size<bf16, e4m3>(l, visit) : pick_size<f16, e4m3>(l, visit);
}

}  // namespace
}  // namespace diffmas::cuda

using diffmas::AttentionArgs;
using namespace diffmas::cuda;

AttentionSizes diffmas_cuda_quantized_memory(const AttentionArgs* args, int device) {
  const AttentionLaunch l = launch_of(*args);
  AttentionSizes sizes{};
  pick_quantized(l, [&](auto t, auto d, auto format) {
    sizes = part_sizes<typename PayloadRows<decltype(t), d.value, decltype(format)>::F>(l, device);
    return 0;
  });
  return sizes;
}

int diffmas_cuda_quantized_forward(const AttentionArgs* args, AttentionMemory memory, int device, void* stream) {
  if (!args->n) return 0;
  if (const int error = set_device(device)) return error;
  AttentionLaunch l = launch_of(*args);
  l.parts = memory.floats, l.counters = memory.counters;
  return pick_quantized(l, [&](auto t, auto d, auto format) {
    using F = typename PayloadRows<decltype(t), d.value, decltype(format)>::F;
    const auto kernel = attention_fwd_kernel_quantized<decltype(t), d.value, decltype(format)>;
    return launch(kernel, grid_of<F>(l, device), dim3(32 * F::kWarps), F::kForwardBytes, stream, l);
  });
}
