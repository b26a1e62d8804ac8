// What kernels are written in: CUDA, and a thin layer over the instructions that need one. Everything has two forms, nvcc's and a
// twin for g++ (host.h says how that runs), so a .cu file is also C++. Conventions:
//   - a kernel takes one struct, `__global__ void kernel(const __grid_constant__ Args args)`, and is started by launch();
//   - shared memory is DIFFMAS_SHARED(float, name, [4][32]) (static) or DIFFMAS_DYNAMIC_SHARED(name), a char* (one a kernel);
//   - an instruction of one architecture goes here, with its twin beside it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <type_traits>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define DIFFMAS_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define DIFFMAS_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]
#else
#include "host.h"
#endif

namespace diffmas::cuda {

// Starts a kernel; -> a cudaError_t, 0 when all is well. A grid without blocks is nothing to do.
template <class Args>
int launch(void (*kernel)(Args), dim3 grid, dim3 threads, size_t shared_bytes, void* stream, Args args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
#ifdef __CUDACC__
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {
    const int error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error) return error;
  }
  void* arguments[] = {&args};
  return cudaLaunchKernel(function, grid, threads, arguments, shared_bytes, static_cast<cudaStream_t>(stream));
#else
  (void)stream;
  host::run(grid, threads, shared_bytes, [=] { kernel(args); });
  return 0;
#endif
}

// ---- numbers --------------------------------------------------------------------------------------------------------------------

using bf16 = __nv_bfloat16;
using f16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(bf16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(f16 x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == 4) return x;
  else if constexpr (std::is_same_v<T, bf16>) return __float2bfloat16_rn(x);
  else return __float2half_rn(x);
}

// ---- global memory --------------------------------------------------------------------------------------------------------------

// N elements that lie together; up to 16 bytes are one access.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  T x[N];
};

template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& x) {
  *reinterpret_cast<Pack<T, N>*>(p) = x;
}

// ---- asynchronous copies into shared memory: 16 bytes, aligned; visible to the copying thread after the wait ----------------------

// valid false: zeros, and `from` is not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  host::copy_async(to, valid ? from : nullptr, 16);
#endif
}

__device__ __forceinline__ void copy_async_commit() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  host::copy_async_commit();
#endif
}

// Until at most kGroupsLeft of this thread's committed groups are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
#else
  host::copy_async_wait(kGroupsLeft);
#endif
}

// ---- warps ----------------------------------------------------------------------------------------------------------------------

// Over aligned groups of `lanes` lanes (a power of two), in all of them; every lane of the warp must come.
__device__ __forceinline__ float group_sum(float x, int lanes = 32) {
  for (int step = lanes >> 1; step; step >>= 1) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ float group_max(float x, int lanes = 32) {
  for (int step = lanes >> 1; step; step >>= 1) x = fmaxf(x, __shfl_xor_sync(~0u, x, step));
  return x;
}

// Barrier `id` (1 to 15) of `threads` threads of the block, whole warps; arrive: without waiting for the others.
__device__ __forceinline__ void barrier_sync(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::meet(host::block.barriers[id], threads, 0, {__FILE__, __LINE__}, false);
#endif
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
#ifdef __CUDACC__
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
#else
  host::meet(host::block.barriers[id], threads, 0, {__FILE__, __LINE__}, false, false);
#endif
}

}  // namespace diffmas::cuda
