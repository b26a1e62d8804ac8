#include "linear.h"

#include "kernels/kernels.h"
#include "parallel.h"

namespace diffmas::cpu {
namespace {

constexpr int64_t kRows = 16;

// A part of the columns for each thread: no sum depends on how they are divided.
template <class F>
void for_each_part(const Threads& threads, int64_t columns, int64_t work, const F& body) {
  const int64_t blocks = (columns + kLinearColumns - 1) / kLinearColumns;
  const int64_t parts = columns * work < kSerialWork ? 1 : std::min(blocks, threads.count);
  for_each_task(threads, parts, [&](int64_t i) {
    body(blocks * i / parts * kLinearColumns, blocks * (i + 1) / parts * kLinearColumns);
  });
}

}  // namespace

void linear(const LinearArgs& args, const Threads& threads) {
  kernels().linear_prepare(args);
  for_each_part(threads, args.to, args.n * args.from,
                [&](int64_t begin, int64_t end) { kernels().linear(args, begin, end, scratch(args.n * (end - begin))); });
}

void add_lora(const LinearArgs& args, const Threads& threads) {
  kernels().linear_prepare(args);
  for_each_task(threads, (args.n + kRows - 1) / kRows,
                [&](int64_t i) { kernels().add_lora(args, i * kRows, std::min(args.n, (i + 1) * kRows), scratch(kRows * args.from)); });
}

void lora_grad(const LoraGradArgs& args, const Threads& threads) {
  for_each_part(threads, args.length, args.n * args.rank,
                [&](int64_t begin, int64_t end) { kernels().lora_grad(args, begin, end); });
}

}  // namespace diffmas::cpu
