// Launches the kernels of cross_attention: picks the instantiation.
#include "attention.h"

#include "attention/dkv.cuh"
#include "attention/dq.cuh"
#include "attention/forward.cuh"
#include "attention/grid.cuh"
#include "attention/kv_ranges.cuh"

namespace diffmas::cuda {
namespace {

constexpr int64_t kManyRows = 64;  // of a sequence on average: from there on a tile of attention/*_sm90.cuh is worth it

// Whether rows can be read and written 16 bytes at a time.
bool in_vectors(const AttentionLaunch& l) {
  const AttentionArgs& a = l.a;
  bool fits = a.head_dim % 8 == 0 && l.slots.half % 8 == 0;
  for (const Rows* rows : {&a.q, &a.k_pool, &a.v_pool, &a.o, &a.d_o, &a.dq, &a.dk_pool, &a.dv_pool}) fits = fits && aligned(*rows);
  return fits;
}

// Calls visit(T, D, kVectors) with the instantiation that serves the arguments.
template <int D, bool kVectors, class T, class Visit>
int with(const Visit& visit) {
  return visit(T{}, std::integral_constant<int, D>{}, std::bool_constant<kVectors>{});
}
template <class T, class Visit>
int pick_size(const AttentionLaunch& l, const Visit& visit) {
  if (l.slots.count() <= 64) return with<64, true, T>(visit);
  return l.slots.count() <= 128 ? with<128, true, T>(visit) : with<kMaxAttentionDim, true, T>(visit);
}
template <class Visit>
int pick_form(const AttentionLaunch& l, const Visit& visit) {
  const AttentionArgs& a = l.a;
  if (l.slots.count() > kMaxAttentionDim || a.k_pool.dtype != a.q.dtype || a.v_pool.dtype != a.q.dtype) return 1;  // cudaErrorInvalidValue
  // float32 is for tests and small models, and each instantiation takes seconds to compile: there are few.
  const bool wide = a.q.dtype == DType::f32;
  if (!in_vectors(l) || (wide && l.slots.count() > 128)) return with<kMaxAttentionDim, false, float>(visit);
  if (wide) return with<128, true, float>(visit);
  return a.q.dtype == DType::bf16 ? pick_size<bf16>(l, visit) : pick_size<f16>(l, visit);
}

// Whether the sm_90 kernels may serve a call: 16-bit types in whole packs, no position offsets, more query rows than a warpgroup's.
template <class T>
bool for_sm90(const AttentionLaunch& l, bool vectors, int device) {
  return vectors && sizeof(T) == 2 && !l.a.view.offset && l.a.n * l.group > kManyRows * l.a.view.batch && is_sm90(device);
}

// Whether dQ, dK and dV come from one kernel.
template <class T>
bool in_one_kernel(const AttentionLaunch& l, bool vectors, int device) {
  return l.a.dq.data && for_sm90<T>(l, vectors, device);
}

// The memory that merge_all needs, or the backward in one kernel. Both are read 16 bytes at a time, so they come first.
template <class T, int D, bool kVectors>
AttentionSizes sizes_of(const AttentionLaunch& l, bool backward, int device) {
  AttentionSizes sizes = part_sizes<Form<T, D>>(l, device);
  if (backward && in_one_kernel<T>(l, kVectors, device)) {
    const AttentionSizes more = backward_sizes_on_sm90(l);
    sizes = {max(sizes.floats, more.floats), max(sizes.counters, more.counters)};
  }
  return sizes;
}

}  // namespace
}  // namespace diffmas::cuda

using diffmas::AttentionArgs;
using namespace diffmas::cuda;

AttentionSizes diffmas_cuda_attention_memory(const AttentionArgs* args, bool backward, int device) {
  const AttentionLaunch l = launch_of(*args);
  AttentionSizes sizes{};
  pick_form(l, [&](auto t, auto d, auto v) {
    sizes = sizes_of<decltype(t), d.value, v.value>(l, backward, device);
    return 0;
  });
  if (backward) sizes.floats += 2 * args->n * args->q_heads + int64_t(sizeof(KVRange) / sizeof(float)) * args->segments;
  return sizes;
}

int diffmas_cuda_attention_forward(const AttentionArgs* args, AttentionMemory memory, int device, void* stream) {
  if (!args->n) return 0;
  if (const int error = set_device(device)) return error;
  AttentionLaunch l = launch_of(*args);
  l.parts = memory.floats, l.counters = memory.counters;
  return pick_form(l, [&](auto t, auto d, auto v) {
    using F = Form<decltype(t), d.value>;
    if (for_sm90<decltype(t)>(l, v.value, device))
      if (const int error = forward_on_sm90(l, device, stream); error != kNotServed) return error;
    const dim3 grid = grid_of<F>(l, device);
    return launch(attention_fwd_kernel<decltype(t), d.value, v.value>, grid, dim3(32 * F::kWarps), F::kForwardBytes, stream, l);
  });
}

int diffmas_cuda_attention_backward(const AttentionArgs* args, AttentionMemory memory, int device, void* stream) {
  if (!args->n) return 0;
  if (const int error = set_device(device)) return error;
  AttentionLaunch l = launch_of(*args);
  l.parts = memory.floats, l.counters = memory.counters;
  return pick_form(l, [&](auto t, auto d, auto v) {
    using T = decltype(t);
    l.bases = reinterpret_cast<float2*>(l.parts + sizes_of<T, d.value, v.value>(l, true, device).floats);
    l.ranges = reinterpret_cast<KVRange*>(l.bases + args->n * args->q_heads);
    const int64_t rows = args->n * args->q_heads + args->view.batch;
    const dim3 rows_grid(unsigned((rows + kRangesWarps - 1) / kRangesWarps));
    if (const int error = launch(attention_bwd_kernel_ranges<T, v.value>, rows_grid, dim3(32 * kRangesWarps), 0, stream, l)) return error;
    if (in_one_kernel<T>(l, v.value, device))
      if (const int error = backward_on_sm90(l, stream); error != kNotServed) return error;
    if (args->dq.data) {
      using F = Form<T, d.value>;
      const dim3 threads(32 * F::kWarps);
      if (const int error = launch(attention_bwd_kernel_dq<T, d.value, v.value>, grid_of<F>(l, device), threads,
                                   F::kBackwardBytes, stream, l))
        return error;
    }
    if (for_sm90<T>(l, v.value, device))
      if (const int error = dkv_on_sm90(l, stream); error != kNotServed) return error;
    using F = PoolForm<T, d.value>;
    // One wave of blocks looks for the rows that need gradients. Older rows have more queries; with many of them up to eight waves even
    // it out.
    const int64_t tiles = (args->pool_rows + F::kRows - 1) / F::kRows,
                  waves = min(int64_t(8), 1 + args->n * l.group / args->view.batch / 64);
    const int64_t blocks = (waves * F::kBlocks * processors(device) + args->kv_heads - 1) / args->kv_heads;
    const dim3 grid(unsigned(min(tiles, blocks)), unsigned(args->kv_heads));
    return launch(attention_bwd_kernel_dkv<T, d.value, v.value>, grid, dim3(32 * F::kWarps), F::kBytes, stream, l);
  });
}
