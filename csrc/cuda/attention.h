// The CUDA kernels of cross_attention for code that is not compiled by nvcc. Torch-free. Functions return a cudaError_t; stream: a
// cudaStream_t of the device that is current.
#pragma once
#include "common/attention.h"

namespace diffmas::cuda {

constexpr int64_t kMaxAttentionDim = 256;

// Memory of a call: floats that may hold anything; counters that are zero and come back zero.
struct AttentionSizes {
  int64_t floats, counters;
};
struct AttentionMemory {
  float* floats;
  unsigned* counters;
};

}  // namespace diffmas::cuda

extern "C" {

// q, k_pool and v_pool are of one dtype, with up to kMaxAttentionDim dimensions.
diffmas::cuda::AttentionSizes diffmas_cuda_attention_memory(const diffmas::AttentionArgs* args, bool backward, int device);
int diffmas_cuda_attention_forward(const diffmas::AttentionArgs* args, diffmas::cuda::AttentionMemory memory, int device, void* stream);
int diffmas_cuda_attention_backward(const diffmas::AttentionArgs* args, diffmas::cuda::AttentionMemory memory, int device, void* stream);

// Of pools in 8 bits, of which every query sees all of its view. q is bfloat16 or float16; rows of q and of the pools are aligned to 16
// bytes, and so is a pool's head; a rotated half has whole fours of dimensions.
diffmas::cuda::AttentionSizes diffmas_cuda_quantized_memory(const diffmas::AttentionArgs* args, int device);
int diffmas_cuda_quantized_forward(const diffmas::AttentionArgs* args, diffmas::cuda::AttentionMemory memory, int device, void* stream);
}
