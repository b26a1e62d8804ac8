// Instructions that only Hopper has: barriers in shared memory that count bytes (mbarrier), tiles that the copy engine brings (TMA),
// products of a warpgroup (wgmma). Include sm90.h, not this.
#pragma once
#include <cuda.h>

namespace diffmas::cuda {

// The 32-bit address of shared memory.
__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(__cvta_generic_to_shared(p)); }

// ---- barriers that count bytes

// By one thread; then barriers_ready(), and __syncthreads().
__device__ __forceinline__ void init_barrier(Barrier* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}
__device__ __forceinline__ void barriers_ready() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void arrive(Barrier* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Arrives, and makes this phase wait for `bytes` more of copies that are issued later.
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

// Waits until the phase of this parity is over. The phase before the first one, which is odd, is over.
__device__ __forceinline__ void wait_for(Barrier* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Makes this thread's ordinary stores to shared memory visible to products and copies that are issued after a barrier.
__device__ __forceinline__ void publish_to_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// ---- boxes of tensors into panels

using TensorMap = CUtensorMap;

// -> a cudaError_t: where the driver does not take the tensor (a stride that 16 bytes do not divide), an error without consequences.
inline int make_tensor_map(TensorMap& map, bool is_bf16, const BoxOf& of) {
  static const auto encode = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const int error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
#else
    const int error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &result);
#endif
    if (error) cudaGetLastError();  // clears it
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
}

// By one thread, into a panel; 128 bytes a row count for the barrier's phase.
__device__ __forceinline__ void copy_box(char* to, const TensorMap& map, int x, int y, int z, Barrier* barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];" ::"r"(
                   shared_address(to)),
               "l"(&map), "r"(x), "r"(y), "r"(z), "r"(shared_address(barrier))
               : "memory");
}

// ---- floats from shared to global memory, by one thread; both addresses and the bytes are multiples of 16

// Stores them, or adds them to what is there, in the background.
__device__ __forceinline__ void store_in_bulk(float* to, const float* from, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void add_in_bulk(float* to, const float* from, int bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;\ncp.async.bulk.commit_group;" ::"l"(to),
               "r"(shared_address(from)), "r"(bytes)
               : "memory");
}
// Until this thread's are read from shared memory; until they are there.
__device__ __forceinline__ void wait_for_bulk_reads() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void wait_for_bulk() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// ---- words in global memory, by which blocks wait for each other

// What another block stored in bulk before it set the word, this thread then adds to in bulk.
__device__ __forceinline__ void wait_for_word(const unsigned* word, unsigned value) {
  unsigned now;
  do asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(word) : "memory");
  while (now != value);
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void set_word(unsigned* word, unsigned value) {
  asm volatile("fence.proxy.async;\nst.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

// ---- products of a warpgroup

// clang-format off
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
#define DIFFMAS_PRODUCT(size, type, names, left, right, adds, ways, ...) \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" adds ", 0;\n" \
               "wgmma.mma_async.sync.aligned.m64n" size "k16.f32." type "." type " {" names "}, %" left ", %" right ", p, 1, 1, " ways ";\n}" \
               : __VA_ARGS__ : "l"(a.descriptor()), "l"(b.descriptor()), "r"(int(add)))
#define DIFFMAS_PRODUCT_OF_ROWS(type) \
  if constexpr (N == 8) DIFFMAS_PRODUCT("64", type, DIFFMAS_NAMES_32, "32", "33", "34", "0, 0", DIFFMAS_32(x, 0)); \
  else DIFFMAS_PRODUCT("128", type, DIFFMAS_NAMES_64, "64", "65", "66", "0, 0", DIFFMAS_32(x, 0), DIFFMAS_32(x, 8))
// The left side in shared memory; both sides from top to bottom of panels.
#define DIFFMAS_PRODUCT_OF_COLUMNS(type) DIFFMAS_PRODUCT("64", type, DIFFMAS_NAMES_32, "32", "33", "34", "1, 1", DIFFMAS_32(x, 0))
// The left side in registers, the right side from top to bottom of panels.
#define DIFFMAS_PRODUCT_REGISTERS(size, type, names, left, right, ...) \
  asm volatile("wgmma.mma_async.sync.aligned.m64n" size "k16.f32." type "." type " {" names "}, {" left "}, %" right ", 1, 1, 1, 1;" \
               : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.descriptor()))
#define DIFFMAS_PRODUCT_OF_REGISTERS(type) \
  if constexpr (N == 8) DIFFMAS_PRODUCT_REGISTERS("64", type, DIFFMAS_NAMES_32, "%32, %33, %34, %35", "36", DIFFMAS_32(x, 0)); \
  else DIFFMAS_PRODUCT_REGISTERS("128", type, DIFFMAS_NAMES_64, "%64, %65, %66, %67", "68", DIFFMAS_32(x, 0), DIFFMAS_32(x, 8))
// clang-format on

// x [64 x 8 N] = (add ? x : 0) + a [64 x 16] b' [16 x 8 N], in the background; of warp w of the warpgroup the rows from 16 w on, as
// multiply_add's. By all four warps. Between begin_products and wait_for_products nobody looks at x, nor changes what a and b name.
template <class T, int N>
__device__ __forceinline__ void add_product_async(float (&x)[N][4], Operand a, Operand b, bool add) {
  static_assert(N == 8 || N == 16);
  if constexpr (std::is_same_v<T, bf16>) {
    DIFFMAS_PRODUCT_OF_ROWS("bf16");
  } else {
    DIFFMAS_PRODUCT_OF_ROWS("f16");
  }
}
// x [64 x 64] = (add ? x : 0) + a' [64 x 16] b [16 x 64]; a and b each have 16 rows of 64.
template <class T>
__device__ __forceinline__ void add_product_of_columns_async(float (&x)[8][4], Operand a, Operand b, bool add) {
  if constexpr (std::is_same_v<T, bf16>) {
    DIFFMAS_PRODUCT_OF_COLUMNS("bf16");
  } else {
    DIFFMAS_PRODUCT_OF_COLUMNS("f16");
  }
}
// x [64 x 8 N] += a [64 x 16] b [16 x 8 N], a in registers as multiply_add's.
template <class T, int N>
__device__ __forceinline__ void add_product_async(float (&x)[N][4], const uint32_t (&a)[4], Operand b) {
  static_assert(N == 8 || N == 16);
  if constexpr (std::is_same_v<T, bf16>) {
    DIFFMAS_PRODUCT_OF_REGISTERS("bf16");
  } else {
    DIFFMAS_PRODUCT_OF_REGISTERS("f16");
  }
}

// Keeps the compiler from moving accesses of these registers across this point.
template <int N>
__device__ __forceinline__ void settle(float (&x)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) asm volatile("" : DIFFMAS_FOUR(x, j)::"memory");
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&x)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; ++j) asm volatile("" : "+r"(x[j][0]), "+r"(x[j][1]), "+r"(x[j][2]), "+r"(x[j][3])::"memory");
}

// Comes before products whose registers, named here, other code has written.
template <class... Registers>
__device__ __forceinline__ void begin_products(Registers&... registers) {
  (settle(registers), ...);
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Makes a group of the products that were issued since the last group.
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kGroupsLeft groups are under way; the sums named here are then valid.
template <int kGroupsLeft, class... Sums>
__device__ __forceinline__ void wait_for_products(Sums&... sums) {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroupsLeft) : "memory");
  (settle(sums), ...);
}

// Sets the number of registers of this warpgroup's threads: to fewer, to more.
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace diffmas::cuda
