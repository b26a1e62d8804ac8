// What a launch needs of CUDA and of torch: errors as exceptions, torch's current stream.
#pragma once
#include <tuple>

#include "tensors.h"

namespace diffmas::binding {

// Raises for a cudaError_t that is not 0.
void check_cuda(int error);
// Of the driver and of the runtime that is linked in.
std::tuple<int64_t, int64_t> cuda_versions();
// torch's current stream of the device.
void* current_stream(Device device);

}  // namespace diffmas::binding
