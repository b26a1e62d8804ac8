// The argument of every kernel of cross_attention, and how kernels address a row.
//
// Heads are padded with zeros to 64, 128 or 256 dimensions in shared memory. kVectors: rows, and the slots within them, are aligned to 16
// bytes. Otherwise, and in float32 beyond 128 dimensions, kernels read rows of any dtype element by element and compute in T = float.
// float32 products are FMA on the same tiles: at 16 rows 64 MAC per key element of 4 bytes, 74 of 128 a cycle.
#pragma once
#include "cuda/attention.h"
#include "cuda/device.h"

namespace diffmas::cuda {

constexpr int kTileRows = 16, kTileKeys = 16;  // the shape of mma.sync
constexpr int kMaxShared = 101376;             // bytes of a block on sm_120, which has least
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// The order of dimensions (slots) within a row of shared memory. Where the rotation pairs dimensions i and i + half, eight of the first
// half are followed by the eight of the second, so that one lane has both in registers. Otherwise (half = 0) slot and dimension are the
// same.
struct Slots {
  int head_dim, half;

  __host__ __device__ int paired() const { return (half + 7) / 8 * 16; }
  __host__ __device__ int count() const { return paired() + head_dim - 2 * half; }
  // -1: nothing there.
  __device__ __forceinline__ int dim(int slot) const {
    const int i = slot / 16 * 8 + slot % 8;
    if (slot < paired()) return i < half ? i + slot / 8 % 2 * half : -1;
    const int d = slot - paired() + 2 * half;
    return d < head_dim ? d : -1;
  }
};

// Pool rows [row, end), a part of one segment, whose keys and values need gradients; view position = row + to_view.
struct alignas(8) KVRange {
  int row, end, to_view;
  int sequence, length;  // of the view
};

struct AttentionLaunch {
  AttentionArgs a;
  Slots slots;
  int group;           // G
  float* parts;        // of every (tile, K/V head): [parts, 16, D], and behind all of them softmax states [parts, 16, 2]
  unsigned* counters;  // of every (tile, K/V head): how many parts are here
  // For dK and dV, from attention_bwd_kernel_ranges.
  KVRange* ranges;  // [S]
  float2* bases;    // [Hkv, n, G]: base and delta of RowNumbers

  // Of the query rows of a K/V head: token * G + head of the group.
  __device__ __forceinline__ float2* bases_of(int kv_head) const { return bases + kv_head * a.n * group; }
};

// Launch forward_sm90.cuh, and after attention_bwd_kernel_ranges backward_sm90.cuh (dQ, dK and dV) or dkv_sm90.cuh (dK and dV), on a
// device of sm_90: of 16-bit types in whole packs, without position offsets. -> kNotServed where they do not serve the call.
constexpr int kNotServed = -1;
int forward_on_sm90(const AttentionLaunch& launch, int device, void* stream);
int backward_on_sm90(const AttentionLaunch& launch, void* stream);
int dkv_on_sm90(const AttentionLaunch& launch, void* stream);
// The `parts` and `counters` of backward_on_sm90.
AttentionSizes backward_sizes_on_sm90(const AttentionLaunch& launch);

// A row whose dtype is known only at run time.
struct AnyRow {
  char* data;
  DType dtype;

  __device__ __forceinline__ AnyRow operator+(int64_t elements) const { return {data + elements * (dtype == DType::f32 ? 4 : 2), dtype}; }
};
__device__ __forceinline__ float element(AnyRow row, int d) {
  if (row.dtype == DType::f32) return reinterpret_cast<const float*>(row.data)[d];
  if (row.dtype == DType::bf16) return to_float(reinterpret_cast<const bf16*>(row.data)[d]);
  return to_float(reinterpret_cast<const f16*>(row.data)[d]);
}
__device__ __forceinline__ void set_element(AnyRow row, int d, float x) {
  if (row.dtype == DType::f32) reinterpret_cast<float*>(row.data)[d] = x;
  else if (row.dtype == DType::bf16) reinterpret_cast<bf16*>(row.data)[d] = from_float<bf16>(x);
  else reinterpret_cast<f16*>(row.data)[d] = from_float<f16>(x);
}
template <class T>
__device__ __forceinline__ float element(const T* row, int d) {
  return to_float(row[d]);
}

// A T*, or an AnyRow.
template <class T, bool kVectors = true>
__device__ __forceinline__ auto row_of(const Rows& rows, int64_t row, int64_t head) {
  const int64_t from = row * rows.stride_row + head * rows.stride_head;
  if constexpr (kVectors) return static_cast<T*>(rows.data) + from;
  else return AnyRow{static_cast<char*>(rows.data), rows.dtype} + from;
}

}  // namespace diffmas::cuda
