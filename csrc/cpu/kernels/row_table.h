// The rows that a small-q task reads, where they lie, and what it asks memory for ahead of them.
#pragma once
#include "tile.h"

namespace diffmas::cpu::DIFFMAS_ISA {

// Rows fetched ahead, only where that pays: two rows of V at a time, scattered rows, and 2-byte rows that are converted, whose many
// instructions per line leave few loads in flight. Rows that are multiplied as they are: those of one query row, K to L2 and V to L1
// (from memory 20 to 25 % more than without; the other way round, or nearer or farther ahead, less). With more query rows only the tile
// that comes next, 30 to 40 % more than without.
constexpr int64_t kAhead = 8;
constexpr int64_t kPast = kAhead + 4;  // keys are taken by fours

// The rows of a tile where they lie.
struct RowTable {
  const char* row[kOneRowKeys + kPast];  // past the count the last row again
  int64_t count;
  DType dtype;
  bool fetch;                      // ask for rows ahead
  bool scaled = false;             // rows are payloads, to be multiplied with
  float scale[kOneRowKeys + kPast];
  const RowTable* next = nullptr;  // the rows that are read after these, if they are to be asked for meanwhile
};

static void find_rows(RowTable& table, const ScheduledAttention& args, const Tile& tile, int64_t count, const Rows& pool,
                      const Scales& scales, int64_t head, bool ahead) {
  table.count = count;
  table.dtype = pool.dtype;
  table.fetch = ahead || tile.row < 0;
  for_rows(args, tile, count, [&](int64_t i, int64_t row) { table.row[i] = row_of(pool, row, head); });
  for (int64_t i = 0; i < kPast; ++i) table.row[count + i] = table.row[count - 1];
  table.scaled = scales.data;
  if (!table.scaled) return;
  for_rows(args, tile, count, [&](int64_t i, int64_t row) { table.scale[i] = scale_of(scales, row, head); });
}

// The same for rows that are read as whole vectors, of `multiple` numbers: others go through the buffer [kSmallQKeys, d], padded with
// zeros.
template <class N>
static void find_whole_rows(RowTable& table, const ScheduledAttention& args, const Tile& tile, int64_t count, const Rows& pool,
                            const Scales& scales, int64_t head, int64_t multiple, float* buffer) {
  using E = typename N::Element;
  if (args.head_dim % multiple == 0)
    return find_rows(table, args, tile, count, pool, scales, head, N::kNumbers == 1 && pool.dtype != DType::f32);
  const TileRows<E> padded = tile_rows<N>(args, tile, count, pool, scales, head, round_up(args.head_dim, multiple), reinterpret_cast<E*>(buffer));
  table.count = count;
  table.dtype = N::kNumbers == 1 ? DType::f32 : pool.dtype;
  table.fetch = table.scaled = false;
  for (int64_t i = 0; i < count + kPast; ++i) table.row[i] = reinterpret_cast<const char*>(padded.data + min(i, count - 1) * padded.stride);
}

// x [rows, kSmallQKeys] times the scales of the tile's rows.
static void times_scales(const RowTable& table, int64_t count, float* x, int64_t rows) {
  if (!table.scaled) return;
  for (int64_t r = 0; r < rows; ++r, x += kSmallQKeys)
    for (int64_t i = 0; i < count; ++i) x[i] *= table.scale[i];
}

// To L1, or to L2 where they would take the place of rows that are needed before.
enum class To { L1, L2 };

template <int N, To kTo = To::L1>
DIFFMAS_INLINE void fetch(const char* const* row, int64_t bytes) {
  for (int i = 0; i < N; ++i)
    for (int64_t b = 0; b < bytes; b += 64) __builtin_prefetch(row[i] + b, 0, kTo == To::L1 ? 3 : 2);
}

// Asks for rows [i, i + N) of the table that is read next.
template <int N>
DIFFMAS_INLINE void fetch_next(const RowTable& table, int64_t i, int64_t bytes) {
  if (table.next && i + N <= table.next->count) fetch<N, To::L2>(table.next->row + i, bytes);
}

// Asks for the first rows of the table.
DIFFMAS_INLINE void fetch_first(const RowTable& table, int64_t d) { fetch<kAhead>(table.row, d * element_size(table.dtype)); }

}  // namespace diffmas::cpu::DIFFMAS_ISA
