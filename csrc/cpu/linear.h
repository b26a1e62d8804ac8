// Linear layers of few rows, whose weight is read once, the small products of LoRA, and what stands between a layer's linears, on the CPU.
#pragma once
#include "common/rows.h"
#include "threads.h"

namespace diffmas::cpu {

// Lengths of rows are multiples of this; few rows are at most so many.
inline constexpr int64_t kLinearColumns = 32, kLinearRows = 32;

// A matrix of float32 or bfloat16: its rows are `stride` elements apart.
struct Matrix {
  void* data;
  int64_t stride;
  DType dtype;
};

// scale * (x down') up for rows x [n, from] -> [n, to]. One of down [rank, from] and up [rank, to] is b_rows, the copy of b [., rank]
// with its rows together, which is made first. u [n, rank]: takes x down'.
struct Lora {
  int64_t rank;  // 0: none
  float scale;
  const float *b, *down, *up;
  float *b_rows, *u;
};

// y [n, to] = x [n, from] weight' + bias + LoRA's; weight [to, from], or as it is, [from, to], where it is `transposed`. residual [n, to]
// of y's dtype, where there is one: is added to y when y has been rounded.
struct LinearArgs {
  int64_t n, from, to;
  Matrix x, weight, y, residual;
  const void* bias;  // [to], of y's dtype; or null
  bool transposed;
  float* x_floats;  // memory for [n, from], unused where x is float32; null for add_lora
  Lora lora;
};

// weight and bias aside: y is added to.
void linear(const LinearArgs& args, const Threads& threads);
void add_lora(const LinearArgs& args, const Threads& threads);

// y = weight * (x / rms(x)) for rows [n, length] of one dtype, rounded to it before the weight, too.
struct NormArgs {
  int64_t n, length;
  Matrix x, y;
  const void* weight;
  float eps;
};

// Its gradient to x, from dy in y's place; the weight is frozen.
struct NormGradArgs {
  NormArgs norm;
  Matrix dx;
};

// y = silu(gate) * up for rows [n, .] of one dtype, rounded in between; y may be gate.
struct GateArgs {
  int64_t n;
  Matrix gate, up, y;
};

// Its gradients, from dy in y's place.
struct GateGradArgs {
  GateArgs gate;
  Matrix dgate, dup;
};

// y += x, for rows [n, length] of one dtype.
struct AddArgs {
  int64_t n, length;
  Matrix x, y;
};

void norm(const NormArgs& args, const Threads& threads);
void norm_backward(const NormGradArgs& args, const Threads& threads);
void gate(const GateArgs& args, int64_t columns, const Threads& threads);
void gate_backward(const GateGradArgs& args, int64_t columns, const Threads& threads);
void add(const AddArgs& args, const Threads& threads);

// A norm, and linears whose x is its y. A linear for gate and one for up, and y, what is made of both, which may be gate's.
void norm_linears(const NormArgs& norm, const LinearArgs* linears, int64_t count, const Threads& threads);
void gated_linears(const LinearArgs& gate, const LinearArgs& up, const Matrix& y, const Threads& threads);

// grad [rank, length] = scale * c' z; c [n, rank], z [n, length].
struct LoraGradArgs {
  int64_t n, rank, length;
  float scale;
  const float* c;
  Matrix z;
  float* grad;
};

void lora_grad(const LoraGradArgs& args, const Threads& threads);

}  // namespace diffmas::cpu
