// Working memory of one call: a fixed amount on the stack, more on the heap. Not initialised.
// Internal linkage: the same names are compiled under different instruction sets.
#pragma once

#include <stddef.h>

#include <stdint.h>

namespace fm {
namespace {

template <class T, int64_t kInline>
class Scratch {
 public:
  explicit Scratch(int64_t count) : data_(count > kInline ? new T[static_cast<size_t>(count)] : inline_) {}
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() {
    if (data_ != inline_) delete[] data_;
  }
  T* data() { return data_; }
  T& operator[](int64_t i) { return data_[i]; }

 private:
  T inline_[kInline];
  T* data_;
};

// The next whole line of memory; 64 bytes more than the rest are enough.
template <class T>
T* on_a_line(T* memory) {
  return memory + (64 - reinterpret_cast<uintptr_t>(memory) % 64) % 64 / sizeof(T);
}

}  // namespace
}  // namespace fm
