// How a call hands its tasks to the caller's threads.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "threads.h"

namespace diffmas::cpu {

// Runs task(i) for i in [0, count), each on whichever thread is free.
template <class F>
void for_each_task(const Threads& threads, int64_t count, const F& task) {
  if (count <= 1 || threads.count <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  struct Shared {
    const F& task;
    int64_t count;
    std::atomic<int64_t> next;
  } shared{task, count, {0}};
  threads.parallel_for(
      std::min(count, threads.count),
      [](int64_t, int64_t, void* context) {
        Shared& s = *static_cast<Shared*>(context);
        for (int64_t i; (i = s.next.fetch_add(1)) < s.count;) s.task(i);
      },
      &shared);
}

// A call of less work than this (in multiply-adds) is over before a second thread has woken up.
inline constexpr int64_t kSerialWork = 1 << 17;

// Runs body(begin, end) over [0, count) in chunks of a fixed size; each element is `work` multiply-adds.
template <class F>
void for_each_chunk(const Threads& threads, int64_t count, int64_t work, const F& body) {
  constexpr int64_t kChunk = 8;
  if (count * work < kSerialWork) return body(0, count);
  for_each_task(threads, (count + kChunk - 1) / kChunk, [&](int64_t i) { body(i * kChunk, std::min(count, (i + 1) * kChunk)); });
}

// One buffer per thread, kept: fresh pages for every call would cost more than a decode step.
inline float* scratch(int64_t size) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  thread_local std::unique_ptr<float, Free> buffer;
  thread_local int64_t capacity = 0;
  if (size > capacity) {
    const size_t bytes = (size_t(size) * sizeof(float) + 63) / 64 * 64;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    capacity = buffer ? size : 0;
    if (!buffer) throw std::bad_alloc();
  }
  return buffer.get();
}

}  // namespace diffmas::cpu
