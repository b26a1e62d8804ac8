// Linear layers of few rows: every weight is read once, for all rows. A sum is over the same numbers in the same order however many
// rows, columns or threads there are. bfloat16 is multiplied as it is where there are dot products, else as floats.
#include "../linear.h"

#include "instructions.h"
#include "kernels.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

constexpr int kOutputs = 4;               // of a tile: as many as `sums` adds up at once
constexpr int64_t kAhead = 12 << 10;      // bytes that a tile along rows is fetched before it is needed: at 4 KB 1 row took a tenth more
constexpr int kSums = W == 16 ? 24 : 12;  // in registers, of 32 or 16
constexpr int64_t kSlab = 64;             // weight rows whose part of all sums is taken in one go; of 16 to 64 the fastest by a little

// What comes next is fetched to L2, where more can be under way than to L1: one row reads W at twice the rate.
DIFFMAS_INLINE void fetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// Where sums are: the columns of a block of kLinearColumns together, since rows a power of two apart fall on the same lines of L1.
struct Sums {
  float* data;
  int64_t row, block;
  float* at(int64_t r, int64_t c) const { return data + c / kLinearColumns * block + r * row + c % kLinearColumns; }
};

struct Floats {
  using Vector = vf;
  static constexpr int kDepth = 1;  // numbers along the reduced dimension that are multiplied at once, in a lane
  template <DType kType>
  static vf along(const void* row, int64_t i) { return load_as<kType>(row, i); }
  template <DType kType>
  static vf across(const char* row, int64_t, int64_t i) { return load_as<kType>(row, i); }
  using Number = float;
  static float number(const char* x, int64_t i) { return reinterpret_cast<const float*>(x)[i]; }
  static vf add(vf sum, vf a, vf b) { return sum + a * b; }
};

#if defined(DIFFMAS_DOTS)
struct Pairs {
  using Vector = vu;
  static constexpr int kDepth = 2;
  template <DType>
  static vu along(const void* row, int64_t i) { return load(reinterpret_cast<const Pair*>(static_cast<const uint16_t*>(row) + i)); }
  template <DType>
  static vu across(const char* row, int64_t stride, int64_t i) {
    const auto half = [&](const char* p) { return *reinterpret_cast<const vh_any*>(reinterpret_cast<const uint16_t*>(p) + i); };
    return interleave(half(row), half(row + stride));
  }
  using Number = Pair;
  static Pair number(const char* x, int64_t i) { return *reinterpret_cast<const Pair*>(x + 2 * i); }
  static vf add(vf sum, vu a, vu b) { return dot(sum, a, b); }
};
#endif

template <int kValue>
struct Count {
  static constexpr int value = kValue;
};

// f(Count<count>), for 1 <= count <= kMost.
template <int kMost, class F>
DIFFMAS_INLINE void with_count(int64_t count, const F& f) {
  if constexpr (kMost > 1)
    if (count < kMost) return with_count<kMost - 1>(count, f);
  f(Count<kMost>{});
}

// f(first, Count<count>) over [0, n) in the fewest parts of about one size, each of at most kMost.
template <int kMost, class F>
DIFFMAS_INLINE void in_parts(int64_t n, const F& f) {
  const int64_t parts = (n + kMost - 1) / kMost;
  for (int64_t i = 0; i < parts; ++i) {
    const int64_t first = n * i / parts, end = n * (i + 1) / parts;
    with_count<kMost>(end - first, [&](auto count) __attribute__((always_inline)) { f(first, count); });
  }
}

// A matrix's rows, in bytes.
struct Bytes {
  const char* data;
  int64_t stride, size;  // of an element

  explicit Bytes(const Matrix& m)
      : data(static_cast<const char*>(m.data)), stride(m.stride * element_size(m.dtype)), size(element_size(m.dtype)) {}
  Bytes(const float* p, int64_t length) : data(reinterpret_cast<const char*>(p)), stride(length * 4), size(4) {}
  const char* row(int64_t i) const { return data + i * stride; }
  Bytes from(int64_t i) const {
    Bytes rest = *this;
    rest.data = row(i);
    return rest;
  }
};

// Rows `first`, ... of x times rows o, ... of w, both read along their rows.
template <class N, DType kType, int kR, int kO>
DIFFMAS_INLINE void product_along(const Bytes& x, int64_t first, const Bytes& w, int64_t o, int64_t depth, Sums out, int64_t column) {
  const int64_t tile = kO * w.stride, ahead = (kAhead + tile - 1) / tile * tile;
  vf acc[kR][kO] = {};
  for (int64_t k = 0; k < depth; k += W * N::kDepth) {
    typename N::Vector right[kO];
    for (int c = 0; c < kO; ++c) {
      right[c] = N::template along<kType>(w.row(o + c), k);
      if (kO > 1) fetch(w.row(o + c) + k * w.size + ahead);
    }
    for (int r = 0; r < kR; ++r) {
      const typename N::Vector left = N::template along<DType::f32>(x.row(first + r), k);
      for (int c = 0; c < kO; ++c) acc[r][c] = N::add(acc[r][c], left, right[c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    if constexpr (kO == 4)
      *reinterpret_cast<f4_any*>(out.at(first + r, column)) = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    else
      for (int c = 0; c < kO; ++c) *out.at(first + r, column + c) = sum(acc[r][c]);
  }
}

// [rows, count] = x w', x and w as floats or of one dtype. One row of pairs goes from one weight row to the next: in the order that
// it lies in, the CPU itself has W there in time (8.1 ms for SmolLM2's 212 MB, 10.0 by tiles of four).
template <class N, DType kType>
void products_along(const Bytes& x, int64_t rows, const Bytes& w, int64_t begin, int64_t end, int64_t depth, Sums out) {
  if (rows == 1 && N::kDepth > 1) {
    for (int64_t o = begin; o < end; ++o) product_along<N, kType, 1, 1>(x, 0, w, o, depth, out, o - begin);
    return;
  }
  for (int64_t o = begin; o < end; o += kOutputs)
    with_count<kOutputs>(min(kOutputs, end - o), [&](auto outputs) __attribute__((always_inline)) {
      in_parts<kSums / kOutputs>(rows, [&](int64_t first, auto count) __attribute__((always_inline)) {
        product_along<N, kType, count.value, outputs.value>(x, first, w, o, depth, out, o - begin);
      });
    });
}

// x w, w read across its rows, a slab of them after the other.
template <class N, DType kType>
void products_across(const Bytes& x, int64_t rows, const Bytes& w, int64_t begin, int64_t end, int64_t depth, Sums out) {
  constexpr int kC = 2;
  typename N::Number numbers[kSlab / N::kDepth][kLinearRows];
  for (int64_t slab = 0; slab < depth; slab += kSlab) {
    const int64_t deep = min(kSlab, depth - slab);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < deep; k += N::kDepth) numbers[k / N::kDepth][r] = N::number(x.row(r), slab + k);
    for (int64_t c = begin; c < end; c += kC * W)
      in_parts<kSums / kC>(rows, [&](int64_t first, auto count) __attribute__((always_inline)) {
        constexpr int kR = count.value;
        vf acc[kR][kC];
        for (int r = 0; r < kR; ++r)
          for (int j = 0; j < kC; ++j) acc[r][j] = slab ? load(out.at(first + r, c - begin + j * W)) : vf{};
        for (int64_t k = 0; k < deep; k += N::kDepth) {
          typename N::Vector right[kC];
          for (int j = 0; j < kC; ++j) right[j] = N::template across<kType>(w.row(slab + k), w.stride, c + j * W);
          for (int d = 0; d < N::kDepth; ++d)
            for (int64_t line = 0; line < kC * W * w.size; line += 64) fetch(w.row(slab + k + d + kSlab) + c * w.size + line);
          for (int r = 0; r < kR; ++r) {
            const typename N::Vector left = splat(numbers[k / N::kDepth][first + r]);
            for (int j = 0; j < kC; ++j) acc[r][j] = N::add(acc[r][j], left, right[j]);
          }
        }
        for (int r = 0; r < kR; ++r)
          for (int j = 0; j < kC; ++j) store(out.at(first + r, c - begin + j * W), acc[r][j]);
      });
  }
}

template <class N, DType kType>
void products(const LinearArgs& args, const Bytes& x, int64_t begin, int64_t end, Sums out) {
  const Bytes w(args.weight);
  (args.transposed ? products_across<N, kType> : products_along<N, kType>)(x, args.n, w, begin, end, args.from, out);
}

// y's rows first, ..., columns c to c + kLinearColumns: the sums [rows, kLinearColumns] plus bias and LoRA's; the residual.
template <int kR>
DIFFMAS_INLINE void finish(const LinearArgs& args, int64_t first, int64_t column, float* sums) {
  const Lora& lora = args.lora;
  for (int64_t c = 0; c < kLinearColumns; c += W) {
    vf acc[kR];
    for (int r = 0; r < kR; ++r) acc[r] = load(sums + r * kLinearColumns + c);
    if (args.bias) {
      const bool floats = args.y.dtype == DType::f32;
      const vf bias = floats ? load_as<DType::f32>(args.bias, column + c) : load_as<DType::bf16>(args.bias, column + c);
      for (int r = 0; r < kR; ++r) acc[r] += bias;
    }
    if (lora.rank) {
      vf part[kR] = {};
      for (int64_t j = 0; j < lora.rank; ++j) {
        const vf up = load(lora.up + j * args.to + column + c);
        for (int r = 0; r < kR; ++r) part[r] += lora.u[(first + r) * lora.rank + j] * up;
      }
      for (int r = 0; r < kR; ++r) acc[r] += lora.scale * part[r];
    }
    for (int r = 0; r < kR; ++r) store(sums + r * kLinearColumns + c, acc[r]);
  }
  const Bytes y(args.y), residual(args.residual);
  for (int r = 0; r < kR; ++r) {
    char* to = const_cast<char*>(y.row(first + r)) + column * y.size;
    float *row = sums + r * kLinearColumns, other[kLinearColumns];
    store_row(to, row, args.y.dtype, kLinearColumns);
    if (!args.residual.data) continue;
    load_row(row, to, args.y.dtype, kLinearColumns);
    load_row(other, residual.row(first + r) + column * y.size, args.y.dtype, kLinearColumns);
    for (int64_t c = 0; c < kLinearColumns; c += W) store(row + c, load(row + c) + load(other + c));
    store_row(to, row, args.y.dtype, kLinearColumns);
  }
}

// x of rows begin to end as floats; buffer: for as many.
Bytes floats_of(const LinearArgs& args, int64_t begin, int64_t end, float* buffer) {
  const Bytes x = Bytes(args.x).from(begin);
  if (args.x.dtype == DType::f32) return x;
  for (int64_t i = 0; i < end - begin; ++i) load_row(buffer + i * args.from, x.row(i), args.x.dtype, args.from);
  return Bytes(buffer, args.from);
}

// u of rows begin to end, of which x is `floats`.
void down(const LinearArgs& args, const Bytes& floats, int64_t begin, int64_t end) {
  const Lora& lora = args.lora;
  const Sums u{lora.u + begin * lora.rank, lora.rank, kLinearColumns};
  products_along<Floats, DType::f32>(floats, end - begin, Bytes(lora.down, args.from), 0, lora.rank, args.from, u);
}

}  // namespace

// What all tasks read: b's rows, and where x_floats are, these and u.
void linear_prepare(const LinearArgs& args) {
  const Lora& lora = args.lora;
  if (lora.rank) {
    const int64_t length = lora.b_rows == lora.up ? args.to : args.from;
    for (int64_t j = 0; j < lora.rank; ++j)
      for (int64_t i = 0; i < length; ++i) lora.b_rows[j * length + i] = lora.b[i * lora.rank + j];
  }
  if (!args.x_floats) return;
  const Bytes floats = floats_of(args, 0, args.n, args.x_floats);
  if (lora.rank) down(args, floats, 0, args.n);
}

void linear_columns(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  const Bytes x(args.x), floats = args.x.dtype == DType::f32 ? x : Bytes(args.x_floats, args.from);
  const Sums sums{scratch, kLinearColumns, args.n * kLinearColumns};
  if (args.weight.dtype == DType::f32)
    products<Floats, DType::f32>(args, floats, begin, end, sums);
  else
#if defined(DIFFMAS_DOTS)
    products<Pairs, DType::bf16>(args, x, begin, end, sums);
#else
    products<Floats, DType::bf16>(args, floats, begin, end, sums);
#endif
  for (int64_t c = begin; c < end; c += kLinearColumns)
    in_parts<4>(args.n, [&](int64_t first, auto count) __attribute__((always_inline)) {
      finish<count.value>(args, first, c, sums.at(first, c - begin));
    });
}

void add_lora_rows(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  down(args, floats_of(args, begin, end, scratch), begin, end);
  const Bytes y(args.y);
  for (int64_t c = 0; c < args.to; c += kLinearColumns)
    in_parts<4>(end - begin, [&](int64_t first, auto count) __attribute__((always_inline)) {
      float sums[count.value * kLinearColumns];
      for (int r = 0; r < count.value; ++r)
        load_row(sums + r * kLinearColumns, y.row(begin + first + r) + c * y.size, args.y.dtype, kLinearColumns);
      finish<count.value>(args, begin + first, c, sums);
    });
}

void lora_grad_columns(const LoraGradArgs& args, int64_t begin, int64_t end) {
  constexpr int kC = 2, kRanks = W == 16 ? 8 : 4;
  constexpr int64_t kRun = 256;  // rows summed apart: one float sum over 40,000 rounds 15 times as much as torch's
  const Bytes z(args.z);
  const auto tile = [&](int64_t c, int64_t first, auto count, auto type) __attribute__((always_inline)) {
    vf total[count.value][kC] = {};
    for (int64_t run = 0; run < args.n; run += kRun) {
      vf acc[count.value][kC] = {};
      for (int64_t i = run; i < min(run + kRun, args.n); ++i) {
        const float* factors = args.c + i * args.rank + first;
        vf x[kC];
        for (int j = 0; j < kC; ++j) x[j] = load_as<DType(type.value)>(z.row(i), c + j * W);
        for (int r = 0; r < count.value; ++r)
          for (int j = 0; j < kC; ++j) acc[r][j] += factors[r] * x[j];
      }
      for (int r = 0; r < count.value; ++r)
        for (int j = 0; j < kC; ++j) total[r][j] += acc[r][j];
    }
    for (int r = 0; r < count.value; ++r)
      for (int j = 0; j < kC; ++j) store(args.grad + (first + r) * args.length + c + j * W, args.scale * total[r][j]);
  };
  for (int64_t c = begin; c < end; c += kC * W)
    in_parts<kRanks>(args.rank, [&](int64_t first, auto count) __attribute__((always_inline)) {
      if (args.z.dtype == DType::f32)
        tile(c, first, count, Count<int(DType::f32)>{});
      else
        tile(c, first, count, Count<int(DType::bf16)>{});
    });
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
