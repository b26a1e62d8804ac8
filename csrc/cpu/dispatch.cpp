// Picks the kernels that are compiled for this CPU's instruction set.
#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>

#include "kernels/kernels.h"

namespace diffmas::cpu {
namespace {

#define DIFFMAS_KERNELS(isa)                                                                                          \
  Kernels {                                                                                                           \
    isa::inject_forward_range, isa::inject_backward_block, isa::merge_states_range, isa::merge_states_backward_range, \
        isa::reposition_range, isa::reposition_backward_head, isa::attention_forward_task, isa::attention_merge_task, \
        isa::attention_backward_unit, isa::attention_backward_reduce_task                                             \
  }

bool has(const char* isa) {
#ifdef DIFFMAS_X86
  if (!std::strcmp(isa, "avx512"))
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  // Every CPU with AVX2 and FMA converts halves too (F16C).
  if (!std::strcmp(isa, "avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#endif
  return !std::strcmp(isa, "generic");
}

// The widest instruction set that this CPU has, or the one that DIFFMAS_CPU_ISA names (for tests; refused where the CPU lacks it).
Kernels pick() {
  const char* wanted = std::getenv("DIFFMAS_CPU_ISA");
  if (wanted && !has(wanted))
    throw std::runtime_error(std::string("DIFFMAS_CPU_ISA: expected generic, avx2 or avx512, and a CPU that has it, got ") + wanted);
  const auto use = [&](const char* isa) { return wanted ? !std::strcmp(isa, wanted) : has(isa); };
#ifdef DIFFMAS_X86
  if (use("avx512")) return DIFFMAS_KERNELS(avx512);
  if (use("avx2")) return DIFFMAS_KERNELS(avx2);
#endif
  return DIFFMAS_KERNELS(generic);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels picked = pick();
  return picked;
}

}  // namespace diffmas::cpu
