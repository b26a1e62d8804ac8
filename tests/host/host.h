// CUDA on the CPU, to check kernels where there is no GPU: the language and its built-in functions. Include csrc/cuda/device.h, not this.
//
//   - One fiber per CUDA thread, host::options.resident blocks at a time. Blocks, and the threads of a block, run in a random order that
//     host::options.seed decides, some warps ahead of others. A thread runs until it waits; so a missing barrier shows as poison or
//     as bits that depend on the seed. Blocks may wait for others, by words in global memory, that are sure to run before or beside them.
//   - Barriers, shuffles and votes check what the CUDA guide asks for: all threads of the block, or all lanes of the mask, arrive,
//     at one line of the source. Otherwise the program says who waits where, and aborts. __syncwarp() orders; nothing else does.
//   - Shared memory is DIFFMAS_SHARED(type, name, [size]...) and DIFFMAS_DYNAMIC_SHARED(name) (char*), on the heap in exactly its
//     size, anew for every block and full of 0xFF: NaN in every float type, -1 in integers. More than options.max_shared aborts.
//   - An asynchronous copy fills its destination with 0xFF when issued, and reads and writes when waited for.
//   - Global memory is whatever the caller gives: compile with -fsanitize=address,undefined and hand over exact-size heap copies
//     (tests/host/tensors.h does). The sanitizers then see every access out of bounds and every vector access off its alignment.
//   - bfloat16 and float16 are storage with conversions that round to nearest even. Not here: clusters, textures, half arithmetic.
//
// What the emulations of single instructions (emulation.h, sm90_emulation.h) are built from, all in diffmas::host:
//   meet(slot, expected, ..)   the caller waits until `expected` threads have come, with a value of each lane
//   wait(counter, seen, ..)    the caller waits until a counter of yours is no longer `seen` (an mbarrier's phase)
//   self                       the running thread: .thread (threadIdx), .warp, .lane, .copies; fail(format, ..) aborts
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <vector>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

// ---- the language ---------------------------------------------------------------------------------------------------------------

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define DIFFMAS_SHARED(type, name, ...) type(&name) __VA_ARGS__ = diffmas::host::shared<type __VA_ARGS__>([] {})
#define DIFFMAS_DYNAMIC_SHARED(name) char* const name = diffmas::host::dynamic_shared
// Where a call stands in the source: a default argument of everything that waits.
#define DIFFMAS_PLACE diffmas::host::Place place = {__builtin_FILE(), __builtin_LINE()}

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
using std::max;
using std::min;

inline dim3 gridDim, blockDim, blockIdx, threadIdx;
inline constexpr int warpSize = 32;

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

inline float __uint_as_float(uint32_t x) {
  float y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline uint32_t __float_as_uint(float x) {
  uint32_t y;
  std::memcpy(&y, &x, 4);
  return y;
}
inline float __bfloat162float(__nv_bfloat16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float x) {
  const uint32_t u = __float_as_uint(x);
  if (x != x) return {0x7FFF};
  return {uint16_t((u + 0x7FFF + (u >> 16 & 1)) >> 16)};
}
inline float __half2float(__half x) {
  const uint32_t exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  float y = float(fraction) * 0x1p-24f;
  if (exponent) y = exponent == 31 ? (fraction ? NAN : INFINITY) : __uint_as_float((exponent + 112) << 23 | fraction << 13);
  return x.bits >> 15 ? -y : y;
}
inline __half __float2half_rn(float x) {
  const uint16_t sign = uint16_t(std::signbit(x) << 15);
  if (x != x) return {0x7FFF};
  const float a = std::fabs(x);
  if (a >= 65520) return {uint16_t(sign | 0x7C00)};
  const int exponent = std::max(a == 0 ? -14 : std::ilogb(a), -14);               // of the units that the fraction counts
  const uint32_t units = uint32_t(std::nearbyint(std::ldexp(a, 10 - exponent)));  // a carry into the exponent is as it should be
  return {uint16_t(sign | (uint32_t(exponent + 14) * 1024 + units))};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline void sincospif(float x, float* sine, float* cosine) { *sine = float(std::sin(M_PI * x)), *cosine = float(std::cos(M_PI * x)); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }
template <class T>
T __ldg(const T* p) {
  return *p;
}
[[noreturn]] inline void __trap() { std::fprintf(stderr, "trap\n"), std::_Exit(70); }
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- fibers ---------------------------------------------------------------------------------------------------------------------

namespace diffmas::host {

struct Options {
  uint64_t seed = 0;
  size_t max_shared = 232448;  // bytes of a block on sm_90
  int processors = 1;          // what processors() says; few, so that blocks that loop do
  size_t resident = 1;         // blocks that run side by side
  bool sm90 = false;           // what is_sm90() says
};
inline Options options;

struct Place {
  const char* file;
  int line;
  bool operator==(const Place& other) const { return file == other.file && line == other.line; }
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  size_t bytes;
  int group;
};

// Threads that have come to one barrier, shuffle or vote. Whoever takes part holds it until its result is read.
struct Exchange {
  Place place;
  int expected, arrived = 0;
  uint64_t complete = 0, sum = 0;
  uint32_t lanes = 0;
  uint64_t value[32];
};
using Slot = std::shared_ptr<Exchange>;  // of the next exchange; null: nobody has come yet

constexpr size_t kStack = 256 << 10;

#if defined(__x86_64__)
using Context = void*;  // the stack pointer of a fiber that does not run; what it needs is on its stack
asm(R"(
.pushsection .text
.weak diffmas_host_switch
diffmas_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq (%rsi), %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.popsection
)");
extern "C" void diffmas_host_switch(Context* from, Context* to);
inline void switch_context(Context* from, Context* to) { diffmas_host_switch(from, to); }
inline void start_context(Context* context, char* stack, void (*entry)()) {
  void** top = reinterpret_cast<void**>(stack + kStack) - 8;  // six registers, where to return to, alignment
  std::memset(top, 0, 64);
  top[6] = reinterpret_cast<void*>(entry);
  *context = top;
}
#else
using Context = ucontext_t;
inline void switch_context(Context* from, Context* to) { swapcontext(from, to); }
inline void start_context(Context* context, char* stack, void (*entry)()) {
  getcontext(context);
  context->uc_stack.ss_sp = stack, context->uc_stack.ss_size = kStack, context->uc_link = nullptr;
  makecontext(context, entry, 0);
}
#endif

// x [64 x columns] += a b' of a warpgroup, under way; sum: this lane's columns / 2 of it (sm90_emulation.h).
// A warpgroup's warps need not come together, but must issue the same products.
struct Product {
  void* sum;
  int columns;
  const uint32_t* registers;  // of the left side; null: it is in shared memory
  uint64_t left, right;       // descriptors
  bool down;                  // of operands in shared memory: whether an index is a column of panels
  bool add;
  void (*multiply)(const Product&, Place);
  std::vector<float> before;   // of the first that is under way to these sums
  std::vector<uint16_t> read;  // operands that were read when it was issued
  uint32_t left_read[4];
  bool registers_read = false;
  int group = 0;
};

// Floats on their way from shared to global memory.
struct Bulk {
  float* to;
  const float* from;
  int bytes;
  bool adds;
  std::vector<float> read;
};

struct Thread {
  dim3 thread;
  int warp, lane;
  std::vector<Copy> copies;  // asynchronous ones, issued and not waited for
  int group = 0;             // of copies, not committed yet
  std::vector<Product> products;
  int product_group = 0;
  size_t issued = 0;        // products
  std::vector<Bulk> bulk;
  const uint64_t* counter;  // runs on once *counter != seen
  uint64_t seen;
  const unsigned* word = nullptr;  // if any, once *word == value instead
  unsigned value;
  Place place;  // where it waits
  bool done;

  bool waits() const { return word ? *word != value : *counter == seen; }
  char* stack;
  Context context;
  void* fake_stack;  // the address sanitizer's
};

struct ByteBarrier;  // sm90_emulation.h

struct Block {
  std::vector<Thread> threads;
  Slot barriers[16];                                                  // by id, 0: __syncthreads
  std::vector<Slot> warps;                                            // 32 a warp, by the lowest lane of the mask
  std::vector<std::vector<uint64_t>> products;                        // of each warpgroup, in order: their operands
  std::map<const void*, std::shared_ptr<ByteBarrier>> byte_barriers;  // by address
  std::map<const void*, void*> shared;                                // by declaration
  size_t shared_bytes;
  std::vector<char> published;  // dynamic shared memory as the copy engine and products see it (sm90_emulation.h)
  std::vector<int> publishing;  // of each warp, lanes that have published what others of it have not yet
};
inline Block block;
inline Thread* self = nullptr;
inline char* dynamic_shared = nullptr;
inline const std::function<void()>* body;
inline Context scheduler;
inline void* scheduler_fake_stack;
inline const void* scheduler_stack;
inline size_t scheduler_stack_size;

[[noreturn]] __attribute__((format(printf, 1, 2))) inline void fail(const char* format, ...) {
  std::fflush(stdout);
  std::fprintf(stderr, "host execution: ");
  va_list args;
  va_start(args, format);
  std::vfprintf(stderr, format, args);
  va_end(args);
  std::fprintf(stderr, " (block %u, %u, %u, seed %llu)\n", blockIdx.x, blockIdx.y, blockIdx.z, (unsigned long long)options.seed);
  std::_Exit(70);
}

// What the address sanitizer must know when the stack changes: leave before, enter after.
inline void leave(void** fake_stack, const void* stack, size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#endif
  (void)fake_stack, (void)stack, (void)size;
}
inline void enter(void* fake_stack, const void** stack, size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, size);
#endif
  (void)fake_stack, (void)stack, (void)size;
}

inline void resume(Thread& thread) {
  self = &thread, threadIdx = thread.thread;
  leave(&scheduler_fake_stack, thread.stack, kStack);
  switch_context(&scheduler, &thread.context);
  enter(scheduler_fake_stack, nullptr, nullptr);
}

inline void suspend() {
  Thread* thread = self;
  leave(thread->done ? nullptr : &thread->fake_stack, scheduler_stack, scheduler_stack_size);
  switch_context(&thread->context, &scheduler);
  enter(thread->fake_stack, &scheduler_stack, &scheduler_stack_size);
}

__attribute__((no_sanitize("address"))) inline void thread_main() {
  enter(nullptr, &scheduler_stack, &scheduler_stack_size);
  (*body)();
  self->done = true;
  suspend();
}

inline void wait(const uint64_t& counter, uint64_t seen, Place place) {
  self->counter = &counter, self->seen = seen, self->place = place;
  if (counter == seen) suspend();
}

// Lets others run on, for so many turns.
inline void fall_behind(int turns, Place place) {
  static const uint64_t always = 1;
  for (self->counter = &always, self->seen = 0, self->place = place; turns; --turns) suspend();
}

// Until a word in global memory, which another block may set, has a value.
inline void wait_for_word(const unsigned* word, unsigned value, Place place) {
  self->word = word, self->value = value, self->place = place;
  if (self->waits()) suspend();
  self->word = nullptr;
}

// Joins the exchange that is open in `slot`; `stay` false: without waiting for the others.
inline Slot meet(Slot& slot, int expected, uint64_t value, Place place, bool same_place = true, bool stay = true) {
  if (!slot) slot = Slot(new Exchange{place, expected});
  const Slot exchange = slot;
  if (same_place && !(exchange->place == place))
    fail("barrier divergence: thread %d is at %s:%d, others wait at %s:%d", int(self - block.threads.data()), place.file, place.line,
         exchange->place.file, exchange->place.line);
  if (exchange->expected != expected)
    fail("barrier divergence: thread %d at %s:%d expects %d threads, others %d", int(self - block.threads.data()), place.file, place.line,
         expected, exchange->expected);
  exchange->value[self->lane] = value;
  exchange->sum += value;
  exchange->lanes |= 1u << self->lane;
  if (++exchange->arrived == expected) exchange->complete = 1, slot.reset();
  else if (stay) wait(exchange->complete, 0, place);
  return exchange;
}

inline Slot meet_block(uint64_t value, Place place) { return meet(block.barriers[0], int(block.threads.size()), value, place); }

inline Slot meet_warp(uint32_t mask, uint64_t value, Place place) {
  if (!(mask >> self->lane & 1)) fail("lane %d at %s:%d is not in its mask %08x", self->lane, place.file, place.line, mask);
  const Slot exchange = meet(block.warps[size_t(self->warp * 32 + __builtin_ctz(mask))], __builtin_popcount(mask), value, place);
  if (exchange->lanes != mask)
    fail("lanes %08x met at %s:%d, lane %d expected %08x", exchange->lanes, place.file, place.line, self->lane, mask);
  return exchange;
}

template <class T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}
template <class T>
T shuffle(uint32_t mask, T x, int from, Place place) {
  const Slot exchange = meet_warp(mask, to_bits(x), place);
  if (!(mask >> from & 1))
    fail("lane %d at %s:%d reads lane %d, which is not in the mask %08x", self->lane, place.file, place.line, from, mask);
  T y;
  std::memcpy(static_cast<void*>(&y), &exchange->value[from], sizeof y);
  return y;
}

inline void* poisoned(size_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, 1024, std::max<size_t>(bytes, 1))) fail("no memory");
  std::memset(p, 0xFF, bytes);
  return p;
}

inline void check_shared(size_t more) {
  if ((block.shared_bytes += more) > options.max_shared)
    fail("%zu bytes of shared memory, at most %zu", block.shared_bytes, options.max_shared);
}

// Every declaration in the source has a lambda type of its own, hence a key of its own.
template <class T, class Declaration>
T& shared(Declaration) {
  static const char key = 0;
  void*& p = block.shared[&key];
  if (!p) check_shared(sizeof(T)), p = poisoned(sizeof(T));
  return *static_cast<T*>(p);
}

[[noreturn]] inline void report_deadlock() {
  int done = 0, waiting = 0;
  const Thread* first = nullptr;
  for (const Thread& t : block.threads) {
    done += t.done;
    if (t.done) continue;
    if (!first) first = &t;
    waiting += t.place == first->place;
    if (!(t.place == first->place))
      std::fprintf(stderr, "thread %d waits at %s:%d\n", int(&t - block.threads.data()), t.place.file, t.place.line);
  }
  fail("barrier divergence: %d threads wait at %s:%d for others; %d of %zu have returned", waiting, first->place.file, first->place.line,
       done, block.threads.size());
}

inline char* stack(size_t i) {
  static std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kStack + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED || mprotect(p, 4096, PROT_NONE)) fail("no memory for stacks");
    stacks.push_back(static_cast<char*>(p) + 4096);
  }
  return stacks[i];
}

// A block that runs, or one of several that run side by side.
struct Running {
  Block block;
  dim3 index;
  char* dynamic_shared;
  std::vector<Thread*> order;
  std::vector<int> asleep;  // warps fall behind others now and then
  int all_asleep = 0;       // and blocks, where there are several
  size_t left;              // threads

  // Its state becomes what the built-in variables say, or stops being that.
  void swap() { std::swap(host::block, block), std::swap(blockIdx, index), std::swap(host::dynamic_shared, dynamic_shared); }
};

inline void start_block(Running& running, size_t dynamic_bytes, size_t first_stack, std::mt19937_64& random) {
  const size_t count = size_t(blockDim.x) * blockDim.y * blockDim.z;
  running.swap();
  block.threads.resize(count);
  block.warps.resize(count);
  block.products.resize(count);
  block.published.assign(dynamic_bytes, char(0xFF));
  block.publishing.resize(count);
  check_shared(dynamic_bytes);
  dynamic_shared = static_cast<char*>(poisoned(dynamic_bytes));
  static const uint64_t started = 1;
  for (unsigned i = 0; i < count; ++i) {
    Thread& t = block.threads[i];
    t.thread = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y));
    t.warp = int(i / 32), t.lane = int(i % 32), t.counter = &started, t.seen = 0, t.done = false, t.stack = stack(first_stack + i);
    start_context(&t.context, t.stack, thread_main);
    running.order.push_back(&t);
  }
  std::shuffle(running.order.begin(), running.order.end(), random);
  running.asleep.resize((count + 31) / 32), running.left = count;
  running.swap();
}

// Every thread that can runs until it waits. -> whether one could, or will once it is awake.
inline bool run_on(Running& running, bool among_others, std::mt19937_64& random) {
  if (among_others && !running.all_asleep && random() % 256 == 0) running.all_asleep = int(random() % 1024);
  if (running.all_asleep) return --running.all_asleep, true;
  bool moved = false;
  running.swap();
  for (int& rounds : running.asleep) {
    if (rounds) --rounds;
    else if (random() % 64 == 0) rounds = int(random() % 64);
  }
  for (Thread* t : running.order) {
    if (t->done || t->waits()) continue;
    moved = true;
    if (running.asleep[size_t(t->warp)]) continue;
    resume(*t);
    running.left -= t->done;
  }
  running.swap();
  return moved;
}

inline void end_block(Running& running) {
  running.swap();
  for (const Thread& t : block.threads) {
    if (const size_t all = block.products[size_t(t.warp / 4)].size(); t.issued != all)
      fail("warp %d took part in %zu products of its warpgroup, of %zu", t.warp, t.issued, all);
    if (!t.bulk.empty()) fail("warp %d ends before what it copies is in global memory", t.warp);
  }
  self = nullptr;
  for (auto& [key, p] : block.shared) std::free(p);
  std::free(dynamic_shared);
  running.swap();
}

inline std::vector<dim3> launches;  // threads of a block, of every launch so far

// kernel<<<grid, threads, dynamic_bytes>>>
inline void run(dim3 grid, dim3 threads, size_t dynamic_bytes, const std::function<void()>& kernel) {
  gridDim = grid, blockDim = threads, body = &kernel;
  launches.push_back(threads);
  if (threads.x * threads.y * threads.z % 32 || threads.x * threads.y * threads.z > 1024)
    fail("blocks of %u x %u x %u threads: expected whole warps, at most 1024 threads", threads.x, threads.y, threads.z);
  std::vector<uint64_t> order(size_t(grid.x) * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 random(options.seed);
  std::shuffle(order.begin(), order.end(), random);
  std::vector<std::unique_ptr<Running>> places(options.resident);
  const size_t count = size_t(threads.x) * threads.y * threads.z;
  size_t next = 0, left = order.size();
  while (left) {
    bool moved = false;
    for (size_t place = 0; place < places.size(); ++place) {
      std::unique_ptr<Running>& running = places[place];
      if (!running && next == order.size()) continue;
      if (!running) {
        const uint64_t i = order[next++];
        running = std::make_unique<Running>();
        running->index = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
        start_block(*running, dynamic_bytes, place * count, random);
      }
      moved = run_on(*running, places.size() > 1, random) || moved;
      if (!running->left) end_block(*running), running.reset(), --left;
    }
    if (moved || !left) continue;
    for (auto& running : places)
      if (running) running->swap(), report_deadlock();
  }
}

// cp.async: `from` null copies zeros.
inline void copy_async(void* to, const void* from, size_t bytes) {
  std::memset(to, 0xFF, bytes);
  self->copies.push_back({to, from, bytes, self->group});
}
inline void copy_async_commit() { ++self->group; }
inline void copy_async_wait(int groups_left) {
  std::vector<Copy> left;
  for (const Copy& c : self->copies) {
    if (c.group >= self->group - groups_left) left.push_back(c);
    else if (c.from) std::memcpy(c.to, c.from, c.bytes);
    else std::memset(c.to, 0, c.bytes);
  }
  self->copies = left;
}

}  // namespace diffmas::host

// ---- barriers, shuffles, votes, atomics -----------------------------------------------------------------------------------------

inline void __syncthreads(DIFFMAS_PLACE) { diffmas::host::meet_block(0, place); }
inline int __syncthreads_count(int x, DIFFMAS_PLACE) { return int(diffmas::host::meet_block(x != 0, place)->sum); }
inline int __syncthreads_or(int x, DIFFMAS_PLACE) { return __syncthreads_count(x, place) > 0; }
inline int __syncthreads_and(int x, DIFFMAS_PLACE) { return __syncthreads_count(x, place) == int(diffmas::host::block.threads.size()); }
inline void __syncwarp(unsigned mask = ~0u, DIFFMAS_PLACE) { diffmas::host::meet_warp(mask, 0, place); }

inline unsigned __ballot_sync(unsigned mask, int x, DIFFMAS_PLACE) {
  const auto exchange = diffmas::host::meet_warp(mask, x != 0, place);
  unsigned votes = 0;
  for (int lane = 0; lane < 32; ++lane) votes |= unsigned(mask >> lane & 1 && exchange->value[lane]) << lane;
  return votes;
}
inline int __any_sync(unsigned mask, int x, DIFFMAS_PLACE) { return __ballot_sync(mask, x, place) != 0; }
inline int __all_sync(unsigned mask, int x, DIFFMAS_PLACE) { return __ballot_sync(mask, x, place) == mask; }

template <class T>
T __shfl_sync(unsigned mask, T x, int from, int width = 32, DIFFMAS_PLACE) {
  const int first = diffmas::host::self->lane & ~(width - 1);
  return diffmas::host::shuffle(mask, x, first | (from & (width - 1)), place);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T x, int bits, int width = 32, DIFFMAS_PLACE) {
  const int lane = diffmas::host::self->lane, from = lane ^ bits;
  return diffmas::host::shuffle(mask, x, (from & ~(width - 1)) > (lane & ~(width - 1)) ? lane : from, place);
}
template <class T>
T __shfl_down_sync(unsigned mask, T x, unsigned delta, int width = 32, DIFFMAS_PLACE) {
  const int lane = diffmas::host::self->lane, from = lane + int(delta);
  return diffmas::host::shuffle(mask, x, (lane & (width - 1)) + int(delta) < width ? from : lane, place);
}
template <class T>
T __shfl_up_sync(unsigned mask, T x, unsigned delta, int width = 32, DIFFMAS_PLACE) {
  const int lane = diffmas::host::self->lane, from = lane - int(delta);
  return diffmas::host::shuffle(mask, x, from >= (lane & ~(width - 1)) ? from : lane, place);
}

// Threads change only where they wait, so plain reads and writes are atomic.
template <class T>
T atomicExch(T* p, T x) {
  std::swap(*p, x);
  return x;
}
template <class T>
T atomicAdd(T* p, T x) {
  return atomicExch(p, T(*p + x));
}
template <class T>
T atomicMax(T* p, T x) {
  return atomicExch(p, std::max(*p, x));
}
template <class T>
T atomicMin(T* p, T x) {
  return atomicExch(p, std::min(*p, x));
}
template <class T>
T atomicOr(T* p, T x) {
  return atomicExch(p, T(*p | x));
}
template <class T>
T atomicAnd(T* p, T x) {
  return atomicExch(p, T(*p & x));
}
template <class T>
T atomicCAS(T* p, T expected, T x) {
  return atomicExch(p, *p == expected ? x : *p);
}
inline unsigned atomicInc(unsigned* p, unsigned last) { return atomicExch(p, *p >= last ? 0 : *p + 1); }
