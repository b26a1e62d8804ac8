#include "low_rank.h"

namespace diffmas::cpu {

PackedLowRank::PackedLowRank(const AttentionArgs& args, int64_t padded_dim)
    : low_(*args.low), kv_heads_(args.kv_heads), head_dim_(args.head_dim), padded_dim_(padded_dim) {
  pack(low_.k, k_);
  pack(low_.v, v_);
}

void PackedLowRank::pack(const LowRankPart& part, Part& packed) const {
  const int64_t pad = padded_rank(part.rank);
  packed.by_code.assign(std::size_t(kv_heads_ * part.rank * padded_dim_), 0.f);
  packed.by_column.assign(std::size_t(kv_heads_ * padded_dim_ * pad), 0.f);
  for (int64_t h = 0; h < kv_heads_; ++h)
    for (int64_t c = 0; c < head_dim_; ++c)
      for (int64_t j = 0; j < part.rank; ++j) {
        const float x = part.b[(h * head_dim_ + c) * part.rank + j];
        packed.by_code[(h * part.rank + j) * padded_dim_ + c] = x;
        packed.by_column[(h * padded_dim_ + c) * pad + j] = x;
      }
}

void PackedLowRank::set(ScheduledAttention& args) const {
  args.low_k = {k_.by_code.data(), k_.by_column.data(), nullptr};
  args.low_v = {v_.by_code.data(), v_.by_column.data(), nullptr};
}

void PackedLowRank::expect(ScheduledAttention& args, int64_t chunks) {
  const auto room = [&](const LowRankPart& part, Part& packed, PackedPart& given) {
    if (!part.db) return;
    packed.grads.assign(std::size_t(chunks * kv_heads_ * part.rank * padded_dim_), 0.f);
    given.grads = packed.grads.data();
  };
  room(low_.k, k_, args.low_k);
  room(low_.v, v_, args.low_v);
}

void PackedLowRank::leave() const {
  leave(low_.k, k_);
  leave(low_.v, v_);
}

void PackedLowRank::leave(const LowRankPart& part, const Part& packed) const {
  if (!part.db) return;
  const int64_t size = kv_heads_ * part.rank * padded_dim_;
  for (int64_t h = 0; h < kv_heads_; ++h)
    for (int64_t c = 0; c < head_dim_; ++c)
      for (int64_t j = 0; j < part.rank; ++j) {
        float sum = 0;
        for (int64_t at = (h * part.rank + j) * padded_dim_ + c; at < int64_t(packed.grads.size()); at += size) sum += packed.grads[at];
        part.db[(h * head_dim_ + c) * part.rank + j] += sum;
      }
}

}  // namespace diffmas::cpu
