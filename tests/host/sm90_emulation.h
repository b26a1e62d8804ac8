// Emulates csrc/cuda/sm90_instructions.h, function by function, with the contracts that are stated there. csrc/cuda/sm90.h includes this
// file where DIFFMAS_HOST_EMULATION is defined.
//
// The emulation follows the PTX manual to the bit: it decodes descriptors, swizzles addresses, counts a barrier's bytes, and holds sums
// back until they are waited for. Only a GPU can show that the manual was read right.
#pragma once

namespace diffmas::cuda {

__device__ __forceinline__ unsigned shared_address(const void* p) { return unsigned(static_cast<const char*>(p) - host::dynamic_shared); }

// ---- barriers that count bytes

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

__device__ __forceinline__ void init_barrier(Barrier* barrier, int count) {
  host::block.byte_barriers[barrier] = std::make_shared<host::ByteBarrier>(host::ByteBarrier{count, count});
}
__device__ __forceinline__ void barriers_ready() {}

__device__ __forceinline__ void arrive(Barrier* barrier) { host::byte_barrier(barrier).arrive(0); }
__device__ __forceinline__ void arrive_expecting(Barrier* barrier, int bytes) { host::byte_barrier(barrier).arrive(bytes); }

__device__ __forceinline__ void wait_for(Barrier* barrier, int parity) {
  host::byte_barrier(barrier).wait_for(parity, {__FILE__, __LINE__});
}

// All that is in shared memory, whoever wrote it, once all lanes of a warp have come. So what nobody publishes is never seen; a warp that
// leaves it to another one is, often.
__device__ __forceinline__ void publish_to_async() {
  int& lanes = host::block.publishing[size_t(host::self->warp)];
  if (++lanes == 32) lanes = 0, std::memcpy(host::block.published.data(), host::dynamic_shared, host::block.published.size());
}

// ---- boxes of tensors into panels

struct TensorMap {
  const char* data;
  int64_t sizes[3], strides[3];  // x, y, z; strides in bytes
  int box_y, box_z;
};

inline int make_tensor_map(TensorMap& map, bool is_bf16, const BoxOf& of) {
  (void)is_bf16;
  if (reinterpret_cast<uintptr_t>(of.data) % 16 || of.stride_y % 8 || of.stride_z % 8) return 1;
  map = {static_cast<const char*>(of.data), {of.x, of.y, of.z}, {2, of.stride_y * 2, of.stride_z * 2}, of.box_y, of.box_z};
  return 0;
}

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
      const unsigned place = swizzled(first + unsigned(row * cuda::kPanelRow + 2 * i));
      for (char* shared : {dynamic_shared, block.published.data()}) std::memcpy(shared + place, &element, 2);
    }
}

}  // namespace diffmas::host

namespace diffmas::cuda {

__device__ __forceinline__ void copy_box(char* to, const TensorMap& map, int x, int y, int z, Barrier* barrier) {
  const int bytes = map.box_y * map.box_z * kPanelRow;
  if (shared_address(to) % kPanelEight) host::fail("a panel at %u, which 1024 does not divide", shared_address(to));
  for (char* shared : {host::dynamic_shared, host::block.published.data()}) std::memset(shared + shared_address(to), 0xFF, size_t(bytes));
  host::byte_barrier(barrier).issue(bytes, [=, &map] { host::copy_box(to, map, x, y, z); });
}

// ---- floats from shared to global memory

__device__ __forceinline__ void store_in_bulk(float* to, const float* from, int bytes) {
  host::self->bulk.push_back({to, from, bytes, false, {}});
}
__device__ __forceinline__ void add_in_bulk(float* to, const float* from, int bytes) {
  host::self->bulk.push_back({to, from, bytes, true, {}});
}
__device__ __forceinline__ void wait_for_bulk_reads() {
  for (host::Bulk& x : host::self->bulk) {
    const auto from = reinterpret_cast<const float*>(host::block.published.data() + shared_address(x.from));
    if (x.read.empty()) x.read.assign(from, from + x.bytes / 4);
  }
}
__device__ __forceinline__ void wait_for_bulk() {
  bool read = true;
  for (const host::Bulk& x : host::self->bulk) read = read && !x.read.empty();
  if (!read) host::fall_behind(4096, {__FILE__, __LINE__});  // nobody has waited for that, so it may be late
  wait_for_bulk_reads();
  for (const host::Bulk& x : host::self->bulk)
    for (size_t i = 0; i < x.read.size(); ++i) x.to[i] = x.adds ? x.to[i] + x.read[i] : x.read[i];
  host::self->bulk.clear();
}

// ---- words in global memory

__device__ __forceinline__ void wait_for_word(const unsigned* word, unsigned value) {
  host::wait_for_word(word, value, {__FILE__, __LINE__});
}
__device__ __forceinline__ void set_word(unsigned* word, unsigned value) {
  if (!host::self->bulk.empty()) host::fail("a word is set before what this thread stores in bulk is there");
  *word = value;
}

// ---- products of a warpgroup

}  // namespace diffmas::cuda

namespace diffmas::host {

// Element [index][k] of an operand, k < 16: what the descriptor says, for the 128-byte swizzle.
inline uint16_t operand_element(uint64_t descriptor, bool across, int index, int k) {
  if (descriptor >> 62 != 1 || descriptor >> 49 & 7)
    fail("descriptor %016llx: expected the 128-byte swizzle without an offset", (unsigned long long)descriptor);
  const auto bytes = [&](int bit) { return unsigned(descriptor >> bit & 0x3FFF) << 4; };
  const unsigned eights = bytes(32),
                 at = across ? bytes(16) * unsigned(index / 64) + eights * unsigned(k / 8) + unsigned(k % 8 * 128 + index % 64 * 2)
                             : eights * unsigned(index / 8) + unsigned(index % 8 * 128 + k * 2);
  uint16_t element;
  std::memcpy(&element, block.published.data() + swizzled(bytes(0) + at), 2);
  return element;
}

// What this lane reads of the operands: 16 of its two rows of the left side if that is in shared memory, then of its columns.
inline std::vector<uint16_t> operands_of(const Product& product) {
  const int row = self->warp % 4 * 16 + self->lane / 4, left = product.registers ? 0 : 32, right = product.columns / 4 * 16;
  std::vector<uint16_t> found(size_t(left + right));
  uint16_t* next = found.data();
  for (int i = 0; i < left; ++i) *next++ = operand_element(product.left, product.down, row + i / 16 * 8, i % 16);
  for (int i = 0; i < right; ++i)
    *next++ = operand_element(product.right, product.down, i / 32 * 8 + self->lane % 4 * 2 + i / 16 % 2, i % 16);
  return found;
}

// The sanitizers would take most of the time of the tests here, where all addresses are the emulation's own.
__attribute__((no_sanitize("address", "undefined"))) inline float add_products(float x, const float* a, const float* b) {
  for (int k = 0; k < 16; ++k) x += a[k] * b[k];
  return x;
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

template <class T>
void multiply(const Product& product, Place place) {
  const auto sum = static_cast<float*>(product.sum);
  const auto number = [](uint16_t bits) { return cuda::to_float(T{bits}); };
  const std::vector<uint16_t> read = product.read.empty() ? operands_of(product) : product.read;
  std::vector<float> elements(read.size());
  std::transform(read.begin(), read.end(), elements.begin(), number);
  const float *left_side = elements.data(), *right = left_side + (product.registers ? 0 : 32);
  float left[2][16];
  if (product.registers) {  // lanes of a row have four columns each
    const uint32_t* a = product.registers_read ? product.left_read : product.registers;
    const auto low = meet_warp(~0u, a[0] | uint64_t(a[1]) << 32, place), high = meet_warp(~0u, a[2] | uint64_t(a[3]) << 32, place);
    for (int h = 0; h < 2; ++h)
      for (int k = 0; k < 16; ++k)
        left[h][k] = number(uint16_t((k < 8 ? low : high)->value[self->lane / 4 * 4 + k % 8 / 2] >> (32 * h + 16 * (k % 2))));
  } else {
    for (int i = 0; i < 32; ++i) left[i / 16][i % 16] = left_side[i];
  }
  if (!product.before.empty()) std::copy(product.before.begin(), product.before.end(), sum);
  for (int i = 0; i < product.columns / 2; ++i) {  // as a lane has them: [columns / 8][4]
    const float* column = right + (i / 4 * 2 + i % 2) * 16;
    sum[i] = add_products(product.add ? sum[i] : 0, left[i / 2 % 2], column);
  }
}

}  // namespace diffmas::host

namespace diffmas::cuda {

template <class T, int N>
__device__ __forceinline__ void add_product_async(float (&x)[N][4], Operand a, Operand b, bool add) {
  static_assert(N == 8 || N == 16);
  host::issue({x, 8 * N, nullptr, a.descriptor(), b.descriptor(), false, add, host::multiply<T>}, {__FILE__, __LINE__});
}
template <class T>
__device__ __forceinline__ void add_product_of_columns_async(float (&x)[8][4], Operand a, Operand b, bool add) {
  host::issue({x, 64, nullptr, a.descriptor(), b.descriptor(), true, add, host::multiply<T>}, {__FILE__, __LINE__});
}
template <class T, int N>
__device__ __forceinline__ void add_product_async(float (&x)[N][4], const uint32_t (&a)[4], Operand b) {
  static_assert(N == 8 || N == 16);
  host::issue({x, 8 * N, a, 0, b.descriptor(), true, true, host::multiply<T>}, {__FILE__, __LINE__});
}

template <int N>
__device__ __forceinline__ void settle(float (&x)[N][4]) {
  (void)x;
}
template <int N>
__device__ __forceinline__ void settle(uint32_t (&x)[N][4]) {
  (void)x;
}

template <class... Registers>
__device__ __forceinline__ void begin_products(Registers&... registers) {
  (settle(registers), ...);
}
__device__ __forceinline__ void commit_products() { ++host::self->product_group; }
template <int kGroupsLeft, class... Sums>
__device__ __forceinline__ void wait_for_products(Sums&... sums) {
  std::vector<host::Product> left;
  for (const host::Product& product : host::self->products) {
    if (product.group >= host::self->product_group - kGroupsLeft) left.push_back(product);
    else product.multiply(product, {__FILE__, __LINE__});
  }
  host::self->products = left;
  (settle(sums), ...);
}

template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_dec() {}
template <int kRegisters>
__device__ __forceinline__ void setmaxnreg_inc() {}

}  // namespace diffmas::cuda
