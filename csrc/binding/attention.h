// From the tensors of a call of attention to what its kernels take.
#pragma once
#include "common/attention.h"

#include "cpu/attention.h"
#include "tensors.h"

namespace diffmas::binding {

// The pools, whose rows may be payloads, and their scales.
struct KV {
  const Tensor &k_pool, &v_pool;
  const Tensor *k_scale = nullptr, *v_scale = nullptr;
};

// What both directions take.
AttentionArgs attention_args(const Tensor& q, const KV& kv, const Tensor& q_indptr, const Tensor& seg_indptr, const Tensor& seg_start,
                             const Tensor& seg_len, const Optional& seg_offset, const Optional& inv_freq, double scale, bool causal,
                             bool interleaved);

// o and lse of what `a` reads. flat: o is [n, Hq * D].
std::tuple<Tensor, Tensor> forward(AttentionArgs& a, const Tensor& q, bool flat);

// The partial results of the CPU kernels, in a tensor.
struct Partials {
  const Tensor& like;
  Optional held;

  cpu::Workspace workspace() {
    return {this, [](void* context, int64_t floats) {
              Partials& self = *static_cast<Partials*>(context);
              self.held = empty(self.like, {floats}, ScalarType::Float);
              return floats_of_own(*self.held);
            }};
  }
};

}  // namespace diffmas::binding
