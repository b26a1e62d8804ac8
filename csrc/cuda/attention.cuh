// cross_attention of few queries over long views, and its backward: bound by the memory that K and V come from; dK and dV of many, too.
//
// A block has up to 16 query rows, (token, head of the GQA group) pairs of one sequence and one K/V head, and a part of the view's
// keys; grid (tiles of rows, K/V heads, parts). A warp of it walks every kWarps-th tile of 16 keys on its own: K and V rows come
// through a ring of asynchronous copies that knows nothing of segments, so it never runs dry between them. Each warp has a softmax
// state, or a dq, of its own; warps are merged in the block, blocks by the last one to arrive, always in one order: one launch, the
// same bits in every run.
//
// What it takes, D = 128 in 16-bit types at 4.3 TB/s on 132 multiprocessors of 1.75 GHz, 18.6 bytes a cycle and multiprocessor:
//   products  2 D of 16 rows a key of 512 bytes: 16 MAC a byte padded to 16 rows, 300 a cycle. mma.sync does 1024 and more, at any G;
//             FMA (128 a cycle) would do 2 G: 19 a cycle at G = 1, 149 at G = 8, and 0.5 conversions a byte and the sums over lanes.
//   issue     a tile of 16 keys (8 KB, 440 cycles): 16 ldmatrix, 32 mma, 16 copies, some 200 others, of 1760 slots.
//   latency   a warp takes some 700 cycles for a tile, so eight (two blocks) could do 94 bytes a cycle.
//   copies    a warp has kStages - 1 tiles under way: 128 KB a multiprocessor. One microsecond of latency needs 33 KB.
//
// dK and dV have no such bound where there are many queries: a block keeps 64 keys and lets the query rows come by, in tiles of 32 for
// which the next one is on its way. A warp's 16 keys and 16 rows at D = 128:
//   products  64 mma: 128 cycles of a multiprocessor at mma.sync's 1024 MAC a cycle (sm_80); sm_90 has attention_sm90.cuh.
//   shared    36 ldmatrix of 512 bytes: 144 cycles, the bound, 910 MAC a cycle. 32 are of q and do, which 16 keys do not use more often;
//             the rest are the half of V that registers have no room for. 32 keys a warp would need 256 registers for their sums.
//   issue     some 300 instructions a warp, of four a cycle: 76 cycles.
//   L2        8 KB of q and do serve four warps: 14 bytes a cycle and multiprocessor, of 24 and more.
//
// Heads of up to 64, 128 and 256 dimensions are padded with zeros in shared memory. kVectors: rows lie on 16 bytes, and so do the slots
// within them. Otherwise, and in float32 beyond 128, they are read element by element, of any dtype, and computed with in T = float.
// float32 is done by FMA in the same places of the same tiles, at 16 rows 64 MAC a key element of 4 bytes: 74 of 128 a cycle.
#pragma once
#include "attention.h"
#include "device.h"

namespace diffmas::cuda {

using cpu::DType;
using cpu::Rows;
using cpu::Segments;

constexpr int kTileRows = 16, kTileKeys = 16;  // what mma.sync likes
constexpr int kMaxShared = 101376;  // bytes of a block on sm_120, which has least
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

// Where dimensions lie within a row of shared memory: in 16-byte slots that are paired by the rotation. Where that turns dimension i
// and i + half into each other, eight of the first half are followed by the eight of the second: both are then in one lane's
// registers. Otherwise (half = 0) slot and dimension are the same.
struct Slots {
  int head_dim, half;

  __host__ __device__ int paired() const { return (half + 7) / 8 * 16; }
  __host__ __device__ int count() const { return paired() + head_dim - 2 * half; }
  // -1: nothing there.
  __device__ __forceinline__ int dim(int slot) const {
    const int i = slot / 16 * 8 + slot % 8;
    if (slot < paired()) return i < half ? i + slot / 8 % 2 * half : -1;
    const int d = slot - paired() + 2 * half;
    return d < head_dim ? d : -1;
  }
};

// Pool rows [row, end), a part of one segment, whose keys and values learn; view position = row + to_view.
struct alignas(8) Run {
  int row, end, to_view;
  int sequence, length;  // of the view
};

struct AttentionLaunch {
  AttentionArgs a;
  Slots slots;
  int group;     // G
  float* parts;  // of every (tile, K/V head): [parts, 16, D], and behind all of them softmax states [parts, 16, 2]
  // For dK and dV, from attention_bwd_kernel_runs.
  Run* runs;      // [S]
  float2* bases;  // [Hkv, n, G]: base and delta of RowNumbers

  // Of the query rows of a K/V head: token * G + head of the group.
  __device__ __forceinline__ float2* bases_of(int kv_head) const { return bases + kv_head * a.n * group; }
};

// dK and dV of 16-bit types by attention_sm90.cuh, on a device of sm_90, after attention_bwd_kernel_runs. -> kNotServed where that does
// not serve them.
constexpr int kNotServed = -1;
int dkv_on_sm90(const AttentionLaunch& launch, void* stream);

// A row of elements whose dtype is not known when compiling.
struct AnyRow {
  char* data;
  DType dtype;

  __device__ __forceinline__ AnyRow operator+(int64_t elements) const { return {data + elements * (dtype == DType::f32 ? 4 : 2), dtype}; }
};
__device__ __forceinline__ float element(AnyRow row, int d) {
  if (row.dtype == DType::f32) return reinterpret_cast<const float*>(row.data)[d];
  if (row.dtype == DType::bf16) return to_float(reinterpret_cast<const bf16*>(row.data)[d]);
  return to_float(reinterpret_cast<const f16*>(row.data)[d]);
}
__device__ __forceinline__ void set_element(AnyRow row, int d, float x) {
  if (row.dtype == DType::f32) reinterpret_cast<float*>(row.data)[d] = x;
  else if (row.dtype == DType::bf16) reinterpret_cast<bf16*>(row.data)[d] = from_float<bf16>(x);
  else reinterpret_cast<f16*>(row.data)[d] = from_float<f16>(x);
}
template <class T>
__device__ __forceinline__ float element(const T* row, int d) {
  return to_float(row[d]);
}

// A T*, or an AnyRow.
template <class T, bool kVectors = true>
__device__ __forceinline__ auto row_of(const Rows& rows, int64_t row, int64_t head) {
  const int64_t from = row * rows.stride_row + head * rows.stride_head;
  if constexpr (kVectors) return static_cast<T*>(rows.data) + from;
  else return AnyRow{static_cast<char*>(rows.data), rows.dtype} + from;
}

__device__ __forceinline__ int lane_id() { return int(threadIdx.x) % 32; }
__device__ __forceinline__ int warp_id() { return int(threadIdx.x) / 32; }

// Sums over a warp: of all lanes; of those up to this one.
__device__ __forceinline__ int warp_sum(int x) {
  for (int step = 16; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}
__device__ __forceinline__ int warp_scan(int x) {
  for (int step = 1; step < 32; step *= 2) {
    const int left = __shfl_up_sync(~0u, x, unsigned(step));
    if (lane_id() >= step) x += left;
  }
  return x;
}

// ---- tiles in shared memory -------------------------------------------------------------------------------------------------------

// 16 rows of D elements, in chunks of 16 bytes whose places within the row depend on the row: eight rows of a column of chunks, and
// the chunks of a row, are in different banks.
template <class T, int D>
struct Tile {
  static constexpr int kElements = 16 / sizeof(T), kChunks = D / kElements, kBytes = 16 * D * int(sizeof(T));
  char* data;

  // Chunk [row0 + row][chunk0 + chunk], when no bit is set in both of row0 and row, nor in chunk0 and chunk. With row0 and chunk0
  // known when compiling, a loop over them needs one register and not one for each of its addresses.
  __device__ __forceinline__ char* at(int row, int chunk, int row0 = 0, int chunk0 = 0) const {
    const int place = (row * kChunks + (chunk ^ (row & 7))) ^ ((row0 ^ chunk0) & 7);
    return data + place * 16 + (row0 * kChunks + (chunk0 & ~7)) * 16;
  }
  // As the left side of a product, and as what rows are read into (see put_rows).
  __device__ __forceinline__ void left(int unit, uint32_t (&a)[4]) const {
    load_tiles<false>(a, at(lane_id() % 16, lane_id() / 16, 0, 2 * unit));
  }
  __device__ __forceinline__ void put(int unit, int h, int c, const float (&x)[2]) const {
    const int slot = 8 * c + lane_id() % 4 * 2;
    store<2>(reinterpret_cast<T*>(at(lane_id() / 4, slot / kElements, 8 * h, 16 / kElements * unit)) + slot % kElements, pack<T>(x));
  }
};

// The same in registers, only as the left side.
template <class T, int D>
struct RegisterTile {
  uint32_t words[D / 16][4];

  __device__ __forceinline__ void left(int unit, uint32_t (&a)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[unit][i];
  }
  __device__ __forceinline__ void put(int unit, int h, int c, const float (&x)[2]) { words[unit][h + 2 * c] = pack<T>(x).words[0]; }
};

// Products of a warp. Results [16 x 8 N] are x[N][4]: of the lane's row lane / 4 and the one eight below it, two columns each from
// 2 (lane % 4) on.

// x [16 x 16] += a [16 x D] b' [D x 16]
template <class T, int D, class Left>
__device__ __forceinline__ void add_scores(float (&x)[2][4], const Left& a, const Tile<T, D>& b) {
  const int lane = hidden(lane_id());
  if constexpr (sizeof(T) == 2) {
#pragma unroll
    for (int unit = 0; unit < D / 16; ++unit) {
      uint32_t left[4], right[4];
      a.left(unit, left);
      load_tiles<false>(right, b.at(lane / 16 * 8 + lane % 8, lane / 8 % 2, 0, 2 * unit));
      multiply_add<T>(x[0], left, right[0], right[1]);
      multiply_add<T>(x[1], left, right[2], right[3]);
    }
  } else {
#pragma unroll 2
    for (int chunk = 0; chunk < D / 4; ++chunk)
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Pack<float, 4> left = load<4>(reinterpret_cast<const float*>(a.at(lane / 4, 0, 8 * h, chunk)));
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const Pack<float, 4> right = load<4>(reinterpret_cast<const float*>(b.at(lane % 4 * 2, 0, i / 2 * 8 + i % 2, chunk)));
#pragma unroll
          for (int e = 0; e < 4; ++e) x[i / 2][2 * h + i % 2] += left[e] * right[e];
        }
      }
  }
}

// sum [16 x 8 N] += p [16 x 16] b [16 x 8 N], columns of b from slot `first` on
template <class T, int D, int N>
__device__ __forceinline__ void add_product(float (&sum)[N][4], const float (&p)[2][4], const Tile<T, D>& b, int first = 0) {
  const int lane = hidden(lane_id());
  if constexpr (sizeof(T) == 2) {
    uint32_t left[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) left[i] = two_from_floats<T>(p[i / 2][i % 2 * 2], p[i / 2][i % 2 * 2 + 1]);
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      uint32_t right[4];
      load_tiles<true>(right, b.at(lane % 16, lane / 16, 0, first / 8 + j));
      multiply_add<T>(sum[j], left, right[0], right[1]);
      multiply_add<T>(sum[j + 1], left, right[2], right[3]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i)  // the four sets of keys i / 2 * 8 + i % 2 + 0, 2, 4, 6, whose p is in register i % 2 of one lane each
#pragma unroll 1
      for (int t = 0; t < 4; ++t) {
        const float low = __shfl_sync(~0u, p[i / 2][i % 2], t, 4), high = __shfl_sync(~0u, p[i / 2][2 + i % 2], t, 4);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          const char* chunk = b.at(2 * t, lane % 4 / 2, i / 2 * 8 + i % 2, first / 4 + 2 * j);
          const Pack<float, 2> right = load<2>(reinterpret_cast<const float*>(chunk) + lane % 2 * 2);
          sum[j][0] += low * right[0], sum[j][1] += low * right[1], sum[j][2] += high * right[0], sum[j][3] += high * right[1];
        }
      }
  }
}

// ---- rotation ---------------------------------------------------------------------------------------------------------------------

// table[i]: cosine and sine of frequency i, `positions` further. A warp's own; angles in float64, as shifts reach 1e5 and more.
__device__ __forceinline__ void make_table(float2* table, const Segments& view, int positions) {
  __syncwarp();
  for (int i = hidden(lane_id()); i < view.half_rotary; i += 32) {
    const double half_turns = double(positions) * double(view.inv_freq[i]) * 0.3183098861837906715;
    sincospif(float(half_turns - 2 * rint(0.5 * half_turns)), &table[i].y, &table[i].x);
  }
  __syncwarp();
}

__device__ __forceinline__ void rotate_pair(float& x, float& y, float2 turn) {
  const float z = x * turn.x - y * turn.y;
  y = y * turn.x + x * turn.y;
  x = z;
}

// Unit u of a row as a lane holds it: x[c][e] is slot 16 u + 8 c + 2 (lane % 4) + e.
__device__ __forceinline__ void rotate_unit(float& x00, float& x01, float& x10, float& x11, int unit, int lane,
                                            const AttentionLaunch& launch, const float2* table) {
  const int half = int(launch.a.view.half_rotary), t = lane % 4;
  if (launch.a.interleaved) {
    if (8 * unit + t < half) rotate_pair(x00, x01, table[8 * unit + t]);
    if (8 * unit + t + 4 < half) rotate_pair(x10, x11, table[8 * unit + t + 4]);
  } else {
    if (8 * unit + 2 * t < half) rotate_pair(x00, x10, table[8 * unit + 2 * t]);
    if (8 * unit + 2 * t + 1 < half) rotate_pair(x01, x11, table[8 * unit + 2 * t + 1]);
  }
}

// ---- where a block works ----------------------------------------------------------------------------------------------------------

struct QueryRow {
  int64_t token;  // packed
  int head;
};

struct Work {
  int sequence, q_first, queries;  // of the sequence
  int row_first, rows;             // of the tile, among the sequence's queries * G; no rows: nothing to do
  int s_first, s_last, length;     // the view's segments, and its tokens
  int n_first, n_end;              // the part of them that this block looks at

  __device__ __forceinline__ QueryRow row(const AttentionLaunch& launch, int i) const {
    const int r = row_first + i;
    return {q_first + r / launch.group, int(blockIdx.y) * launch.group + r % launch.group};
  }
  // The last token of the view that a row sees.
  __device__ __forceinline__ int last(const AttentionLaunch& launch, int i) const {
    return !launch.a.view.causal ? length - 1 : length - queries + (row_first + i) / launch.group;
  }
};

__device__ __forceinline__ int view_length(const Segments& view, int s_first, int s_last) {
  int length = 0;
  for (int s = s_first + lane_id(); s < s_last; s += 32) length += int(view.length[s]);
  return warp_sum(length);
}

// Sequence b has the tiles from q_indptr[b] G / 16 + b on: room for all of its rows, known without looking at other sequences. Every
// warp finds it for itself; parts are whole tiles of `keys` keys.
__device__ __forceinline__ Work find_work(const AttentionLaunch& launch, int keys) {
  const Segments& view = launch.a.view;
  const int lane = lane_id(), tile = int(blockIdx.x);
  const auto first_tile = [&](int b) { return int(view.q_indptr[b] * launch.group / kTileRows) + b; };
  Work w;
  w.sequence = -1;
  for (int b = lane; b - lane < view.batch; b += 32) w.sequence += __popc(__ballot_sync(~0u, b < view.batch && first_tile(b) <= tile));
  w.q_first = int(view.q_indptr[w.sequence]), w.queries = int(view.q_indptr[w.sequence + 1]) - w.q_first;
  w.row_first = (tile - first_tile(w.sequence)) * kTileRows;
  w.rows = min(kTileRows, w.queries * launch.group - w.row_first);
  if (w.rows <= 0) return w;
  w.s_first = int(view.seg_indptr[w.sequence]), w.s_last = int(view.seg_indptr[w.sequence + 1]);
  w.length = view_length(view, w.s_first, w.s_last);
  const int end = min(max(w.last(launch, w.rows - 1) + 1, 0), w.length), parts = int(gridDim.z);
  const int share = ((end + parts - 1) / parts + keys - 1) / keys * keys;
  w.n_first = min(int(blockIdx.z) * share, end), w.n_end = min(w.n_first + share, end);
  return w;
}

// A unit of a query row (16 slots), as a lane has it in a product: x[c][e] is slot 16 unit + 8 c + 2 (lane % 4) + e. Loads without a
// branch, so that they do not wait for each other.
template <class T, bool kVectors, class Row>
__device__ __forceinline__ void read_unit(float (&x)[2][2], Row row, bool there, int slot, const Slots& slots) {
#pragma unroll
  for (int c = 0; c < 2; ++c, slot += 8) {
    if constexpr (kVectors) {
      const int d = slots.dim(slot);
      const Pack<T, 2> two = load<2, T>(row + max(d, 0));
      x[c][0] = there && d >= 0 ? two[0] : 0, x[c][1] = there && d >= 0 ? two[1] : 0;
    } else {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int d = slots.dim(slot + e);
        const float one = element(row, max(d, 0));
        x[c][e] = there && d >= 0 ? one : 0;
      }
    }
  }
}

// Reads 16 query rows into a tile, and turns them by the table where there is one.
template <class T, int D, bool kVectors, class To>
__device__ __forceinline__ void put_rows(To& to, const AttentionLaunch& launch, const Work& work, const Rows& rows, const float2* table,
                                         int first_unit = 0, int units = 1) {
  const int lane = hidden(lane_id());
  const auto put = [&](int unit, int h) {
    const bool there = lane / 4 + 8 * h < work.rows;
    const QueryRow row = work.row(launch, there ? lane / 4 + 8 * h : 0);
    float x[2][2];
    read_unit<T, kVectors>(x, row_of<T, kVectors>(rows, row.token, row.head), there, 16 * unit + lane % 4 * 2, launch.slots);
    if (table) rotate_unit(x[0][0], x[0][1], x[1][0], x[1][1], unit, lane, launch, table);
    to.put(unit, h, 0, x[0]), to.put(unit, h, 1, x[1]);
  };
  if constexpr (std::is_same_v<To, Tile<T, D>>) {
#pragma unroll 4
    for (int i = 2 * first_unit; i < D / 8; i += i % 2 ? 2 * units - 1 : 1) put(i / 2, i % 2);
  } else {
#pragma unroll
    for (int i = 0; i < D / 8; ++i) put(i / 2, i % 2);
  }
}

// ---- keys and values --------------------------------------------------------------------------------------------------------------

// A chunk of a pool row, or zeros: rows that nobody has written may hold NaN.
template <class T, bool kVectors, class Row>
__device__ __forceinline__ void copy_chunk(char* to, Row row, bool valid, int slot, const AttentionLaunch& launch) {
  if constexpr (kVectors) {
    const int d = launch.slots.dim(slot);
    copy_async_16(to, row + max(d, 0), valid && d >= 0);
  } else {
#pragma unroll 1
    for (int e = 0; e < 16 / int(sizeof(T)); ++e) {
      const int d = launch.slots.dim(slot + e);
      reinterpret_cast<T*>(to)[e] = valid && d >= 0 ? element(row, d) : 0;
    }
  }
}

// A lane's way through the segments: positions of the view, rising, to pool rows and shifts.
struct Cursor {
  int s, end, to_row, shift;

  // Ready for positions from n_first on: before the first segment that reaches beyond it.
  __device__ __forceinline__ Cursor(const Segments& view, const Work& work) : s(work.s_first - 1), end(0), to_row(0), shift(0) {
    for (int first = work.s_first; first < work.s_last; first += 32) {
      const int mine = first + lane_id();
      const int mine_end = end + warp_scan(mine < work.s_last ? int(view.length[mine]) : 0);
      const int passed = __popc(__ballot_sync(~0u, mine < work.s_last && mine_end <= work.n_first));
      if (passed) end = __shfl_sync(~0u, mine_end, passed - 1);
      s += passed;
      if (passed < 32) break;
    }
  }
  __device__ __forceinline__ int row(const Segments& view, int position) {
    if (position >= end) {
      int begin;
      do {
        begin = end, end += int(view.length[++s]);
      } while (position >= end);
      to_row = int(view.start[s]) - begin;
      shift = view.shift ? int(view.shift[s]) : 0;
    }
    return position + to_row;
  }
};

// What the backward knows of a query row: the base of its scores in log2 (0 where nothing was seen), do . o - dlse, the last token of
// the view that it sees.
struct alignas(16) RowNumbers {
  float base, delta;
  int last;
};

// How the forward and dq use a multiprocessor: up to four warps with a ring of their own, 100 KB a block. Query rows are in registers
// where those suffice.
template <class T, int D>
struct Form {
  using Keys = Tile<T, D>;
  static constexpr int kRowBytes = D * int(sizeof(T)), kWarps = kRowBytes <= 256 ? 4 : 1024 / kRowBytes;
  static constexpr int kBlocks = kRowBytes <= 128 ? 3 : 2;  // of a multiprocessor
  static constexpr bool kInRegisters = sizeof(T) == 2 && D <= 128;
  static constexpr int kStages = kInRegisters ? 3 : 2;
  using Queries = std::conditional_t<kInRegisters, RegisterTile<T, D>, Keys>;

  // Shared memory: the ring, a rotation table a warp, query rows, numbers of the rows.
  static constexpr int kRing = kWarps * kStages * 2 * Keys::kBytes, kTable = D / 2 * int(sizeof(float2));
  static constexpr int kTables = kRing, kQueries = kTables + kWarps * kTable;
  static constexpr int kForwardBytes = kQueries + (kInRegisters ? 0 : kWarps * Keys::kBytes);
  static constexpr int kNumbers = kForwardBytes + (kInRegisters ? 0 : Keys::kBytes);  // backward: behind a tile of do
  static constexpr int kBackwardBytes = kNumbers + kTileRows * int(sizeof(RowNumbers));
  static_assert(kWarps * kTileRows * (D + 2) * int(sizeof(float)) <= kRing);  // for the warps' states in the end
  static_assert(kBackwardBytes <= kMaxShared);

  __device__ __forceinline__ static float2* table(char* shared) { return reinterpret_cast<float2*>(shared + kTables + warp_id() * kTable); }
  // The i-th tile of query rows; one of a warp, or of all.
  __device__ __forceinline__ static Queries queries(char* shared, int i) {
    if constexpr (kInRegisters) return {};
    else return {shared + kQueries + i * Keys::kBytes};
  }
};

// This warp's tiles of a block's keys. The first copies start when it is made: before the query rows are read.
template <class T, int D, bool kVectors>
struct KeyStream {
  using F = Form<T, D>;
  using Keys = Tile<T, D>;
  static constexpr int kStep = F::kWarps * kTileKeys;

  const AttentionLaunch& launch;
  const int end, first, count;
  char* const ring;
  const decltype(row_of<T, kVectors>(Rows{}, 0, 0)) k_rows, v_rows;
  Cursor cursor;
  int shifts[F::kStages];  // of key lane % 16 of the tiles under way

  __device__ __forceinline__ KeyStream(const AttentionLaunch& launch, const Work& work, char* shared)
      : launch(launch), end(work.n_end), first(work.n_first + warp_id() * kTileKeys), count(max(end - first + kStep - 1, 0) / kStep),
        ring(shared + warp_id() * F::kStages * 2 * Keys::kBytes), k_rows(row_of<T, kVectors>(launch.a.k_pool, 0, blockIdx.y)),
        v_rows(row_of<T, kVectors>(launch.a.v_pool, 0, blockIdx.y)), cursor(launch.a.view, work) {
#pragma unroll
    for (int i = 0; i < F::kStages - 1; ++i) shifts[i] = copy(i);
  }

  // visit(K tile, V tile, position of the first key, number of keys, shift of key lane % 16)
  template <class Visit>
  __device__ __forceinline__ void for_each(Visit visit) {
    for (int i = 0; i < count; ++i) {
      copy_async_wait<F::kStages - 2>();
      __syncwarp();  // all lanes' copies are here, and all have read the tile before, whose place the next copies take
      shifts[F::kStages - 1] = copy(i + F::kStages - 1);
      const int position = first + i * kStep;
      visit(stage(i, 0), stage(i, 1), position, min(end - position, kTileKeys), shifts[0]);
#pragma unroll
      for (int j = 0; j + 1 < F::kStages; ++j) shifts[j] = shifts[j + 1];
    }
    copy_async_wait<0>();
  }

 private:
  __device__ __forceinline__ Keys stage(int i, int v) const { return {ring + (i % F::kStages * 2 + v) * Keys::kBytes}; }

  // -> the shift of key lane % 16.
  __device__ __forceinline__ int copy(int i) {
    if (i < count) {
      const int position = first + i * kStep + lane_id() % kTileKeys;
      const int row = position < end ? cursor.row(launch.a.view, position) : -1;
      const Keys k = stage(i, 0), v = stage(i, 1);
#pragma unroll 8
      for (int j = 0; j < Keys::kChunks / 2; ++j) {
        const int key = lane_id() / Keys::kChunks, chunk = lane_id() % Keys::kChunks;
        const int key0 = 32 * j / Keys::kChunks, chunk0 = 32 * j % Keys::kChunks, slot = (chunk0 + chunk) * Keys::kElements;
        const int key_row = __shfl_sync(~0u, row, key0 + key);
        const int64_t from = max(key_row, 0);
        copy_chunk<T, kVectors>(k.at(key, chunk, key0, chunk0), k_rows + from * launch.a.k_pool.stride_row, key_row >= 0, slot, launch);
        copy_chunk<T, kVectors>(v.at(key, chunk, key0, chunk0), v_rows + from * launch.a.v_pool.stride_row, key_row >= 0, slot, launch);
      }
    }
    copy_async_commit();
    return cursor.shift;
  }
};

// ---- what warps and blocks found becomes one --------------------------------------------------------------------------------------

// Of `count` results x [count, 16, D]: kSoftmax: the states' sum, their maxima (of log2 scores) and sums being tops; else the sum.
// done(row, slot, x, top, sum) with four of a row's slots at a time.
template <int D, bool kSoftmax, class Done>
__device__ __forceinline__ void merge(int count, int rows, const float* x, const float2* tops, Done done) {
  for (int i = int(threadIdx.x); i < rows * (D / 4); i += int(blockDim.x)) {
    const int row = i / (D / 4), slot = i % (D / 4) * 4;
    float top = -INFINITY, sum = 0, total[4] = {};
    if constexpr (kSoftmax)
      for (int j = 0; j < count; ++j) top = fmaxf(top, tops[j * kTileRows + row].x);
    const float base = top == -INFINITY ? 0 : top;
#pragma unroll 4
    for (int j = 0; j < count; ++j) {
      float weight = 1;
      if constexpr (kSoftmax) {
        weight = exp2f(tops[j * kTileRows + row].x - base);
        sum += weight * tops[j * kTileRows + row].y;
      }
      const Pack<float, 4> part = load<4>(x + (j * kTileRows + row) * D + slot);
#pragma unroll
      for (int e = 0; e < 4; ++e) total[e] += weight * part[e];
    }
    done(row, slot, total, top, sum);
  }
}

// Whether all other blocks that count here have been; what they wrote is then seen. The counter comes back to zero. before: shared.
__device__ __forceinline__ bool last_to_arrive(unsigned* counter, unsigned blocks, unsigned* before) {
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) *before = atomicInc(counter, blocks - 1);
  __syncthreads();
  __threadfence();
  return *before == blocks - 1;
}

// done(row, slot, x, top, sum) in the end, by one block, with the sum of what all warps of all parts have. The ring is over.
template <class T, int D, bool kSoftmax, class Done>
__device__ __forceinline__ void merge_all(const AttentionLaunch& launch, const Work& work, char* shared, const float (&x)[D / 8][4],
                                          const float (&top)[2], const float (&sum)[2], Done done) {
  constexpr int kSize = kTileRows * D, kWarps = Form<T, D>::kWarps;
  float* const warps = reinterpret_cast<float*>(shared);
  float2* const warp_tops = reinterpret_cast<float2*>(warps + kWarps * kSize);
  const int lane = lane_id();
  __syncthreads();
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = lane / 4 + 8 * h;
#pragma unroll
    for (int j = 0; j < D / 8; ++j)
      store<2>(warps + warp_id() * kSize + row * D + 8 * j + lane % 4 * 2, pack<float>({x[j][2 * h], x[j][2 * h + 1]}));
    if (lane % 4 == 0) warp_tops[warp_id() * kTileRows + row] = make_float2(top[h], sum[h]);
  }
  __syncthreads();
  if (gridDim.z == 1) return merge<D, kSoftmax>(kWarps, work.rows, warps, warp_tops, done);

  const int64_t tiles = int64_t(gridDim.x) * gridDim.y, tile = int64_t(blockIdx.y) * gridDim.x + blockIdx.x, parts = gridDim.z;
  float* const all = launch.parts + tile * parts * kSize;
  float2* const all_tops = reinterpret_cast<float2*>(launch.parts + tiles * parts * kSize) + tile * parts * kTileRows;
  merge<D, kSoftmax>(kWarps, work.rows, warps, warp_tops, [&](int row, int slot, const float (&x)[4], float top, float sum) {
    store<4>(all + int64_t(blockIdx.z) * kSize + row * D + slot, pack<float>(x));
    if (kSoftmax && slot == 0) all_tops[int(blockIdx.z) * kTileRows + row] = make_float2(top, sum);
  });
  unsigned* const before = reinterpret_cast<unsigned*>(shared + Form<T, D>::kTables);
  if (last_to_arrive(launch.a.counters + tile, gridDim.z, before)) merge<D, kSoftmax>(int(parts), work.rows, all, all_tops, done);
}

// Four slots of a query's row.
template <class T, bool kVectors, class Row>
__device__ __forceinline__ void store_slots(Row row, int slot, const float (&x)[4], const AttentionLaunch& launch) {
  if constexpr (kVectors) {
    const int d = launch.slots.dim(slot);
    if (d >= 0) store<4>(row + d, pack<T>(x));
  } else {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int d = launch.slots.dim(slot + e);
      if (d >= 0) set_element(row, d, x[e]);
    }
  }
}

// Of the keys `left` (bits) of a tile, those that are read at one shift, which are no longer left.
__device__ __forceinline__ unsigned take_shift(int shifts, unsigned& left, int& shift) {
  shift = __shfl_sync(~0u, shifts, __ffs(int(left)) - 1);
  const unsigned same = __ballot_sync(~0u, shifts == shift) & left;
  left &= ~same;
  return same;
}

// ---- forward ----------------------------------------------------------------------------------------------------------------------

template <class T, int D, bool kVectors>
__global__ void __launch_bounds__(32 * Form<T, D>::kWarps, Form<T, D>::kBlocks) attention_fwd_kernel(const __grid_constant__ AttentionLaunch launch) {
  using F = Form<T, D>;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const Work work = find_work(launch, F::kWarps * kTileKeys);
  if (work.rows <= 0) return;
  const int lane = lane_id();
  const int last[2] = {work.last(launch, lane / 4), work.last(launch, lane / 4 + 8)};
  const float scale = launch.a.scale * kLog2e;
  KeyStream<T, D, kVectors> stream(launch, work, shared);
  auto q = F::queries(shared, warp_id());
  int turned = 0;  // q, by so many positions back
  put_rows<T, D, kVectors>(q, launch, work, launch.a.q, nullptr);

  float o[D / 8][4] = {}, top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  stream.for_each([&](const Tile<T, D>& k, const Tile<T, D>& v, int position, int keys, int shifts) {
    float s[2][4];
#pragma unroll
    for (int i = 0; i < 8; ++i) s[i / 4][i % 4] = -INFINITY;
    for (unsigned left = (1u << keys) - 1; left;) {
      int shift;
      const unsigned same = take_shift(shifts, left, shift);
      if (shift != turned) {
        make_table(F::table(shared), launch.a.view, -shift);
        put_rows<T, D, kVectors>(q, launch, work, launch.a.q, F::table(shared));
        turned = shift;
        __syncwarp();
      }
      float x[2][4] = {};
      add_scores<T, D>(x, q, k);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int key = i / 4 * 8 + lane % 4 * 2 + i % 2;
        if (same >> key & 1 && position + key <= last[i / 2 % 2]) s[i / 4][i % 4] = x[i / 4][i % 4] * scale;
      }
    }
    float shrink[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float mine = fmaxf(fmaxf(s[0][2 * h], s[0][2 * h + 1]), fmaxf(s[1][2 * h], s[1][2 * h + 1]));
      const float higher = fmaxf(top[h], group_max(mine, 4));
      const float base = higher == -INFINITY ? 0 : higher;  // a row that has seen nothing yet
      shrink[h] = exp2f(top[h] - base);
      top[h] = higher, sum[h] *= shrink[h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float& p = s[i / 2][2 * h + i % 2];
        p = exp2f(p - base), sum[h] += p;
      }
    }
    if (__any_sync(~0u, shrink[0] < 1 || shrink[1] < 1)) {  // seldom, once the largest score is found
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i / 4][i % 4] *= shrink[i / 2 % 2];
    }
    add_product<T, D>(o, s, v);
  });

#pragma unroll
  for (int h = 0; h < 2; ++h) sum[h] = group_sum(sum[h], 4);
  merge_all<T, D, true>(launch, work, shared, o, top, sum, [&](int i, int slot, float (&x)[4], float top, float sum) {
    const QueryRow row = work.row(launch, i);
    const float share = sum == 0 ? 0 : 1 / sum;  // NaN is no empty row
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= share;
    store_slots<T, kVectors>(row_of<T, kVectors>(launch.a.o, row.token, row.head), slot, x, launch);
    if (slot == 0) launch.a.lse[row.token * launch.a.q_heads + row.head] = sum == 0 ? -INFINITY : (top + log2f(sum)) * kLn2;
  });
}

// ---- dq ---------------------------------------------------------------------------------------------------------------------------

// do . o - dlse of a query row, in all lanes of a warp.
template <class T, bool kVectors>
__device__ __forceinline__ float delta_of(const AttentionLaunch& launch, int64_t token, int head) {
  const auto d_o = row_of<T, kVectors>(launch.a.d_o, token, head), o = row_of<T, kVectors>(launch.a.o, token, head);
  float sum = 0;
  for (int d = lane_id(); d < launch.slots.head_dim; d += 32) sum += element(d_o, d) * element(o, d);
  return group_sum(sum) - (launch.a.dlse ? launch.a.dlse[token * launch.a.q_heads + head] : 0);
}

template <class T, bool kVectors>
__device__ __forceinline__ RowNumbers numbers_of(const AttentionLaunch& launch, int64_t token, int head, int last) {
  const float lse = launch.a.lse[token * launch.a.q_heads + head], delta = delta_of<T, kVectors>(launch, token, head);
  return {lse == -INFINITY ? 0 : lse * kLog2e, delta, last};
}

// The forward's way through the keys. dq is gathered in the frame of the segment at hand, and turned when that changes.
template <class T, int D, bool kVectors>
__global__ void __launch_bounds__(32 * Form<T, D>::kWarps, Form<T, D>::kBlocks) attention_bwd_kernel_dq(const __grid_constant__ AttentionLaunch launch) {
  using F = Form<T, D>;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const Work work = find_work(launch, F::kWarps * kTileKeys);
  if (work.rows <= 0) return;
  const int lane = lane_id();
  float2* const table = F::table(shared);
  KeyStream<T, D, kVectors> stream(launch, work, shared);
  auto q = F::queries(shared, warp_id()), d_o = F::queries(shared, F::kWarps);
  put_rows<T, D, kVectors>(q, launch, work, launch.a.q, nullptr);
  if (F::kInRegisters) put_rows<T, D, kVectors>(d_o, launch, work, launch.a.d_o, nullptr);
  else put_rows<T, D, kVectors>(d_o, launch, work, launch.a.d_o, nullptr, warp_id(), F::kWarps);
  RowNumbers* const numbers = reinterpret_cast<RowNumbers*>(shared + F::kNumbers);
  for (int i = warp_id(); i < kTileRows; i += F::kWarps) {
    const QueryRow row = work.row(launch, min(i, work.rows - 1));
    const RowNumbers mine = numbers_of<T, kVectors>(launch, row.token, row.head, i < work.rows ? work.last(launch, i) : -1);
    if (lane == 0) numbers[i] = mine;
  }
  __syncthreads();
  const float scale = launch.a.scale * kLog2e;

  float dq[D / 8][4] = {};
  int turned = 0;  // q and dq, by so many positions back
  const auto turn = [&](int positions) {
    make_table(table, launch.a.view, positions);
    const int lane = hidden(lane_id());
#pragma unroll
    for (int i = 0; i < D / 8; ++i) {
      float *x = &dq[i / 2 * 2][i % 2 * 2], *y = &dq[i / 2 * 2 + 1][i % 2 * 2];
      rotate_unit(x[0], x[1], y[0], y[1], i / 2, lane, launch, table);
    }
  };
  stream.for_each([&](const Tile<T, D>& k, const Tile<T, D>& v, int position, int keys, int shifts) {
    for (unsigned left = (1u << keys) - 1; left;) {
      int shift;
      const unsigned same = take_shift(shifts, left, shift);
      if (shift != turned) {
        turn(turned - shift);
        make_table(table, launch.a.view, -shift);
        put_rows<T, D, kVectors>(q, launch, work, launch.a.q, table);
        turned = shift;
        __syncwarp();
      }
      float s[2][4] = {}, dp[2][4] = {};
      add_scores<T, D>(s, q, k);
      add_scores<T, D>(dp, d_o, v);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const RowNumbers row = numbers[lane / 4 + 8 * h];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int key = i / 2 * 8 + lane % 4 * 2 + i % 2;
          float& x = s[i / 2][2 * h + i % 2];
          const float p = same >> key & 1 && position + key <= row.last ? exp2f(x * scale - row.base) : 0;
          x = p * (dp[i / 2][2 * h + i % 2] - row.delta);
        }
      }
      add_product<T, D>(dq, s, k);
    }
  });
  if (turned) turn(turned);

  const float none[2] = {};
  merge_all<T, D, false>(launch, work, shared, dq, none, none, [&](int i, int slot, float (&x)[4], float, float) {
    const QueryRow row = work.row(launch, i);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] *= launch.a.scale;
    store_slots<T, kVectors>(row_of<T, kVectors>(launch.a.dq, row.token, row.head), slot, x, launch);
  });
}

// ---- dK, dV -----------------------------------------------------------------------------------------------------------------------

constexpr int kRunsWarps = 4;

// What the blocks of dK and dV need to know of queries and segments; a warp for every (token, head) and then every sequence.
template <class T, bool kVectors>
__global__ void __launch_bounds__(32 * kRunsWarps) attention_bwd_kernel_runs(const __grid_constant__ AttentionLaunch launch) {
  const Segments& view = launch.a.view;
  const int64_t rows = launch.a.n * launch.a.q_heads, i = int64_t(blockIdx.x) * kRunsWarps + warp_id();
  if (i < rows) {
    const int64_t token = i / launch.a.q_heads;
    const int head = int(i % launch.a.q_heads);
    const RowNumbers row = numbers_of<T, kVectors>(launch, token, head, 0);
    // A base of NaN stands for the whole row, which is taken out of the products (clear_not_finite).
    const bool finite = fabsf(row.base) < INFINITY && fabsf(row.delta) < INFINITY;
    const float2 two = finite ? make_float2(row.base, row.delta) : make_float2(NAN, 0);
    if (lane_id() == 0) launch.bases_of(head / launch.group)[token * launch.group + head % launch.group] = two;
  } else if (i - rows < view.batch) {
    const int b = int(i - rows), s_first = int(view.seg_indptr[b]), s_last = int(view.seg_indptr[b + 1]);
    const int length = view_length(view, s_first, s_last);
    int learns = 0;  // from this position on
    if (view.newest) learns = length - int(min(view.newest[b], int64_t(length)));
    if (view.q_indptr[b] == view.q_indptr[b + 1]) learns = length;
    for (int first = s_first, before = 0; first < s_last; first += 32) {
      const int s = first + lane_id(), size = s < s_last ? int(view.length[s]) : 0, end = before + warp_scan(size), begin = end - size;
      if (s < s_last) {
        const int start = int(view.start[s]);
        launch.runs[s] = {start + min(max(learns - begin, 0), size), start + size, begin - start, b, length};
      }
      before = __shfl_sync(~0u, end, 31);
    }
  }
}

// A tile as the left side of products, its first kHeld units in registers.
template <class T, int D, int kHeld>
struct HeldTile {
  Tile<T, D> tile;
  uint32_t words[kHeld > 0 ? kHeld : 1][4];

  __device__ __forceinline__ void hold() {
#pragma unroll
    for (int unit = 0; unit < kHeld; ++unit) tile.left(unit, words[unit]);
  }
  __device__ __forceinline__ void left(int unit, uint32_t (&a)[4]) const {
    if (unit >= kHeld) return tile.left(unit, a);
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = words[unit][i];
  }
  __device__ __forceinline__ const char* at(int row, int chunk, int row0, int chunk0) const { return tile.at(row, chunk, row0, chunk0); }
};

// A warp owns 16 pool rows, or shares them with another that has the other half of the dimensions: sums of dK and dV are in registers.
// In 16-bit types query rows come through a ring of two tiles, and what registers are left keep keys and values.
template <class T, int D>
struct PoolForm {
  using Keys = Tile<T, D>;
  static constexpr bool kAsync = sizeof(T) == 2;
  static constexpr int kWarps = 4, kHalves = D > 128 ? 2 : 1, kSlots = D / kHalves, kGroups = kWarps / kHalves, kRows = 16 * kGroups;
  static constexpr int kBlocks = kAsync && D <= 64 ? 3 : 2;  // of a multiprocessor; one where its shared memory is 100 KB (sm_120)
  static constexpr int kQueries = kAsync && D <= 128 ? 32 : 16, kStages = kAsync ? 2 : 1;
  static constexpr int kHeldKeys = kAsync && D <= 128 ? D / 16 : 0, kHeldValues = kHeldKeys < 4 ? kHeldKeys : 4;
  static constexpr int kAtOnce = 8;  // pairs of gradients asked for before the first is written

  // Shared memory: tiles of K, of V, the ring of q and do, base and delta of its rows, a rotation table, votes of two kinds.
  static constexpr int kRing = 2 * kGroups * Keys::kBytes, kOne = kQueries / 16 * Keys::kBytes, kNumbers = kRing + kStages * 2 * kOne;
  static constexpr int kTable = kNumbers + kStages * kQueries * int(sizeof(float2)), kVotes = kTable + D / 2 * int(sizeof(float2));
  static constexpr int kBytes = kVotes + 2 * kWarps * int(sizeof(unsigned));
  static_assert(kBytes <= kMaxShared);
};

// Query rows [row, row + kQueries) of a sequence's `rows` into a stage of the ring, zeros behind its end. A thread copies whole units
// of rows, 32 bytes, so that it can turn what it has copied: both slots of a pair are its own.
template <class T, int D>
struct QueryCopies {
  using F = PoolForm<T, D>;
  using Keys = Tile<T, D>;
  static constexpr int kUnits = D / 16, kStep = 32 * F::kWarps / kUnits;
  static_assert(F::kQueries % kStep == 0);

  // Chunk 0 or 1 of this thread. The slots of a pair of halves lie in neighbours; else lanes side by side copy what lies side by side.
  __device__ __forceinline__ static int chunk(const Slots& slots, int i) {
    const int unit = hidden(int(threadIdx.x)) % kUnits;
    return slots.half ? 2 * unit + i : unit + i * kUnits;
  }
  __device__ __forceinline__ static void issue(char* shared, int stage, const AttentionLaunch& launch, int q_first, int row, int rows) {
    const AttentionArgs& a = launch.a;
    const Keys q{shared + F::kRing + stage * 2 * F::kOne}, d_o{q.data + F::kOne};
    const auto query = [&](int i) {
      const int r = min(row + i, rows - 1);
      return QueryRow{q_first + r / launch.group, int(blockIdx.y) * launch.group + r % launch.group};
    };
#pragma unroll 1
    for (int i = hidden(int(threadIdx.x)) / kUnits; i < F::kQueries; i += kStep) {
      const bool there = row + i < rows;
      const QueryRow from = query(i);
      const T *q_row = row_of<T>(a.q, from.token, from.head), *d_o_row = row_of<T>(a.d_o, from.token, from.head);
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int to = chunk(launch.slots, c), tile = i / 16 * Keys::kBytes;
        copy_chunk<T, true>(Keys{q.data + tile}.at(i % 16, to), q_row, there, to * Keys::kElements, launch);
        copy_chunk<T, true>(Keys{d_o.data + tile}.at(i % 16, to), d_o_row, there, to * Keys::kElements, launch);
      }
    }
    if (const int i = int(threadIdx.x); i < F::kQueries) {
      float2* const numbers = reinterpret_cast<float2*>(shared + F::kNumbers) + stage * F::kQueries + i;
      const int64_t from = int64_t(q_first) * launch.group + min(row + i, rows - 1);
      copy_async_8(numbers, launch.bases_of(int(blockIdx.y)) + from, row + i < rows);
    }
    copy_async_commit();
  }
  // What this thread has copied of q, which has arrived.
  __device__ __forceinline__ static void turn(char* shared, int stage, const AttentionLaunch& launch, const float2* table) {
    const int half = int(launch.a.view.half_rotary);
#pragma unroll 1
    for (int i = int(threadIdx.x) / kUnits; i < F::kQueries; i += kStep) {
      const Keys q{shared + F::kRing + stage * 2 * F::kOne + i / 16 * Keys::kBytes};
      T* at[2];
      float x[2][8];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        at[c] = reinterpret_cast<T*>(q.at(i % 16, chunk(launch.slots, c)));
        const Pack<T, 8> eight = load<8>(at[c]);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[c][e] = eight[e];
      }
#pragma unroll
      for (int e = 0; e < 8; ++e) {
        if (launch.a.interleaved) {
          const int first = chunk(launch.slots, e / 4) * 4 + e % 4;
          if (first < half) rotate_pair(x[e / 4][e % 4 * 2], x[e / 4][e % 4 * 2 + 1], table[first]);
        } else if (chunk(launch.slots, 0) * 4 + e < half) {
          rotate_pair(x[0][e], x[1][e], table[chunk(launch.slots, 0) * 4 + e]);
        }
      }
#pragma unroll
      for (int c = 0; c < 2; ++c) store<8>(at[c], pack<T>(x[c]));
    }
  }
};

// visit(i) for the threads i that say yes, one after the other. No thread says so of the same votes before all are back.
template <class Visit>
__device__ __forceinline__ void for_each_vote(bool yes, unsigned* votes, Visit visit) {
  const unsigned mine = __ballot_sync(~0u, yes);
  if (lane_id() == 0) votes[warp_id()] = mine;
  __syncthreads();
  for (int warp = 0; warp < int(blockDim.x) / 32; ++warp)
    for (unsigned left = votes[warp]; left; left &= left - 1) visit(warp * 32 + __ffs(int(left)) - 1);
  __syncthreads();
}

// What QueryCopies does, without asynchronous copies.
template <class T, int D, bool kVectors>
__device__ __forceinline__ void put_queries(char* shared, const AttentionLaunch& launch, int q_first, int row, int rows, const float2* table) {
  using F = PoolForm<T, D>;
  Work work;
  work.q_first = q_first, work.row_first = row, work.rows = min(F::kQueries, rows - row);
  Tile<T, D> q{shared + F::kRing}, d_o{shared + F::kRing + F::kOne};
  put_rows<T, D, kVectors>(q, launch, work, launch.a.q, table, warp_id(), F::kWarps);
  put_rows<T, D, kVectors>(d_o, launch, work, launch.a.d_o, nullptr, warp_id(), F::kWarps);
  if (threadIdx.x < F::kQueries) {
    const bool there = int(threadIdx.x) < work.rows;
    const int64_t from = int64_t(q_first) * launch.group + row + (there ? int(threadIdx.x) : 0);
    const float2 numbers = launch.bases_of(int(blockIdx.y))[from];
    reinterpret_cast<float2*>(shared + F::kNumbers)[threadIdx.x] = there ? numbers : make_float2(0, 0);
  }
}

// Zeros for rows of q and do whose base is NaN. That base reaches the keys which such a row sees; 0 times NaN would reach all keys of
// the warp's tile, other sequences' too.
template <class T, int D>
__device__ __forceinline__ void clear_not_finite(char* q, const float* numbers) {
  using F = PoolForm<T, D>;
  using Keys = Tile<T, D>;
  const float base = numbers[2 * (hidden(lane_id()) % F::kQueries)];
  const unsigned wrong = __ballot_sync(~0u, base != base);
  if (!wrong) return;  // the same rows in all warps
#pragma unroll 1
  for (int i = hidden(int(threadIdx.x)); i < F::kQueries * Keys::kChunks; i += int(blockDim.x)) {
    const int row = i / Keys::kChunks;
    float* const chunk = reinterpret_cast<float*>(Keys{q + row / 16 * Keys::kBytes}.at(row % 16, i % Keys::kChunks));
    if (wrong >> row & 1) store<4>(chunk, zeros<float, 4>()), store<4>(chunk + F::kOne / 4, zeros<float, 4>());
  }
  __syncthreads();
}

// Blocks own tiles of pool rows of a K/V head, every gridDim.x-th, and look which of them learn from anybody: 128 at a time. In a
// latent step it is one or two in the whole pool. Products are transposed here: keys are the rows.
template <class T, int D, bool kVectors>
__global__ void __launch_bounds__(32 * PoolForm<T, D>::kWarps, PoolForm<T, D>::kBlocks)
attention_bwd_kernel_dkv(const __grid_constant__ AttentionLaunch launch) {
  using F = PoolForm<T, D>;
  using Keys = typename F::Keys;
  DIFFMAS_DYNAMIC_SHARED(shared);
  const AttentionArgs& a = launch.a;
  const int lane = lane_id(), thread = int(threadIdx.x), threads = int(blockDim.x), head = int(blockIdx.y);
  const int group = warp_id() / F::kHalves, first_slot = warp_id() % F::kHalves * F::kSlots;
  float2* const table = reinterpret_cast<float2*>(shared + F::kTable);
  unsigned* const votes = reinterpret_cast<unsigned*>(shared + F::kVotes);
  const float scale = a.scale * kLog2e;
  const auto meets = [&](const Run& run, int tile) { return run.row < (tile + 1) * F::kRows && run.end > max(run.row, tile * F::kRows); };
  const auto owned = [&](int i) { return Keys{shared + (i * F::kGroups + group) * Keys::kBytes}; };

  const auto learn = [&](int tile) {
    for (int i = thread; i < F::kRows * Keys::kChunks; i += threads) {
      const int key = i / Keys::kChunks, chunk = i % Keys::kChunks, row = tile * F::kRows + key;
      const bool there = row < a.pool_rows;  // what nobody has written stays in its own row
      const Keys k{shared + key / 16 * Keys::kBytes}, v{shared + (F::kGroups + key / 16) * Keys::kBytes};
      const auto k_row = row_of<T, kVectors>(a.k_pool, there ? row : 0, head), v_row = row_of<T, kVectors>(a.v_pool, there ? row : 0, head);
      copy_chunk<T, kVectors>(k.at(key % 16, chunk), k_row, there, chunk * Keys::kElements, launch);
      copy_chunk<T, kVectors>(v.at(key % 16, chunk), v_row, there, chunk * Keys::kElements, launch);
    }
    copy_async_commit();

    float dk[F::kSlots / 8][4] = {}, dv[F::kSlots / 8][4] = {};
    HeldTile<T, D, F::kHeldKeys> k{owned(0)};
    HeldTile<T, D, F::kHeldValues> v{owned(1)};
    bool here = false, learnt[2] = {};
    int stage = 0;
    const int warp_row = tile * F::kRows + 16 * group, my_row = warp_row + lane / 4;  // and the one eight further
    for (int s0 = 0; s0 < a.segments; s0 += threads) {
      const int mine = s0 + thread;
      for_each_vote(mine < a.segments && meets(launch.runs[mine], tile), votes + F::kWarps, [&](int i) {
        const Run run = launch.runs[s0 + i];
        const int shift = a.view.shift ? int(a.view.shift[s0 + i]) : 0;
        const int q_first = int(a.view.q_indptr[run.sequence]), queries = int(a.view.q_indptr[run.sequence + 1]) - q_first;
        const int rows = queries * launch.group;
        // The first query row that sees a pool row.
        const auto sees = [&](int row) { return !a.view.causal ? 0 : (row + run.to_view - (run.length - queries)) * launch.group; };
        const int warp_first = max(warp_row, run.row), warp_from = warp_first < min(warp_row + 16, run.end) ? sees(warp_first) : INT32_MAX;
        int from[2];
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const bool in_run = my_row + 8 * h >= run.row && my_row + 8 * h < run.end;
          learnt[h] |= in_run;
          from[h] = in_run ? sees(my_row + 8 * h) : INT32_MAX;
        }
        if (shift) {
          if (warp_id() == 0) make_table(table, a.view, -shift);  // all have turned the rows before
          if constexpr (F::kAsync) __syncthreads();
        }
        const int first = max(sees(max(run.row, tile * F::kRows)), 0);
        if constexpr (F::kAsync)
          if (first < rows) QueryCopies<T, D>::issue(shared, stage, launch, q_first, first, rows);
        for (int row = first; row < rows; row += F::kQueries) {
          copy_async_wait<0>();
          if constexpr (F::kAsync) {
            if (shift) QueryCopies<T, D>::turn(shared, stage, launch, table);
          } else {
            __syncthreads();  // the table is here, and all have done with the rows before
            put_queries<T, D, kVectors>(shared, launch, q_first, row, rows, shift ? table : nullptr);
          }
          __syncthreads();  // K, V and the rows are here, and all have done with those whose place the next ones take
          const Keys q{shared + F::kRing + stage * 2 * F::kOne}, d_o{q.data + F::kOne};
          const float* const numbers = reinterpret_cast<const float*>(shared + F::kNumbers) + 2 * stage * F::kQueries;
          clear_not_finite<T, D>(q.data, numbers);
          if constexpr (F::kAsync) {
            stage = 1 - stage;
            if (row + F::kQueries < rows) QueryCopies<T, D>::issue(shared, stage, launch, q_first, row + F::kQueries, rows);
          }
          if (!here) k.hold(), v.hold(), here = true;

#pragma unroll 1
          for (int sixteen = 0; sixteen < F::kQueries; sixteen += 16) {
            const int at = row + sixteen;
            if (at >= rows) break;
            if (at + 15 < warp_from) continue;
            const Keys q16{q.data + sixteen / 16 * Keys::kBytes}, d_o16{d_o.data + sixteen / 16 * Keys::kBytes};
            float p[2][4] = {}, ds[2][4] = {};
            add_scores<T, D>(p, k, q16);
            add_scores<T, D>(ds, v, d_o16);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
              const int query = sixteen + 8 * c + lane % 4 * 2;
              const Pack<float, 4> two = load<4>(numbers + 2 * query);  // base and delta of both; all zero, as q and do, behind the last
#pragma unroll
              for (int i = 0; i < 4; ++i) {
                const bool seen = row + query + i % 2 >= from[i / 2];
                float &x = p[c][i], &y = ds[c][i];
                x = seen ? exp2f(x * scale - two[i % 2 * 2]) : 0;
                y = seen ? x * (y - two[i % 2 * 2 + 1]) : 0;
              }
            }
            add_product<T, D>(dv, p, d_o16, first_slot);
            add_product<T, D>(dk, ds, q16, first_slot);
          }
        }
      });
    }
    copy_async_wait<0>();

    const int to_slot = first_slot + hidden(lane_id()) % 4 * 2;
    const auto add = [&](const Rows& rows, const float(&x)[F::kSlots / 8][4], float factor) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        if (!learnt[h]) continue;
        float* const to = row_of<float>(rows, my_row + 8 * h, head);
        if constexpr (kVectors) {
#pragma unroll
          for (int j0 = 0; j0 < F::kSlots / 8; j0 += F::kAtOnce) {
            Pack<float, 2> old[F::kAtOnce];
#pragma unroll
            for (int j = 0; j < F::kAtOnce; ++j) old[j] = load<2>(to + max(launch.slots.dim(hidden(to_slot) + 8 * (j0 + j)), 0));
#pragma unroll
            for (int j = 0; j < F::kAtOnce; ++j)
              if (const int d = launch.slots.dim(hidden(to_slot) + 8 * (j0 + j)); d >= 0)
                store<2>(to + d, pack<float>({old[j][0] + factor * x[j0 + j][2 * h], old[j][1] + factor * x[j0 + j][2 * h + 1]}));
          }
        } else {
#pragma unroll
          for (int j = 0; j < 2 * (F::kSlots / 8); ++j) {
            const int d = launch.slots.dim(to_slot + 8 * (j / 2) + j % 2);
            if (d >= 0) to[d] += factor * x[j / 2][2 * h + j % 2];
          }
        }
      }
    };
    add(a.dk_pool, dk, a.scale);
    add(a.dv_pool, dv, 1);
  };

  const int64_t tiles = (a.pool_rows + F::kRows - 1) / F::kRows;
  for (int64_t first = blockIdx.x; first < tiles; first += int64_t(threads) * gridDim.x) {
    const int64_t mine = first + int64_t(thread) * gridDim.x;
    int learns = 0;
    if (mine < tiles)
      for (int s = 0; s < a.segments; ++s) learns |= int(meets(launch.runs[s], int(mine)));
    for_each_vote(learns, votes, [&](int i) { learn(int(first) + i * int(gridDim.x)); });
  }
}

}  // namespace diffmas::cuda
