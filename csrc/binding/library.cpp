// Registers the ops of torch.ops.diffmas_native, an implementation per device. LibTorch stable ABI: one binary for torch 2.10 and
// newer. Python defines their schemas, from the dictionary that also has those of torch.ops.diffmas, before it loads this library.
#include "cpu/dispatch.h"
#include "ops.h"
#ifdef DIFFMAS_CUDA
#include "cuda.h"
#endif

using namespace diffmas::binding;

static std::string cpu_form() { return diffmas::cpu::form(); }

STABLE_TORCH_LIBRARY_IMPL(diffmas_native, CompositeExplicitAutograd, m) { m.impl("cpu_form", TORCH_BOX(&cpu_form)); }

STABLE_TORCH_LIBRARY_IMPL(diffmas_native, CPU, m) {
  m.impl("inject", TORCH_BOX(&inject));
  m.impl("inject_backward", TORCH_BOX(&inject_backward));
  m.impl("cross_attention", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_attention_backward));
  m.impl("cross_attention_quantized", TORCH_BOX(&cross_attention_quantized));
  m.impl("cross_attention_quantized_backward", TORCH_BOX(&cross_attention_quantized_backward));
  m.impl("low_rank_attention", TORCH_BOX(&low_rank_attention));
  m.impl("low_rank_attention_backward", TORCH_BOX(&low_rank_attention_backward));
  m.impl("inject_attend", TORCH_BOX(&inject_attend));
  m.impl("inject_attend_backward", TORCH_BOX(&inject_attend_backward));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("few_rows_layers", TORCH_BOX(&few_rows_layers));
  m.impl("few_rows_layers_backward", TORCH_BOX(&few_rows_layers_backward));
  m.impl("few_rows_lora_grads", TORCH_BOX(&few_rows_lora_grads));
  m.impl("norm", TORCH_BOX(&norm));
  m.impl("norm_backward", TORCH_BOX(&norm_backward));
  m.impl("gate", TORCH_BOX(&gate));
  m.impl("gate_backward", TORCH_BOX(&gate_backward));
  m.impl("add_lora", TORCH_BOX(&add_lora));
  m.impl("lora_grad", TORCH_BOX(&lora_grad));
  m.impl("merge_states", TORCH_BOX(&merge_states));
  m.impl("merge_states_backward", TORCH_BOX(&merge_states_backward));
  m.impl("reposition", TORCH_BOX(&reposition));
  m.impl("reposition_backward", TORCH_BOX(&reposition_backward));
}

#ifdef DIFFMAS_CUDA
STABLE_TORCH_LIBRARY_IMPL(diffmas_native, CUDA, m) {
  m.impl("inject", TORCH_BOX(&inject));
  m.impl("inject_backward", TORCH_BOX(&inject_backward));
  m.impl("cross_attention", TORCH_BOX(&cross_attention));
  m.impl("cross_attention_backward", TORCH_BOX(&cross_attention_backward));
  m.impl("cross_attention_quantized", TORCH_BOX(&cross_attention_quantized));
}

STABLE_TORCH_LIBRARY_IMPL(diffmas_native, CompositeExplicitAutograd, m) { m.impl("versions", TORCH_BOX(&cuda_versions)); }
#endif
