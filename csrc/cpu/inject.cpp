#include "inject.h"

#include <vector>

#include "kernels/kernels.h"
#include "parallel.h"

namespace diffmas::cpu {

void inject_forward(const InjectArgs& args, const Threads& threads) {
  const int64_t work = (args.q_heads + 2 * args.kv_heads) * args.head_dim;
  for_each_chunk(threads, args.n, work, [&](int64_t begin, int64_t end) { kernels().inject_forward(args, begin, end); });
}

void inject_backward(InjectArgs args, float* dq_weight, float* dk_weight, const Threads& threads) {
  const int64_t blocks = (args.n + kInjectBlock - 1) / kInjectBlock, d = args.head_dim;
  std::vector<float> partials(size_t(blocks * 2 * d));  // [blocks, 2, D]: dq_weight and dk_weight of one block
  args.weight_partials = partials.data();
  for_each_task(threads, blocks, [&](int64_t i) { kernels().inject_backward(args, i); });
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

}  // namespace diffmas::cpu
