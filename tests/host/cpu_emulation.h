// Emulates csrc/cpu/kernels/instructions.h, function by function, with the contracts that are stated there. The numbers are the CPU's:
// a product of two bfloat16 is exact, every addition rounds, subnormals are zero on the way in and out.
#pragma once
#include "host.h"

namespace diffmas::cpu::DIFFMAS_ISA {

inline float flushed(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }

// Of two bfloat16.
inline float add_product(float sum, uint16_t a, uint16_t b) {
  return flushed(flushed(sum) + flushed(flushed(bfloat_to_float(a)) * flushed(bfloat_to_float(b))));
}
inline float add_pair(float sum, uint32_t a, uint32_t b) {
  return add_product(add_product(sum, uint16_t(a >> 16), uint16_t(b >> 16)), uint16_t(a), uint16_t(b));
}

vf dot(vf sum, vu a, vu b) {
  for (int i = 0; i < W; ++i) sum[i] = add_pair(sum[i], a[i], b[i]);
  return sum;
}

vh narrow(vf x) {
  vh y;
  for (int i = 0; i < W; ++i) y[i] = float_to_bfloat(flushed(x[i]));
  return y;
}
vu narrow(vf first, vf second) { return interleave(narrow(first), narrow(second)); }

#if defined(DIFFMAS_TILES)
struct Tiles {
  static constexpr int kRows = 16, kWords = 16;
  bool configured = false;
  uint32_t word[8][kRows][kWords];
  bool written[8];

  uint32_t (&tile(int t, bool read))[kRows][kWords] {
    if (!configured) host::fail("tile %d is used outside of a configuration", t);
    if (read && !written[t]) host::fail("tile %d is read before it was written", t);
    written[t] = true;
    return word[t];
  }
};
inline Tiles tiles;

void configure_tiles(const TileConfig& config) {
  if (tiles.configured) host::fail("tiles are configured twice");
  if (config.palette != 1 || config.start_row) host::fail("palette %d", config.palette);
  for (int t = 0; t < 16; ++t)  // the CPU has eight, and refuses any other that is asked for
    if (config.row_bytes[t] != (t < 8 ? 64 : 0) || config.rows[t] != (t < 8 ? 16 : 0)) host::fail("tile %d is not one of 16 x 64 bytes", t);
  tiles.configured = true;
  for (bool& written : tiles.written) written = false;
}
void release_tiles() { tiles.configured = false; }

template <int kTile>
void tile_zero() {
  for (auto& row : tiles.tile(kTile, false))
    for (uint32_t& x : row) x = 0;
}
template <int kTile>
void tile_load(const void* rows, int64_t stride) {
  auto& tile = tiles.tile(kTile, false);
  for (int r = 0; r < Tiles::kRows; ++r) __builtin_memcpy(tile[r], static_cast<const char*>(rows) + r * stride, sizeof tile[r]);
}
template <int kTile>
void tile_store(void* rows, int64_t stride) {
  auto& tile = tiles.tile(kTile, true);
  for (int r = 0; r < Tiles::kRows; ++r) __builtin_memcpy(static_cast<char*>(rows) + r * stride, tile[r], sizeof tile[r]);
}
template <int kC, int kA, int kB>
void tile_dot() {
  static_assert(kC != kA && kC != kB && kA != kB);  // the CPU refuses others
  auto &c = tiles.tile(kC, true), &a = tiles.tile(kA, true), &b = tiles.tile(kB, true);
  for (int m = 0; m < Tiles::kRows; ++m)
    for (int n = 0; n < Tiles::kWords; ++n) {
      float first = 0, second = 0;  // the CPU has a sum for each number of the pairs
      for (int k = 0; k < Tiles::kWords; ++k) {
        first = add_product(first, uint16_t(a[m][k]), uint16_t(b[k][n]));
        second = add_product(second, uint16_t(a[m][k] >> 16), uint16_t(b[k][n] >> 16));
      }
      c[m][n] = float_to_bits(flushed(flushed(bits_to_float(c[m][n])) + flushed(first + second)));
    }
}
#endif

}  // namespace diffmas::cpu::DIFFMAS_ISA
