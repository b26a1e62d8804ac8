// The kernels as one instruction set provides them. The .cpp files of this folder are compiled once per instruction set, each into its
// own namespace; dispatch.cpp picks one at load time.
//
// What multiplies bfloat16 (avx512_bf16, amx, arm_bf16) is attention and linears; the other kernels are avx512's, on ARM generic's.
//
// Those files must not use inline functions from outside that namespace (the standard library's too): the linker keeps one copy of
// such a function, and it could be the one compiled for a CPU that this is not.
#pragma once
#include "../linear.h"
#include "../merge_states.h"
#include "../reposition.h"
#include "../tasks.h"
#include "common/inject.h"

namespace diffmas::cpu {

struct Kernels {
  void (*inject_forward)(const InjectArgs&, int64_t token_begin, int64_t token_end);
  void (*inject_backward)(const InjectArgs&, int64_t block);
  void (*merge_states)(const MergeArgs&, int64_t token_begin, int64_t token_end);
  void (*merge_states_backward)(const MergeArgs&, int64_t token_begin, int64_t token_end);
  void (*reposition)(const RepositionArgs&, int64_t begin, int64_t end);
  void (*reposition_backward)(const RepositionArgs&, int64_t head);
  void (*norm_rows)(const NormArgs&, int64_t row_begin, int64_t row_end, float* scratch);
  void (*norm_backward_rows)(const NormGradArgs&, int64_t row_begin, int64_t row_end, float* scratch);
  void (*gate)(const GateArgs&, int64_t row_begin, int64_t row_end, int64_t column_begin, int64_t column_end);
  void (*gate_backward)(const GateGradArgs&, int64_t row_begin, int64_t row_end, int64_t columns);
  void (*add_rows)(const AddArgs&, int64_t row_begin, int64_t row_end);
  int64_t (*one_row_keys)(const AttentionArgs&);  // kOneRowKeys where the form multiplies these dtypes as they are
  void (*attention_forward)(const ScheduledAttention&, const ForwardTask&, float* scratch);
  void (*attention_merge)(const ScheduledAttention&, const MergeTask&);
  void (*attention_backward)(const ScheduledAttention&, const BackwardUnit&, int64_t head, float* scratch);
  void (*attention_backward_reduce)(const ScheduledAttention&, const MergeTask&);
  void (*low_rank_forward)(const ScheduledAttention&, const ForwardTask&, float* scratch);
  void (*low_rank_backward)(const ScheduledAttention&, const BackwardUnit&, int64_t head, int64_t chunk, float* scratch);
  void (*linear_prepare)(const LinearArgs&);
  void (*linear)(const LinearArgs&, int64_t column_begin, int64_t column_end, float* scratch);
  void (*add_lora)(const LinearArgs&, int64_t row_begin, int64_t row_end, float* scratch);
  void (*lora_grad)(const LoraGradArgs&, int64_t column_begin, int64_t column_end);
};

// Of this CPU.
const Kernels& kernels();

#define DIFFMAS_DECLARE_PRODUCTS(isa)                                                                        \
  namespace isa {                                                                                             \
  int64_t attention_one_row_keys(const AttentionArgs&);                                                       \
  void attention_forward_task(const ScheduledAttention&, const ForwardTask&, float* scratch);                 \
  void attention_merge_task(const ScheduledAttention&, const MergeTask&);                                     \
  void attention_backward_unit(const ScheduledAttention&, const BackwardUnit&, int64_t head, float* scratch); \
  void attention_backward_reduce_task(const ScheduledAttention&, const MergeTask&);                           \
  void low_rank_forward_task(const ScheduledAttention&, const ForwardTask&, float* scratch);                  \
  void low_rank_backward_unit(const ScheduledAttention&, const BackwardUnit&, int64_t, int64_t, float*);      \
  void linear_prepare(const LinearArgs&);                                                                     \
  void linear_columns(const LinearArgs&, int64_t column_begin, int64_t column_end, float* scratch);           \
  void add_lora_rows(const LinearArgs&, int64_t row_begin, int64_t row_end, float* scratch);                  \
  void lora_grad_columns(const LoraGradArgs&, int64_t column_begin, int64_t column_end);                      \
  }
#define DIFFMAS_DECLARE_KERNELS(isa)                                                          \
  DIFFMAS_DECLARE_PRODUCTS(isa)                                                              \
  namespace isa {                                                                             \
  void inject_forward_range(const InjectArgs&, int64_t token_begin, int64_t token_end);       \
  void inject_backward_block(const InjectArgs&, int64_t block);                               \
  void merge_states_range(const MergeArgs&, int64_t token_begin, int64_t token_end);          \
  void merge_states_backward_range(const MergeArgs&, int64_t token_begin, int64_t token_end); \
  void reposition_range(const RepositionArgs&, int64_t begin, int64_t end);                   \
  void reposition_backward_head(const RepositionArgs&, int64_t head);                         \
  void norm_rows(const NormArgs&, int64_t row_begin, int64_t row_end, float* scratch);        \
  void norm_backward_rows(const NormGradArgs&, int64_t row_begin, int64_t row_end, float*);   \
  void gate_block(const GateArgs&, int64_t, int64_t, int64_t, int64_t);                       \
  void gate_backward_rows(const GateGradArgs&, int64_t, int64_t, int64_t);                    \
  void add_rows(const AddArgs&, int64_t, int64_t);                                            \
  }
DIFFMAS_DECLARE_KERNELS(generic)
#ifdef DIFFMAS_X86
DIFFMAS_DECLARE_KERNELS(avx2)
DIFFMAS_DECLARE_KERNELS(avx512)
DIFFMAS_DECLARE_PRODUCTS(avx512_bf16)
DIFFMAS_DECLARE_PRODUCTS(amx)
#else
DIFFMAS_DECLARE_PRODUCTS(arm_bf16)
#endif
#undef DIFFMAS_DECLARE_KERNELS
#undef DIFFMAS_DECLARE_PRODUCTS

}  // namespace diffmas::cpu
