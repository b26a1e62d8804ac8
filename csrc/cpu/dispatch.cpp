// Picks the kernels for this CPU, plans a call, hands its tasks to the threads.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "kernels.h"
#include "plan.h"

namespace diffmas::cpu {
namespace {

#define DIFFMAS_KERNELS(isa)                                                                                    \
  Kernels {                                                                                                     \
    isa::inject_forward_range, isa::inject_backward_block, isa::merge_states_range, isa::merge_states_backward_range, \
        isa::reposition_range, isa::reposition_backward_head, isa::attention_forward_task, isa::attention_merge_task, \
        isa::attention_backward_unit, isa::attention_backward_reduce_task                                       \
  }

bool has(const char* isa) {
#ifdef DIFFMAS_X86
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  // Every CPU with AVX2 and FMA converts halves too (F16C).
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "generic");
}

// The widest form that this CPU has, or the one that DIFFMAS_CPU_ISA names (for tests; refused where the CPU does not have it).
Kernels pick() {
  const char* wanted = std::getenv("DIFFMAS_CPU_ISA");
  if (wanted && !has(wanted)) throw std::runtime_error(std::string("DIFFMAS_CPU_ISA: expected generic, avx2 or avx512, and a CPU that has it, got ") + wanted);
  const auto use = [&](const char* isa) { return wanted ? !std::strcmp(isa, wanted) : has(isa); };
#ifdef DIFFMAS_X86
  if (use("avx512")) return DIFFMAS_KERNELS(avx512);
  if (use("avx2")) return DIFFMAS_KERNELS(avx2);
#endif
  return DIFFMAS_KERNELS(generic);
}

const Kernels& kernels() {
  static const Kernels picked = pick();
  return picked;
}

// Runs task(i) for i in [0, count), each on whichever thread is free.
template <class F>
void run(const Threads& threads, int64_t count, const F& task) {
  if (count <= 1 || threads.count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Shared {
    const F& task;
    int64_t count;
    std::atomic<int64_t> next;
  } shared{task, count, {0}};
  threads.parallel_for(
      std::min(count, threads.count),
      [](int64_t, int64_t, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1)) < s.count;) s.task(i);
      },
      &shared);
}

// A call of less work than this (in multiply-adds) is over before a second thread has woken up.
constexpr int64_t kSerialWork = 1 << 17;

// Runs body(begin, end) over [0, count) in chunks of a fixed size; each element is `work` multiply-adds.
template <class F>
void run_chunks(const Threads& threads, int64_t count, int64_t work, const F& body) {
  constexpr int64_t kChunk = 8;
  if (count * work < kSerialWork) return body(0, count);
  run(threads, (count + kChunk - 1) / kChunk, [&](int64_t i) { body(i * kChunk, std::min(count, (i + 1) * kChunk)); });
}

// One buffer per thread, kept: fresh pages for every call would cost more than a decode step.
float* scratch(int64_t size) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t capacity = 0;
  if (size > capacity) {
    const size_t bytes = (size_t(size) * sizeof(float) + 63) / 64 * 64;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    capacity = buffer ? size : 0;
    if (!buffer) throw std::bad_alloc();
  }
  return buffer.get();
}

// The rotations of a call of reposition, one per distinct shift. Angles in float64: shifts reach 1e5 and more.
struct ShiftTables {
  std::vector<int64_t> rotation;  // [m]
  std::vector<float> cos, sin;    // [rotations, Dr]

  explicit ShiftTables(RepositionArgs& args) : rotation(size_t(args.m)) {
    std::vector<int64_t> shifts(args.shift, args.shift + args.m);
    std::sort(shifts.begin(), shifts.end());
    shifts.erase(std::unique(shifts.begin(), shifts.end()), shifts.end());
    for (int64_t i = 0; i < args.m; ++i) rotation[i] = std::lower_bound(shifts.begin(), shifts.end(), args.shift[i]) - shifts.begin();
    const int64_t half = args.half_rotary, step = args.interleaved ? 2 : 1, other = args.interleaved ? 1 : half;
    cos.resize(shifts.size() * 2 * half), sin.resize(cos.size());
    for (size_t s = 0; s < shifts.size(); ++s)
      for (int64_t i = 0; i < half; ++i) {
        const double angle = double(shifts[s]) * double(args.inv_freq[i]);
        const size_t at = s * 2 * half + i * step;
        cos[at] = cos[at + other] = float(std::cos(angle));
        sin[at] = sin[at + other] = float(std::sin(angle));
      }
    args.rotation = rotation.data(), args.cos = cos.data(), args.sin = sin.data();
  }
};

}  // namespace

void inject_forward(const InjectArgs& args, const Threads& threads) {
  const int64_t work = (args.q_heads + 2 * args.kv_heads) * args.head_dim;
  run_chunks(threads, args.n, work, [&](int64_t begin, int64_t end) { kernels().inject_forward(args, begin, end); });
}

void inject_backward(InjectArgs args, float* dq_weight, float* dk_weight, const Threads& threads) {
  const int64_t blocks = (args.n + kInjectBlock - 1) / kInjectBlock, d = args.head_dim;
  std::vector<float> partials(size_t(blocks * 2 * d));
  args.weight_partials = partials.data();
  run(threads, blocks, [&](int64_t i) { kernels().inject_backward(args, i); });
  for (float* out : {dq_weight, dk_weight}) {
    if (!out) continue;
    const float* from = partials.data() + (out == dk_weight ? d : 0);
    for (int64_t i = 0; i < d; ++i) {
      double total = 0;
      for (int64_t b = 0; b < blocks; ++b) total += from[b * 2 * d + i];
      out[i] = float(total);
    }
  }
}

void merge_states(const MergeArgs& args, const Threads& threads) {
  run_chunks(threads, args.n, 2 * args.heads * args.head_dim, [&](int64_t begin, int64_t end) { kernels().merge_states(args, begin, end); });
}

void merge_states_backward(const MergeArgs& args, const Threads& threads) {
  run_chunks(threads, args.n, 4 * args.heads * args.head_dim,
             [&](int64_t begin, int64_t end) { kernels().merge_states_backward(args, begin, end); });
}

void reposition(RepositionArgs args, const Threads& threads) {
  const ShiftTables tables(args);
  run_chunks(threads, args.m, 3 * args.kv_heads * args.head_dim, [&](int64_t begin, int64_t end) { kernels().reposition(args, begin, end); });
}

void reposition_backward(RepositionArgs args, const Threads& threads) {
  const ShiftTables tables(args);
  run(threads, args.kv_heads, [&](int64_t head) { kernels().reposition_backward(args, head); });
}

void attention_forward(AttentionArgs args, const Segments& segments, const Threads& threads, const Workspace& workspace) {
  const Rotations rotations(segments);
  const ForwardPlan plan(segments, rotations, args.group(), args.kv_heads);
  args.rotation_cos = rotations.cos.data();
  args.rotation_sin = rotations.sin.data();
  args.padded_dim = padded_head_dim(args.head_dim);
  args.block_rows = largest_block(segments, args.group());
  args.tiles = plan.tiles.data();
  args.blocks = plan.blocks.data();
  if (plan.partials) args.partials = workspace.take(workspace.context, plan.partials * args.forward_partial_size());

  const Threads used = plan.pairs * args.head_dim < kSerialWork ? Threads{1, nullptr} : threads;
  run(used, int64_t(plan.tasks.size()), [&](int64_t i) {
    kernels().attention_forward(args, plan.tasks[i], scratch(forward_scratch_size(args.padded_dim)));
  });
  run(used, int64_t(plan.merges.size()), [&](int64_t i) { kernels().attention_merge(args, plan.merges[i]); });
}

void attention_backward(AttentionArgs args, const Segments& segments, const Threads& threads, const Workspace& workspace) {
  const Rotations rotations(segments);
  args.rotation_cos = rotations.cos.data();
  args.rotation_sin = rotations.sin.data();
  args.padded_dim = padded_head_dim(args.head_dim);
  args.block_rows = largest_block(segments, args.group());
  const BackwardPlan plan(segments, rotations, args.group(), args.kv_heads, args.padded_dim, args.dq.data != nullptr);
  args.tiles = plan.tiles.data();
  args.blocks = plan.blocks.data();
  int64_t partials = 0;
  for (const BackwardPhase& phase : plan.phases) partials = std::max(partials, phase.partials);
  if (partials) args.partials = workspace.take(workspace.context, partials * args.backward_partial_size());
  for (const BackwardPhase& phase : plan.phases) {
    const int64_t chunks = int64_t(phase.chunk_indptr.size()) - 1;
    // A thread owns the rows of one (chunk, kv head) of the gradient pools.
    run(threads, chunks * args.kv_heads, [&](int64_t i) {
      const int64_t chunk = i / args.kv_heads, head = i % args.kv_heads;
      for (int64_t u = phase.chunk_indptr[chunk]; u < phase.chunk_indptr[chunk + 1]; ++u)
        kernels().attention_backward(args, phase.units[u], head, scratch(backward_scratch_size(args.padded_dim)));
    });
    run(threads, int64_t(phase.reduces.size()), [&](int64_t i) { kernels().attention_backward_reduce(args, phase.reduces[i]); });
  }
}

}  // namespace diffmas::cpu
