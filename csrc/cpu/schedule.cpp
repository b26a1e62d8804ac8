#include "schedule.h"

#include <algorithm>
#include <cmath>

namespace diffmas::cpu {
namespace {

// Enough tasks for the widest CPU on which a split still helps.
constexpr int64_t kWantedTasks = 32;
// A split or a chunk shorter than this costs more to join than it gains.
constexpr int64_t kLeastKeys = 512;
// A piece of a segment this long is read where it lies; shorter ones are gathered into one tile.
constexpr int64_t kLeastInPlace = 32;
// Floats of partial dq that a backward phase may hold (64 MiB).
constexpr int64_t kPartialBudget = int64_t(1) << 24;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part of a segment inside one chunk of the pool.
struct Piece {
  int64_t view, row, skip, length;
  int32_t segment, rotation, chunk;
  bool needs_grad;

  bool joins(const Piece& next) const { return rotation == next.rotation && chunk == next.chunk && needs_grad == next.needs_grad; }
};

int64_t view_length(const Segments& s, int64_t b) {
  int64_t total = 0;
  for (int64_t i = s.seg_indptr[b]; i < s.seg_indptr[b + 1]; ++i) total += s.length[i];
  return total;
}

// Pool rows of each chunk: chunk c ends where bounds[c] says (the last one is open).
std::vector<Piece> pieces_of(const Segments& s, const Rotations& rotations, int64_t b, const std::vector<int64_t>& bounds) {
  std::vector<Piece> pieces;
  int64_t view = 0;
  const int64_t first_needing = s.grad_tail ? view_length(s, b) - s.grad_tail[b] : 0;
  for (int64_t i = s.seg_indptr[b]; i < s.seg_indptr[b + 1]; ++i) {
    const int32_t rotation = s.offset && s.inv_freq ? rotations.find(s.offset[i]) : -1;
    for (int64_t skip = 0; skip < s.length[i];) {
      const int64_t row = s.start[i] + skip;
      const auto bound = std::upper_bound(bounds.begin(), bounds.end(), row);
      const int64_t rest = s.length[i] - skip;
      int64_t length = bound == bounds.end() ? rest : std::min(rest, *bound - row);
      const bool needs_grad = view >= first_needing;
      if (!needs_grad) length = std::min(length, first_needing - view);
      pieces.push_back({view, row, skip, length, int32_t(i), rotation, int32_t(bound - bounds.begin()), needs_grad});
      skip += length;
      view += length;
    }
  }
  return pieces;
}

// Tiles of pieces in view order. A tile never mixes offsets, chunks, or rows that need gradients with others. Returns each tile's chunk.
std::vector<int32_t> append_tiles(const std::vector<Piece>& pieces, int64_t tile_keys, std::vector<Tile>& tiles) {
  std::vector<int32_t> chunks;
  for (size_t p = 0; p < pieces.size();) {
    const Piece& first = pieces[p];
    int64_t done = 0;  // of pieces[p]
    while (first.length - done >= kLeastInPlace) {
      const int64_t count = std::min(tile_keys, first.length - done);
      tiles.push_back(
          {first.view + done, first.row + done, first.skip + done, first.segment, int32_t(count), first.rotation, first.needs_grad});
      chunks.push_back(first.chunk);
      done += count;
    }
    if (done == first.length) {
      ++p;
      continue;
    }
    Tile tile{first.view + done, first.row + done, first.skip + done, first.segment, int32_t(first.length - done),
              first.rotation,    first.needs_grad};
    chunks.push_back(first.chunk);
    for (++p; p < pieces.size(); ++p) {
      const Piece& next = pieces[p];
      if (next.length >= kLeastInPlace || tile.count + next.length > tile_keys || !first.joins(next)) break;
      if (next.row != tile.row + tile.count) tile.row = -1;
      tile.count += int32_t(next.length);
    }
    tiles.push_back(tile);
  }
  return chunks;
}

// Keys in a tile of sequence b.
int64_t tile_keys(const Segments& s, int64_t b, int64_t group, int64_t one_row_keys) {
  const int64_t rows = (s.q_indptr[b + 1] - s.q_indptr[b]) * group;
  return rows == 1 ? one_row_keys : rows <= kSmallQRows ? kSmallQKeys : kTileKeys;
}

// Query blocks of sequence b.
void append_blocks(const Segments& s, int64_t b, int64_t group, std::vector<Block>& blocks) {
  const int64_t queries = s.q_indptr[b + 1] - s.q_indptr[b];
  const int64_t limit = view_length(s, b) - queries;
  for (int64_t row = 0; row < queries * group; row += kBlockRows)
    blocks.push_back({s.q_indptr[b], row, limit, int32_t(std::min(kBlockRows, queries * group - row)), s.causal});
}

// How many of the tiles [begin, end) the block's last query sees.
int64_t visible_end(const Block& block, int64_t group, const std::vector<Tile>& tiles, int64_t begin, int64_t end) {
  if (!block.causal) return end;
  const int64_t last = block.limit + (block.row + block.rows - 1) / group;
  return std::partition_point(tiles.begin() + begin, tiles.begin() + end, [&](const Tile& tile) { return tile.view <= last; }) -
         tiles.begin();
}

// The pool rows at which the covered rows are cut into chunks. A row that several sequences share is in one chunk for all of them.
std::vector<int64_t> chunk_bounds(const Segments& s, int64_t heads) {
  std::vector<std::pair<int64_t, int64_t>> ranges;
  for (int64_t i = s.seg_indptr[0]; i < s.seg_indptr[s.batch]; ++i)
    if (s.length[i] > 0) ranges.push_back({s.start[i], s.start[i] + s.length[i]});
  std::sort(ranges.begin(), ranges.end());
  std::vector<std::pair<int64_t, int64_t>> merged;
  int64_t covered = 0;
  for (auto [begin, end] : ranges) {
    if (!merged.empty() && begin <= merged.back().second) begin = merged.back().second;
    if (begin >= end) continue;
    covered += end - begin;
    if (!merged.empty() && begin == merged.back().second) merged.back().second = end;
    else merged.push_back({begin, end});
  }
  const int64_t chunks = std::max<int64_t>(1, std::min(ceil_div(kWantedTasks, heads), covered / kLeastKeys));
  std::vector<int64_t> bounds;
  int64_t before = 0;  // covered rows in earlier ranges
  for (const auto& [begin, end] : merged) {
    for (int64_t c = int64_t(bounds.size()) + 1; c < chunks && covered * c / chunks < before + end - begin; ++c)
      bounds.push_back(begin + std::max<int64_t>(0, covered * c / chunks - before));
    before += end - begin;
  }
  return bounds;
}

}  // namespace

Rotations::Rotations(const Segments& s) {
  if (!s.offset || !s.inv_freq) return;
  for (int64_t i = s.seg_indptr[0]; i < s.seg_indptr[s.batch]; ++i)
    if (s.offset[i] != 0) offsets.push_back(s.offset[i]);
  std::sort(offsets.begin(), offsets.end());
  offsets.erase(std::unique(offsets.begin(), offsets.end()), offsets.end());
  for (int64_t offset : offsets)
    for (int64_t i = 0; i < s.half_rotary; ++i) {
      const double angle = -double(offset) * double(s.inv_freq[i]);
      cos.push_back(float(std::cos(angle)));
      sin.push_back(float(std::sin(angle)));
    }
}

int32_t Rotations::find(int64_t offset) const {
  if (offset == 0) return -1;
  return int32_t(std::lower_bound(offsets.begin(), offsets.end(), offset) - offsets.begin());
}

int64_t largest_block(const Segments& s, int64_t group) {
  int64_t queries = 0;
  for (int64_t b = 0; b < s.batch; ++b) queries = std::max(queries, s.q_indptr[b + 1] - s.q_indptr[b]);
  return std::min(kBlockRows, queries * group);
}

ForwardSchedule::ForwardSchedule(const Segments& s, const Rotations& rotations, int64_t group, int64_t kv_heads, int64_t one_row_keys) {
  std::vector<std::pair<int64_t, int64_t>> ranges;  // of each block's tiles
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t begin = int64_t(tiles.size()), block = int64_t(blocks.size());
    append_blocks(s, b, group, blocks);
    if (block == int64_t(blocks.size())) continue;
    append_tiles(pieces_of(s, rotations, b, {}), tile_keys(s, b, group, one_row_keys), tiles);
    for (size_t i = block; i < blocks.size(); ++i)
      ranges.push_back({begin, visible_end(blocks[i], group, tiles, begin, int64_t(tiles.size()))});
  }
  const int64_t whole = int64_t(blocks.size()) * kv_heads;
  // The longest tasks first: the threads finish together.
  std::vector<int64_t> order(blocks.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    return (ranges[a].second - ranges[a].first) * blocks[a].rows > (ranges[b].second - ranges[b].first) * blocks[b].rows;
  });
  for (int64_t i : order) {
    const auto [begin, end] = ranges[i];
    const int64_t count = end - begin;
    const int64_t keys = count ? tiles[end - 1].view + tiles[end - 1].count - tiles[begin].view : 0;
    pairs += kv_heads * blocks[i].rows * keys;
    const int64_t splits = std::max<int64_t>(1, std::min({ceil_div(kWantedTasks, whole), keys / kLeastKeys, count}));
    for (int64_t head = 0; head < kv_heads; ++head) {
      if (splits == 1) {
        tasks.push_back({i, head, begin, end, -1});
        continue;
      }
      merges.push_back({i, head, partials, splits});
      for (int64_t j = 0; j < splits; ++j)
        tasks.push_back({i, head, begin + count * j / splits, begin + count * (j + 1) / splits, partials++});
    }
  }
}

BackwardSchedule::BackwardSchedule(const Segments& s, const Rotations& rotations, int64_t group, int64_t kv_heads, int64_t padded_dim,
                                   int64_t one_row_keys, bool want_dq, int64_t heads_apart) {
  const std::vector<int64_t> bounds = chunk_bounds(s, heads_apart);
  const int64_t chunks = int64_t(bounds.size()) + 1;
  const int64_t partial_budget =
      std::max<int64_t>(1, kPartialBudget / std::max<int64_t>(1, kv_heads * largest_block(s, group) * padded_dim));
  std::vector<std::vector<BackwardUnit>> by_chunk(chunks);
  BackwardPhase phase;
  const auto end_phase = [&] {
    if (want_dq && phase.reduces.empty()) return;
    phase.chunk_indptr.push_back(0);
    for (auto& units : by_chunk) {
      phase.units.insert(phase.units.end(), units.begin(), units.end());
      phase.chunk_indptr.push_back(int64_t(phase.units.size()));
      units.clear();
    }
    phases.push_back(std::move(phase));
    phase = {};
  };
  for (int64_t b = 0; b < s.batch; ++b) {
    size_t block = blocks.size();
    append_blocks(s, b, group, blocks);
    if (block == blocks.size()) continue;
    // Ranges of tiles by chunk; a chunk's tiles stay in view order.
    std::vector<Tile> unordered;
    const std::vector<int32_t> chunk_of = append_tiles(pieces_of(s, rotations, b, bounds), tile_keys(s, b, group, one_row_keys), unordered);
    std::vector<int64_t> order(unordered.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = int64_t(i);
    std::stable_sort(order.begin(), order.end(), [&](int64_t x, int64_t y) { return chunk_of[x] < chunk_of[y]; });
    struct TileRange {
      int32_t chunk;
      int64_t begin, end;
    };
    std::vector<TileRange> ranges;
    for (int64_t i : order) {
      const int64_t at = int64_t(tiles.size());
      if (ranges.empty() || ranges.back().chunk != chunk_of[i]) ranges.push_back({chunk_of[i], at, at});
      tiles.push_back(unordered[i]);
      ranges.back().end = at + 1;
    }
    for (; block < blocks.size(); ++block) {
      const int64_t first = phase.partials;
      for (const TileRange& range : ranges) {
        const int64_t end = visible_end(blocks[block], group, tiles, range.begin, range.end);
        if (end > range.begin) by_chunk[range.chunk].push_back({int64_t(block), range.begin, end, want_dq ? phase.partials++ : -1});
      }
      if (!want_dq) continue;
      for (int64_t head = 0; head < kv_heads; ++head) phase.reduces.push_back({int64_t(block), head, first, phase.partials - first});
      if (phase.partials >= partial_budget) end_phase();
    }
  }
  end_phase();
}

}  // namespace diffmas::cpu
