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

// The device of this thread's launches from now on; the caller puts back what was there.
inline int set_device(int device) {
#ifdef __CUDACC__
  return cudaSetDevice(device);
#else
  return (void)device, 0;
#endif
}

// Streaming multiprocessors. Does not wait for the device.
inline int processors(int device) {
#ifdef __CUDACC__
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) ? 1 : count;
#else
  return (void)device, host::options.processors;
#endif
}

// Whether code for sm_90a runs there.
inline bool is_sm90(int device) {
#ifdef __CUDACC__
  int major = 0, minor = 0;
  return !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major == 9 &&
         !cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) && minor == 0;
#else
  return (void)device, host::options.sm90;
#endif
}

// Of the driver and of the runtime that we are linked with.
inline int versions(int* driver, int* runtime) {
#ifdef __CUDACC__
  if (const int error = cudaDriverGetVersion(driver)) return error;
  return cudaRuntimeGetVersion(runtime);
#else
  return *driver = *runtime = 0;
#endif
}

inline const char* error_text(int error) {
#ifdef __CUDACC__
  return cudaGetErrorString(cudaError_t(error));
#else
  return error ? "failed" : "no error";
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

// 2^x to two units in the last place; results below 2^-126 are zero.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDACC__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

// Two of them in a word, `low` at the lower address.
template <class T>
__device__ __forceinline__ uint32_t two_from_floats(float low, float high) {
  if constexpr (std::is_same_v<T, bf16>)
    return __bfloat16_as_ushort(from_float<bf16>(low)) | uint32_t(__bfloat16_as_ushort(from_float<bf16>(high))) << 16;
  else
    return __half_as_ushort(from_float<f16>(low)) | uint32_t(__half_as_ushort(from_float<f16>(high))) << 16;
}

// x, of which the compiler knows nothing: what follows from it stays in the branch where it is needed, instead of in registers.
__device__ __forceinline__ int hidden(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// ---- global memory --------------------------------------------------------------------------------------------------------------

// N elements as they lie in memory, in whole words: 16-bit elements are not taken apart before they are used, which would double
// their registers. 16 bytes are one access.
template <class T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Pack {
  static_assert(sizeof(T) * N % 4 == 0);
  static constexpr int kWords = sizeof(T) * N / 4;
  uint32_t words[kWords];

  __device__ __forceinline__ float operator[](int i) const {
    if constexpr (sizeof(T) == 4) return __uint_as_float(words[i]);
    else if constexpr (std::is_same_v<T, bf16>) return __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    else return __half2float(__ushort_as_half(static_cast<unsigned short>(words[i / 2] >> 16 * (i % 2))));
  }
};

template <class T, int N>
__device__ __forceinline__ Pack<T, N> pack(const float (&x)[N]) {
  Pack<T, N> y;
#pragma unroll
  for (int i = 0; i < y.kWords; ++i) {
    if constexpr (sizeof(T) == 4) y.words[i] = __float_as_uint(x[i]);
    else y.words[i] = two_from_floats<T>(x[2 * i], x[2 * i + 1]);
  }
  return y;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> zeros() {
  Pack<T, N> y;
#pragma unroll
  for (int i = 0; i < y.kWords; ++i) y.words[i] = 0;
  return y;
}

// p is aligned to the pack.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load(const T* p) {
  return *reinterpret_cast<const Pack<T, N>*>(p);
}

// Of memory that nobody writes while the kernel runs: the compiler may move it before a store.
template <int N, class T>
__device__ __forceinline__ Pack<T, N> load_constant(const T* p) {
#ifdef __CUDACC__
  if constexpr (sizeof(T) * N % 16 == 0) {
    Pack<T, N> y;
#pragma unroll
    for (int i = 0; i < y.kWords; i += 4) {
      const uint4 x = __ldg(reinterpret_cast<const uint4*>(p) + i / 4);
      y.words[i] = x.x, y.words[i + 1] = x.y, y.words[i + 2] = x.z, y.words[i + 3] = x.w;
    }
    return y;
  }
#endif
  return load<N>(p);
}

template <int N, class T>
__device__ __forceinline__ void store(T* p, const Pack<T, N>& x) {
  *reinterpret_cast<Pack<T, N>*>(p) = x;
}

// ---- asynchronous copies into shared memory: aligned; visible to the copying thread after the wait --------------------------------

// valid false: zeros, and `from` is not read.
__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
#else
  host::copy_async(to, valid ? from : nullptr, 16);
#endif
}

__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool valid = true) {
#ifdef __CUDACC__
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(unsigned(__cvta_generic_to_shared(to))), "l"(from), "r"(valid ? 8 : 0)
               : "memory");
#else
  host::copy_async(to, valid ? from : nullptr, 8);
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

// ---- tensor cores: products of 16-bit elements, summed up in float32 ---------------------------------------------------------------

// Four 8 x 8 tiles from shared memory. Lane l names row l % 8 (16 bytes) of tile l / 8, and gets of tile t in words[t] the elements
// [l / 4][2 (l % 4) and the next] of it, or of it transposed.
template <bool kTransposed>
__device__ __forceinline__ void load_tiles(uint32_t (&words)[4], const void* row) {
#ifdef __CUDACC__
  const unsigned from = unsigned(__cvta_generic_to_shared(row));
  if constexpr (kTransposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(from) : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3]) : "r"(from) : "memory");
#else
  const uint4 mine = *static_cast<const uint4*>(row);
  const auto low = host::meet_warp(~0u, mine.x | uint64_t(mine.y) << 32, {__FILE__, __LINE__});
  const auto high = host::meet_warp(~0u, mine.z | uint64_t(mine.w) << 32, {__FILE__, __LINE__});
  const auto element = [&](int tile, int r, int c) { return uint32_t((c < 4 ? low : high)->value[8 * tile + r] >> 16 * (c % 4)) & 0xFFFF; };
  const int r = host::self->lane / 4, c = host::self->lane % 4 * 2;
  for (int t = 0; t < 4; ++t)
    words[t] = kTransposed ? element(t, c, r) | element(t, c + 1, r) << 16 : element(t, r, c) | element(t, r, c + 1) << 16;
#endif
}

// sum [16 x 8] += a [16 x 16] b [16 x 8]. With r = lane / 4, c = 2 (lane % 4), a lane holds of a the pairs that begin at [r][c],
// [r + 8][c], [r][c + 8], [r + 8][c + 8], of b those down from [c][r] and [c + 8][r], of the sum those at [r][c] and [r + 8][c].
template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>)
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  else
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  const auto low = host::meet_warp(~0u, a[0] | uint64_t(a[1]) << 32, {__FILE__, __LINE__});
  const auto high = host::meet_warp(~0u, a[2] | uint64_t(a[3]) << 32, {__FILE__, __LINE__});
  const auto right = host::meet_warp(~0u, b0 | uint64_t(b1) << 32, {__FILE__, __LINE__});
  const auto half = [](uint64_t words, int i) { return to_float(T{uint16_t(words >> 16 * i)}); };
  const int r = host::self->lane / 4, c = host::self->lane % 4 * 2;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      sum[i] += half((k < 8 ? low : high)->value[4 * r + k % 8 / 2], i / 2 * 2 + k % 2) * half(right->value[4 * (c + i % 2) + k % 8 / 2], k / 8 * 2 + k % 2);
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
