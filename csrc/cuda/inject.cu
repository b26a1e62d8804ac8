// Launches the kernels of inject: picks the instantiation and the number of blocks.
#include "inject.h"

#include "inject/backward.cuh"
#include "inject/forward.cuh"

namespace diffmas::cuda {
namespace {

bool aligned(const Rows& rows, DType dtype) {
  const int64_t elements = dtype == DType::f32 ? 4 : 8;
  return rows.dtype == dtype && reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.stride_row % elements == 0 &&
         rows.stride_head % elements == 0;
}
bool aligned(const Table& table, DType dtype) {
  const int64_t elements = dtype == DType::f32 ? 4 : 8;
  return !table.data || (table.dtype == dtype && reinterpret_cast<uintptr_t>(table.data) % 16 == 0 && table.stride % elements == 0);
}

// Whether every row can be read and written 16 bytes at a time, in dtypes that have an instantiation.
bool in_vectors(const InjectArgs& a, bool backward) {
  const int64_t v = a.q.dtype == DType::f32 ? 4 : 8;
  const bool fits = a.head_dim % v == 0 && a.rotary_dim % (2 * v) == 0;
  const bool rows = aligned(a.q, a.q.dtype) && aligned(a.k, a.q.dtype) && aligned(a.q_out, a.q.dtype);
  const bool tables =
      (aligned(a.cos, a.q.dtype) && aligned(a.sin, a.q.dtype)) || (aligned(a.cos, DType::f32) && aligned(a.sin, DType::f32));
  const DType pool = backward ? DType::f32 : a.q.dtype;
  const bool others =
      backward ? aligned(a.dq_rot, a.q.dtype) && aligned(a.dk, a.q.dtype) && aligned(a.dv, a.q.dtype) : aligned(a.v, a.q.dtype);
  return fits && rows && tables && others && aligned(a.k_pool, pool) && aligned(a.v_pool, pool) && aligned(a.q_weight, a.q.dtype) &&
         aligned(a.k_weight, a.q.dtype);
}

unsigned blocks_of(int64_t rows, int64_t groups) { return unsigned((rows + groups - 1) / groups); }

InjectLaunch launch_of(const InjectArgs& a, int v) {
  InjectLaunch launch{};
  launch.args = a;
  if (!a.cos.data) launch.args.rotary_dim = 0;
  const int64_t rotary = launch.args.rotary_dim;
  launch.rotated_units = int(rotary / (2 * v));
  launch.units = launch.rotated_units + int((a.head_dim - rotary + 2 * v - 1) / (2 * v));
  launch.lanes = 1;
  while (launch.lanes < launch.units && launch.lanes < 32) launch.lanes *= 2;
  const int64_t groups = kInjectThreads / launch.lanes;
  launch.q_blocks = blocks_of(a.n * a.q_heads, groups), launch.kv_blocks = blocks_of(a.n * a.kv_heads, groups);
  return launch;
}

// Few blocks that loop over rows, divided between q and k by the bytes of a row. The bits of the weights' gradients depend on their number.
InjectLaunch backward_launch_of(const InjectArgs& a, int v, int device) {
  InjectLaunch launch = launch_of(a, v);
  const int64_t element = a.q.dtype == DType::f32 ? 4 : 2;
  const double q = double(3 * element * a.q_heads), kv = double((3 * element + 16) * a.kv_heads);
  const unsigned most = unsigned(processors(device)) * kInjectBackwardBlocks;
  const unsigned most_q = max(1u, unsigned(most * q / (q + kv))), most_kv = max(1u, most - most_q);
  launch.q_blocks = max(1u, min(launch.q_blocks, most_q)), launch.kv_blocks = max(1u, min(launch.kv_blocks, most_kv));
  return launch;
}

// Calls visit(T, C, V, N) with the instantiation that serves the arguments; T, C: types of the rows and of cos and sin.
template <int V, int N, class T, class C, class Visit>
int with(const Visit& visit) {
  return visit(T{}, C{}, std::integral_constant<int, V>{}, std::integral_constant<int, N>{});
}
template <class Visit>
int pick_form(const InjectArgs& a, bool backward, const Visit& visit) {
  if (!in_vectors(a, backward)) return with<1, 8, Any, Any>(visit);
  const bool wide = a.cos.data && a.cos.dtype == DType::f32;
  switch (a.q.dtype) {
    case DType::f32: return a.head_dim <= 256 ? with<4, 1, float, float>(visit) : with<4, 2, float, float>(visit);
    case DType::bf16: return wide ? with<8, 1, bf16, float>(visit) : with<8, 1, bf16, bf16>(visit);
    default: return wide ? with<8, 1, f16, float>(visit) : with<8, 1, f16, f16>(visit);
  }
}

int vector_size(const InjectArgs& a, bool backward) { return !in_vectors(a, backward) ? 1 : a.q.dtype == DType::f32 ? 4 : 8; }

}  // namespace
}  // namespace diffmas::cuda

using diffmas::InjectArgs;
using namespace diffmas::cuda;

const char* diffmas_cuda_error(int error) { return error_text(error); }

int diffmas_cuda_versions(int* driver, int* runtime) { return versions(driver, runtime); }

int diffmas_cuda_inject_forward(const InjectArgs* args, int device, void* stream) {
  if (const int error = set_device(device)) return error;
  const InjectLaunch launch_args = launch_of(*args, vector_size(*args, false));
  return pick_form(*args, false, [&](auto t, auto c, auto v, auto n) {
    const dim3 grid(launch_args.q_blocks + launch_args.kv_blocks);
    return launch(inject_fwd_kernel<decltype(t), decltype(c), v.value, n.value>, grid, dim3(kInjectThreads), 0, stream, launch_args);
  });
}

int64_t diffmas_cuda_inject_partials(const InjectArgs* args, int device) {
  const InjectLaunch l = backward_launch_of(*args, vector_size(*args, true), device);
  return args->head_dim * ((args->q_weight.data ? l.q_blocks : 0) + (args->k_weight.data ? l.kv_blocks : 0));
}

int diffmas_cuda_inject_backward(const InjectArgs* args, float* dq_weight, float* dk_weight, int device, void* stream) {
  if (const int error = set_device(device)) return error;
  InjectLaunch l = backward_launch_of(*args, vector_size(*args, true), device);
  l.dq_weight = dq_weight ? args->weight_partials : nullptr;
  l.dk_weight = dk_weight ? args->weight_partials + (dq_weight ? l.q_blocks * args->head_dim : 0) : nullptr;
  const int error = pick_form(*args, true, [&](auto t, auto c, auto v, auto n) {
    const size_t shared = size_t(kInjectWarps * args->head_dim) * sizeof(float);
    const dim3 grid(l.q_blocks + l.kv_blocks);
    return launch(inject_bwd_kernel<decltype(t), decltype(c), v.value, n.value>, grid, dim3(kInjectThreads), shared, stream, l);
  });
  if (error || !(dq_weight || dk_weight)) return error;
  Columns columns{{l.dq_weight, l.dk_weight}, {dq_weight, dk_weight}, {int(l.q_blocks), int(l.kv_blocks)}, int(args->head_dim)};
  if (!dq_weight) columns.x[0] = l.dk_weight, columns.y[0] = dk_weight, columns.rows[0] = int(l.kv_blocks);
  const dim3 grid(unsigned(args->head_dim + 31) / 32, dq_weight && dk_weight ? 2 : 1);
  return launch(sum_columns_kernel, grid, dim3(32 * kColumnRows), 0, stream, columns);
}
