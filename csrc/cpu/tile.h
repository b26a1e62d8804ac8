// Between memory and the matrix products: query blocks and K/V tiles as float rows.
#pragma once
#include "attention.h"
#include "gemm.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// Query rows sit in the lanes of panels: scores and probabilities are [key, lane], so that K and V are read as they lie and the
// softmax runs down the keys without crossing lanes.
constexpr int kPanel = 3 * W;
static_assert(kBlockRows % kPanel == 0, "a block is a whole number of panels");
DIFFMAS_INLINE float* take(float*& scratch, int64_t size) {
  float* p = scratch;
  scratch += size;
  return p;
}

DIFFMAS_INLINE int panel_vectors(int64_t rows, int64_t panel) { return int(min(3, (rows - panel * kPanel + W - 1) / W)); }

struct QueryBlock {
  const AttentionArgs& args;
  const Block& block;
  int64_t head;  // kv head
  int64_t d;     // row length in scratch: head_dim rounded up to W, zero filled

  QueryBlock(const AttentionArgs& args, const Block& block, int64_t head)
      : args(args), block(block), head(head), d(round_up(args.head_dim, W)) {}

  int64_t rows() const { return block.rows; }
  int64_t panels() const { return (block.rows + kPanel - 1) / kPanel; }
  int64_t token(int64_t r) const { return block.token + (block.row + r) / args.group(); }
  int64_t query_head(int64_t r) const { return head * args.group() + (block.row + r) % args.group(); }
  // Last view token that row r sees.
  int64_t limit(int64_t r) const { return block.causal ? block.limit + (block.row + r) / args.group() : INT64_MAX / 2; }
  // Tokens of the tile that some row sees. A tile with none is in no task.
  int64_t visible(const Tile& tile) const {
    const int64_t last = limit(block.rows - 1);
    return last - tile.view < tile.count ? last - tile.view + 1 : tile.count;
  }

  void load_rows(float* dst, const Rows& src) const {  // -> [rows, d]
    for (int64_t r = 0; r < rows(); ++r, dst += d) {
      load_row(dst, row_of(src, token(r), query_head(r)), src.dtype, args.head_dim);
      for (int64_t c = args.head_dim; c < d; ++c) dst[c] = 0;
    }
  }

  // dst = src with every row's rotary part turned by -shift (or back).
  void rotate(float* dst, const float* src, int32_t rotation, bool back) const {
    const int64_t half = args.half_rotary;
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

  // dst [panels, d, kPanel] = src [rows, d] transposed; lanes past the last row are zero.
  void pack(float* dst, const float* src) const {
    for (int64_t p = 0; p < panels(); ++p, dst += d * kPanel)
      for (int64_t lane = 0; lane < kPanel; ++lane) {
        const int64_t r = p * kPanel + lane;
        if (r < rows())
          for (int64_t c = 0; c < d; ++c) dst[c * kPanel + lane] = src[r * d + c];
        else
          for (int64_t c = 0; c < d; ++c) dst[c * kPanel + lane] = 0;
      }
  }

  // scores [panels, kTileKeys, kPanel] = keys [count, d] . packed queries [panels, d, kPanel]
  void panel_scores(float* scores, const float* packed, const float* keys, int64_t ldk, int64_t count) const {
    for (int64_t p = 0; p < panels(); ++p) {
      const float* b = packed + p * d * kPanel;
      float* c = scores + p * kTileKeys * kPanel;
      const Left a{keys, ldk, 1};
      switch (panel_vectors(rows(), p)) {
        case 1: strip<1, false>(count, d, a, b, kPanel, c, kPanel); break;
        case 2: strip<2, false>(count, d, a, b, kPanel, c, kPanel); break;
        default: strip<3, false>(count, d, a, b, kPanel, c, kPanel);
      }
    }
  }

  // out [rows, d] += weights^T . values, weights [panels, kTileKeys, kPanel], values [count, d]
  void add_weighted(float* out, const float* weights, const float* values, int64_t ldv, int64_t count) const {
    for (int64_t p = 0; p < panels(); ++p)
      gemm<true>(min(kPanel, rows() - p * kPanel), d, count, {weights + p * kTileKeys * kPanel, 1, kPanel}, values, ldv,
                 out + p * kPanel * d, d);
  }

  // out [count, d] (row length ldo) += weights . x, x [rows, d]
  void add_outer(float* out, int64_t ldo, const float* weights, const float* x, int64_t count) const {
    for (int64_t p = 0; p < panels(); ++p)
      gemm<true>(count, d, min(kPanel, rows() - p * kPanel), {weights + p * kTileKeys * kPanel, kPanel, 1}, x + p * kPanel * d, d,
                 out, ldo);
  }
};

// Calls visit(i, pool row) for the first count tokens of a tile.
template <class F>
DIFFMAS_INLINE void for_rows(const AttentionArgs& args, const Tile& tile, int64_t count, const F& visit) {
  if (tile.row >= 0) {
    for (int64_t i = 0; i < count; ++i) visit(i, tile.row + i);
    return;
  }
  int64_t segment = tile.segment, offset = tile.offset;
  for (int64_t i = 0; i < count; ++i, ++offset) {
    while (offset == args.seg_length[segment]) ++segment, offset = 0;
    visit(i, args.seg_start[segment] + offset);
  }
}

struct FloatRows {
  float* data;
  int64_t stride;
};

// The rows of a tile where they lie, when they are float32, consecutive and need no padding.
DIFFMAS_INLINE bool in_place(const AttentionArgs& args, const Tile& tile, const Rows& pool) {
  return tile.row >= 0 && pool.dtype == DType::f32 && args.head_dim % W == 0;
}

// Reads one word of every line. The products then read many rows at a time, which memory serves at half the speed.
static void read_in_order(FloatRows rows, int64_t count, int64_t d) {
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < d; c += 16) (void)*const_cast<const volatile float*>(rows.data + i * rows.stride + c);
}

static FloatRows tile_rows(const AttentionArgs& args, const Tile& tile, int64_t count, const Rows& pool, int64_t head, float* buffer) {
  if (in_place(args, tile, pool)) {
    const FloatRows rows{reinterpret_cast<float*>(row_of(pool, tile.row, head)), pool.stride_row};
    read_in_order(rows, count, args.head_dim);
    return rows;
  }
  const int64_t d = round_up(args.head_dim, W);
  for_rows(args, tile, count, [&](int64_t i, int64_t row) {
    load_row(buffer + i * d, row_of(pool, row, head), pool.dtype, args.head_dim);
    for (int64_t c = args.head_dim; c < d; ++c) buffer[i * d + c] = 0;
  });
  return {buffer, d};
}

}  // namespace diffmas::cpu::DIFFMAS_ISA
