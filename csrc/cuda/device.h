// What kernels are written in: CUDA, and a thin layer over instructions that CUDA has no function for. nvcc compiles kernels with
// instructions.h and runtime.h; the tests compile the same kernels with a C++ compiler and an emulation of both (tests/host). Conventions:
//   - a kernel takes one struct, `__global__ void kernel(const __grid_constant__ Args args)`, and is started by launch();
//   - shared memory is DIFFMAS_SHARED(float, name, [4][32]) (static) or DIFFMAS_DYNAMIC_SHARED(name), a char* (one a kernel);
//   - an instruction of one architecture is a function of instructions.h (or sm90_instructions.h), with an emulation in tests/host.
#pragma once
#ifdef DIFFMAS_HOST_EMULATION
#include "emulation.h"
#else
#include "instructions.h"
#include "runtime.h"
#endif

namespace diffmas::cuda {

// Over aligned groups of `lanes` lanes (a power of two), in all of them; every lane of the warp must come.
__device__ __forceinline__ float group_sum(float x, int lanes = 32) {
  for (int step = lanes >> 1; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float group_max(float x, int lanes = 32) {
  for (int step = lanes >> 1; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }

// Sums over a warp: of all lanes; of those up to this one.
__device__ __forceinline__ int warp_sum(int x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ int warp_scan(int x) {
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, x, unsigned(step));
    if (lane_id() >= step) x += left;
  }
  return x;
}

}  // namespace diffmas::cuda
