// The CUDA kernels of inject for code that is not compiled by nvcc. Torch-free. Functions return a cudaError_t; stream: a cudaStream_t
// of the device that is current.
#pragma once
#include "common/inject.h"

extern "C" {

// What a cudaError_t means.
const char* diffmas_cuda_error(int error);
// As CUDA numbers them, 13000 for 13.0. driver: 0 where there is none; no context is made.
int diffmas_cuda_versions(int* driver, int* runtime);

int diffmas_cuda_inject_forward(const diffmas::InjectArgs* args, int device, void* stream);

// args.weight_partials: as many floats as this, or null when there are none. dq_weight, dk_weight: [D], null without a norm.
int64_t diffmas_cuda_inject_partials(const diffmas::InjectArgs* args, int device);
int diffmas_cuda_inject_backward(const diffmas::InjectArgs* args, float* dq_weight, float* dk_weight, int device, void* stream);
}
