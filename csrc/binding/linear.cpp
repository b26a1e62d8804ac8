#include "linear.h"

#include "ops.h"

namespace diffmas::binding {

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& a, const Optional& b,
                                  double scale, bool transposed) {
  check(x.dim() == 2 && weight.dim() == 2, "x", "[n, in], and weight: [out, in]", x);
  const std::vector<Adapter> adapter{{pointer(a), pointer(b), scale}};
  const Linear linear{weight, pointer(bias), a ? adapter : std::vector<Adapter>{}};
  const int64_t n = x.size(0), from = transposed ? linear.out() : linear.in(), to = transposed ? linear.in() : linear.out();
  check(n <= cpu::kLinearRows, "x", "at most 32 rows", x);
  Tensor y = empty(x, {n, to}, x.scalar_type()), u = empty(x, {n, linear.rank()}, ScalarType::Float);
  Memory memory(x, linear.floats(n));
  const cpu::Matrix rows = matrix("x", x, from);
  cpu::linear(linear.args(n, rows, from, {y.data_ptr(), to, rows.dtype}, floats_of_own(u), memory, transposed), threads());
  return {y, u};
}

namespace {

// x [n, length] and what becomes of it, in order.
struct Rows {
  int64_t n, length;
  cpu::Matrix x;

  Rows(const char* name, const Tensor& t) : n(t.dim() == 2 ? t.size(0) : 0), length(t.dim() == 2 ? t.size(1) : 0), x(matrix(name, t, length)) {}
  cpu::Matrix like(const char* name, const Tensor& t) const {
    check_shape(name, t, {n, length});
    const cpu::Matrix m = matrix(name, t, length);
    check(m.dtype == x.dtype, name, "the dtype of the others", t);
    return m;
  }
};

cpu::NormArgs norm_args(const Rows& rows, const Tensor& weight, double eps, const cpu::Matrix& y) {
  const ScalarType dtype = rows.x.dtype == DType::f32 ? ScalarType::Float : ScalarType::BFloat16;
  return {rows.n, rows.length, rows.x, y, vector("weight", weight, rows.length, dtype), float(eps)};
}

}  // namespace

Tensor norm(const Tensor& x, const Tensor& weight, double eps) {
  const Rows rows("x", x);
  Tensor y = empty(x, {rows.n, rows.length}, x.scalar_type());
  cpu::norm(norm_args(rows, weight, eps, rows.like("y", y)), threads());
  return y;
}

Tensor norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight, double eps) {
  const Rows rows("x", x);
  Tensor dx = empty(x, {rows.n, rows.length}, x.scalar_type());
  cpu::norm_backward({norm_args(rows, weight, eps, rows.like("dy", dy)), rows.like("dx", dx)}, threads());
  return dx;
}

Tensor gate(const Tensor& gate, const Tensor& up) {
  const Rows rows("gate", gate);
  Tensor y = empty(gate, {rows.n, rows.length}, gate.scalar_type());
  cpu::gate({rows.n, rows.x, rows.like("up", up), rows.like("y", y)}, rows.length, threads());
  return y;
}

std::tuple<Tensor, Tensor> gate_backward(const Tensor& dy, const Tensor& gate, const Tensor& up) {
  const Rows rows("gate", gate);
  Tensor dgate = empty(gate, {rows.n, rows.length}, gate.scalar_type()), dup = empty(gate, {rows.n, rows.length}, gate.scalar_type());
  const cpu::GateArgs args{rows.n, rows.x, rows.like("up", up), rows.like("dy", dy)};
  cpu::gate_backward({args, rows.like("dgate", dgate), rows.like("dup", dup)}, rows.length, threads());
  return {dgate, dup};
}

Tensor add_lora(const Tensor& y, const Tensor& x, const Tensor& a, const Tensor& b, double scale, bool transposed) {
  check(a.dim() == 2 && b.dim() == 2, "a", "[rank, in], and b: [out, rank]", a);
  const int64_t rank = a.size(0), in = a.size(1), out = b.size(0);
  cpu::LinearArgs args{};
  args.n = x.size(0), args.from = transposed ? out : in, args.to = transposed ? in : out, args.transposed = transposed;
  args.x = matrix("x", x, args.from), args.y = matrix("y", y, args.to);
  check(y.size(0) == args.n, "y", "as many rows as x", y);
  Tensor u = empty(x, {args.n, rank}, ScalarType::Float), b_rows = empty(x, {rank, out}, ScalarType::Float);
  args.lora = lora(&a, &b, scale, in, out, transposed, floats_of_own(u), floats_of_own(b_rows));
  cpu::add_lora(args, threads());
  return u;
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
