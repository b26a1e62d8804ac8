// The language as kernels use it, and instructions that CUDA has no function for. Include device.h, not this.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "numbers.h"

#define DIFFMAS_SHARED(type, name, ...) __shared__ __align__(16) type name __VA_ARGS__
#define DIFFMAS_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) char name[]

namespace diffmas::cuda {

// 2^x to two units in the last place; results below 2^-126 are zero.
__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Asynchronous copies into shared memory: aligned; visible to the copying thread after the wait.

// valid false: zeros, and `from` is not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 8 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 4 : 0)
               : "memory");
}

__device__ __forceinline__ void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Until at most kGroupsLeft of this thread's committed groups are under way.
template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory");
}

// x y + z of two 16-bit elements in a word, each rounded once; subnormals are numbers.
template <class T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t x, uint32_t y, uint32_t z) {
  uint32_t result;
  if constexpr (std::is_same_v<T, bf16>) asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  else asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(x), "r"(y), "r"(z));
  return result;
}

// Tensor cores: products of 16-bit elements, summed up in float32.

// Four 8 x 8 tiles from shared memory. Lane l names row l % 8 (16 bytes) of tile l / 8, and gets of tile t in words[t] the elements
// [l / 4][2 (l % 4) and the next] of it, or of it transposed.
template <bool kTransposed>
__device__ __forceinline__ void load_tiles(uint32_t (&words)[4], const void* row) {
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(from)
                 : "memory");
}

// sum [16 x 8] += a [16 x 16] b [16 x 8]. With r = lane / 4, c = 2 (lane % 4), a lane holds of a the pairs that begin at [r][c],
// [r + 8][c], [r][c + 8], [r + 8][c + 8], of b those down from [c][r] and [c + 8][r], of the sum those at [r][c] and [r + 8][c].
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Barrier `id` (1 to 15) of `threads` threads of the block, whole warps; arrive: without waiting for the others.
__device__ __forceinline__ void barrier_sync(int id, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory"); }
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

}  // namespace diffmas::cuda
