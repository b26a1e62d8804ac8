// The few calls of the CUDA runtime. Include device.h, not this.
#pragma once
#include <cstddef>

namespace diffmas::cuda {

// Starts a kernel; -> a cudaError_t, 0 when all is well. A grid without blocks is nothing to do.
template <class Args>
int launch(void (*kernel)(Args), dim3 grid, dim3 threads, size_t shared_bytes, void* stream, Args args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return 0;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > 48 << 10) {
    const int error = cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error) return error;
  }
  void* arguments[] = {&args};
  return cudaLaunchKernel(function, grid, threads, arguments, shared_bytes, static_cast<cudaStream_t>(stream));
}

// The device of this thread's launches from now on; the caller puts back what was there.
inline int set_device(int device) { return cudaSetDevice(device); }

// Streaming multiprocessors. Does not wait for the device.
inline int processors(int device) {
  int count = 0;
  return cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) ? 1 : count;
}

// Whether code for sm_90a runs there.
inline bool is_sm90(int device) {
  int major = 0, minor = 0;
  return !cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) && major == 9 &&
         !cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) && minor == 0;
}

// Of the driver and of the runtime that is linked in.
inline int versions(int* driver, int* runtime) {
  if (const int error = cudaDriverGetVersion(driver)) return error;
  return cudaRuntimeGetVersion(runtime);
}

inline const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace diffmas::cuda
