// The forward over rows of 8 bits as csrc/cuda/attention_quantized.cu launches it.
#include "cuda/attention_quantized.cu"

#include "attention_args.h"

int main() {
  diffmas::host::Tensors t;
  diffmas::host::options.processors = int(t.number("processors"));
  diffmas::host::options.max_shared = kMaxShared;
  const AttentionArgs a = diffmas::host::attention_args(t);
  const AttentionSizes sizes = diffmas_cuda_quantized_memory(&a, 0);
  std::vector<float> floats(size_t(sizes.floats), NAN);
  std::vector<unsigned> counters(size_t(sizes.counters));
  const int error = diffmas_cuda_quantized_forward(&a, {floats.data(), counters.data()}, 0, nullptr);
  if (error) diffmas::host::fail("error %d", error);
  for (unsigned counter : counters)
    if (counter) diffmas::host::fail("a counter is left at %u", counter);
  t.finish();
}
