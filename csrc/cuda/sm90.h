// Instructions that only Hopper has (sm_90a), and their twins for the host: barriers in shared memory that count bytes (mbarrier),
// tiles that the copy engine brings (TMA), products of a warpgroup (wgmma). As device.h, which says what a twin is.
//
// The twins follow the PTX manual to the bit: where a descriptor and the swizzle of an address say that an element lies, how many bytes a
// barrier waits for, that sums are not there before they are waited for. That the manual was read right only a GPU can tell.
#pragma once
#include "device.h"

#ifdef __CUDACC__
#include <cuda.h>
#endif

namespace diffmas::cuda {

// A tile in shared memory is panels of 64 elements of 16 bits: rows of 128 bytes, whose 16-byte chunks are permuted within eight rows
// (the 128-byte swizzle), so panels begin at multiples of 1024.
constexpr int kPanelElements = 64, kPanelRow = 128, kPanelEight = 8 * kPanelRow;

// As 32-bit addresses name it.
__device__ __forceinline__ unsigned shared_address(const void* p) {
#ifdef __CUDACC__
  return unsigned(__cvta_generic_to_shared(p));
#else
  return unsigned(static_cast<const char*>(p) - host::dynamic_shared);
#endif
}

// ---- barriers that count bytes --------------------------------------------------------------------------------------------------

using Barrier = uint64_t;  // phase 0 first; a phase ends when `count` threads have arrived and all expected bytes are here

#ifndef __CUDACC__
}  // namespace diffmas::cuda

namespace diffmas::host {

// A phase ends as late as it can: when somebody waits for that, or the next one begins.
struct ByteBarrier {
  int count, left;
  int waiting = 0;
  int64_t expected = 0, issued = 0;  // bytes
  uint64_t phase = 0;
  std::vector<std::function<void()>> copies;  // run when the phase ends: what they bring is poison before

  void end_phase() {
    if (left || expected != issued) return;
    for (const auto& copy : copies) copy();
    copies.clear();
    left = count, expected = issued = 0, ++phase;
  }
  void arrive(int64_t bytes) {
    end_phase();
    --left, expected += bytes;
    if (waiting) end_phase();
  }
  void issue(int64_t bytes, const std::function<void()>& copy) {
    issued += bytes, copies.push_back(copy);
    if (waiting) end_phase();
  }
  void wait_for(int parity, Place place) {
    end_phase();
    if (int(phase % 2) != parity) return;
    ++waiting, wait(phase, phase, place), --waiting;
  }
};

inline ByteBarrier& byte_barrier(const void* p) {
  const auto found = block.byte_barriers.find(p);
  if (found == block.byte_barriers.end()) fail("a barrier that was not initialised");
  return *found->second;
}

}  // namespace diffmas::host

namespace diffmas::cuda {
#endif

// By one thread; then barriers_ready(), and __syncthreads().
__device__ __forceinline__ void init_barrier(Barrier* barrier, int count) {
#ifdef __CUDACC__
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
#else
  host::block.byte_barriers[barrier] = std::make_shared<host::ByteBarrier>(host::ByteBarrier{count, count});
#endif
}
__device__ __forceinline__ void barriers_ready() {
#ifdef __CUDACC__
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
#endif
}

__device__ __forceinline__ void arrive(Barrier* barrier) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
#else
  host::byte_barrier(barrier).arrive(0);
#endif
}
// Arrives, and has this phase wait for so many bytes more, of copies that are issued after this.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
#ifdef __CUDACC__
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
#else
  host::byte_barrier(barrier).arrive(bytes);
#endif
}

// Until the phase of this parity is over; of the one before the first, odd, it is.
__device__ __forceinline__ void wait_for(Barrier* barrier, int parity) {
#ifdef __CUDACC__
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)), "r"(parity) : "memory");
#else
  host::byte_barrier(barrier).wait_for(parity, {__FILE__, __LINE__});
#endif
}

// What this thread wrote to shared memory by ordinary stores is seen by products and copies that are issued after a barrier.
__device__ __forceinline__ void publish_to_async() {
#ifdef __CUDACC__
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

// ---- boxes of tensors into panels -----------------------------------------------------------------------------------------------

// A tensor [z, y, x] of 16-bit elements in global memory, and the box that is copied of it: [box_z, box_y, 64] becomes the rows
// box_y z + y of a panel. Elements outside of the tensor are zeros; a box counts its bytes all the same.
#ifdef __CUDACC__
using TensorMap = CUtensorMap;
#else
struct TensorMap {
  const char* data;
  int64_t sizes[3], strides[3];  // x, y, z; strides in bytes
  int box_y, box_z;
};
#endif

struct BoxOf {
  const void* data;
  int64_t x, y, z, stride_y, stride_z;  // strides in elements
  int box_y, box_z;
};

// -> a cudaError_t: where the driver does not take the tensor (a stride that 16 bytes do not divide), an error without consequences.
inline int make_tensor_map(TensorMap& map, bool is_bf16, const BoxOf& of) {
#ifdef __CUDACC__
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const int error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const int error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error) cudaGetLastError();  // which nobody else is to find
    return error || result != cudaDriverEntryPointSuccess ? nullptr : reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  if (!encode) return cudaErrorNotSupported;
  const cuuint64_t sizes[] = {cuuint64_t(of.x), cuuint64_t(of.y), cuuint64_t(of.z)};
  const cuuint64_t strides[] = {cuuint64_t(of.stride_y) * 2, cuuint64_t(of.stride_z) * 2};
  const cuuint32_t box[] = {kPanelElements, cuuint32_t(of.box_y), cuuint32_t(of.box_z)}, steps[] = {1, 1, 1};
  const auto type = is_bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
  const int error = encode(&map, type, 3, const_cast<void*>(of.data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                           CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error ? cudaErrorInvalidValue : 0;
#else
  (void)is_bf16;
  if (reinterpret_cast<uintptr_t>(of.data) % 16 || of.stride_y % 8 || of.stride_z % 8) return 1;
  map = {static_cast<const char*>(of.data), {of.x, of.y, of.z}, {2, of.stride_y * 2, of.stride_z * 2}, of.box_y, of.box_z};
  return 0;
#endif
}

#ifndef __CUDACC__
}  // namespace diffmas::cuda

namespace diffmas::host {

// The 128-byte swizzle of an address in shared memory.
inline unsigned swizzled(unsigned address) { return address ^ (address >> 7 & 7) << 4; }

inline void copy_box(char* to, const cuda::TensorMap& map, int x, int y, int z) {
  const unsigned first = cuda::shared_address(to);
  for (int row = 0; row < map.box_y * map.box_z; ++row)
    for (int i = 0; i < cuda::kPanelElements; ++i) {
      const int64_t at[] = {x + i, y + row % map.box_y, z + row / map.box_y};
      uint16_t element = 0;
      bool inside = true;
      const char* from = map.data;
      for (int d = 0; d < 3; ++d) inside = inside && at[d] >= 0 && at[d] < map.sizes[d], from += at[d] * map.strides[d];
      if (inside) std::memcpy(&element, from, 2);
      std::memcpy(dynamic_shared + swizzled(first + unsigned(row * cuda::kPanelRow + 2 * i)), &element, 2);
    }
}

}  // namespace diffmas::host

namespace diffmas::cuda {
#endif

// By one thread, into a panel; 128 bytes a row count for the barrier's phase.
__device__ __forceinline__ void copy_box(char* to, const TensorMap& map, int x, int y, int z, Barrier* barrier) {
#ifdef __CUDACC__
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(shared_address(to)),
      "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
      : "memory");
#else
  const int bytes = map.box_y * map.box_z * kPanelRow;
  if (shared_address(to) % kPanelEight) host::fail("a panel at %u, which 1024 does not divide", shared_address(to));
  std::memset(to, 0xFF, size_t(bytes));
  host::byte_barrier(barrier).issue(bytes, [=, &map] { host::copy_box(to, map, x, y, z); });
#endif
}

// ---- products of a warpgroup ----------------------------------------------------------------------------------------------------

// Where 16 columns (of the sum over) of a product's operand lie: in the rows of a panel from `first` on, one an index that stays; or
// from top to bottom of panels that lie `apart` bytes from each other, 64 indices that stay side by side (as the transposed right side).
struct Operand {
  uint64_t descriptor;

  __device__ __forceinline__ explicit Operand(unsigned first, int apart = 16)
      : descriptor(uint64_t(first >> 4 & 0x3FFF) | uint64_t(apart >> 4) << 16 | uint64_t(kPanelEight >> 4) << 32 | uint64_t(1) << 62) {}
  // So many bytes further.
  __device__ __forceinline__ Operand operator+(int bytes) const {
    Operand x = *this;
    x.descriptor += unsigned(bytes) >> 4;
    return x;
  }
};

#ifndef __CUDACC__
}  // namespace diffmas::cuda

namespace diffmas::host {

// Element [index][k] of an operand, k < 16: what the descriptor says, for the 128-byte swizzle.
inline uint16_t operand_element(uint64_t descriptor, bool across, int index, int k) {
  if (descriptor >> 62 != 1 || descriptor >> 49 & 7) fail("descriptor %016llx: expected the 128-byte swizzle without an offset", (unsigned long long)descriptor);
  const auto bytes = [&](int bit) { return unsigned(descriptor >> bit & 0x3FFF) << 4; };
  const unsigned eights = bytes(32), at = across ? bytes(16) * unsigned(index / 64) + eights * unsigned(k / 8) + unsigned(k % 8 * 128 + index % 64 * 2)
                                                 : eights * unsigned(index / 8) + unsigned(index % 8 * 128 + k * 2);
  uint16_t element;
  std::memcpy(&element, dynamic_shared + swizzled(bytes(0) + at), 2);
  return element;
}

// What this lane reads of the operands: 16 of its two rows of the left side if that is in shared memory, then of its columns.
inline std::vector<uint16_t> operands_of(const Product& product) {
  std::vector<uint16_t> found;
  const int row = self->warp % 4 * 16 + self->lane / 4;
  if (!product.registers)
    for (int i = 0; i < 32; ++i) found.push_back(operand_element(product.left, false, row + i / 16 * 8, i % 16));
  for (int i = 0; i < product.columns / 4 * 16; ++i)
    found.push_back(operand_element(product.right, product.registers, i / 32 * 8 + self->lane % 4 * 2 + i / 16 % 2, i % 16));
  return found;
}

// Takes the sums away until they are waited for. Operands are read at once or then, as a GPU may: one of both by chance.
inline void issue(Product product, Place place) {
  meet_warp(~0u, 0, place);
  std::vector<uint64_t>& all = block.products[size_t(self->warp / 4)];
  const uint64_t operands = product.right ^ product.left;
  if (self->issued == all.size()) all.push_back(operands);
  if (all[self->issued++] != operands) fail("lane %d of warp %d multiplies by other operands than its warpgroup", self->lane, self->warp);
  bool under_way = false;
  for (const Product& other : self->products) under_way = under_way || other.sum == product.sum;
  const auto sum = static_cast<float*>(product.sum);
  if (!under_way) {
    product.before.assign(sum, sum + product.columns / 2);
    std::fill(sum, sum + product.columns / 2, NAN);
  }
  if ((self->issued * 0x9E3779B97F4A7C15u ^ options.seed * 0xBF58476D1CE4E5B9u) >> 40 & 1) {
    product.read = operands_of(product);
    if (product.registers) std::copy(product.registers, product.registers + 4, product.left_read), product.registers_read = true;
  }
  product.group = self->product_group;
  self->products.push_back(product);
}

template <class T> void multiply(const Product& product, Place place) {
  const auto sum = static_cast<float*>(product.sum);
  const auto number = [](uint16_t bits) { return cuda::to_float(T{bits}); };
  const std::vector<uint16_t> elements = product.read.empty() ? operands_of(product) : product.read;
  const uint16_t *left_side = elements.data(), *right = left_side + (product.registers ? 0 : 32);
  float left[2][16];
  if (product.registers) {  // lanes of a row have four columns each
    const uint32_t* a = product.registers_read ? product.left_read : product.registers;
    const auto low = meet_warp(~0u, a[0] | uint64_t(a[1]) << 32, place), high = meet_warp(~0u, a[2] | uint64_t(a[3]) << 32, place);
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k)
        left[h][k] = number(uint16_t((k < 8 ? low : high)->value[self->lane / 4 * 4 + k % 8 / 2] >> (32 * h + 16 * (k % 2))));
  } else {
    for (int i = 0; i < 32; ++i) left[i / 16][i % 16] = number(left_side[i]);
  }
  if (!product.before.empty()) std::copy(product.before.begin(), product.before.end(), sum);
  for (int i = 0; i < product.columns / 2; ++i) {  // as a lane has them: [columns / 8][4]
    float x = product.add ? sum[i] : 0;
    for (int k = 0; k < 16; ++k) x += left[i / 2 % 2][k] * number(right[(i / 4 * 2 + i % 2) * 16 + k]);
    sum[i] = x;
  }
}

}  // namespace diffmas::host

namespace diffmas::cuda {
#endif

#ifdef __CUDACC__
// Registers of an accumulator as operands of an instruction.
#define DIFFMAS_FOUR(x, j) "+f"(x[j][0]), "+f"(x[j][1]), "+f"(x[j][2]), "+f"(x[j][3])
#define DIFFMAS_32(x, j) \
  DIFFMAS_FOUR(x, j), DIFFMAS_FOUR(x, j + 1), DIFFMAS_FOUR(x, j + 2), DIFFMAS_FOUR(x, j + 3), DIFFMAS_FOUR(x, j + 4), \
      DIFFMAS_FOUR(x, j + 5), DIFFMAS_FOUR(x, j + 6), DIFFMAS_FOUR(x, j + 7)
#define DIFFMAS_NAMES_32 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, " \
  "%29, %30, %31"
#define DIFFMAS_NAMES_64 \
  DIFFMAS_NAMES_32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, " \
  "%55, %56, %57, %58, %59, %60, %61, %62, %63"
// The left side in shared memory; both sides by rows.
#define DIFFMAS_PRODUCT(type) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %34, 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " {" DIFFMAS_NAMES_32 "}, %32, %33, p, 1, 1, 0, 0;\n}" \
               : DIFFMAS_32(x, 0) : "l"(a.descriptor), "l"(b.descriptor), "r"(int(adds)))
// The left side in registers, the right side from top to bottom of panels.
#define DIFFMAS_PRODUCT_REGISTERS(size, type, names, left, right, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" size "k16.f32." type "." type " {" names "}, {" left "}, %" right ", 1, 1, 1, 1;" \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor))
#define DIFFMAS_PRODUCT_OF_REGISTERS(type) \
  if constexpr (N == 8) DIFFMAS_PRODUCT_REGISTERS("64", type, DIFFMAS_NAMES_32, "%32, %33, %34, %35", "36", DIFFMAS_32(x, 0)); \
  else DIFFMAS_PRODUCT_REGISTERS("128", type, DIFFMAS_NAMES_64, "%64, %65, %66, %67", "68", DIFFMAS_32(x, 0), DIFFMAS_32(x, 8))
#endif

// x [64 x 64] = (adds ? x : 0) + a [64 x 16] b' [16 x 64], in the background; of warp w of the warpgroup the rows from 16 w on, as
// multiply_add's. By all four warps. Between begin_products and wait_for_products nobody looks at x, nor changes what a and b name.
template <class T>
__device__ __forceinline__ void add_product_async(float (&x)[8][4], Operand a, Operand b, bool adds) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) DIFFMAS_PRODUCT("bf16");
  else DIFFMAS_PRODUCT("f16");
#else
  host::issue({x, 64, nullptr, a.descriptor, b.descriptor, adds, host::multiply<T>}, {__FILE__, __LINE__});
#endif
}
// x [64 x 8 N] += a [64 x 16] b [16 x 8 N], a in registers as multiply_add's.
template <class T, int N>
__device__ __forceinline__ void add_product_async(float (&x)[N][4], const uint32_t (&a)[4], Operand b) {
  static_assert(N == 8 || N == 16);
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bf16>) { DIFFMAS_PRODUCT_OF_REGISTERS("bf16"); }
  else { DIFFMAS_PRODUCT_OF_REGISTERS("f16"); }
#else
  host::issue({x, 8 * N, a, 0, b.descriptor, true, host::multiply<T>}, {__FILE__, __LINE__});
#endif
}

// Registers are as the program says before what follows, and not looked at before it.
template <int N>
__device__ __forceinline__ void settle(float (&x)[N][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int j = 0; j < N; ++j) asm volatile("" : DIFFMAS_FOUR(x, j)::"memory");
#else
  (void)x;
#endif
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&x)[N][4]) {
#ifdef __CUDACC__
#pragma unroll
  for (int j = 0; j < N; ++j) asm volatile("" : "+r"(x[j][0]), "+r"(x[j][1]), "+r"(x[j][2]), "+r"(x[j][3])::"memory");
#else
  (void)x;
#endif
}

// Before products whose registers, named here, something else has written.
template <class... Registers>
__device__ __forceinline__ void begin_products(Registers&... registers) {
#ifdef __CUDACC__
  (settle(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#else
  (settle(registers), ...);
#endif
}
// What was issued since the last one is a group.
__device__ __forceinline__ void commit_products() {
#ifdef __CUDACC__
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#else
  ++host::self->product_group;
#endif
}
// Until at most kGroupsLeft are under way; the sums named here are then there.
template <int kGroupsLeft, class... Sums>
__device__ __forceinline__ void wait_for_products(Sums&... sums) {
#ifdef __CUDACC__
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  (settle(sums), ...);
#else
  std::vector<host::Product> left;
  for (const host::Product& product : host::self->products) {
    if (product.group >= host::self->product_group - kGroupsLeft) left.push_back(product);
    else product.multiply(product, {__FILE__, __LINE__});
  }
  host::self->products = left;
  (settle(sums), ...);
#endif
}

// This warpgroup's threads have so many registers from now on: fewer, more.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
#ifdef __CUDACC__
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
#endif
}

}  // namespace diffmas::cuda
