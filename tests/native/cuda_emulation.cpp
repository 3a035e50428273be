// What libtorch_cuda.so would answer: the emulated device is torch's CPU. These definitions go before torch's own.
#include "cuda_emulation.h"
#include "torch_abi.h"

extern "C" {

int32_t aoti_torch_device_type_cuda() { return aoti_torch_device_type_cpu(); }

AOTITorchError aoti_torch_create_cuda_guard(int32_t, CUDAGuardHandle* guard) {
  *guard = nullptr;
  return 0;
}

AOTITorchError aoti_torch_delete_cuda_guard(CUDAGuardHandle) { return 0; }

AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return 0;
}

void fm_emulation_fail(int error) { pending_error = static_cast<cudaError_t>(error); }

}  // extern "C"
