// cross_attention and its backward as csrc/cuda/attention.cu launches them.
#include "cuda/attention.cu"
#include "cuda/attention_sm90.cu"

#include "attention_args.h"

int main() {
  diffmas::host::Tensors t;
  diffmas::host::options.processors = int(t.number("processors"));
  diffmas::host::options.max_shared = size_t(t.number("max_shared"));
  diffmas::host::options.sm90 = t.number("sm90");
  diffmas::host::options.resident = size_t(t.number("resident"));
  const bool backward = t.number("backward");
  const AttentionArgs a = diffmas::host::attention_args(t);
  if (int(t.number("vectors")) != int(in_vectors(launch_of(a)))) diffmas::host::fail("another form than the test expects");

  const AttentionSizes sizes = diffmas_cuda_attention_memory(&a, backward, 0);
  std::vector<float> floats(size_t(sizes.floats), NAN);
  std::vector<unsigned> counters(size_t(sizes.counters));
  const auto launch = backward ? diffmas_cuda_attention_backward : diffmas_cuda_attention_forward;
  const int error = launch(&a, {floats.data(), counters.data()}, 0, nullptr);
  if (error) diffmas::host::fail("error %d", error);
  bool by_warpgroups = false;
  for (const dim3& threads : diffmas::host::launches) by_warpgroups = by_warpgroups || threads.x == ForwardForm<64>::kThreads;
  if (by_warpgroups != bool(t.number("warpgroups"))) diffmas::host::fail("another kernel than the test expects");
  if (by_warpgroups && a.dq.data && diffmas::host::launches[2].x != BackwardForm<64>::kThreads)
    diffmas::host::fail("dq comes from another kernel than dK and dV");
  for (unsigned counter : counters)
    if (counter) diffmas::host::fail("a counter is left at %u", counter);
  t.finish();
}
