// The arguments of an op's call, read from torch's stack in the order of fm_fast/_schemas.py and checked: all that a backend needs.
#pragma once

#include "evaluation.h"
#include "path.h"
#include "tensors.h"

namespace fm {

namespace abi {
class Arguments;
}

struct NoiseCall {
  Shape shape;
  View out;
  KeyWords key_words;
  DrawKind kind;
  uint32_t purpose;
};

// How t [B] and the coefficients [B, 6] are filled; both are float64 where `wide`, else float32.
struct ScheduleCall {
  void *t, *coefficients;
  bool wide;
  Path path;      // kPathGiven: both are there already
  int objective;  // of no meaning for kPathGiven
  TimeLaw law;
};

struct SampleCall {
  Shape shape;
  View x_t, x1, x0;  // x0 may be absent: it is drawn
  KeyWords key_words;
  DataTransform transform;
  const void* coefficients;  // [B, 6], float32 or float64
  Dtype coefficient_dtype;
  bool wide;  // computes in double
  ScheduleCall schedule;
};

struct LossCall {
  Shape shape;
  View o, x1, x0, grad, weight;  // x0, grad, weight: may be absent
  View x_t;                      // what path_sample made of x1 and drawn noise, in the compute type, or absent
  KeyWords key_words;
  DataTransform transform;
  const void* coefficients;
  Dtype coefficient_dtype;
  const void* sample_weight;  // [B] float32 or float64, or nullptr
  Dtype sample_weight_dtype;
  View grad_output;    // strides (batch, -, -), or absent for 1
  double grad_factor;  // 2 over the reduction's divisor
  bool finished;       // grad is the gradient already if grad_output, a single number, is one
  int reduction;
  double divisor;
  void* loss;  // one number or [B], float32 or float64; absent in the backward pass
  Dtype loss_dtype;
  bool wide;
};

struct StepTerm {
  HalvedView k;  // the conditional half first
  double coefficient;
};

// y = a x + sum_j c_j m(k_j). The views may have been merged: elementwise work has no logical order.
struct StepCall {
  Shape shape;
  View out, x;
  HalvedView copy;             // may be absent
  View kept;                   // may be absent: gets the last k as it came
  const double* coefficients;  // a, c_1, ..., c_count, in memory of the op's device
  int64_t count;
  double guidance;
  bool wide;
};

// means[b]: the mean over sample b of (e / (atol + rtol max(|y|, |end|)))^2 for e = sum_j c_j k_j. Every k_j is a view of its own.
struct ErrorCall {
  Shape shape;
  View y, end;
  const double* coefficients;  // c_1, ..., c_count, in memory of the op's device
  int64_t count;
  double rtol, atol;
  double* means;
  bool wide;
};

// The steps of samples, each of a length of its own. All memory is dense and the op's device's; rows hold a number a sample.
struct ControlCall {
  int64_t batch, parts, stop_count, stages;
  double* numbers;    // t, the length of the next step before it is cut at a stop, and after
  int64_t* counts;    // the number of the next stop, evaluations so far, the Status of step_control.h
  int64_t* totals;    // three numbers that are added to: samples on the way, given up now, accepted now
  uint8_t* accepted;  // of the steps that were tried
  double* times;      // of the next step's evaluations, a row a stage
  void* factors;      // the next step's length, and that over the length before; float64 where `wide`, else float32
  bool wide;
  const double* means;  // mean squares of the errors, a row a part of the state; without parts no step was tried
  const double* stops;  // where the solve begins, and the times at which steps end
  const double* nodes;  // one a stage
  double order;
  int64_t evaluations;  // of the step that was tried
};

// Probes first, first + 1, ... of stream "probe".
struct ProbeCall {
  Shape shape;
  View view;  // of the first probe
  int64_t probe_stride, probes;
  KeyWords key_words;
  int64_t index, first, share;
  const int64_t *codes, *rows;  // of structured probes (rows: of these probes), or nullptr
};

// Of a call's probes into dots; after the last probe of an evaluation its estimate goes to the sums.
struct DivergenceCall {
  ProbeCall probes;  // `view` is g
  bool normals, last;
  double* dots;  // of these probes, [probes, B]
  Evaluation evaluation;
};

NoiseCall read_noise(abi::Arguments* in);
SampleCall read_path_sample(abi::Arguments* in);
LossCall read_path_loss(abi::Arguments* in);
LossCall read_path_loss_backward(abi::Arguments* in);
ControlCall read_step_control(abi::Arguments* in);
ProbeCall read_probe(abi::Arguments* in);
DivergenceCall read_divergence_step(abi::Arguments* in);

// One letter an argument, as abi::Arguments wants them.
constexpr const char* kNoiseArguments = "TTiii";
constexpr const char* kPathSampleArguments = "TTTTTTiffiiffffffb";
constexpr const char* kPathLossArguments = "TTTTTTTTiffbO";
constexpr const char* kPathLossBackwardArguments = "TTTTTTTTiffbb";
constexpr const char* kLinearStepArguments = "TTTLTifO";
constexpr const char* kStepErrorArguments = "TTTLTff";
constexpr const char* kStepControlArguments = "TTTTTTTTTii";
constexpr const char* kProbeArguments = "TTTTiii";
constexpr const char* kDivergenceStepArguments = "TTTTTTiiiiiff";

// One of the numbers that a tensor of coefficients holds.
FM_HD double coefficient_at(const void* coefficients, Dtype dtype, int64_t sample, int column) {
  return number_at(coefficients, dtype, kColumns * sample + column);
}

// Whether a backward pass has nothing left to do. On a GPU only a kernel knows.
FM_HD bool is_finished(const LossCall& call) { return call.finished && number_at(call.grad_output.data, call.grad_output.dtype, 0) == 1.0; }

// The six numbers of a sample and its time, which is clamped where it is given.
template <class T>
FM_HD Coefficients coefficients_of(const ScheduleCall& schedule, const Key& key, int64_t sample, T* time) {
  T given = static_cast<T*>(schedule.t)[sample];
  const TimeLaw& law = schedule.law;
  double t = law.sampler == kTimeGiven ? clamp_time(law, static_cast<double>(given))
                                       : draw_time(law, stream_of(key, kStreamTime), sample_id(key, sample));
  *time = static_cast<T>(t);
  return coefficients(schedule.path, schedule.objective, static_cast<double>(*time));
}

template <class T>
FM_HD void put_coefficients(const ScheduleCall& schedule, int64_t sample, T time, const Coefficients& c) {
  T* row = static_cast<T*>(schedule.coefficients) + kColumns * sample;
  static_cast<T*>(schedule.t)[sample] = time;
  row[kA] = static_cast<T>(c.a);
  row[kS] = static_cast<T>(c.s);
  row[kC1] = static_cast<T>(c.c1);
  row[kC0] = static_cast<T>(c.c0);
  row[kK] = static_cast<T>(c.k);
  row[kW] = static_cast<T>(c.w);
}

}  // namespace fm
