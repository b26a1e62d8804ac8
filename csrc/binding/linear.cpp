#include "cpu/linear.h"

#include "ops.h"

namespace diffmas::binding {
namespace {

constexpr Device kCpu{false, 0};

void check(bool right, const char* name, const char* expected, const Tensor& t) {
  STD_TORCH_CHECK(right, name, ": expected ", expected, ", got shape ", shape_of(t), " in ",
                  torch::headeronly::toString(t.scalar_type()));
}

cpu::Matrix matrix(const char* name, const Tensor& t, int64_t columns) {
  check(t.dim() == 2 && t.size(1) == columns && columns % cpu::kLinearColumns == 0, name, "rows of a length that fits, a multiple of 32", t);
  check(!t.is_cuda() && (columns == 0 || t.stride(1) == 1) && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16),
        name, "rows in float32 or bfloat16 on the CPU", t);
  return {t.data_ptr(), t.stride(0), t.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16};
}

// a [rank, in], b [out, rank]; see Lora. -> u and what must live as long as the call.
struct Small {
  Tensor u, b_rows;
};
Small take_lora(cpu::LinearArgs& args, const Tensor& x, const Optional& a, const Optional& b, double scale, int64_t in, int64_t out) {
  const int64_t rank = a ? a->size(0) : 0;
  Small small{empty(x, {args.n, rank}, ScalarType::Float), empty(x, {rank, out}, ScalarType::Float)};
  if (!rank) return small;
  const float *a_rows = floats("a", a, {rank, in}, kCpu), *b_data = floats("b", b, {out, rank}, kCpu);
  float* b_rows = floats_of_own(small.b_rows);
  args.lora = {rank, float(scale), b_data, args.transposed ? b_rows : a_rows, args.transposed ? a_rows : b_rows, b_rows,
               floats_of_own(small.u)};
  return small;
}

}  // namespace

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& a, const Optional& b,
                                  double scale, bool transposed) {
  check(x.dim() == 2 && weight.dim() == 2, "x", "[n, in], and weight: [out, in]", x);
  const int64_t out = weight.size(0), in = weight.size(1);
  cpu::LinearArgs args{};
  args.n = x.size(0), args.from = transposed ? out : in, args.to = transposed ? in : out, args.transposed = transposed;
  args.x = matrix("x", x, args.from), args.weight = matrix("weight", weight, in);
  check(args.to % cpu::kLinearColumns == 0, "weight", "a number of rows that is a multiple of 32", weight);
  check_dtype("weight", weight, x.scalar_type());
  check(args.n <= cpu::kLinearRows, "x", "at most 32 rows", x);
  if (bias) {
    check_shape("bias", *bias, {args.to}), check_dtype("bias", *bias, x.scalar_type());
    check(bias->is_contiguous() && !bias->is_cuda(), "bias", "a contiguous tensor on the CPU", *bias);
    args.bias = bias->data_ptr();
  }
  Tensor y = empty(x, {args.n, args.to}, x.scalar_type());
  args.y = {y.data_ptr(), args.to, args.x.dtype};
  const Small small = take_lora(args, x, a, b, scale, in, out);
  const Tensor x_floats = empty(x, {args.x.dtype == DType::f32 ? 1 : args.n, args.from}, ScalarType::Float);
  args.x_floats = floats_of_own(x_floats);
  cpu::linear(args, threads());
  return {y, small.u};
}

Tensor add_lora(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, bool transposed) {
  check(a.dim() == 2 && b.dim() == 2, "a", "[rank, in], and b: [out, rank]", a);
  const int64_t in = a.size(1), out = b.size(0);
  cpu::LinearArgs args{};
  args.n = x.size(0), args.from = transposed ? out : in, args.to = transposed ? in : out, args.transposed = transposed;
  args.x = matrix("x", x, args.from), args.y = matrix("y", y, args.to);
  check(y.size(0) == args.n, "y", "as many rows as x", y);
  const Small small = take_lora(args, x, a, b, scale, in, out);
  cpu::add_lora(args, threads());
  return small.u;
}

Tensor lora_grad(const Tensor& c, const Tensor& z, double scale) {
  check(c.dim() == 2 && z.dim() == 2, "c", "[n, rank], and z: [n, length]", c);
  cpu::LoraGradArgs args{};
  args.n = c.size(0), args.rank = c.size(1), args.length = z.size(1), args.scale = float(scale);
  args.c = floats("c", c, {z.size(0), args.rank}, kCpu), args.z = matrix("z", z, args.length);
  Tensor grad = empty(c, {args.rank, args.length}, ScalarType::Float);
  args.grad = floats_of_own(grad);
  cpu::lora_grad(args, threads());
  return grad;
}

}  // namespace diffmas::binding
