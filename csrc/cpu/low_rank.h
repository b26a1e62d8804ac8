// Low-rank parts as the kernels take them.
#pragma once
#include <cstddef>
#include <vector>

#include "tasks.h"

namespace diffmas::cpu {

// b in the layouts of products, and the gradients of b from each chunk of a backward.
class PackedLowRank {
 public:
  PackedLowRank(const AttentionArgs& args, int64_t padded_dim);
  void set(ScheduledAttention& args) const;

  // For a backward of so many chunks.
  void expect(ScheduledAttention& args, int64_t chunks);
  // Adds them up, in order.
  void leave() const;

 private:
  struct Part {
    std::vector<float> by_code, by_column, grads;
  };
  void pack(const LowRankPart& part, Part& packed) const;
  void leave(const LowRankPart& part, const Part& packed) const;

  const LowRank& low_;
  int64_t kv_heads_, head_dim_, padded_dim_;
  Part k_, v_;
};

}  // namespace diffmas::cpu
