// inject: norm and rotation of every head of q and k; k and v go to their pool rows. A group of lanes has one (token, head).
#pragma once
#include "units.cuh"

namespace diffmas::cuda {

// to = from, normed and rotated.
template <class T, class C, int V, int N>
__device__ __forceinline__ void rotate_row(const InjectLaunch& launch, const Place (&places)[N], const Rows& to, int64_t to_row,
                                           const Rows& from, int64_t token, int head, const Table& weight) {
  const InjectArgs& a = launch.args;
  Unit<T, V> x[N], w[N];
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = Unit<T, V>(places[n], row_at<T>(from, token, head), from.dtype);
  const UnitTables<C, V, N> tables(a, places, token);
  float r = 1;
  if (weight.data) {
    float squares = 0;
#pragma unroll
    for (int n = 0; n < N; ++n) w[n] = Unit<T, V>(places[n], weight.data, weight.dtype);
#pragma unroll
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int e = 0; e < 2 * V; ++e) squares += x[n](e / V, e % V) * x[n](e / V, e % V);
    r = rsqrtf(group_sum(squares, launch.lanes) / float(a.head_dim) + a.eps);
  }
#pragma unroll
  for (int n = 0; n < N; ++n) {
    Floats<V> y;
#pragma unroll
    for (int e = 0; e < 2 * V; ++e) {
      y(e / V, e % V) = x[n](e / V, e % V);
      if (weight.data) y(e / V, e % V) *= r * w[n](e / V, e % V);
    }
    if (places[n].rotated) rotate_unit<false>(y, tables.cos[n], tables.sin[n], a.interleaved);
    y.template to<T>().store(places[n], row_at<T>(to, to_row, head), to.dtype);
  }
}

template <class T, class C, int V, int N>
__global__ void __launch_bounds__(kInjectThreads, V == 1 || N > 1                   ? 1
                                                  : sizeof(Raw<C>) > sizeof(Raw<T>) ? 3
                                                                                    : 4)
    inject_fwd_kernel(const __grid_constant__ InjectLaunch launch) {
  const InjectArgs& a = launch.args;
  const Group group(launch.lanes);
  const bool is_q = blockIdx.x < launch.q_blocks;
  const unsigned heads = unsigned(is_q ? a.q_heads : a.kv_heads);
  const unsigned row = (is_q ? blockIdx.x : blockIdx.x - launch.q_blocks) * unsigned(group.groups) + unsigned(group.group);
  const unsigned token = row / heads, head = row % heads;
  bool live = token < a.n;
  int64_t to_row = token;
  if (!is_q) {
    to_row = live ? a.slots[token] : -1;
    live = to_row >= 0;
  }
  Place places[N];
#pragma unroll
  for (int n = 0; n < N; ++n) places[n] = place_of<V>(launch, group.lane + n * launch.lanes, live);
  if (is_q) {
    rotate_row<T, C, V, N>(launch, places, a.q_out, to_row, a.q, token, int(head), a.q_weight);
  } else {
    Unit<T, V> v[N];  // loads while k is computed
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = Unit<T, V>(places[n], row_at<T>(a.v, token, head), a.v.dtype);
    rotate_row<T, C, V, N>(launch, places, a.k_pool, to_row, a.k, token, int(head), a.k_weight);
#pragma unroll
    for (int n = 0; n < N; ++n) v[n].store(places[n], row_at<T>(a.v_pool, to_row, head), a.v_pool.dtype);
  }
}

}  // namespace diffmas::cuda
