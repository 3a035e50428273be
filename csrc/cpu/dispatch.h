// The kernels of the instruction set in use.
#pragma once

#include "kernels.h"

namespace fm {

struct KernelTable {
  const char* name;
  bool (*runs_here)();
  NoiseKernel noise;
  ScheduleKernel schedule;
  SampleKernel path_sample;
  LossKernel path_loss;
  StepKernel linear_step;
  ErrorKernel step_error;
  ControlKernel step_control;
  ParityKernel parity;
  ProbeKernel probe;
  DivergenceKernel divergence_step;
  GradientNormKernel adamw_ema_norm;
  AdamwKernel adamw_ema;
  NormKernel group_norm_silu;
  NormGradKernel group_norm_silu_backward;
  ConvKernel conv_weight_grad, conv_weight_grad_sums;
  Conv3x3Kernel conv3x3_weights, conv3x3;
  AttentionKernel attention, attention_backward;
  AssignmentKernel assignment;
};

// The best this CPU can run, or what fm_fast_cpu_select chose.
const KernelTable& kernels();

}  // namespace fm
