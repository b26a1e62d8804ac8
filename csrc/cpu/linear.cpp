#include "linear.h"

#include "kernels/kernels.h"
#include "parallel.h"

namespace diffmas::cpu {
namespace {

// A task's columns do not depend on the number of threads, and neither does any sum.
constexpr int64_t kColumns = 4 * kLinearColumns, kRows = 16;

template <class F>
void for_each_part(const Threads& threads, int64_t count, int64_t part, int64_t work, const F& body) {
  if (count * work < kSerialWork) return body(0, count);
  for_each_task(threads, (count + part - 1) / part, [&](int64_t i) { body(i * part, std::min(count, (i + 1) * part)); });
}

}  // namespace

void linear(const LinearArgs& args, const Threads& threads) {
  kernels().linear_prepare(args, 0, args.n);
  for_each_part(threads, args.to, kColumns, args.n * args.from,
                [&](int64_t begin, int64_t end) { kernels().linear(args, begin, end, scratch(args.n * (end - begin))); });
}

void add_lora(const LinearArgs& args, const Threads& threads) {
  kernels().linear_prepare(args, 0, 0);
  for_each_part(threads, args.n, kRows, args.lora.rank * (args.from + args.to), [&](int64_t begin, int64_t end) {
    kernels().add_lora(args, begin, end, scratch(kRows * args.to));
  });
}

void lora_grad(const LoraGradArgs& args, const Threads& threads) {
  for_each_part(threads, args.length, kColumns, args.n * args.rank,
                [&](int64_t begin, int64_t end) { kernels().lora_grad(args, begin, end); });
}

}  // namespace diffmas::cpu
