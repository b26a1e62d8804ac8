#include "attention.h"

#include "kernels/kernels.h"
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

}  // namespace

void attention_forward(const AttentionArgs& args, const Threads& threads, const Workspace& workspace) {
  const Rotations rotations(args.view);
  ScheduledAttention s = scheduled(args, rotations);
  const ForwardSchedule schedule(args.view, rotations, s.group(), args.kv_heads, kernels().one_row_keys(args));
  s.tiles = schedule.tiles.data();
  s.blocks = schedule.blocks.data();
  if (schedule.partials) s.partials = workspace.take(workspace.context, schedule.partials * s.forward_partial_size());

  const Threads used = schedule.pairs * args.head_dim < kSerialWork ? Threads{1, nullptr} : threads;
  for_each_task(used, int64_t(schedule.tasks.size()),
                [&](int64_t i) { kernels().attention_forward(s, schedule.tasks[i], scratch(forward_scratch_size(s.padded_dim))); });
  for_each_task(used, int64_t(schedule.merges.size()), [&](int64_t i) { kernels().attention_merge(s, schedule.merges[i]); });
}

void attention_backward(const AttentionArgs& args, const Threads& threads, const Workspace& workspace) {
  const Rotations rotations(args.view);
  ScheduledAttention s = scheduled(args, rotations);
  const BackwardSchedule schedule(args.view, rotations, s.group(), args.kv_heads, s.padded_dim, kernels().one_row_keys(args),
                                  args.dq.data != nullptr);
  s.tiles = schedule.tiles.data();
  s.blocks = schedule.blocks.data();
  int64_t partials = 0;
  for (const BackwardPhase& phase : schedule.phases) partials = std::max(partials, phase.partials);
  if (partials) s.partials = workspace.take(workspace.context, partials * s.backward_partial_size());
  for (const BackwardPhase& phase : schedule.phases) {
    const int64_t chunks = int64_t(phase.chunk_indptr.size()) - 1;
    // A thread owns the rows of one (chunk, kv head) of the gradient pools.
    for_each_task(threads, chunks * args.kv_heads, [&](int64_t i) {
      const int64_t chunk = i / args.kv_heads, head = i % args.kv_heads;
      for (int64_t u = phase.chunk_indptr[chunk]; u < phase.chunk_indptr[chunk + 1]; ++u)
        kernels().attention_backward(s, phase.units[u], head, scratch(backward_scratch_size(s.padded_dim)));
    });
    for_each_task(threads, int64_t(phase.reduces.size()), [&](int64_t i) { kernels().attention_backward_reduce(s, phase.reduces[i]); });
  }
}

}  // namespace diffmas::cpu
