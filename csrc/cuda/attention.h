// The CUDA kernels of cross_attention for few queries a sequence (decoding, latent steps) for whoever is not compiled by nvcc.
// Torch-free. Functions return a cudaError_t; stream: a cudaStream_t of the device that is current.
#pragma once
#include "../cpu/attention.h"

namespace diffmas::cuda {

constexpr int64_t kMaxAttentionDim = 256;

struct AttentionArgs {
  int64_t n, q_heads, kv_heads, head_dim;
  int64_t pool_rows, segments;  // R, S
  cpu::Segments view;
  cpu::Rows q, k_pool, v_pool;  // of one dtype, up to 256 dimensions
  cpu::Rows o;                  // [n, Hq, D]
  float* lse;                   // [n, Hq]
  float scale;
  bool interleaved;
  // Backward only.
  cpu::Rows d_o;
  const float* dlse;           // [n, Hq] or null
  cpu::Rows dq;                // no data: not wanted
  cpu::Rows dk_pool, dv_pool;  // float32
  // Memory of the call: floats that may hold anything; counters that are zero and come back zero.
  float* workspace;
  unsigned* counters;
};

struct AttentionMemory {
  int64_t floats, counters;
};

}  // namespace diffmas::cuda

extern "C" {

diffmas::cuda::AttentionMemory diffmas_cuda_attention_memory(const diffmas::cuda::AttentionArgs* args, bool backward, int device);
int diffmas_cuda_attention_forward(const diffmas::cuda::AttentionArgs* args, int device, void* stream);
int diffmas_cuda_attention_backward(const diffmas::cuda::AttentionArgs* args, int device, void* stream);
}
