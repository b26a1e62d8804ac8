#include "attention.h"

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/kernels.h"
#include "low_rank.h"
#include "parallel.h"
#include "schedule.h"

namespace diffmas::cpu {
namespace {

ScheduledAttention scheduled(const AttentionArgs& args, const Rotations& rotations) {
  ScheduledAttention s{args};
  s.rotation_cos = rotations.cos.data();
  s.rotation_sin = rotations.sin.data();
  s.padded_dim = padded_head_dim(args.head_dim);
  s.block_rows = largest_block(args.view, s.group());
  return s;
}

std::optional<PackedLowRank> packed_low_rank(ScheduledAttention& s) {
  if (!s.low) return {};
  std::optional<PackedLowRank> packed(std::in_place, s, s.padded_dim);
  packed->set(s);
  return packed;
}

}  // namespace

void attention_forward(const AttentionArgs& args, const Threads& threads, const Workspace& workspace) {
  const Rotations rotations(args.view);
  ScheduledAttention s = scheduled(args, rotations);
  const auto packed = packed_low_rank(s);
  ForwardSchedule schedule(args.view, rotations, s.group(), args.kv_heads, kernels().one_row_keys(args));
  s.tiles = schedule.tiles.data();
  s.blocks = schedule.blocks.data();
  if (schedule.partials) s.partials = workspace.take(workspace.context, schedule.partials * s.forward_partial_size());

  const Threads used = schedule.pairs * args.head_dim < kSerialWork ? Threads{1, nullptr} : threads;
  std::vector<ForwardTask>& tasks = schedule.tasks;
  if (s.low)  // which have tables that all heads of a row read
    std::stable_sort(tasks.begin(), tasks.end(), [](const ForwardTask& a, const ForwardTask& b) { return a.tile_begin < b.tile_begin; });
  const auto run = s.low ? kernels().low_rank_forward : kernels().attention_forward;
  const int64_t floats = s.low ? low_rank_scratch_size(s.padded_dim, *s.low) : forward_scratch_size(s.padded_dim);
  for_each_task(used, int64_t(tasks.size()), [&](int64_t i) { run(s, tasks[i], scratch(floats)); });
  for_each_task(used, int64_t(schedule.merges.size()), [&](int64_t i) { kernels().attention_merge(s, schedule.merges[i]); });
}

void attention_backward(const AttentionArgs& args, const Threads& threads, const Workspace& workspace) {
  const Rotations rotations(args.view);
  ScheduledAttention s = scheduled(args, rotations);
  auto packed = packed_low_rank(s);
  // A thread owns the rows of one (chunk, kv head) of the gradient pools, and where all heads add to the codes, of a chunk.
  const int64_t heads_apart = s.low ? 1 : args.kv_heads;
  const BackwardSchedule schedule(args.view, rotations, s.group(), args.kv_heads, s.padded_dim, kernels().one_row_keys(args),
                                  args.dq.data != nullptr, heads_apart);
  s.tiles = schedule.tiles.data();
  s.blocks = schedule.blocks.data();
  int64_t partials = 0, most_chunks = 0;
  for (const BackwardPhase& phase : schedule.phases) {
    partials = std::max(partials, phase.partials);
    most_chunks = std::max(most_chunks, int64_t(phase.chunk_indptr.size()) - 1);
  }
  if (partials) s.partials = workspace.take(workspace.context, partials * s.backward_partial_size());
  if (packed) packed->expect(s, most_chunks);
  for (const BackwardPhase& phase : schedule.phases) {
    const int64_t chunks = int64_t(phase.chunk_indptr.size()) - 1;
    for_each_task(threads, chunks * heads_apart, [&](int64_t i) {
      const int64_t chunk = i / heads_apart, head = i % heads_apart;
      for (int64_t u = phase.chunk_indptr[chunk]; u < phase.chunk_indptr[chunk + 1]; ++u)
        if (!packed) kernels().attention_backward(s, phase.units[u], head, scratch(backward_scratch_size(s.padded_dim)));
        else
          for (int64_t h = 0; h < args.kv_heads; ++h)
            kernels().low_rank_backward(s, phase.units[u], h, chunk, scratch(low_rank_scratch_size(s.padded_dim, *s.low)));
    });
    for_each_task(threads, int64_t(phase.reduces.size()), [&](int64_t i) { kernels().attention_backward_reduce(s, phase.reduces[i]); });
  }
  if (packed) packed->leave();
}

}  // namespace diffmas::cpu
