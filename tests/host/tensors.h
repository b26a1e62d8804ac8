// Arguments of a kernel that runs on the host, from stdin, and results to stdout; tests/on_host.py is the other end.
//
// Every tensor lies in an allocation of its own, of exactly the bytes from its first element to its last; the address sanitizer
// knows what is outside, and which of the bytes between the rows of a strided tensor are not its elements. What the kernel has no
// business writing is compared afterwards.
#pragma once
#include <iostream>
#include <sstream>
#include <string>

#include "cuda/device.h"

namespace diffmas::host {

class Tensors {
  struct Tensor {
    std::string name, dtype, access;
    int64_t bytes, offset, element;  // offset: of the first element from an address that divides by 64
    std::vector<int64_t> sizes, strides;
    char *block, *data;
    std::vector<char> before;
  };
  std::map<std::string, double> numbers;
  std::vector<Tensor> tensors;

  const Tensor* find(const std::string& name) const {
    for (const Tensor& t : tensors)
      if (t.name == name) return &t;
    return nullptr;
  }

  static void guard(const Tensor& t) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_poison_memory_region(t.block, size_t(t.offset + t.bytes));
    std::vector<int64_t> index(t.sizes.size(), 0);
    for (int64_t size : t.sizes)
      if (size == 0) return;
    const bool runs = t.sizes.empty() || t.strides.back() == 1;
    for (;;) {  // over rows, runs of the last dimension, or over elements
      int64_t at = 0;
      for (size_t i = 0; i < index.size(); ++i) at += index[i] * t.strides[i];
      __asan_unpoison_memory_region(t.data + at * t.element, size_t((!runs || t.sizes.empty() ? 1 : t.sizes.back()) * t.element));
      int i = int(index.size()) - (runs ? 2 : 1);
      for (; i >= 0 && ++index[size_t(i)] == t.sizes[size_t(i)]; --i) index[size_t(i)] = 0;
      if (i < 0) return;
    }
#else
    (void)t;
#endif
  }
  static void unguard(const Tensor& t) {
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.block, size_t(t.offset + t.bytes));
#else
    (void)t;
#endif
  }

 public:
  Tensors() {
    std::ios::sync_with_stdio(false);
    std::string line, kind, word;
    while (std::getline(std::cin, line) && line != "end") {
      std::istringstream words(line);
      words >> kind;
      if (kind == "number") {
        words >> word;
        words >> numbers[word];
        continue;
      }
      Tensor t;
      size_t dims;
      words >> t.name >> t.dtype >> t.access >> t.bytes >> t.offset >> t.element >> dims;
      t.sizes.resize(dims), t.strides.resize(dims);
      for (int64_t& x : t.sizes) words >> x;
      for (int64_t& x : t.strides) words >> x;
      void* p = nullptr;
      if (posix_memalign(&p, 64, size_t(t.offset + t.bytes + !t.bytes))) fail("no memory");
      t.block = static_cast<char*>(p), t.data = t.block + t.offset;
      std::cin.read(t.data, t.bytes);
      if (t.access == "in") t.before.assign(t.data, t.data + t.bytes);
      guard(t);
      tensors.push_back(t);
    }
    options.seed = uint64_t(number("seed"));
  }

  double number(const std::string& name) const { return numbers.at(name); }
  template <class T = void>
  T* data(const std::string& name) const {
    return find(name) ? reinterpret_cast<T*>(find(name)->data) : nullptr;
  }
  const std::string& dtype(const std::string& name) const { return find(name)->dtype; }
  int64_t size(const std::string& name, size_t dim) const { return find(name)->sizes[dim]; }
  int64_t stride(const std::string& name, size_t dim) const { return find(name)->strides[dim]; }
  bool has(const std::string& name) const { return find(name); }

  // Writes the tensors that were to be written; call it last.
  void finish() {
    for (const Tensor& t : tensors) {
      unguard(t);
      if (t.access == "in" && !std::equal(t.before.begin(), t.before.end(), t.data))
        fail("%s was written, which is an input", t.name.c_str());
      if (t.access == "out") std::cout.write(t.data, t.bytes);
      std::free(t.block);
    }
    std::cout.flush();
  }
};

}  // namespace diffmas::host
