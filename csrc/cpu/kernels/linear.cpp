// Linear layers of few rows: every weight is read once, for all rows. A sum is over the same numbers in the same order however many
// rows, columns or threads there are. bfloat16 is multiplied as it is where there are dot products, else as floats.
#include "../linear.h"

#include "instructions.h"
#include "kernels.h"

namespace diffmas::cpu::DIFFMAS_ISA {
namespace {

constexpr int kOutputs = 4;            // of a tile: as many as `sums` adds up at once
constexpr int kSums = W == 16 ? 24 : 12;  // in registers, of 32 or 16
constexpr int64_t kSlab = 32;          // weight rows whose part of all sums is taken in one go, while the next ones are fetched

struct Floats {
  using Vector = vf;
  static constexpr int kDepth = 1;  // numbers along the reduced dimension that are multiplied at once, in a lane
  template <DType kType>
  static vf along(const void* row, int64_t i) { return load_as<kType>(row, i); }
  template <DType kType>
  static vf across(const char* row, int64_t, int64_t i) { return load_as<kType>(row, i); }
  static vf one(const char* x, int64_t i) { return splat(reinterpret_cast<const float*>(x)[i]); }
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
    return __builtin_convertvector(half(row), vu) | __builtin_convertvector(half(row + stride), vu) << 16;
  }
  static vu one(const char* x, int64_t i) { return splat(*reinterpret_cast<const Pair*>(x + 2 * i)); }
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
  int64_t stride, size;  // of a row's step and of an element

  explicit Bytes(const Matrix& m) : data(static_cast<const char*>(m.data)), stride(m.stride * element_size(m.dtype)), size(element_size(m.dtype)) {}
  Bytes(const float* p, int64_t length) : data(reinterpret_cast<const char*>(p)), stride(length * 4), size(4) {}
  const char* row(int64_t i) const { return data + i * stride; }
};

// sums[r, o] = row r of x times row o of w, both read along their rows.
template <class N, DType kType, int kR, int kO>
DIFFMAS_INLINE void product_along(const Bytes& x, int64_t first, const Bytes& w, int64_t o, int64_t depth, float* sums_at, int64_t stride) {
  vf acc[kR][kO] = {};
  for (int64_t k = 0; k < depth; k += W * N::kDepth) {
    typename N::Vector right[kO];
    for (int c = 0; c < kO; ++c) {
      right[c] = N::template along<kType>(w.row(o + c), k);
      __builtin_prefetch(w.row(o + c + kO) + k * w.size);
    }
    for (int r = 0; r < kR; ++r) {
      const typename N::Vector left = N::template along<DType::f32>(x.row(first + r), k);
      for (int c = 0; c < kO; ++c) acc[r][c] = N::add(acc[r][c], left, right[c]);
    }
  }
  for (int r = 0; r < kR; ++r) {
    if constexpr (kO == 4)
      *reinterpret_cast<f4_any*>(sums_at + r * stride) = sums(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    else
      for (int c = 0; c < kO; ++c) sums_at[r * stride + c] = sum(acc[r][c]);
  }
}

// [rows, count] = x w', x and w as floats or of one dtype.
template <class N, DType kType>
void products_along(const Bytes& x, int64_t rows, const Bytes& w, int64_t begin, int64_t end, int64_t depth, float* out, int64_t stride) {
  for (int64_t o = begin; o < end; o += kOutputs)
    with_count<kOutputs>(min(kOutputs, end - o), [&](auto outputs) __attribute__((always_inline)) {
      in_parts<kSums / kOutputs>(rows, [&](int64_t first, auto count) __attribute__((always_inline)) {
        product_along<N, kType, count.value, outputs.value>(x, first, w, o, depth, out + first * stride + o - begin, stride);
      });
    });
}

// out [rows, begin:end] = x w, w read across its rows, a slab of them after the other.
template <class N, DType kType>
void products_across(const Bytes& x, int64_t rows, const Bytes& w, int64_t begin, int64_t end, int64_t depth, float* out, int64_t stride) {
  constexpr int kC = kLinearColumns / W < 2 ? 2 : (W == 16 ? 2 : 2);
  for (int64_t slab = 0; slab < depth; slab += kSlab)
    for (int64_t c = begin; c < end; c += kC * W)
      in_parts<kSums / kC>(rows, [&](int64_t first, auto count) __attribute__((always_inline)) {
        constexpr int kR = count.value;
        float* at = out + first * stride + c - begin;
        vf acc[kR][kC];
        for (int r = 0; r < kR; ++r)
          for (int j = 0; j < kC; ++j) acc[r][j] = slab ? load(at + r * stride + j * W) : vf{};
        for (int64_t k = slab; k < slab + kSlab; k += N::kDepth) {
          const char* row = w.row(k);
          typename N::Vector right[kC];
          for (int j = 0; j < kC; ++j) right[j] = N::template across<kType>(row, w.stride, c + j * W);
          for (int d = 0; d < N::kDepth; ++d) __builtin_prefetch(w.row(k + d + kSlab) + c * w.size);
          for (int r = 0; r < kR; ++r) {
            const typename N::Vector left = N::one(x.row(first + r), k);
            for (int j = 0; j < kC; ++j) acc[r][j] = N::add(acc[r][j], left, right[j]);
          }
        }
        for (int r = 0; r < kR; ++r)
          for (int j = 0; j < kC; ++j) store(at + r * stride + j * W, acc[r][j]);
      });
}

template <class N, DType kType>
void products(const LinearArgs& args, const Bytes& x, int64_t begin, int64_t end, float* out) {
  const Bytes w(args.weight);
  (args.transposed ? products_across<N, kType> : products_along<N, kType>)(x, args.n, w, begin, end, args.from, out, end - begin);
}

// Rows first, ..., of `out`, columns begin to end, plus bias and LoRA's; then they are y.
template <int kR>
DIFFMAS_INLINE void finish(const LinearArgs& args, int64_t first, int64_t begin, int64_t end, float* out) {
  const Lora& lora = args.lora;
  const int64_t count = end - begin;
  for (int64_t c = 0; c < count; c += W) {
    vf acc[kR];
    for (int r = 0; r < kR; ++r) acc[r] = load(out + r * count + c);
    if (args.bias) {
      const vf bias = args.y.dtype == DType::f32 ? load_as<DType::f32>(args.bias, begin + c) : load_as<DType::bf16>(args.bias, begin + c);
      for (int r = 0; r < kR; ++r) acc[r] += bias;
    }
    if (lora.rank) {
      vf part[kR] = {};
      for (int64_t j = 0; j < lora.rank; ++j) {
        const vf up = load(lora.up + j * args.to + begin + c);
        for (int r = 0; r < kR; ++r) part[r] += lora.u[(first + r) * lora.rank + j] * up;
      }
      for (int r = 0; r < kR; ++r) acc[r] += lora.scale * part[r];
    }
    for (int r = 0; r < kR; ++r) store(out + r * count + c, acc[r]);
  }
  const int64_t size = element_size(args.y.dtype);
  for (int r = 0; r < kR; ++r)
    store_row(static_cast<char*>(args.y.data) + ((first + r) * args.y.stride + begin) * size, out + r * count, args.y.dtype, count);
}

const char* row_of(const Matrix& m, int64_t row) { return Bytes(m).row(row); }

void down(const LinearArgs& args, const Bytes& x, int64_t first, int64_t rows) {
  const Lora& lora = args.lora;
  products_along<Floats, DType::f32>(x, rows, Bytes(lora.down, args.from), 0, lora.rank, args.from, lora.u + first * lora.rank, lora.rank);
}

}  // namespace

// What all tasks read: x as floats and LoRA's u of some rows, and its b.
void linear_prepare(const LinearArgs& args, int64_t begin, int64_t end) {
  const Lora& lora = args.lora;
  if (lora.rank) {
    const int64_t length = lora.b_rows == lora.up ? args.to : args.from;
    for (int64_t j = 0; j < lora.rank; ++j)
      for (int64_t i = 0; i < length; ++i) lora.b_rows[j * length + i] = lora.b[i * lora.rank + j];
  }
  if (args.x_floats)
    for (int64_t i = begin; i < end; ++i) load_row(args.x_floats + i * args.from, row_of(args.x, i), args.x.dtype, args.from);
  if (lora.rank && begin < end) down(args, args.x_floats ? Bytes(args.x_floats, args.from) : Bytes(args.x), begin, end - begin);
}

void linear_columns(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  const Bytes floats = args.x_floats ? Bytes(args.x_floats, args.from) : Bytes(args.x);
#if defined(DIFFMAS_DOTS)
  if (args.weight.dtype == DType::bf16)
    products<Pairs, DType::bf16>(args, Bytes(args.x), begin, end, scratch);
#else
  if (args.weight.dtype == DType::bf16)
    products<Floats, DType::bf16>(args, floats, begin, end, scratch);
#endif
  else
    products<Floats, DType::f32>(args, floats, begin, end, scratch);
  in_parts<4>(args.n, [&](int64_t first, auto count) __attribute__((always_inline)) {
    finish<count.value>(args, first, begin, end, scratch + first * (end - begin));
  });
}

void add_lora_rows(const LinearArgs& args, int64_t begin, int64_t end, float* scratch) {
  if (args.x_floats)
    for (int64_t i = begin; i < end; ++i) load_row(args.x_floats + i * args.from, row_of(args.x, i), args.x.dtype, args.from);
  const Bytes floats = args.x_floats ? Bytes(args.x_floats, args.from) : Bytes(args.x);
  down(args, Bytes(reinterpret_cast<const float*>(floats.row(begin)), args.x_floats ? args.from : args.x.stride), begin, end - begin);
  in_parts<4>(end - begin, [&](int64_t first, auto count) __attribute__((always_inline)) {
    for (int r = 0; r < count.value; ++r) load_row(scratch + r * args.to, row_of(args.y, begin + first + r), args.y.dtype, args.to);
    finish<count.value>(args, begin + first, 0, args.to, scratch);
  });
}

void lora_grad_columns(const LoraGradArgs& args, int64_t begin, int64_t end) {
  constexpr int kC = 2, kRanks = W == 16 ? 8 : 4;
  const Bytes z(args.z);
  const auto tile = [&](int64_t c, int64_t first, auto count, auto type) __attribute__((always_inline)) {
    vf acc[count.value][kC] = {};
    for (int64_t i = 0; i < args.n; ++i) {
      const float* factors = args.c + i * args.rank + first;
      vf x[kC];
      for (int j = 0; j < kC; ++j) x[j] = load_as<DType(type.value)>(z.row(i), c + j * W);
      for (int r = 0; r < count.value; ++r)
        for (int j = 0; j < kC; ++j) acc[r][j] += factors[r] * x[j];
    }
    for (int r = 0; r < count.value; ++r)
      for (int j = 0; j < kC; ++j) store(args.grad + (first + r) * args.length + c + j * W, args.scale * acc[r][j]);
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
