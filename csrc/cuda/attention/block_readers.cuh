// Which sequences read which blocks of pool rows: found once, by a small kernel, for all K/V heads and tiles of the backward.
#pragma once
#include "work.cuh"

namespace diffmas::cuda {

constexpr int kBlockRows = 128, kNobody = INT32_MAX, kReadersThreads = 128;

struct alignas(8) BlockReader {
  int token;   // the first of the sequence's that sees one of the block's rows; kNobody: none does
  int before;  // the last block before this one that the sequence reads; -1: none
};

struct BlockReaders {
  BlockReader* data;  // [blocks, B]
  Segments view;
  int blocks;

  __device__ __forceinline__ BlockReader& of(int block, int sequence) const { return data[int64_t(block) * view.batch + sequence]; }
};

// A thread for every block and sequence.
__global__ void __launch_bounds__(kReadersThreads) attention_bwd_kernel_readers(const __grid_constant__ BlockReaders readers) {
  const Segments& view = readers.view;
  const int64_t i = int64_t(blockIdx.x) * kReadersThreads + threadIdx.x;
  if (i >= readers.blocks * view.batch) return;
  const int block = int(i / view.batch), b = int(i % view.batch), row = block * kBlockRows;
  int first = kNobody, before = -1, length = 0;  // first: a token of the view
  for (int s = int(view.seg_indptr[b]); s < int(view.seg_indptr[b + 1]); ++s) {
    const int start = int(view.start[s]), size = int(view.length[s]), last = start + size - 1;
    if (start < row + kBlockRows && last >= row) first = min(first, length + max(row - start, 0));
    if (start < row) before = max(before, min(last / kBlockRows, block - 1));
    length += size;
  }
  const int queries = int(view.q_indptr[b + 1] - view.q_indptr[b]);
  if (first == kNobody || queries == 0) first = kNobody;
  else first = view.causal ? max(first - (length - queries), 0) : 0;
  readers.of(block, b) = {first, before};
}

}  // namespace diffmas::cuda
