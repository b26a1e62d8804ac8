// Rows of 8 bits with a scale each: what a kernel that walks keys does with them. Payloads stay what they are in shared memory, and become
// numbers in registers, in the order in which 8 x 8 tiles of 16-bit elements bring them: a lane gets four of a key's, or two neighbours
// of two keys'. So of 16 dimensions the even ones come first: slot 16 u + 8 c + i is dimension 16 u + 2 i + c, of q and o too.
#pragma once
#include "key_stream.cuh"
#include "payload.cuh"
#include "rotation.cuh"

namespace diffmas::cuda {

// 16 rows of D payloads of format P, and behind them their scales.
template <int D, class P>
struct PayloadTile {
  using Payloads = Tile<uint8_t, D>;
  static constexpr int kBytes = Payloads::kBytes + kTileKeys * int(sizeof(float));
  char* data;

  __device__ __forceinline__ Payloads rows() const { return {data}; }
  __device__ __forceinline__ float* scales() const { return reinterpret_cast<float*>(data + Payloads::kBytes); }
};

// x [16 x 16] += a [16 x D] b' [D x 16], but for b's scales
template <class T, int D, class P, class Left>
__device__ __forceinline__ void add_scores(float (&x)[2][4], const Left& a, const PayloadTile<D, P>& b) {
  const int lane = hidden(lane_id());
#pragma unroll
  for (int unit = 0; unit < D / 16; unit += 2) {
    uint32_t words[4];
    load_tiles<false>(words, b.rows().at(lane / 16 * 8 + lane % 8, lane / 8 % 2, 0, unit));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      uint32_t left[4];
      a.left(unit + c, left);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const Pairs right = pairs_of<T, P>(words[2 * h + c]);
        multiply_add<T>(x[h], left, right.even, right.odd);
      }
    }
  }
}

// sum [16 x D] += p [16 x 16] b [16 x D], columns in the order of slots
template <class T, int D, class P>
__device__ __forceinline__ void add_product(float (&sum)[D / 8][4], const float (&p)[2][4], const PayloadTile<D, P>& b) {
  const int lane = hidden(lane_id());
  uint32_t left[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const Pack<float, 2> scales = load<2>(b.scales() + i / 2 * 8 + lane % 4 * 2);
    left[i] = two_from_floats<T>(p[i / 2][i % 2 * 2] * (scales[0] * kUnit<T, P>),
                                 p[i / 2][i % 2 * 2 + 1] * (scales[1] * kUnit<T, P>));
  }
#pragma unroll
  for (int unit = 0; unit < D / 16; unit += 2) {
    uint32_t words[4];
    load_tiles<true>(words, b.rows().at(lane % 16, lane / 16, 0, unit));
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const Pairs low = pairs_of<T, P>(words[2 * c]), high = pairs_of<T, P>(words[2 * c + 1]);
      multiply_add<T>(sum[2 * (unit + c)], left, low.even, high.even);
      multiply_add<T>(sum[2 * (unit + c) + 1], left, low.odd, high.odd);
    }
  }
}

// Heads and halves that are rotated divide by 16 and 4, rows are aligned to 16 bytes.
template <class T, int D, class P>
struct PayloadRows {
  using Keys = PayloadTile<D, P>;
  using F = Form<T, D, Keys>;

  const AttentionLaunch& launch;
  const char *const k_rows, *const v_rows;
  const Scales scales;  // lanes below 16 bring those of keys, the others those of values

  __device__ __forceinline__ explicit PayloadRows(const AttentionLaunch& launch)
      : launch(launch),
        k_rows(row_of<const char>(launch.a.k_pool, 0, blockIdx.y)),
        v_rows(row_of<const char>(launch.a.v_pool, 0, blockIdx.y)),
        scales(lane_id() < kTileKeys ? launch.a.k_scale : launch.a.v_scale) {}

  // Starts the copies of a tile. row: of key lane % 16; -1: none.
  __device__ __forceinline__ void copy(Keys k, Keys v, int row) const {
    using Payloads = typename Keys::Payloads;
    const int lane = lane_id();
    const float* const scale = scales.data + max(row, 0) * scales.stride_row + blockIdx.y * scales.stride_head;
    copy_async_4((lane < kTileKeys ? k : v).scales() + lane % kTileKeys, scale, row >= 0);
#pragma unroll
    for (int j = 0; j < Payloads::kChunks / 2; ++j) {
      const int key = lane / Payloads::kChunks, chunk = lane % Payloads::kChunks, key0 = 32 * j / Payloads::kChunks;
      const int key_row = __shfl_sync(~0u, row, key0 + key), d = chunk * Payloads::kElements;
      const bool valid = key_row >= 0 && d < launch.slots.head_dim;
      const int64_t from = valid ? key_row : 0, in_row = valid ? d : 0;
      copy_async_16(k.rows().at(key, chunk, key0), k_rows + from * launch.a.k_pool.stride_row + in_row, valid);
      copy_async_16(v.rows().at(key, chunk, key0), v_rows + from * launch.a.v_pool.stride_row + in_row, valid);
    }
  }

  // Reads a tile of q, rotated by the table if there is one.
  template <class To>
  __device__ __forceinline__ static void read_queries(To& to, const AttentionLaunch& launch, const Work& work, const float2* table) {
    const int lane = hidden(lane_id());
    const auto put = [&](int unit, int h) {
      const int i = lane / 4 + 8 * h, d = 16 * unit + lane % 4 * 4;
      const bool there = i < work.rows && d < launch.slots.head_dim;
      const QueryRow row = work.row(launch, there ? i : 0);
      const T* const from = row_of<T>(launch.a.q, row.token, row.head);
      float x[4];
      read(x, from + (there ? d : 0));
      if (table && there) rotate(x, from, d, launch, table);
#pragma unroll
      for (int c = 0; c < 2; ++c) to.put(unit, h, c, {there ? x[c] : 0, there ? x[2 + c] : 0});
    };
    if constexpr (std::is_same_v<To, Tile<T, D>>) {
#pragma unroll 4
      for (int i = 0; i < D / 8; ++i) put(i / 2, i % 2);
    } else {
#pragma unroll
      for (int i = 0; i < D / 8; ++i) put(i / 2, i % 2);
    }
  }

  // What a key's products with q are multiplied with, to be scores.
  __device__ __forceinline__ static float score_scale(const Keys& k, float scale, int key) {
    return k.scales()[key] * (scale * kUnit<T, P>);
  }

  // Writes four slots of a query's row.
  __device__ __forceinline__ static void write(const AttentionLaunch& launch, const Rows& rows, QueryRow at, int slot,
                                               const float (&x)[4]) {
    const int d = slot / 16 * 16 + slot % 8 * 2 + slot / 8 % 2;
    T* const row = row_of<T>(rows, at.token, at.head);
    if (d >= launch.slots.head_dim) return;
#pragma unroll
    for (int e = 0; e < 4; ++e) row[d + 2 * e] = from_float<T>(x[e]);
  }

 private:
  __device__ __forceinline__ static void read(float (&x)[4], const T* from) {
    const Pack<T, 4> four = load<4>(from);
#pragma unroll
    for (int e = 0; e < 4; ++e) x[e] = four[e];
  }

  // Dimensions d to d + 3 of a row; where the halves are apart, those that they are rotated with are read, too.
  __device__ __forceinline__ static void rotate(float (&x)[4], const T* row, int d, const AttentionLaunch& launch, const float2* table) {
    const int half = int(launch.a.view.half_rotary);
    if (d >= 2 * half) return;
    if (launch.a.interleaved) {
      rotate_pair(x[0], x[1], table[d / 2]);
      if (d / 2 + 1 < half) rotate_pair(x[2], x[3], table[d / 2 + 1]);
      return;
    }
    const bool first = d < half;
    const int other = first ? d + half : d - half;
    float y[4];
    read(y, row + other);
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const float2 angle = table[min(d, other) + e];
      x[e] = x[e] * angle.x + (first ? -y[e] : y[e]) * angle.y;
    }
  }
};

}  // namespace diffmas::cuda
