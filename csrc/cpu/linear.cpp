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

void columns_of(const LinearArgs& args, int64_t begin, int64_t end) {
  if (begin < end) kernels().linear(args, begin, end, scratch(args.n * (end - begin)));
}

}  // namespace

void linear(const LinearArgs& args, const Threads& threads) {
  kernels().linear_prepare(args);
  for_each_part(threads, args.to, args.n * args.from, [&](int64_t begin, int64_t end) { columns_of(args, begin, end); });
}

void norm(const NormArgs& args, const Threads& threads) {
  for_each_chunk(threads, args.n, args.length,
                 [&](int64_t begin, int64_t end) { kernels().norm_rows(args, begin, end, scratch(args.length)); });
}

void norm_backward(const NormGradArgs& args, const Threads& threads) {
  const NormArgs& norm = args.norm;
  for_each_chunk(threads, norm.n, norm.length,
                 [&](int64_t begin, int64_t end) { kernels().norm_backward_rows(args, begin, end, scratch(2 * norm.length)); });
}

void gate(const GateArgs& args, int64_t columns, const Threads& threads) {
  for_each_chunk(threads, args.n, columns, [&](int64_t begin, int64_t end) { kernels().gate(args, begin, end, 0, columns); });
}

void gate_backward(const GateGradArgs& args, int64_t columns, const Threads& threads) {
  for_each_chunk(threads, args.gate.n, columns, [&](int64_t begin, int64_t end) { kernels().gate_backward(args, begin, end, columns); });
}

void add(const AddArgs& args, const Threads& threads) {
  for_each_chunk(threads, args.n, args.length, [&](int64_t begin, int64_t end) { kernels().add_rows(args, begin, end); });
}

void norm_linears(const NormArgs& args, const LinearArgs* linears, int64_t count, const Threads& threads) {
  norm(args, threads);
  int64_t to = 0;
  for (int64_t i = 0; i < count; ++i) {
    kernels().linear_prepare(linears[i]);
    to += linears[i].to;
  }
  for_each_part(threads, to, args.n * args.length, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (int64_t i = 0; i < count; first += linears[i++].to)
      columns_of(linears[i], std::max<int64_t>(begin - first, 0), std::min(end - first, linears[i].to));
  });
}

void gated_linears(const LinearArgs& gate, const LinearArgs& up, const Matrix& y, const Threads& threads) {
  kernels().linear_prepare(gate);
  kernels().linear_prepare(up);
  for_each_part(threads, gate.to, 2 * gate.n * gate.from, [&](int64_t begin, int64_t end) {
    columns_of(gate, begin, end);
    columns_of(up, begin, end);
    kernels().gate({gate.n, gate.y, up.y, y}, 0, gate.n, begin, end);
  });
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
