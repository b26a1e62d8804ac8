// A row of inject in the registers of a group of lanes. inject is bound by memory, or by the launch when there is one token.
//
// A row is one (token, head). It is cut into units of two packs of V elements that are rotated into each other (halves), or each in
// itself (interleaved), or not at all; a group of `lanes` lanes, a power of two, holds a row, N units a lane. So a rotation needs no
// other lane, a norm a few shuffles. Either V elements are 16 bytes and dtypes are template arguments, or V is 1
// and every element's dtype is looked at as it is read (odd sizes, strides or mixtures of dtypes). Sums are float32.
#pragma once
#include "common/inject.h"
#include "cuda/device.h"

namespace diffmas::cuda {

constexpr int kInjectThreads = 256;
constexpr int kInjectWarps = kInjectThreads / 32;
// Blocks of the backward on a multiprocessor: few, as each leaves a row of the weights' gradients; enough to have the loads of one
// row under way while another is summed up.
constexpr int kInjectBackwardBlocks = 2;

struct InjectLaunch {
  InjectArgs args;
  int lanes;                     // of a row
  int units, rotated_units;      // of a row; the rotated ones come first
  unsigned q_blocks, kv_blocks;  // the first ones do rows of q, the others of k and v
  float *dq_weight, *dk_weight;  // backward: [blocks, D] each
};

// ---- elements of type T, or of any dtype (Any)

struct Any {};
template <class T>
struct RawOf {
  using type = T;
};
template <>
struct RawOf<Any> {
  using type = float;
};
template <class T>
using Raw = typename RawOf<T>::type;

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

// ---- units

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

// A unit as it lies in memory; Floats below has it as floats.
template <class T, int V>
struct Unit {
  Pack<Raw<T>, V> half[2];

  __device__ __forceinline__ Unit() {}
  __device__ __forceinline__ Unit(const Place& p, const void* row, DType dtype)
      : half{load_if<T, V>(p.has[0], row, dtype, p.at[0]), load_if<T, V>(p.has[1], row, dtype, p.at[1])} {}
  // Of a gradient row, which the kernel zeroes later.
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
__device__ __forceinline__ void rotate_unit(Floats<V>& x, const Unit<C, V>& cos, const Unit<C, V>& sin, bool interleaved) {
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

// ---- rows

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
struct UnitTables {
  Unit<C, V> cos[N], sin[N];

  __device__ __forceinline__ UnitTables(const InjectArgs& a, const Place (&places)[N], int64_t token) {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      Place p = places[n];
      p.has[0] = p.has[0] && p.rotated, p.has[1] = p.has[1] && p.rotated;
      cos[n] = Unit<C, V>(p, table_at<C>(a.cos, token), a.cos.dtype);
      sin[n] = Unit<C, V>(p, table_at<C>(a.sin, token), a.sin.dtype);
    }
  }
};

}  // namespace diffmas::cuda
