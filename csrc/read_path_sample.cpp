// The arguments of path_sample.
#include "calls.h"
#include "unbox.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

namespace {

// With the coefficients given, their objective is known to the caller alone and may have any code.
int read_objective(Arguments* in, const Path& path) {
  int64_t objective = in->integer();
  return path.kind == kPathGiven ? kVelocity : code(objective, kVelocity, kData, "objective");
}

ScheduleCall read_schedule(const Tensor& t, const Tensor& coef, int64_t batch, const Path& path, int objective, const TimeLaw& law) {
  if (path.kind == kPathGiven) return ScheduleCall{nullptr, nullptr, false, path, objective, law};
  void *times = dense_floats(t, batch), *coefficients = dense_floats(coef, kColumns * batch);
  if (is_wide(t) != is_wide(coef)) t.fail("expected the dtype of coef");
  return ScheduleCall{times, coefficients, is_wide(coef), path, objective, law};
}

}  // namespace

SampleCall read_path_sample(Arguments* in) {
  Tensor x_t = in->tensor("x_t"), t = in->tensor("t"), coef = in->tensor("coef");
  Tensor x1 = in->tensor("x1"), x0 = in->tensor("x0"), key = in->tensor("key");
  refuse_grad({&t, &coef, &x1, &x0});
  Path path = {code(in->integer(), kPathGiven, kPathCosine, "path"), in->number(), in->number()};
  int objective = read_objective(in, path);
  TimeLaw law = {code(in->integer(), kTimeGiven, kTimeLogitNormal, "t_sampler"), in->number(), in->number(), in->number(), in->number()};
  SampleCall call = {};
  call.transform = read_transform(in);
  call.shape = shape_of(x1);
  call.x_t = float_view(x_t, x1);
  call.x1 = data_view(x1, x1);
  call.x0 = float_view_or_absent(x0, x1);
  call.key_words = key_words(key, call.shape.batch);
  call.coefficients = dense_floats(coef, kColumns * call.shape.batch);
  call.coefficient_dtype = dtype_of(coef);
  call.wide = is_wide(coef) || is_wide(x_t) || is_wide(x1) || (call.x0.data && is_wide(x0));
  call.schedule = read_schedule(t, coef, call.shape.batch, path, objective, law);
  return call;
}

}  // namespace fm
