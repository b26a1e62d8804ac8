// cross_attention and its backward on the CPU.
#pragma once
#include "common/attention.h"
#include "threads.h"

namespace diffmas::cpu {

void attention_forward(const AttentionArgs& args, const Threads& threads, const Workspace& workspace);
void attention_backward(const AttentionArgs& args, const Threads& threads, const Workspace& workspace);

}  // namespace diffmas::cpu
