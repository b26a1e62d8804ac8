// Kernels that are right and kernels that are wrong, to see that host execution tells them apart.
#include "cuda/sm90.h"
#include "tensors.h"

namespace {

using namespace diffmas::cuda;
using diffmas::host::Tensors;

struct Args {
  int mistake, n;
  float* y;
};

// y[i] = i, through shared memory, warps and asynchronous copies; `mistake` leaves something out.
__global__ void turn_kernel(const Args args) {
  DIFFMAS_SHARED(float, tile, [64]);
  DIFFMAS_DYNAMIC_SHARED(bytes);
  float* copied = reinterpret_cast<float*>(bytes);
  const int i = int(threadIdx.x), from = int(blockIdx.x) * 64;
  tile[i] = float(from + i);
  if (args.mistake == 1 && i == 5) return;            // a thread that exits
  if (args.mistake == 2 && i >= 32) __syncthreads();  // a barrier at two places
  else if (args.mistake != 3) __syncthreads();        // no barrier: reads what is not written
  const float x = tile[63 - i];
  if (i % 4 == 0) copy_async_16(copied + i, args.y + from + i);
  copy_async_commit();
  if (args.mistake != 4) copy_async_wait<0>();
  __syncthreads();
  float y = copied[i] + __shfl_xor_sync(~0u, x, 31);                  // back in order, the other half of the block
  if (args.mistake == 5 && i == 40) y += __shfl_sync(1u << 8, y, 9);  // of a lane that is not in the mask
  if (args.mistake == 6 && i == 63) args.y[from + 64 + args.n] = 0;   // out of bounds
  if (args.mistake == 7) y += tile[i + (i == 63)];                    // out of bounds in shared memory
  if (args.mistake == 8) tile[i] = load<4>(args.y + i % 2)[0];        // off its alignment
  __syncthreads();
  args.y[from + (i ^ 32)] = y;
}

// y: sums, votes, scans of lanes; the last block to arrive adds up what the others left.
__global__ void warp_kernel(const Args args) {
  DIFFMAS_SHARED(unsigned, last, );
  const int i = int(threadIdx.x), lane = i % 32;
  float* y = args.y + 2;
  const float sum = group_sum(float(i), 8), top = group_max(float(i), 16);
  float scan = 1;
  for (int step = 1; step < 16; step *= 2) {
    const float left = __shfl_up_sync(~0u, scan, unsigned(step), 16);
    if (lane % 16 >= step) scan += left;
  }
  const float down = __shfl_down_sync(~0u, float(lane), 3, 8);
  const unsigned votes = __ballot_sync(~0u, i % 3 == 0);
  if (lane < 16) scan += __shfl_sync(0xFFFFu, scan, 15);  // half a warp
  const int count = __syncthreads_count(i < 50);
  y[int(blockIdx.x) * 64 + i] = sum + top + scan + down + float(__popc(votes)) + float(count);
  __threadfence();
  if (i == 0) last = atomicAdd(reinterpret_cast<unsigned*>(args.y), 1u);
  __syncthreads();
  if (last + 1 != gridDim.x || i) return;
  float total = 0;
  for (int j = 0; j < 64 * int(gridDim.x); ++j) total += y[j];
  args.y[1] = total;
}

// Warp 1 hands numbers to warp 0 through two named barriers.
__global__ void pipe_kernel(const Args args) {
  DIFFMAS_SHARED(float, box, [32]);
  const int lane = int(threadIdx.x) % 32;
  for (int step = 0; step < args.n; ++step) {
    if (threadIdx.x >= 32) {
      if (step) barrier_sync(2, 64);
      box[lane] = float(step * 32 + lane);
      barrier_arrive(1, 64);
    } else {
      barrier_sync(1, 64);
      args.y[step * 32 + lane] = box[31 - lane];
      if (step + 1 < args.n) barrier_arrive(2, 64);
    }
  }
}

struct BoxArgs {
  int mistake;
  float* y;           // [64, 64] and then once more
  TensorMap a, b, c;  // [64, 16], [64, 16], [16, 64]
};

// a b' and a c, bf16, of boxes that the copy engine brings; `mistake` leaves something out.
__global__ void product_kernel(const __grid_constant__ BoxArgs args) {
  DIFFMAS_DYNAMIC_SHARED(shared);
  constexpr int kPanel = 64 * kPanelRow;
  Barrier* const here = reinterpret_cast<Barrier*>(shared + 3 * kPanel);
  const int thread = int(threadIdx.x);
  if (thread == 0) {
    if (args.mistake != 9) init_barrier(here, 1);
    barriers_ready();
  }
  __syncthreads();
  if (thread == 0) {
    arrive_expecting(here, (2 * 64 + 16) * kPanelRow + 16 * (args.mistake == 10));
    copy_box(shared + (args.mistake == 11 ? 128 : 0), args.a, 0, 0, 0, here);
    copy_box(shared + kPanel, args.b, 0, 0, 0, here);
    copy_box(shared + 2 * kPanel, args.c, 0, 0, 0, here);
  }
  if (args.mistake != 12) wait_for(here, 0);
  if (args.mistake == 15 && thread >= 96) return;
  if (args.mistake >= 18) {  // takes row 3 of b out, and does not tell
    if (thread < kPanelRow / 4) reinterpret_cast<uint32_t*>(shared + kPanel)[3 * kPanelRow / 4 + thread] = 0;
    if (args.mistake == 19) publish_to_async();
    __syncthreads();
  }
  const unsigned a = shared_address(shared), b = a + kPanel, c = b + kPanel;
  float x[8][4] = {}, z[8][4];
  uint32_t left[1][4];
  load_tiles<false>(left[0],
                    shared + diffmas::host::swizzled(unsigned((thread / 32 * 16 + thread % 16) * kPanelRow + thread % 32 / 16 * 16)));
  begin_products(x, left);
  add_product_async<bf16>(x, left[0], Operand(c));
  commit_products();
  add_product_async<bf16>(z, Operand(a), Operand(args.mistake == 14 && thread == 70 ? a : b), false);
  commit_products();
  if (args.mistake == 13) left[0][1] = 0x7FC0;                                     // which the first product may still read
  if (args.mistake == 17) *reinterpret_cast<uint16_t*>(shared + kPanel) = 0x7FC0, publish_to_async();  // as the second one this
  wait_for_products<1>(x);
  if (args.mistake != 16) wait_for_products<0>(z);
  for (int j = 0; j < 8; ++j)
    for (int e = 0; e < 4; ++e) {
      const int row = thread / 32 * 16 + thread % 32 / 4 + e / 2 * 8, column = 8 * j + thread % 4 * 2 + e % 2;
      args.y[row * 64 + column] = z[j][e], args.y[4096 + row * 64 + column] = x[j][e];
    }
  if (args.mistake == 16) wait_for_products<0>(z);
}

__global__ void round_kernel(const Args args) {
  for (int i = int(threadIdx.x); i < args.n; i += int(blockDim.x)) {
    const float x = args.y[i];
    args.y[args.n + i] = to_float(from_float<bf16>(x));
    args.y[2 * args.n + i] = to_float(from_float<f16>(x));
  }
}

}  // namespace

int main() {
  Tensors t;
  const Args args{int(t.number("mistake")), int(t.number("n")), t.data<float>("y")};
  const dim3 grid(unsigned(t.number("blocks")));
  void (*kernels[])(Args) = {turn_kernel, warp_kernel, pipe_kernel, round_kernel};
  if (t.number("kernel") == 4) {
    BoxArgs boxes{args.mistake, args.y, {}, {}, {}};
    const auto box = [&](TensorMap& map, const char* name, int rows) {  // whatever lies behind the columns is read as zeros
      if (make_tensor_map(map, true, {t.data(name), t.size(name, 1), t.size(name, 0), 1, t.stride(name, 0), t.stride(name, 0), rows, 1}))
        diffmas::host::fail("no box of %s", name);
    };
    box(boxes.a, "a", 64), box(boxes.b, "b", 64), box(boxes.c, "c", 16);
    launch(product_kernel, grid, dim3(128), 3 * 64 * kPanelRow + sizeof(Barrier), nullptr, boxes);
  } else {
    launch(kernels[int(t.number("kernel"))], grid, dim3(64), 64 * 4, nullptr, args);
  }
  t.finish();
}
