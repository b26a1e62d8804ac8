// What a decoder layer does between its linears, for few rows: the norm, and the gate of its feed-forward part.
#include "../linear.h"
#include "kernels.h"
#include "simd.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

char* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<char*>(m.data) + (row * m.stride + column) * element_size(m.dtype);
}

// x as a row of this dtype holds it, which is left in `memory`.
void round_row(float* x, void* memory, DType dtype, int64_t d) {
  store_row(memory, x, dtype, d);
  load_row(x, memory, dtype, d);
}

}  // namespace

void norm_rows(const NormArgs& args, int64_t begin, int64_t end, float* x) {
  const int64_t d = args.length;
  for (int64_t i = begin; i < end; ++i) {
    load_row(x, at(args.x, i, 0), args.x.dtype, d);
    const float r = 1 / __builtin_sqrtf(sum_of_squares(x, d) / float(d) + args.eps);
    for (int64_t c = 0; c < d; c += W) store(x + c, load(x + c) * r);
    round_row(x, at(args.y, i, 0), args.y.dtype, d);
    for (int64_t c = 0; c < d; c += kLinearColumns) {
      float weight[kLinearColumns];
      load_row(weight, static_cast<const char*>(args.weight) + c * element_size(args.y.dtype), args.y.dtype, kLinearColumns);
      for (int64_t j = 0; j < kLinearColumns; j += W) store(x + c + j, load(weight + j) * load(x + c + j));
    }
    store_row(at(args.y, i, 0), x, args.y.dtype, d);
  }
}

void gate_columns(const GateArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = 0; i < args.n; ++i)
    for (int64_t c = begin; c < end; c += kLinearColumns) {
      float gate[kLinearColumns], up[kLinearColumns];
      char* y = at(args.gate, i, c);
      load_row(gate, y, args.gate.dtype, kLinearColumns);
      load_row(up, at(args.up, i, c), args.up.dtype, kLinearColumns);
      for (int64_t j = 0; j < kLinearColumns; j += W) store(gate + j, load(gate + j) / (1.f + exp(-load(gate + j))));
      round_row(gate, y, args.gate.dtype, kLinearColumns);
      for (int64_t j = 0; j < kLinearColumns; j += W) store(gate + j, load(gate + j) * load(up + j));
      store_row(y, gate, args.gate.dtype, kLinearColumns);
    }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
