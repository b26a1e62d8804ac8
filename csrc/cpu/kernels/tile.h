// Between memory and the matrix products: query blocks and K/V tiles.
#pragma once
#include "operands.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// Query rows sit in the lanes of panels: scores are [key, lane] and outputs [column, lane]. K and V are then the broadcast operand
// of every product and are read as they lie, the softmax runs down the keys without crossing lanes, and a panel's products,
// which share its scores, run one after the other while those are in L1.
constexpr int kPanel = 3 * W;
static_assert(kBlockRows % kPanel == 0, "a block is a whole number of panels");

struct QueryBlock {
  const ScheduledAttention& args;
  const Block& block;
  int64_t head;  // kv head
  int64_t d;     // row length in scratch

  QueryBlock(const ScheduledAttention& args, const Block& block, int64_t head)
      : args(args), block(block), head(head), d(row_length(args)) {}

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

  // dst [panels, d, kPanel] = src [rows, d] transposed, for the right operand; idle lanes of the last vector are zero.
  void pack(float* dst, const float* src, float*) const {
    for (int64_t p = 0; p < panels(); ++p, dst += d * kPanel, src += kPanel * d) transpose(dst, kPanel, src, d, panel_rows(p), d);
  }
#if defined(DIFFMAS_DOTS)
  void pack(Pair* dst, const float* src, float* spare) const {  // spare [d, kPanel]
    for (int64_t p = 0; p < panels(); ++p, dst += d * kPanel / 2, src += kPanel * d) {
      transpose(spare, kPanel, src, d, panel_rows(p), d);
      pair_rows(dst, spare, kPanel, d, kPanel);
    }
  }
#endif

  // dst [rows rounded up to 4, d] = src [panels, d, kPanel] transposed back.
  void unpack(float* dst, const float* src) const {
    for (int64_t p = 0; p < panels(); ++p, src += d * kPanel, dst += kPanel * d)
      transpose(dst, d, src, kPanel, d, round_up(panel_rows(p), 4));
  }

  // C [m, lanes of panel p] (Into) A [m, depth] B [depth, lanes], m and depth rounded up to what a product takes. B has rows of kPanel.
  template <class N, Into kInto>
  void panel_product(int64_t p, int64_t m, int64_t depth, Left<typename N::Element> a, const typename N::Element* b, int64_t ldb, float* c,
                     int64_t ldc, const float* alpha = nullptr, Ahead* ahead = nullptr) const {
    m = round_up(m, N::kRows), depth = round_up(depth, N::kDepth) / N::kNumbers;
    switch (panel_vectors(p)) {
      case 1: return strip<1, kInto>(m, depth, a, b, ldb, c, ldc, alpha, ahead);
      case 2: return strip<2, kInto>(m, depth, a, b, ldb, c, ldc, alpha, ahead);
      default: return strip<3, kInto>(m, depth, a, b, ldb, c, ldc, alpha, ahead);
    }
  }

  // out [tokens, d] (row length ldo) += weights x, weights [key, kBlockRows numbers], x [rows, d]. seen[p] is what panel p
  // sees: a token takes part with the rows from the first panel on that sees it. Tiles begin with earlier rows, whose weights are zero.
  template <class N>
  void add_outer(float* out, int64_t ldo, const typename N::Element* weights, const typename N::Element* x, const int64_t* seen) const {
    constexpr int64_t kLength = kBlockRows / N::kNumbers;
    int64_t done = 0;
    for (int64_t p = 0; p < panels(); ++p) {
      const int64_t r = p * kPanel / N::kDepth * N::kDepth, e = r / N::kNumbers, end = round_up(seen[p], N::kRows);
      if (end > done)
        product<Into::add>(end - done, d, round_up(rows() - r, N::kDepth) / N::kNumbers, {weights + done * kLength + e, kLength, 1},
                           x + e * d, d, out + done * ldo, ldo);
      done = end;
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

// The rows of a tile where they lie, when they are what a product takes, or a copy of them in the buffer, rows of d numbers.
template <class N>
static TileRows<typename N::Element> tile_rows(const ScheduledAttention& args, const Tile& tile, int64_t count, const Rows& pool,
                                               const Scales& scales, int64_t head, int64_t d, typename N::Element* buffer) {
  using E = typename N::Element;
  constexpr bool kFloats = N::kNumbers == 1;
  const bool fits = args.head_dim == d && count % N::kRows == 0 && pool.stride_row % N::kNumbers == 0;
  if (tile.row >= 0 && fits && (!kFloats || pool.dtype == DType::f32))
    return {reinterpret_cast<const E*>(row_of(pool, tile.row, head)), pool.stride_row / N::kNumbers};
  const int64_t length = d / N::kNumbers;
  for_rows(args, tile, count, [&](int64_t i, int64_t row) {
    const char* from = row_of(pool, row, head);
    if constexpr (kFloats) {
      load_row(buffer + i * length, from, pool.dtype, args.head_dim, scale_of(scales, row, head));
      for (int64_t c = args.head_dim; c < d; ++c) buffer[i * length + c] = 0;
    } else {
      char* to = reinterpret_cast<char*>(buffer + i * length);
      __builtin_memcpy(to, from, uint64_t(2 * args.head_dim));
      __builtin_memset(to + 2 * args.head_dim, 0, uint64_t(2 * (d - args.head_dim)));
    }
  });
  for (int64_t i = count * length; i < round_up(count, N::kRows) * length; ++i) buffer[i] = E{};
  return {buffer, length};
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
