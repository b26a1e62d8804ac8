// What the kernels ask of their caller: threads, and memory for partial results.
#pragma once
#include <cstdint>

namespace diffmas::cpu {

// Runs body(begin, end, context) over [0, count) on the caller's thread pool. The only door to threads.
using ParallelFor = void (*)(int64_t count, void (*body)(int64_t begin, int64_t end, void* context), void* context);

struct Threads {
  int64_t count;
  ParallelFor parallel_for;
};

// Memory for partial results from the caller's allocator, valid until the call is over; taken once.
struct Workspace {
  void* context;
  float* (*take)(void* context, int64_t floats);
};

}  // namespace diffmas::cpu
