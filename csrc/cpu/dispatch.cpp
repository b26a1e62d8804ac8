// Picks the kernels that are compiled for this CPU's instruction set.
#include "dispatch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(DIFFMAS_X86)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(DIFFMAS_HAS_ARM_BF16)
#if defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif
#endif

#include "kernels/kernels.h"

namespace diffmas::cpu {
namespace {

#define DIFFMAS_PRODUCTS(isa)                                                                                       \
  isa::attention_one_row_keys, isa::attention_forward_task, isa::attention_merge_task, isa::attention_backward_unit, \
      isa::attention_backward_reduce_task, isa::low_rank_forward_task, isa::low_rank_backward_unit, isa::linear_prepare, isa::linear_columns, isa::add_lora_rows, isa::lora_grad_columns
#define DIFFMAS_KERNELS(isa, products_isa)                                                                           \
  Kernels {                                                                                                           \
    isa::inject_forward_range, isa::inject_backward_block, isa::merge_states_range, isa::merge_states_backward_range, \
        isa::reposition_range, isa::reposition_backward_head, isa::norm_rows, isa::norm_backward_rows, isa::gate_block,      \
        isa::gate_backward_rows, isa::add_rows, DIFFMAS_PRODUCTS(products_isa)                                               \
  }

#if defined(DIFFMAS_X86)
bool has_bit(unsigned leaf, unsigned subleaf, int word, int bit) {  // word: 0 for EAX, 3 for EDX
  unsigned words[4] = {};
  return __get_cpuid_count(leaf, subleaf, words, words + 1, words + 2, words + 3) && (words[word] >> bit & 1);
}

// The kernel saves the tiles of those processes only that have asked for them; where it (XCR0) or a sandbox knows none, it refuses.
bool may_use_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#elif defined(DIFFMAS_HAS_ARM_BF16)
bool has_arm_bf16() {
#if defined(__linux__)
  constexpr unsigned long kBf16 = 1 << 14;  // HWCAP2_BF16
  return getauxval(AT_HWCAP2) & kBf16;
#elif defined(__APPLE__)
  int has = 0;
  size_t size = sizeof has;
  return !sysctlbyname("hw.optional.arm.FEAT_BF16", &has, &size, nullptr, 0) && has;
#else
  return false;
#endif
}
#endif

bool has(const char* isa) {
  const auto is = [&](const char* name) { return !std::strcmp(isa, name); };
#ifdef DIFFMAS_X86
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vl");
  const bool dots = avx512 && has_bit(7, 1, 0, 5);
  if (is("amx")) return dots && has_bit(7, 0, 3, 22) && has_bit(7, 0, 3, 24) && may_use_tiles();
  if (is("avx512_bf16")) return dots;
  if (is("avx512")) return avx512;
  // Every CPU with AVX2 and FMA converts halves too (F16C).
  if (is("avx2")) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
#elif defined(DIFFMAS_HAS_ARM_BF16)
  if (is("arm_bf16")) return has_arm_bf16();
#endif
  return is("generic");
}

struct Form {
  const char* name;
  Kernels kernels;
};

// The widest first. What a compiler does not know is left out (setup.py).
const Form kForms[] = {
#ifdef DIFFMAS_X86
#ifdef DIFFMAS_HAS_AMX
    {"amx", DIFFMAS_KERNELS(avx512, amx)},
#endif
#ifdef DIFFMAS_HAS_AVX512_BF16
    {"avx512_bf16", DIFFMAS_KERNELS(avx512, avx512_bf16)},
#endif
    {"avx512", DIFFMAS_KERNELS(avx512, avx512)},
    {"avx2", DIFFMAS_KERNELS(avx2, avx2)},
#elif defined(DIFFMAS_HAS_ARM_BF16)
    {"arm_bf16", DIFFMAS_KERNELS(generic, arm_bf16)},
#endif
    {"generic", DIFFMAS_KERNELS(generic, generic)},
};

// The first that this CPU has, or the one that DIFFMAS_CPU_ISA names (refused where it is not to be had).
const Form& pick() {
  const char* wanted = std::getenv("DIFFMAS_CPU_ISA");
  for (const Form& form : kForms)
    if ((!wanted || !std::strcmp(form.name, wanted)) && has(form.name)) return form;
  std::string names;
  for (const Form& form : kForms)
    if (has(form.name)) names += std::string(names.empty() ? "" : ", ") + form.name;
  throw std::runtime_error("DIFFMAS_CPU_ISA: expected what this CPU and this build have, " + names + "; got " + wanted);
}

const Form& picked() {
  static const Form& form = pick();
  return form;
}

}  // namespace

const Kernels& kernels() { return picked().kernels; }

const char* form() { return picked().name; }

}  // namespace diffmas::cpu
