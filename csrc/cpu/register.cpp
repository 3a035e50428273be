// Registration of the CPU implementations. Schemas live in fm_fast/_schemas.py; the ops read their arguments in that order.
#include "../unbox.h"
#include "ops.h"

namespace fm {

void check_device(const abi::Tensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  if (tensor.device_type() != cpu) tensor.fail("expected a CPU tensor");
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
            {"divergence_step", divergence_step},
            {"adamw_ema_norm", adamw_ema_norm},
            {"adamw_ema", adamw_ema},
            {"group_norm_silu", group_norm_silu},
            {"group_norm_silu_backward", group_norm_silu_backward},
            {"conv_weight_grad", conv_weight_grad},
            {"conv3x3", conv3x3},
            {"attention", attention},
            {"attention_backward", attention_backward},
            {"assignment", assignment}};

// A failure leaves ops without a CPU implementation (torch says so when one is called): never end the process that loads us.
bool register_all() {
  TorchLibraryHandle library = nullptr;
  if (aoti_torch_library_init_impl("fm_fast", "CPU", "csrc/cpu/register.cpp", 0, &library)) return false;
  for (const auto& op : kOps)
    if (torch_library_impl(library, op.name, op.run, abi::kTorchVersion)) return false;
  return true;
}

[[maybe_unused]] const bool registered = register_all();

}  // namespace
}  // namespace fm
