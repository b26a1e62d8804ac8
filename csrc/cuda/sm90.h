// What kernels for Hopper (sm_90a) are written in besides device.h: its instructions, and the types that they take.
#pragma once
#include "device.h"

namespace diffmas::cuda {

// A tile in shared memory is panels of 64 elements of 16 bits: rows of 128 bytes, whose 16-byte chunks are permuted within eight rows
// (the 128-byte swizzle), so panels begin at multiples of 1024.
constexpr int kPanelElements = 64, kPanelRow = 128, kPanelEight = 8 * kPanelRow;

using Barrier = uint64_t;  // phase 0 first; a phase ends when `count` threads have arrived and all expected bytes are here

// A tensor [z, y, x] of 16-bit elements in global memory, and the box that is copied of it: [box_z, box_y, 64] becomes the rows
// box_y z + y of a panel. Elements outside of the tensor are zeros; a box counts its bytes all the same.
struct BoxOf {
  const void* data;
  int64_t x, y, z, stride_y, stride_z;  // strides in elements
  int box_y, box_z;
};

// Where a product's operand lies, for 16 steps of the sum. Either every row of a panel, beginning at `first`, has the 16 elements of one
// index; or, for the transposed right side, 16 rows of panels that are `apart` bytes apart have 64 indices side by side each.
struct Operand {
  unsigned low;  // of the descriptor; its upper half is the same for all, so that 32 bits are kept and added to

  __device__ __forceinline__ explicit Operand(unsigned first, int apart = 16) : low((first >> 4 & 0x3FFF) | unsigned(apart >> 4) << 16) {}
  // `bytes` further.
  __device__ __forceinline__ Operand operator+(int bytes) const {
    Operand x = *this;
    x.low += unsigned(bytes) >> 4;
    return x;
  }
  __device__ __forceinline__ uint64_t descriptor() const { return low | uint64_t(kPanelEight >> 4) << 32 | uint64_t(1) << 62; }
};

}  // namespace diffmas::cuda

#ifdef DIFFMAS_HOST_EMULATION
#include "sm90_emulation.h"
#else
#include "sm90_instructions.h"
#endif

namespace diffmas::cuda {

// An accumulator [64 x 8 N], in 16 bits, as the left side of N / 2 products.
template <class T, int N>
__device__ __forceinline__ void as_left_side(uint32_t (&to)[N / 2][4], const float (&x)[N][4]) {
#pragma unroll
  for (int i = 0; i < 2 * N; ++i) to[i / 4][i % 4] = two_from_floats<T>(x[i / 2][i % 2 * 2], x[i / 2][i % 2 * 2 + 1]);
}

}  // namespace diffmas::cuda
