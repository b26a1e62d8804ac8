// Reads query rows from global memory into a tile.
#pragma once
#include "rotation.cuh"
#include "tile.cuh"
#include "work.cuh"

namespace diffmas::cuda {

// Reads a unit (16 slots) of a query row as a lane has it in a product: x[c][e] is slot 16 unit + 8 c + 2 (lane % 4) + e. Loads without a
// branch, so that loads do not wait for each other.
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

// Reads 16 query rows into a tile, rotated by the table if there is one.
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

}  // namespace diffmas::cuda
