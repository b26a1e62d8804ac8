// inject and its backward on the CPU.
#pragma once
#include "common/inject.h"
#include "threads.h"

namespace diffmas::cpu {

// Weight gradients are summed per block of this many tokens, then over blocks in order: the same bits for any thread count.
inline constexpr int64_t kInjectBlock = 32;

void inject_forward(const InjectArgs& args, const Threads& threads);
// dq_weight, dk_weight: float32 [D], null when the weight is absent.
void inject_backward(InjectArgs args, float* dq_weight, float* dk_weight, const Threads& threads);

}  // namespace diffmas::cpu
