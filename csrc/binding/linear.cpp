#include "cpu/linear.h"

#include <algorithm>

#include "ops.h"

namespace diffmas::binding {
namespace {

constexpr Device kCpu{false, 0};

void check(bool right, const char* name, const char* expected, const Tensor& t) {
  STD_TORCH_CHECK(right, name, ": expected ", expected, ", got shape ", shape_of(t), " in ",
                  torch::headeronly::toString(t.scalar_type()));
}

DType dtype_of(const Tensor& t) { return t.scalar_type() == ScalarType::Float ? DType::f32 : DType::bf16; }

cpu::Matrix matrix(const char* name, const Tensor& t, int64_t columns) {
  check(t.dim() == 2 && t.size(1) == columns && columns % cpu::kLinearColumns == 0, name, "rows of a length that fits, a multiple of 32", t);
  check(!t.is_cuda() && (columns == 0 || t.stride(1) == 1) && (t.scalar_type() == ScalarType::Float || t.scalar_type() == ScalarType::BFloat16),
        name, "rows in float32 or bfloat16 on the CPU", t);
  return {t.data_ptr(), t.stride(0), dtype_of(t)};
}

const void* vector(const char* name, const Tensor& t, int64_t length, ScalarType dtype) {
  check_shape(name, t, {length}), check_dtype(name, t, dtype);
  check(t.is_contiguous() && !t.is_cuda(), name, "a contiguous tensor on the CPU", t);
  return t.data_ptr();
}

// A call's memory, of which parts are taken one after the other.
struct Memory {
  Tensor all;
  float* next;
  Memory(const Tensor& like, int64_t floats) : all(empty(like, {floats}, ScalarType::Float)), next(floats_of_own(all)) {}
  float* take(int64_t floats) { return (next += floats) - floats; }
};

// a [rank, in], b [out, rank]. u, b_rows: memory for what is theirs in Lora.
cpu::Lora lora(const Optional& a, const Optional& b, double scale, int64_t in, int64_t out, bool transposed, float* u, float* b_rows) {
  if (!a || !a->size(0)) return {};
  const int64_t rank = a->size(0);
  const float *a_rows = floats("a", a, {rank, in}, kCpu), *b_data = floats("b", b, {out, rank}, kCpu);
  return {rank, float(scale), b_data, transposed ? b_rows : a_rows, transposed ? a_rows : b_rows, b_rows, u};
}

// weight [out, in], bias [out].
struct Linear {
  const Tensor& weight;
  const Optional &bias, &a, &b;
  double scale;

  int64_t out() const { return weight.size(0); }
  int64_t in() const { return weight.size(1); }
  int64_t rank() const { return a ? a->size(0) : 0; }
  // That its args take of the memory at most, for n rows.
  int64_t floats(int64_t n) const { return n * std::max(in(), out()) + rank() * out(); }

  cpu::LinearArgs args(int64_t n, const cpu::Matrix& x, int64_t length, const cpu::Matrix& y, float* u, Memory& memory,
                       bool transposed = false) const {
    cpu::LinearArgs args{};
    args.n = n, args.transposed = transposed, args.x = x, args.y = y;
    args.from = transposed ? out() : in(), args.to = transposed ? in() : out();
    check(args.from == length, "weight", "what fits the rows of x", weight);
    args.weight = matrix("weight", weight, in());
    check(args.to % cpu::kLinearColumns == 0, "weight", "a number of rows that is a multiple of 32", weight);
    check(args.weight.dtype == x.dtype, "weight", "the dtype of x", weight);
    if (bias) args.bias = vector("bias", *bias, args.to, weight.scalar_type());
    args.x_floats = memory.take(x.dtype == DType::f32 ? 0 : n * args.from);
    args.lora = lora(a, b, scale, in(), out(), transposed, u, memory.take(rank() * out()));
    return args;
  }
};

// What goes into a layer's linears, [1, n, length].
struct FewRows {
  int64_t n, length;
  cpu::Matrix matrix;

  FewRows(const char* name, const Tensor& x) : length(x.dim() == 3 ? x.size(2) : 0) {
    check(length && x.size(0) == 1 && x.is_contiguous() && !x.is_cuda() && length % cpu::kLinearColumns == 0, name,
          "[1, n, length] in order on the CPU, of a length that is a multiple of 32", x);
    check(x.scalar_type() == ScalarType::Float || x.scalar_type() == ScalarType::BFloat16, name, "float32 or bfloat16", x);
    check(x.size(1) <= cpu::kLinearRows, name, "at most 32 rows", x);
    n = x.size(1), matrix = {x.data_ptr(), length, dtype_of(x)};
  }
};

}  // namespace

std::tuple<Tensor, Tensor> linear(const Tensor& x, const Tensor& weight, const Optional& bias, const Optional& a, const Optional& b,
                                  double scale, bool transposed) {
  check(x.dim() == 2 && weight.dim() == 2, "x", "[n, in], and weight: [out, in]", x);
  const Linear linear{weight, bias, a, b, scale};
  const int64_t n = x.size(0), from = transposed ? linear.out() : linear.in(), to = transposed ? linear.in() : linear.out();
  check(n <= cpu::kLinearRows, "x", "at most 32 rows", x);
  Tensor y = empty(x, {n, to}, x.scalar_type()), u = empty(x, {n, linear.rank()}, ScalarType::Float);
  Memory memory(x, linear.floats(n));
  const cpu::Matrix rows = matrix("x", x, from);
  cpu::linear(linear.args(n, rows, from, {y.data_ptr(), to, rows.dtype}, floats_of_own(u), memory, transposed), threads());
  return {y, u};
}

std::tuple<Tensor, Tensor, Tensor> norm_qkv(
    const Tensor& x, const Tensor& norm, double eps, const Tensor& q_weight, const Optional& q_bias, const Optional& q_a,
    const Optional& q_b, double q_scale, const Tensor& k_weight, const Optional& k_bias, const Optional& k_a, const Optional& k_b,
    double k_scale, const Tensor& v_weight, const Optional& v_bias, const Optional& v_a, const Optional& v_b, double v_scale) {
  const FewRows rows("x", x);
  const Linear linears[] = {{q_weight, q_bias, q_a, q_b, q_scale}, {k_weight, k_bias, k_a, k_b, k_scale}, {v_weight, v_bias, v_a, v_b, v_scale}};
  const int64_t n = rows.n;
  int64_t floats = n * rows.length;
  for (const Linear& linear : linears) floats += linear.floats(n) + n * linear.rank();
  Memory memory(x, floats);
  const cpu::Matrix y{memory.take(n * rows.length), rows.length, rows.matrix.dtype};
  const cpu::NormArgs norm_args{n, rows.length, rows.matrix, y, vector("norm", norm, rows.length, x.scalar_type()), float(eps)};
  Tensor outs[] = {empty(x, {1, n, linears[0].out()}, x.scalar_type()), empty(x, {1, n, linears[1].out()}, x.scalar_type()),
                   empty(x, {1, n, linears[2].out()}, x.scalar_type())};
  cpu::LinearArgs args[3];
  for (int i = 0; i < 3; ++i)
    args[i] = linears[i].args(n, y, rows.length, {outs[i].data_ptr(), linears[i].out(), y.dtype}, memory.take(n * linears[i].rank()), memory);
  cpu::norm_linears(norm_args, args, 3, threads());
  return {outs[0], outs[1], outs[2]};
}

Tensor after_attention(const Tensor& o, const Tensor& x, const Tensor& norm, double eps, const Tensor& o_weight, const Optional& o_bias,
                       const Optional& o_a, const Optional& o_b, double o_scale, const Tensor& gate_weight, const Optional& gate_bias,
                       const Optional& gate_a, const Optional& gate_b, double gate_scale, const Tensor& up_weight,
                       const Optional& up_bias, const Optional& up_a, const Optional& up_b, double up_scale, const Tensor& down_weight,
                       const Optional& down_bias, const Optional& down_a, const Optional& down_b, double down_scale) {
  const FewRows attended("o", o), rows("x", x);
  const Linear out{o_weight, o_bias, o_a, o_b, o_scale}, gate{gate_weight, gate_bias, gate_a, gate_b, gate_scale},
      up{up_weight, up_bias, up_a, up_b, up_scale}, down{down_weight, down_bias, down_a, down_b, down_scale};
  const int64_t n = rows.n, length = rows.length, inner = gate.out();
  check(attended.n == n && o.scalar_type() == x.scalar_type(), "o", "as many rows as x, of its dtype", o);
  check(out.out() == length && down.out() == length, "weight", "o's and down's of as many rows as x is long", o_weight);
  check(up.out() == inner, "weight", "up's of gate's shape", up_weight);
  int64_t floats = n * length;
  for (const Linear* linear : {&out, &gate, &up, &down}) floats += linear->floats(n) + n * (linear->out() + linear->rank());
  Memory memory(x, floats);
  const auto take = [&](int64_t length) { return cpu::Matrix{memory.take(n * length), length, rows.matrix.dtype}; };
  const auto args = [&](const Linear& linear, const cpu::Matrix& x, int64_t length, const cpu::Matrix& y) {
    return linear.args(n, x, length, y, memory.take(n * linear.rank()), memory);
  };
  const cpu::Matrix sum = take(length), normed = take(length), gated = take(inner), ups = take(inner);
  Tensor y = empty(x, {1, n, length}, x.scalar_type());
  const cpu::Matrix rows_of_y{y.data_ptr(), length, sum.dtype};
  cpu::LinearArgs first = args(out, attended.matrix, attended.length, sum), last = args(down, gated, inner, rows_of_y);
  first.residual = rows.matrix, last.residual = sum;
  const cpu::NormArgs norm_args{n, length, sum, normed, vector("norm", norm, length, x.scalar_type()), float(eps)};
  const cpu::LinearArgs gate_args = args(gate, normed, length, gated), up_args = args(up, normed, length, ups);
  cpu::linear(first, threads());
  cpu::norm_linears(norm_args, nullptr, 0, threads());
  cpu::gated_linears(gate_args, up_args, threads());
  cpu::linear(last, threads());
  return y;
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
  args.lora = lora(a, b, scale, in, out, transposed, floats_of_own(u), floats_of_own(b_rows));
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
