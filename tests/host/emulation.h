// Emulates csrc/cuda/instructions.h and csrc/cuda/runtime.h on the CPU, function by function, with the contracts that are stated there.
// csrc/cuda/device.h includes this file where DIFFMAS_HOST_EMULATION is defined.
#pragma once
#include "host.h"

#include "cuda/numbers.h"

namespace diffmas::cuda {

// ---- csrc/cuda/runtime.h

template <class Args>
int launch(void (*kernel)(Args), dim3 grid, dim3 threads, size_t shared_bytes, void*, Args args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  host::run(grid, threads, shared_bytes, [=] { kernel(args); });
  return 0;
}

inline int set_device(int) { return 0; }
inline int processors(int) { return host::options.processors; }
inline bool is_sm90(int) { return host::options.sm90; }
inline int versions(int* driver, int* runtime) { return *driver = *runtime = 0; }
inline const char* error_text(int error) { return error ? "failed" : "no error"; }

// ---- csrc/cuda/instructions.h

__device__ __forceinline__ float exp2_approximate(float x) { return exp2f(x); }

__device__ __forceinline__ void copy_async_16(void* to, const void* from, bool valid = true) {
  host::copy_async(to, valid ? from : nullptr, 16);
}

__device__ __forceinline__ void copy_async_8(void* to, const void* from, bool valid = true) {
  host::copy_async(to, valid ? from : nullptr, 8);
}

__device__ __forceinline__ void copy_async_4(void* to, const void* from, bool valid = true) {
  host::copy_async(to, valid ? from : nullptr, 4);
}

__device__ __forceinline__ void copy_async_commit() { host::copy_async_commit(); }

template <int kGroupsLeft>
__device__ __forceinline__ void copy_async_wait() {
  host::copy_async_wait(kGroupsLeft);
}

template <class T>
__device__ __forceinline__ uint32_t multiply_add_pairs(uint32_t x, uint32_t y, uint32_t z) {
  const auto one = [&](int i) {
    const auto half = [i](uint32_t word) { return double(to_float(T{uint16_t(word >> 16 * i)})); };
    return half(x) * half(y) + half(z);
  };
  return two_from_floats<T>(float(one(0)), float(one(1)));
}

template <bool kTransposed>
__device__ __forceinline__ void load_tiles(uint32_t (&words)[4], const void* row) {
  const uint4 mine = *static_cast<const uint4*>(row);
  const auto low = host::meet_warp(~0u, mine.x | uint64_t(mine.y) << 32, {__FILE__, __LINE__});
  const auto high = host::meet_warp(~0u, mine.z | uint64_t(mine.w) << 32, {__FILE__, __LINE__});
  const auto element = [&](int tile, int r, int c) { return uint32_t((c < 4 ? low : high)->value[8 * tile + r] >> 16 * (c % 4)) & 0xFFFF; };
  const int r = host::self->lane / 4, c = host::self->lane % 4 * 2;
  for (int t = 0; t < 4; ++t)
    words[t] = kTransposed ? element(t, c, r) | element(t, c + 1, r) << 16 : element(t, r, c) | element(t, r, c + 1) << 16;
}

template <class T>
__device__ __forceinline__ void multiply_add(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto low = host::meet_warp(~0u, a[0] | uint64_t(a[1]) << 32, {__FILE__, __LINE__});
  const auto high = host::meet_warp(~0u, a[2] | uint64_t(a[3]) << 32, {__FILE__, __LINE__});
  const auto right = host::meet_warp(~0u, b0 | uint64_t(b1) << 32, {__FILE__, __LINE__});
  const auto half = [](uint64_t words, int i) { return to_float(T{uint16_t(words >> 16 * i)}); };
  const int r = host::self->lane / 4, c = host::self->lane % 4 * 2;
  for (int i = 0; i < 4; ++i)
    for (int k = 0; k < 16; ++k)
      sum[i] += half((k < 8 ? low : high)->value[4 * r + k % 8 / 2], i / 2 * 2 + k % 2) *
                half(right->value[4 * (c + i % 2) + k % 8 / 2], k / 8 * 2 + k % 2);
}

__device__ __forceinline__ void barrier_sync(int id, int threads) {
  host::meet(host::block.barriers[id], threads, 0, {__FILE__, __LINE__}, false);
}
__device__ __forceinline__ void barrier_arrive(int id, int threads) {
  host::meet(host::block.barriers[id], threads, 0, {__FILE__, __LINE__}, false, false);
}

}  // namespace diffmas::cuda
