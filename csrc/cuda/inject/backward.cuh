// The backward of inject: a few blocks that loop over rows, each of which leaves one row of the weights' gradients, and a second small
// kernel that sums these in order.
#pragma once
#include "units.cuh"

namespace diffmas::cuda {

template <int V, int N>
struct WeightGradient {
  Floats<V> sum[N] = {};

  // Over the rows of a block, in a fixed order: groups of a warp by shuffles, then warp by warp. sums: [warps, D].
  __device__ __forceinline__ void store_block(const InjectLaunch& launch, float* sums, float* out) {
    const int D = int(launch.args.head_dim), lane = int(threadIdx.x) % 32;
#pragma unroll
    for (int n = 0; n < N; ++n) {
      const Place p = place_of<V>(launch, (lane & (launch.lanes - 1)) + n * launch.lanes, true);
#pragma unroll
      for (int e = 0; e < 2 * V; ++e) {
        float& x = sum[n](e / V, e % V);
        for (int step = launch.lanes; step < 32; step *= 2) x += __shfl_xor_sync(~0u, x, step);
        if (lane < launch.lanes && p.has[e / V]) sums[int(threadIdx.x) / 32 * D + p.at[e / V] + e % V] = x;
      }
    }
    __syncthreads();
    for (int i = int(threadIdx.x); i < D; i += kInjectThreads) {
      float total = 0;
      for (int warp = 0; warp < kInjectWarps; ++warp) total += sums[warp * D + i];
      out[i] = total;
    }
  }
};

// The gradient dx of a row from the gradient dy of y = rotated(x r w), r = 1 / rms(x). With u = dy rotated back:
// dx = r w u - x r^3 mean(u w x), dw = sum of u x r.
template <class T, class C, class G, int V, int N>
__device__ __forceinline__ void rotate_row_back(const InjectLaunch& launch, const Place (&places)[N], const Rows& dx,
                                                const Unit<G, V> (&dy)[N], const Unit<T, V> (&x)[N], const Table& weight, int64_t token,
                                                int head, WeightGradient<V, N>& gradient) {
  const InjectArgs& a = launch.args;
  Unit<T, V> w[N];
  if (weight.data)
#pragma unroll
    for (int n = 0; n < N; ++n) w[n] = Unit<T, V>(places[n], weight.data, weight.dtype);
  const UnitTables<C, V, N> tables(a, places, token);
  Floats<V> u[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2 * V; ++e) u[n](e / V, e % V) = dy[n](e / V, e % V);
    if (places[n].rotated) rotate_unit<true>(u[n], tables.cos[n], tables.sin[n], a.interleaved);
  }
  if (weight.data) {
    float squares = 0, dot = 0;
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2 * V; ++e) {
        const float xe = x[n](e / V, e % V);
        squares += xe * xe;
        dot += u[n](e / V, e % V) * w[n](e / V, e % V) * xe;
      }
    const float size = float(a.head_dim);
    const float r = rsqrtf(group_sum(squares, launch.lanes) / size + a.eps);
    const float c = r * r * r * (group_sum(dot, launch.lanes) / size);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2 * V; ++e) {
        const float ue = u[n](e / V, e % V), xe = x[n](e / V, e % V);
        gradient.sum[n](e / V, e % V) += ue * (xe * r);
        u[n](e / V, e % V) = r * w[n](e / V, e % V) * ue - c * xe;
      }
  }
#pragma unroll
  for (int n = 0; n < N; ++n) u[n].template to<T>().store(places[n], row_at<T>(dx, token, head), dx.dtype);
}

template <class T, class C, int V, int N>
__global__ void __launch_bounds__(kInjectThreads, V == 1 || N > 1 ? 1 : kInjectBackwardBlocks)
    inject_bwd_kernel(const __grid_constant__ InjectLaunch launch) {
  DIFFMAS_DYNAMIC_SHARED(shared);
  const InjectArgs& a = launch.args;
  const Group group(launch.lanes);
  const bool is_q = blockIdx.x < launch.q_blocks;
  const unsigned block = is_q ? blockIdx.x : blockIdx.x - launch.q_blocks, blocks = is_q ? launch.q_blocks : launch.kv_blocks;
  const unsigned heads = unsigned(is_q ? a.q_heads : a.kv_heads), rows = unsigned(a.n) * heads, groups = unsigned(group.groups);
  WeightGradient<V, N> gradient;
  for (unsigned first = block * groups; first < rows; first += blocks * groups) {
    const unsigned row = first + unsigned(group.group), token = row / heads, head = row % heads;
    const bool live = row < rows;
    const int64_t slot = is_q || !live ? 0 : a.slots[token];
    Place places[N], stored[N];
#pragma unroll
    for (int n = 0; n < N; ++n) {
      places[n] = place_of<V>(launch, group.lane + n * launch.lanes, live);
      stored[n] = place_of<V>(launch, group.lane + n * launch.lanes, live && slot >= 0);
    }
    Unit<T, V> x[N];  // only a norm asks for it
    const auto load_x = [&](const Rows& rows, const Table& weight) {
      if (weight.data)
#pragma unroll
        for (int n = 0; n < N; ++n) x[n] = Unit<T, V>(places[n], row_at<T>(rows, token, head), rows.dtype);
    };
    if (is_q) {
      Unit<T, V> dy[N];
#pragma unroll
      for (int n = 0; n < N; ++n) dy[n] = Unit<T, V>(places[n], row_at<T>(a.dq_rot, token, head), a.dq_rot.dtype);
      load_x(a.q, a.q_weight);
      rotate_row_back<T, C>(launch, places, a.q_out, dy, x, a.q_weight, token, int(head), gradient);
    } else {  // takes rows out of the gradient pools, which are float32; zeros where nothing was stored
      char *dk_row = row_at<float>(a.k_pool, slot, head), *dv_row = row_at<float>(a.v_pool, slot, head);
      Unit<float, V> dk[N], dv[N];
#pragma unroll
      for (int n = 0; n < N; ++n) dk[n] = Unit<float, V>::taken(stored[n], dk_row), dv[n] = Unit<float, V>::taken(stored[n], dv_row);
      load_x(a.k, a.k_weight);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        Floats<V> y;
#pragma unroll
        for (int e = 0; e < 2 * V; ++e) y(e / V, e % V) = dv[n](e / V, e % V);
        y.template to<T>().store(places[n], row_at<T>(a.dv, token, head), a.dv.dtype);
        Unit<float, V>::zero(stored[n], dk_row);  // by the lane that has read it
        Unit<float, V>::zero(stored[n], dv_row);
      }
      rotate_row_back<T, C>(launch, places, a.dk, dk, x, a.k_weight, token, int(head), gradient);
    }
  }
  float* out = is_q ? launch.dq_weight : launch.dk_weight;
  if (out) gradient.store_block(launch, reinterpret_cast<float*>(shared), out + block * a.head_dim);
}

// Sums of columns: y[i] = x[0, i] + x[1, i] + .., for two matrices of `columns` columns.
struct Columns {
  const float* x[2];
  float* y[2];
  int rows[2];
  int columns;
};
constexpr int kColumnRows = 8;  // summed side by side, in threads of their own

__global__ void __launch_bounds__(32 * kColumnRows) sum_columns_kernel(const __grid_constant__ Columns args) {
  DIFFMAS_SHARED(float, sums, [kColumnRows][32]);
  const int lane = int(threadIdx.x) % 32, part = int(threadIdx.x) / 32, column = int(blockIdx.x) * 32 + lane, which = int(blockIdx.y);
  float total = 0;
  if (column < args.columns) {
    const float* x = args.x[which] + column;
#pragma unroll 8
    for (int row = part; row < args.rows[which]; row += kColumnRows) total += x[int64_t(row) * args.columns];
  }
  sums[part][lane] = total;
  __syncthreads();
  if (part || column >= args.columns) return;
  for (int i = 1; i < kColumnRows; ++i) total += sums[i][lane];
  args.y[which][column] = total;
}

}  // namespace diffmas::cuda
