// inject and its backward: bound by memory, or by the launch when there is one token.
//
// A row is one (token, head). It is cut into units of two packs of V elements that are rotated into each other (halves), or each in
// itself (interleaved), or not at all; a group of `lanes` lanes, a power of two, holds a row, N units a lane. So a rotation needs no
// other lane, a norm a few shuffles. Two forms: V elements are 16 bytes and dtypes are known when compiling, or V is one element
// and every dtype is looked at as it is read (odd sizes, strides or mixtures of dtypes). Sums are float32.
#pragma once
#include "../cpu/inject.h"  // the arguments: plain data, the same for both
#include "device.h"

namespace diffmas::cuda {

using cpu::DType;
using cpu::InjectArgs;
using cpu::Rows;
using cpu::Table;

constexpr int kInjectThreads = 256;
constexpr int kInjectWarps = kInjectThreads / 32;
// Blocks of the backward on a multiprocessor: few, as each leaves a row of the weights' gradients; enough to have the loads of one
// row under way while another is summed up.
constexpr int kInjectBackwardBlocks = 2;

struct InjectLaunch {
  InjectArgs args;
  int lanes;                    // of a row
  int units, rotated_units;     // of a row; the rotated ones come first
  unsigned q_blocks, kv_blocks; // the first ones do rows of q, the others of k and v
  float *dq_weight, *dk_weight; // backward: [blocks, D] each
};

// ---- elements of a dtype that is known when compiling, or Any -----------------------------------------------------------------------

struct Any {};
template <class T> struct RawOf { using type = T; };
template <> struct RawOf<Any> { using type = float; };
template <class T> using Raw = typename RawOf<T>::type;

template <class T>
__device__ __forceinline__ int64_t bytes_of(DType dtype) {
  if constexpr (std::is_same_v<T, Any>) return dtype == DType::f32 ? 4 : 2;
  else return sizeof(T);
}

// Elements i .. i + V of a row, or zeros. kConstant: of an input that the kernel does not write.
template <class T, int V, bool kConstant = true>
__device__ __forceinline__ Pack<Raw<T>, V> load_if(bool valid, const void* row, DType dtype, int i) {
  if (!valid) return zeros<Raw<T>, V>();
  if constexpr (std::is_same_v<T, Any>) {
    if (dtype == DType::f32) return load<1>(static_cast<const float*>(row) + i);
    const float x[] = {dtype == DType::bf16 ? to_float(static_cast<const bf16*>(row)[i]) : to_float(static_cast<const f16*>(row)[i])};
    return pack<float>(x);
  } else {
    const T* p = static_cast<const T*>(row) + i;
    return kConstant ? load_constant<V>(p) : load<V>(p);
  }
}

template <class T, int V>
__device__ __forceinline__ void store_pack(void* row, DType dtype, int i, const Pack<Raw<T>, V>& x) {
  if constexpr (std::is_same_v<T, Any>) {
    if (dtype == DType::f32) static_cast<float*>(row)[i] = x[0];
    else if (dtype == DType::bf16) static_cast<bf16*>(row)[i] = from_float<bf16>(x[0]);
    else static_cast<f16*>(row)[i] = from_float<f16>(x[0]);
  } else {
    store<V>(static_cast<T*>(row) + i, x);
  }
}

// ---- units ------------------------------------------------------------------------------------------------------------------------

// Where the two packs of a unit begin, and whether they are there.
struct Place {
  int at[2];
  bool has[2], rotated;
};

template <int V>
__device__ __forceinline__ Place place_of(const InjectLaunch& launch, int unit, bool live) {
  const int D = int(launch.args.head_dim), Dr = int(launch.args.rotary_dim);
  Place p;
  p.rotated = unit < launch.rotated_units;
  const bool halves = p.rotated && !launch.args.interleaved;
  p.at[0] = halves ? unit * V : 2 * unit * V;  // rotated units hold 2 V elements each, so the rest begins at Dr
  p.at[1] = p.at[0] + (halves ? Dr / 2 : V);
  p.has[0] = live && unit < launch.units;
  p.has[1] = p.has[0] && p.at[1] < D;
  return p;
}

// As it lies in memory, and as floats.
template <class T, int V>
struct Unit {
  Pack<Raw<T>, V> half[2];

  __device__ __forceinline__ Unit() {}
  __device__ __forceinline__ Unit(const Place& p, const void* row, DType dtype)
      : half{load_if<T, V>(p.has[0], row, dtype, p.at[0]), load_if<T, V>(p.has[1], row, dtype, p.at[1])} {}
  // A row that is zeroed later.
  __device__ __forceinline__ static Unit taken(const Place& p, const void* row) {
    Unit y;
    y.half[0] = load_if<T, V, false>(p.has[0], row, DType::f32, p.at[0]);
    y.half[1] = load_if<T, V, false>(p.has[1], row, DType::f32, p.at[1]);
    return y;
  }
  __device__ __forceinline__ float operator()(int h, int e) const { return half[h][e]; }

  __device__ __forceinline__ void store(const Place& p, void* row, DType dtype) const {
    if (p.has[0]) store_pack<T, V>(row, dtype, p.at[0], half[0]);
    if (p.has[1]) store_pack<T, V>(row, dtype, p.at[1], half[1]);
  }
  __device__ __forceinline__ static void zero(const Place& p, void* row) {
    Unit y;
    y.half[0] = y.half[1] = zeros<Raw<T>, V>();
    y.store(p, row, DType::f32);
  }
};

template <int V>
struct Floats {
  float half[2][V];

  __device__ __forceinline__ float& operator()(int h, int e) { return half[h][e]; }

  template <class T>
  __device__ __forceinline__ Unit<T, V> to() const {
    Unit<T, V> y;
    y.half[0] = pack<Raw<T>>(half[0]), y.half[1] = pack<Raw<T>>(half[1]);
    return y;
  }
};

// y1 = x1 cos1 - x2 sin1, y2 = x2 cos2 + x1 sin2; its transpose.
__device__ __forceinline__ void rotate(float& x1, float& x2, float cos1, float cos2, float sin1, float sin2) {
  const float y1 = x1 * cos1 - x2 * sin1;
  x2 = x2 * cos2 + x1 * sin2;
  x1 = y1;
}
__device__ __forceinline__ void rotate_back(float& x1, float& x2, float cos1, float cos2, float sin1, float sin2) {
  const float y1 = x1 * cos1 + x2 * sin2;
  x2 = x2 * cos2 - x1 * sin1;
  x1 = y1;
}

template <bool kBack, int V, class C>
__device__ __forceinline__ void turn(Floats<V>& x, const Unit<C, V>& cos, const Unit<C, V>& sin, bool interleaved) {
  const auto pair = [&](int h1, int e1, int h2, int e2) {
    if constexpr (kBack) rotate_back(x(h1, e1), x(h2, e2), cos(h1, e1), cos(h2, e2), sin(h1, e1), sin(h2, e2));
    else rotate(x(h1, e1), x(h2, e2), cos(h1, e1), cos(h2, e2), sin(h1, e1), sin(h2, e2));
  };
  if (V > 1 && interleaved) {
#pragma unroll
    for (int h = 0; h < 2; ++h)
#pragma unroll
      for (int e = 0; e + 1 < V; e += 2) pair(h, e, h, e + 1);
  } else {
#pragma unroll
    for (int e = 0; e < V; ++e) pair(0, e, 1, e);
  }
}

// ---- rows -------------------------------------------------------------------------------------------------------------------------

template <class T>
__device__ __forceinline__ char* row_at(const Rows& rows, int64_t row, int64_t head) {
  return static_cast<char*>(rows.data) + (row * rows.stride_row + head * rows.stride_head) * bytes_of<T>(rows.dtype);
}
template <class C>
__device__ __forceinline__ const char* table_at(const Table& table, int64_t row) {
  return static_cast<const char*>(table.data) + row * table.stride * bytes_of<C>(table.dtype);
}

// Which row a group works on. No lane leaves before the others of its warp: shuffles need them all.
struct Group {
  int lane, group, groups;  // lane within the group, group within the block

  __device__ __forceinline__ explicit Group(int lanes)
      : lane(int(threadIdx.x) & (lanes - 1)), group(int(threadIdx.x) / lanes), groups(kInjectThreads / lanes) {}
};

// cos and sin of N units of a token.
template <class C, int V, int N>
struct Turns {
  Unit<C, V> cos[N], sin[N];

  __device__ __forceinline__ Turns(const InjectArgs& a, const Place (&places)[N], int64_t token) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Place p = places[n];
      p.has[0] = p.has[0] && p.rotated, p.has[1] = p.has[1] && p.rotated;
      cos[n] = Unit<C, V>(p, table_at<C>(a.cos, token), a.cos.dtype);
      sin[n] = Unit<C, V>(p, table_at<C>(a.sin, token), a.sin.dtype);
    }
  }
};

// to = from, normed and rotated.
template <class T, class C, int V, int N>
__device__ __forceinline__ void turn_row(const InjectLaunch& launch, const Place (&places)[N], const Rows& to, int64_t to_row, const Rows& from,
                                         int64_t token, int head, const Table& weight) {
  const InjectArgs& a = launch.args;
  Unit<T, V> x[N], w[N];
#pragma unroll
  for (int n = 0; n < N; ++n) x[n] = Unit<T, V>(places[n], row_at<T>(from, token, head), from.dtype);
  const Turns<C, V, N> turns(a, places, token);
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
    if (places[n].rotated) turn<false>(y, turns.cos[n], turns.sin[n], a.interleaved);
    y.template to<T>().store(places[n], row_at<T>(to, to_row, head), to.dtype);
  }
}

template <class T, class C, int V, int N>
__global__ void __launch_bounds__(kInjectThreads, V == 1 || N > 1 ? 1 : sizeof(Raw<C>) > sizeof(Raw<T>) ? 3 : 4) inject_fwd_kernel(const __grid_constant__ InjectLaunch launch) {
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
    turn_row<T, C, V, N>(launch, places, a.q_out, to_row, a.q, token, int(head), a.q_weight);
  } else {
    Unit<T, V> v[N];  // on its way while k is worked on
#pragma unroll
    for (int n = 0; n < N; ++n) v[n] = Unit<T, V>(places[n], row_at<T>(a.v, token, head), a.v.dtype);
    turn_row<T, C, V, N>(launch, places, a.k_pool, to_row, a.k, token, int(head), a.k_weight);
#pragma unroll
    for (int n = 0; n < N; ++n) v[n].store(places[n], row_at<T>(a.v_pool, to_row, head), a.v_pool.dtype);
  }
}

// ---- backward -----------------------------------------------------------------------------------------------------------------------

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

// The gradient dy of a row as it left, to that of the row as it came. y = rotated(x r w) with r = 1 / rms(x):
// with u = dy rotated back, dx = r w u - x r^3 mean(u w x), dw = sum of u x r.
template <class T, class C, class G, int V, int N>
__device__ __forceinline__ void turn_row_back(const InjectLaunch& launch, const Place (&places)[N], const Rows& dx, const Unit<G, V> (&dy)[N],
                                              const Unit<T, V> (&x)[N], const Table& weight, int64_t token, int head,
                                              WeightGradient<V, N>& gradient) {
  const InjectArgs& a = launch.args;
  Unit<T, V> w[N];
  if (weight.data)
#pragma unroll
    for (int n = 0; n < N; ++n) w[n] = Unit<T, V>(places[n], weight.data, weight.dtype);
  const Turns<C, V, N> turns(a, places, token);
  Floats<V> u[N];
#pragma unroll
  for (int n = 0; n < N; ++n) {
#pragma unroll
    for (int e = 0; e < 2 * V; ++e) u[n](e / V, e % V) = dy[n](e / V, e % V);
    if (places[n].rotated) turn<true>(u[n], turns.cos[n], turns.sin[n], a.interleaved);
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
__global__ void __launch_bounds__(kInjectThreads, V == 1 || N > 1 ? 1 : kInjectBackwardBlocks) inject_bwd_kernel(const __grid_constant__ InjectLaunch launch) {
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
      turn_row_back<T, C>(launch, places, a.q_out, dy, x, a.q_weight, token, int(head), gradient);
    } else {  // the gradient pools are float32, their rows are taken out; zeros where nothing was stored
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
      turn_row_back<T, C>(launch, places, a.dk, dk, x, a.k_weight, token, int(head), gradient);
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
