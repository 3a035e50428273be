// One op call on one device: the device made current, torch's stream on it, and working memory.
#pragma once

#include "../unbox.h"

namespace fm {
namespace cuda {

class Session {
 public:
  // On the device of the op's first argument; every other tensor must be there too.
  explicit Session(const abi::Arguments& in);
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  ~Session();

  void* stream() const { return stream_; }

  // Uninitialised memory that kernels on this stream may use. It goes back to torch's allocator, which keeps the order of the stream.
  template <class T>
  T* scratch(int64_t count) {
    return static_cast<T*>(allocate((count * static_cast<int64_t>(sizeof(T)) + 7) / 8));
  }

 private:
  void* allocate(int64_t doubles);

  int32_t device_;
  CUDAGuardHandle guard_ = nullptr;
  AtenTensorHandle scratch_ = nullptr;
  void* stream_ = nullptr;
};

}  // namespace cuda
}  // namespace fm
