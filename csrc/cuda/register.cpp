// Registration of the CUDA implementations, and the session of a call. Schemas live in fm_fast/_schemas.py.
#include "kernels.h"
#include "ops.h"
#include "session.h"

// Tests register the same functions elsewhere.
#ifndef FM_NAMESPACE
#define FM_NAMESPACE "fm_fast"
#define FM_DISPATCH_KEY "CUDA"
#endif

namespace fm {

void check_device(const abi::Tensor& tensor) {
  static const int32_t cuda = aoti_torch_device_type_cuda();
  if (tensor.device_type() != cuda) tensor.fail("expected a CUDA tensor");
  if (tensor.device_index() != cuda::current_device()) tensor.fail("expected a tensor on the device of the op's first argument");
}

namespace cuda {

Session::Session(const abi::Arguments& in) {
  abi::Tensor first = in.first("first");
  if (first.device_type() != aoti_torch_device_type_cuda()) first.fail("expected a CUDA tensor");
  device_ = first.device_index();
  abi::check(aoti_torch_get_current_cuda_stream(device_, &stream_), "get_current_cuda_stream");
  // Last: what a constructor that throws has made, no destructor takes back.
  abi::check(aoti_torch_create_cuda_guard(device_, &guard_), "create_cuda_guard");
}

Session::~Session() {
  if (scratch_) aoti_torch_delete_tensor_object(scratch_);
  if (guard_) aoti_torch_delete_cuda_guard(guard_);
}

void* Session::allocate(int64_t doubles) {
  if (doubles < 1) doubles = 1;
  const int64_t stride = 1;
  if (aoti_torch_empty_strided(1, &doubles, &stride, aoti_torch_dtype_float64(), aoti_torch_device_type_cuda(), device_, &scratch_))
    throw std::runtime_error("fm_fast: no working memory of " + std::to_string(doubles * sizeof(double)) +
                             " bytes could be had of torch: the device is out of memory, most likely");
  return abi::Tensor(scratch_, "scratch").data();
}

namespace {

constexpr struct {
  const char* name;
  void (*run)(StableIValue*, uint64_t, uint64_t);
} kOps[] = {{"noise", noise},
            {"path_sample", path_sample},
            {"path_loss", path_loss},
            {"path_loss_backward", path_loss_backward},
            {"linear_step", linear_step},
            {"step_error", step_error},
            {"step_control", step_control},
            {"probe", probe},
            {"divergence_step", divergence_step}};

// A failure leaves ops without a CUDA implementation (torch says so when one is called): never end the process that loads us.
bool register_all() {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl(FM_NAMESPACE, FM_DISPATCH_KEY, "csrc/cuda/register.cpp", 0, &library)) return false;
  for (const auto& op : kOps)
    if (torch_library_impl(library, op.name, op.run, abi::kTorchVersion)) return false;
  return true;
}

[[maybe_unused]] const bool registered = register_all();

}  // namespace
}  // namespace cuda
}  // namespace fm

// The version of CUDA that this library was built with: 13000 is 13.0. (The runtime is not asked for the driver's: that would start it.)
extern "C" __attribute__((visibility("default"))) int fm_fast_cuda_runtime_version(void) { return fm::cuda::runtime_version(); }
