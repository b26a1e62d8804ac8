// cross_attention and its backward by the CPU kernels. With DIFFMAS_HOST_EMULATION the instructions that multiply bfloat16 are
// emulated, and the program that includes this says which: DIFFMAS_DOTS alone, or DIFFMAS_TILES too.
#define DIFFMAS_ISA emulated
#include "cpu/attention.cpp"
#include "cpu/kernels/attention_backward.cpp"
#include "cpu/kernels/attention_forward.cpp"
#include "cpu/low_rank.cpp"
#include "cpu/schedule.cpp"

// Tensors come with it, whether or not kernels were emulated.
#if !defined(DIFFMAS_HOST_EMULATION)
#define DIFFMAS_HOST_EMULATION
#endif
#include "attention_args.h"

namespace diffmas::cpu {

const Kernels& kernels() {
  static const Kernels emulated = [] {
    Kernels k{};
    k.one_row_keys = emulated::attention_one_row_keys;
    k.attention_forward = emulated::attention_forward_task, k.attention_merge = emulated::attention_merge_task;
    k.attention_backward = emulated::attention_backward_unit, k.attention_backward_reduce = emulated::attention_backward_reduce_task;
    return k;
  }();
  return emulated;
}

}  // namespace diffmas::cpu

int main() {
  diffmas::host::Tensors t;
  const diffmas::AttentionArgs args = diffmas::host::attention_args(t);
  std::vector<float> partials;
  const diffmas::cpu::Workspace workspace{&partials, [](void* context, int64_t floats) {
                                            auto& partials = *static_cast<std::vector<float>*>(context);
                                            partials.assign(size_t(floats), NAN);
                                            return partials.data();
                                          }};
  (t.number("backward") ? diffmas::cpu::attention_backward : diffmas::cpu::attention_forward)(args, {1, nullptr}, workspace);
  t.finish();
}
