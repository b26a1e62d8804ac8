// Between memory and the matrix products: query blocks and K/V tiles as float rows.
#pragma once
#include "../tasks.h"
#include "gemm.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// Query rows sit in the lanes of panels: scores are [key, lane] and outputs [column, lane]. K and V are then the broadcast operand
// of every product and are read as they lie, the softmax runs down the keys without crossing lanes, and a panel's products,
// which share its scores, run one after the other while those are in L1.
constexpr int kPanel = 3 * W;
static_assert(kBlockRows % kPanel == 0, "a block is a whole number of panels");

DIFFMAS_INLINE float* take(float*& scratch, int64_t size) {
  float* p = scratch;
  scratch += size;
  return p;
}

// dst[c, r] = src[r, c] for up to 4 rows, zeros in place of missing ones; cols a multiple of 4.
DIFFMAS_INLINE void transpose_four(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t cols) {
  for (int64_t c = 0; c < cols; c += 4) {
    f4 x[4], y[4];
    for (int i = 0; i < 4; ++i) x[i] = i < rows ? *reinterpret_cast<const f4_any*>(src + i * lds + c) : f4{};
    for (int i = 0; i < 4; i += 2) {
      y[i] = DIFFMAS_SHUFFLE4(x[i], x[i + 1], 0, 4, 1, 5);
      y[i + 1] = DIFFMAS_SHUFFLE4(x[i], x[i + 1], 2, 6, 3, 7);
    }
    for (int i = 0; i < 2; ++i) {
      *reinterpret_cast<f4_any*>(dst + (c + 2 * i) * ldd) = DIFFMAS_SHUFFLE4(y[i], y[i + 2], 0, 1, 4, 5);
      *reinterpret_cast<f4_any*>(dst + (c + 2 * i + 1) * ldd) = DIFFMAS_SHUFFLE4(y[i], y[i + 2], 2, 3, 6, 7);
    }
  }
}

// dst[c, r] = src[r, c], rows rounded up to W with zeros; cols a multiple of 4.
static void transpose(float* dst, int64_t ldd, const float* src, int64_t lds, int64_t rows, int64_t cols) {
  const int64_t whole = rows / 4 * 4;
  for (int64_t r = 0; r < whole; r += 4) transpose_four(dst + r, ldd, src + r * lds, lds, 4, cols);
  for (int64_t r = whole; r < round_up(rows, W); r += 4) transpose_four(dst + r, ldd, src + r * lds, lds, rows - r, cols);
}

struct QueryBlock {
  const ScheduledAttention& args;
  const Block& block;
  int64_t head;  // kv head
  int64_t d;     // row length in scratch: head_dim rounded up to W, zero filled

  QueryBlock(const ScheduledAttention& args, const Block& block, int64_t head)
      : args(args), block(block), head(head), d(round_up(args.head_dim, W)) {}

  int64_t rows() const { return block.rows; }
  int64_t panels() const { return (block.rows + kPanel - 1) / kPanel; }
  int64_t token(int64_t r) const { return block.token + (block.row + r) / args.group(); }
  int64_t query_head(int64_t r) const { return head * args.group() + (block.row + r) % args.group(); }
  // Last view token that row r sees.
  int64_t limit(int64_t r) const { return block.causal ? block.limit + (block.row + r) / args.group() : INT64_MAX / 2; }
  // Tokens of the tile that row r sees.
  int64_t visible(const Tile& tile, int64_t r) const { return max(0, min(tile.count, limit(r) - tile.view + 1)); }
  // Tokens of the tile that some row sees. A tile with none is in no task.
  int64_t visible(const Tile& tile) const { return visible(tile, rows() - 1); }

  void load_rows(float* dst, const Rows& src, float factor = 1) const {  // -> [rows, d]
    for (int64_t r = 0; r < rows(); ++r, dst += d) {
      load_row(dst, row_of(src, token(r), query_head(r)), src.dtype, args.head_dim, factor);
      for (int64_t c = args.head_dim; c < d; ++c) dst[c] = 0;
    }
  }

  // dst = src with every row's rotary part rotated by -offset (or back).
  void rotate(float* dst, const float* src, int32_t rotation, bool back) const {
    const int64_t half = args.view.half_rotary;
    const float* cos = args.rotation_cos + rotation * half;
    const float* sin = args.rotation_sin + rotation * half;
    const int64_t step = args.interleaved ? 2 : 1, other = args.interleaved ? 1 : half;
    for (int64_t r = 0; r < rows(); ++r, dst += d, src += d) {
      for (int64_t i = 0; i < half; ++i) {
        const float x = src[i * step], y = src[i * step + other], s = back ? -sin[i] : sin[i];
        dst[i * step] = x * cos[i] - y * s;
        dst[i * step + other] = y * cos[i] + x * s;
      }
      for (int64_t c = 2 * half; c < d; ++c) dst[c] = src[c];
    }
  }

  // Rows of panel p.
  int64_t panel_rows(int64_t p) const { return min(kPanel, rows() - p * kPanel); }
  int panel_vectors(int64_t p) const { return int((panel_rows(p) + W - 1) / W); }
  // Tokens of the tile that some row of panel p sees.
  int64_t panel_visible(const Tile& tile, int64_t p) const { return visible(tile, p * kPanel + panel_rows(p) - 1); }

  // dst [panels, d, kPanel] = src [rows, d] transposed; idle lanes of the last vector are zero.
  void pack(float* dst, const float* src) const {
    for (int64_t p = 0; p < panels(); ++p, dst += d * kPanel, src += kPanel * d) transpose(dst, kPanel, src, d, panel_rows(p), d);
  }

  // dst [rows rounded up to 4, d] = src [panels, d, kPanel] transposed back.
  void unpack(float* dst, const float* src) const {
    for (int64_t p = 0; p < panels(); ++p, src += d * kPanel, dst += kPanel * d)
      transpose(dst, d, src, kPanel, d, round_up(panel_rows(p), 4));
  }

  // C [m, lanes of panel p] (Into) A [m, depth] B [depth, lanes].
  template <Into kInto>
  void panel_product(int64_t p, int64_t m, int64_t depth, Left a, const float* b, int64_t ldb, float* c, int64_t ldc,
                     const float* alpha = nullptr, Ahead* ahead = nullptr) const {
    switch (panel_vectors(p)) {
      case 1: return strip<1, kInto>(m, depth, a, b, ldb, c, ldc, alpha, ahead);
      case 2: return strip<2, kInto>(m, depth, a, b, ldb, c, ldc, alpha, ahead);
      default: return strip<3, kInto>(m, depth, a, b, ldb, c, ldc, alpha, ahead);
    }
  }

  // out [tokens, d] (row length ldo) += weights x, weights [key, kBlockRows], x [rows, d]. seen[p] is what panel p
  // sees: a token takes part with the rows from the first panel on that sees it.
  void add_outer(float* out, int64_t ldo, const float* weights, const float* x, const int64_t* seen) const {
    int64_t done = 0;
    for (int64_t p = 0; p < panels(); ++p) {
      const int64_t r = p * kPanel;
      if (seen[p] > done)
        add_product(seen[p] - done, d, rows() - r, {weights + done * kBlockRows + r, kBlockRows, 1}, x + r * d, d, out + done * ldo, ldo);
      done = seen[p];
    }
  }

  // Scores [count, lanes] (row length ld) of panel p against a tile: -inf where the row does not see the token.
  void mask(const Tile& tile, int64_t p, float* s, int64_t ld, int64_t count) const {
    const int64_t r0 = p * kPanel, from = visible(tile, r0);
    if (from >= count) return;
    alignas(64) int32_t seen[kPanel];
    for (int64_t i = 0; i < kPanel; ++i) seen[i] = int32_t(visible(tile, min(r0 + i, rows() - 1)));
    for (int64_t i = from; i < count; ++i)
      for (int64_t j = 0; j < kPanel; j += W) {
        const vi hidden = *reinterpret_cast<const vi_any*>(seen + j) <= int32_t(i);
        store(s + i * ld + j, hidden ? splat(-kInf) : load(s + i * ld + j));
      }
  }
};

// Calls visit(i, pool row) for the first count tokens of a tile.
template <class F>
DIFFMAS_INLINE void for_rows(const ScheduledAttention& args, const Tile& tile, int64_t count, const F& visit) {
  if (tile.row >= 0) {
    for (int64_t i = 0; i < count; ++i) visit(i, tile.row + i);
    return;
  }
  int64_t segment = tile.segment, token = tile.skip;
  for (int64_t i = 0; i < count; ++i, ++token) {
    while (token == args.view.length[segment]) ++segment, token = 0;
    visit(i, args.view.start[segment] + token);
  }
}

struct FloatRows {
  float* data;
  int64_t stride;
};

// The rows of a tile where they lie, when they are float32, consecutive and need no padding.
DIFFMAS_INLINE bool in_place(const ScheduledAttention& args, const Tile& tile, const Rows& pool) {
  return tile.row >= 0 && pool.dtype == DType::f32 && args.head_dim % W == 0;
}

// To ask for a tile's rows of two pools of one dtype while `panels` panels go through a product of kTileKeys rows.
DIFFMAS_INLINE Ahead ahead_of(const Tile& tile, const Rows& k, const Rows& v, const QueryBlock& q) {
  if (tile.row < 0) return {};
  const int64_t size = element_size(k.dtype);
  return {row_of(k, tile.row, q.head),
          row_of(v, tile.row, q.head),
          k.stride_row * size,
          v.stride_row * size,
          q.args.head_dim * size,
          tile.count,
          (8 + q.panels() - 1) / q.panels(),
          0};
}

static FloatRows tile_rows(const ScheduledAttention& args, const Tile& tile, int64_t count, const Rows& pool, int64_t head, float* buffer) {
  if (in_place(args, tile, pool)) return {reinterpret_cast<float*>(row_of(pool, tile.row, head)), pool.stride_row};
  const int64_t d = round_up(args.head_dim, W);
  for_rows(args, tile, count, [&](int64_t i, int64_t row) {
    load_row(buffer + i * d, row_of(pool, row, head), pool.dtype, args.head_dim);
    for (int64_t c = args.head_dim; c < d; ++c) buffer[i * d + c] = 0;
  });
  return {buffer, d};
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
