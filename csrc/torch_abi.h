// The functions of LibTorch's stable C shim that we call (present since torch 2.10), declared here so that building needs no torch,
// and small owners around them. tests/native compiles this file together with torch's own headers: a changed signature is an error there.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <optional>
#include <stdexcept>
#include <string>

struct AtenTensorOpaque;
using AtenTensorHandle = AtenTensorOpaque*;
class TorchLibraryOpaque;
using TorchLibraryHandle = TorchLibraryOpaque*;
struct StableListOpaque;
using StableListHandle = StableListOpaque*;
struct CUDAGuardOpaque;
using CUDAGuardHandle = CUDAGuardOpaque*;
using AOTITorchError = int32_t;
using StableIValue = uint64_t;

#define FM_TORCH __attribute__((__visibility__("default")))

extern "C" {

typedef void (*ParallelFunc)(int64_t begin, int64_t end, void* ctx);

FM_TORCH int32_t aoti_torch_dtype_bfloat16();
FM_TORCH int32_t aoti_torch_dtype_float16();
FM_TORCH int32_t aoti_torch_dtype_float32();
FM_TORCH int32_t aoti_torch_dtype_float64();
FM_TORCH int32_t aoti_torch_dtype_uint8();
FM_TORCH int32_t aoti_torch_dtype_int64();
FM_TORCH int32_t aoti_torch_device_type_cpu();
FM_TORCH int32_t aoti_torch_device_type_cuda();
FM_TORCH bool aoti_torch_grad_mode_is_enabled();

FM_TORCH AOTITorchError aoti_torch_delete_tensor_object(AtenTensorHandle tensor);
FM_TORCH AOTITorchError aoti_torch_new_tensor_handle(AtenTensorHandle orig_handle, AtenTensorHandle* new_handle);
FM_TORCH AOTITorchError aoti_torch_get_data_ptr(AtenTensorHandle tensor, void** ret_data_ptr);
FM_TORCH AOTITorchError aoti_torch_get_dim(AtenTensorHandle tensor, int64_t* ret_dim);
FM_TORCH AOTITorchError aoti_torch_get_sizes(AtenTensorHandle tensor, int64_t** ret_sizes);
FM_TORCH AOTITorchError aoti_torch_get_strides(AtenTensorHandle tensor, int64_t** ret_strides);
FM_TORCH AOTITorchError aoti_torch_get_dtype(AtenTensorHandle tensor, int32_t* ret_dtype);
FM_TORCH AOTITorchError aoti_torch_get_device_type(AtenTensorHandle tensor, int32_t* ret_device_type);

FM_TORCH AOTITorchError aoti_torch_get_device_index(AtenTensorHandle tensor, int32_t* ret_device_index);
FM_TORCH AOTITorchError aoti_torch_empty_strided(int64_t ndim, const int64_t* sizes_ptr, const int64_t* strides_ptr, int32_t dtype,
                                                 int32_t device_type, int32_t device_index, AtenTensorHandle* ret_new_tensor);

FM_TORCH AOTITorchError aoti_torch_library_init_impl(const char* ns, const char* k, const char* file, uint32_t line,
                                                     TorchLibraryHandle* ret_new_torch_lib);
FM_TORCH AOTITorchError torch_library_impl(TorchLibraryHandle self, const char* name, void (*fn)(StableIValue*, uint64_t, uint64_t),
                                           uint64_t extension_build_version);
FM_TORCH AOTITorchError torch_call_dispatcher(const char* opName, const char* overloadName, StableIValue* stack,
                                              uint64_t extension_build_version);
FM_TORCH AOTITorchError torch_list_size(StableListHandle list_handle, size_t* size);
FM_TORCH AOTITorchError torch_list_get_item(StableListHandle list_handle, size_t index, StableIValue* element);
FM_TORCH AOTITorchError torch_delete_list(StableListHandle list_handle);
FM_TORCH AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t grain_size, ParallelFunc func, void* ctx);

// In libtorch_cuda.so; the others are in libtorch_cpu.so.
FM_TORCH AOTITorchError aoti_torch_create_cuda_guard(int32_t device_index, CUDAGuardHandle* ret_guard);
FM_TORCH AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle guard);
FM_TORCH AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

}  // extern "C"

namespace fm {
namespace abi {

constexpr uint64_t kTorchVersion = 0x020a000000000000u;  // 2.10, the oldest torch we run on

inline void check(AOTITorchError error, const char* call) {
  if (error) throw std::runtime_error(std::string("fm_fast: torch's C interface failed in ") + call);
}

// A tensor owned by somebody else, with the name that error messages use. Its geometry is asked for once: every question is a call.
class Tensor {
 public:
  Tensor(AtenTensorHandle handle, const char* name) : handle_(handle), name_(name) {
    dim_ = get<int64_t>(aoti_torch_get_dim, "get_dim");
    sizes_ = get<int64_t*>(aoti_torch_get_sizes, "get_sizes");
    strides_ = get<int64_t*>(aoti_torch_get_strides, "get_strides");
  }

  // The first entry of the first dimension: what torch calls tensor[0].
  Tensor entry() const {
    Tensor result = *this;
    if (dim_ < 1) fail("expected at least one dimension");
    --result.dim_;
    ++result.sizes_;
    ++result.strides_;
    return result;
  }

  const char* name() const { return name_; }
  int64_t dim() const { return dim_; }
  const int64_t* sizes() const { return sizes_; }
  const int64_t* strides() const { return strides_; }
  int64_t numel() const {
    int64_t numel = 1;
    for (int64_t i = 0; i < dim_; ++i) numel *= sizes_[i];
    return numel;
  }

  void* data() const { return get<void*>(aoti_torch_get_data_ptr, "get_data_ptr"); }
  int32_t dtype() const { return get<int32_t>(aoti_torch_get_dtype, "get_dtype"); }
  int32_t device_type() const { return get<int32_t>(aoti_torch_get_device_type, "get_device_type"); }
  int32_t device_index() const { return get<int32_t>(aoti_torch_get_device_index, "get_device_index"); }

  [[noreturn]] void fail(const std::string& problem) const {
    throw std::runtime_error(std::string("fm_fast: argument ") + name_ + ": " + problem);
  }

  // The C interface has no such question, but a view of a tensor that requires grad is not a leaf.
  bool requires_grad() const {
    StableIValue stack[1];
    check(aoti_torch_new_tensor_handle(handle_, reinterpret_cast<AtenTensorHandle*>(stack)), "new_tensor_handle");
    check(torch_call_dispatcher("aten::alias", "", stack, kTorchVersion), "alias");
    check(torch_call_dispatcher("aten::is_leaf", "", stack, kTorchVersion), "is_leaf");
    return (stack[0] & 0xff) == 0;
  }

 private:
  template <class T, class Getter>
  T get(Getter getter, const char* call) const {
    T value;
    check(getter(handle_, &value), call);
    return value;
  }

  AtenTensorHandle handle_;
  const char* name_;
  int64_t dim_;
  const int64_t *sizes_, *strides_;
};

// A list of tensors owned by somebody else.
class TensorList {
 public:
  TensorList(StableListHandle handle, const char* name) : handle_(handle), name_(name) {
    check(torch_list_size(handle, &size_), "list_size");
  }

  int64_t size() const { return static_cast<int64_t>(size_); }
  const char* name() const { return name_; }
  AtenTensorHandle handle(int64_t i) const {
    StableIValue item;
    check(torch_list_get_item(handle_, static_cast<size_t>(i), &item), "list_get_item");
    return reinterpret_cast<AtenTensorHandle>(item);
  }
  Tensor operator[](int64_t i) const { return Tensor(handle(i), name_); }

 private:
  StableListHandle handle_;
  const char* name_;
  size_t size_;
};

// The arguments of one boxed call, read in schema order. Slots of tensors and of tensor lists own their handles, and a list's items are
// handles of their own; an optional tensor comes in a box. All of them are freed at the end, also when an error is thrown halfway.
// `kinds`: one letter an argument, T for tensors, O for optional tensors, L for lists of tensors.
class Arguments {
 public:
  Arguments(StableIValue* stack, const char* kinds) : stack_(stack), kinds_(kinds) {}
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  ~Arguments() {
    for (int i = 0; kinds_[i]; ++i) {
      if (kinds_[i] == 'T') aoti_torch_delete_tensor_object(handle(i));
      if (kinds_[i] == 'O') free_box(boxed(i));
      if (kinds_[i] == 'L') free_list(list(i));
    }
  }

  // The first argument, without moving on.
  Tensor first(const char* name) const { return Tensor(handle(0), name); }
  Tensor tensor(const char* name) { return Tensor(handle(next_++), name); }
  std::optional<Tensor> optional_tensor(const char* name) {
    const StableIValue* box = boxed(next_++);
    return box ? std::optional<Tensor>(Tensor(reinterpret_cast<AtenTensorHandle>(*box), name)) : std::nullopt;
  }
  TensorList tensors(const char* name) { return TensorList(list(next_++), name); }
  int64_t integer() { return read<int64_t>(); }
  double number() { return read<double>(); }
  bool flag() { return read<bool>(); }

 private:
  AtenTensorHandle handle(int i) const { return reinterpret_cast<AtenTensorHandle>(stack_[i]); }
  StableIValue* boxed(int i) const { return reinterpret_cast<StableIValue*>(stack_[i]); }
  StableListHandle list(int i) const { return reinterpret_cast<StableListHandle>(stack_[i]); }

  static void free_box(StableIValue* box) {
    if (box) aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(*box));
    delete box;
  }

  static void free_list(StableListHandle list) {
    size_t size = 0;
    StableIValue item;
    torch_list_size(list, &size);
    for (size_t i = 0; i < size; ++i)
      if (!torch_list_get_item(list, i, &item)) aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(item));
    torch_delete_list(list);
  }

  template <class T>
  T read() {
    T value;
    __builtin_memcpy(&value, stack_ + next_++, sizeof(T));
    return value;
  }

  StableIValue* stack_;
  const char* kinds_;
  int next_ = 0;
};

}  // namespace abi
}  // namespace fm
