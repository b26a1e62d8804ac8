// Rotates queries and their gradients to the frame of a segment that is read at a position offset.
#pragma once
#include "launch.cuh"

namespace diffmas::cuda {

// Fills a warp's table with the cosine and sine of every frequency at `positions`. Angles in float64: offsets reach 1e5 and more.
__device__ __forceinline__ void make_table(float2* table, const Segments& view, int positions) {
  __syncwarp();
  for (int i = hidden(lane_id()); i < view.half_rotary; i += 32) {
    const double half_turns = double(positions) * double(view.inv_freq[i]) * 0.3183098861837906715;
    sincospif(float(half_turns - 2 * rint(0.5 * half_turns)), &table[i].y, &table[i].x);
  }
  __syncwarp();
}

__device__ __forceinline__ void rotate_pair(float& x, float& y, float2 angle) {
  const float z = x * angle.x - y * angle.y;
  y = y * angle.x + x * angle.y;
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

}  // namespace diffmas::cuda
