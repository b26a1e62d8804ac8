#include "merge_states.h"

#include "kernels/kernels.h"
#include "parallel.h"

namespace diffmas::cpu {

void merge_states(const MergeArgs& args, const Threads& threads) {
  const int64_t work = 2 * args.heads * args.head_dim;
  for_each_chunk(threads, args.n, work, [&](int64_t begin, int64_t end) { kernels().merge_states(args, begin, end); });
}

void merge_states_backward(const MergeArgs& args, const Threads& threads) {
  const int64_t work = 4 * args.heads * args.head_dim;
  for_each_chunk(threads, args.n, work, [&](int64_t begin, int64_t end) { kernels().merge_states_backward(args, begin, end); });
}

}  // namespace diffmas::cpu
