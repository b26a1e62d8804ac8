// What a decoder layer does between its linears: the norm, the gate of its feed-forward part, and sums. All round where torch does.
#include "../linear.h"
#include "kernels.h"
#include "simd.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

char* at(const Matrix& m, int64_t row, int64_t column) {
  return static_cast<char*>(m.data) + (row * m.stride + column) * element_size(m.dtype);
}

// Columns at a time: many, as each look at the dtype is for all of them, and few enough for L1.
constexpr int64_t kChunk = 8 * kLinearColumns;

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

void norm_backward_rows(const NormGradArgs& args, int64_t begin, int64_t end, float* x) {
  const NormArgs& norm = args.norm;
  const int64_t d = norm.length;
  const DType dtype = norm.x.dtype;
  float* g = x + d;  // the gradient to x / rms(x), rounded as that was
  for (int64_t i = begin; i < end; ++i) {
    load_row(x, at(norm.x, i, 0), dtype, d);
    load_row(g, at(norm.y, i, 0), dtype, d);
    for (int64_t c = 0; c < d; c += kLinearColumns) {
      float weight[kLinearColumns];
      load_row(weight, static_cast<const char*>(norm.weight) + c * element_size(dtype), dtype, kLinearColumns);
      for (int64_t j = 0; j < kLinearColumns; j += W) store(g + c + j, load(weight + j) * load(g + c + j));
    }
    round_row(g, at(args.dx, i, 0), dtype, d);
    const float r = 1 / __builtin_sqrtf(sum_of_squares(x, d) / float(d) + norm.eps);
    vf dots = {};
    for (int64_t c = 0; c < d; c += W) dots += load(g + c) * load(x + c);
    const float along = sum(dots) * r * r * r / float(d);
    for (int64_t c = 0; c < d; c += W) store(x + c, load(g + c) * r - load(x + c) * along);
    store_row(at(args.dx, i, 0), x, dtype, d);
  }
}

void gate_block(const GateArgs& args, int64_t row_begin, int64_t row_end, int64_t begin, int64_t end) {
  const DType dtype = args.gate.dtype;
  for (int64_t i = row_begin; i < row_end; ++i)
    for (int64_t c = begin; c < end; c += kChunk) {
      const int64_t n = min(kChunk, end - c);
      float gate[kChunk], up[kChunk];
      char* y = at(args.y, i, c);
      load_row(gate, at(args.gate, i, c), dtype, n);
      load_row(up, at(args.up, i, c), dtype, n);
      for (int64_t j = 0; j < n; j += W) store(gate + j, load(gate + j) / (1.f + exp(-load(gate + j))));
      round_row(gate, y, dtype, n);
      for (int64_t j = 0; j < n; j += W) store(gate + j, load(gate + j) * load(up + j));
      store_row(y, gate, dtype, n);
    }
}

void gate_backward_rows(const GateGradArgs& args, int64_t begin, int64_t end, int64_t columns) {
  const DType dtype = args.gate.gate.dtype;
  for (int64_t i = begin; i < end; ++i)
    for (int64_t c = 0; c < columns; c += kChunk) {
      const int64_t n = min(kChunk, columns - c);
      float gate[kChunk], up[kChunk], dy[kChunk], sigmoid[kChunk], silu[kChunk], dsilu[kChunk];
      char *dgate = at(args.dgate, i, c), *dup = at(args.dup, i, c);
      load_row(gate, at(args.gate.gate, i, c), dtype, n);
      load_row(up, at(args.gate.up, i, c), dtype, n);
      load_row(dy, at(args.gate.y, i, c), dtype, n);
      for (int64_t j = 0; j < n; j += W) {
        store(sigmoid + j, 1.f / (1.f + exp(-load(gate + j))));
        store(silu + j, load(gate + j) / (1.f + exp(-load(gate + j))));
        store(dsilu + j, load(dy + j) * load(up + j));
      }
      round_row(silu, dup, dtype, n);
      round_row(dsilu, dgate, dtype, n);
      for (int64_t j = 0; j < n; j += W) {
        const vf s = load(sigmoid + j);
        store(silu + j, load(dy + j) * load(silu + j));
        store(dsilu + j, load(dsilu + j) * s * (1.f + load(gate + j) * (1.f - s)));
      }
      store_row(dup, silu, dtype, n);
      store_row(dgate, dsilu, dtype, n);
    }
}

void add_rows(const AddArgs& args, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end; ++i)
    for (int64_t c = 0; c < args.length; c += kChunk) {
      const int64_t n = min(kChunk, args.length - c);
      float x[kChunk], y[kChunk];
      load_row(x, at(args.x, i, c), args.x.dtype, n);
      load_row(y, at(args.y, i, c), args.y.dtype, n);
      for (int64_t j = 0; j < n; j += W) store(y + j, load(y + j) + load(x + j));
      store_row(at(args.y, i, c), y, args.y.dtype, n);
    }
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
