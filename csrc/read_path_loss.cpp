// The arguments of path_loss and its backward.
#include "calls.h"
#include "loss.h"
#include "unbox.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

namespace {

constexpr int64_t kWorthRecovering = 64;  // elements of a sample, below which drawing x0 again is faster

struct LossInputs {
  Tensor o, x1, x0, key, coef, weight;
};

LossInputs read_inputs(Arguments* in) {
  return LossInputs{in->tensor("o"), in->tensor("x1"), in->tensor("x0"), in->tensor("key"), in->tensor("coef"), in->tensor("weight")};
}

void set_weight(const Tensor& weight, const Tensor& o, LossCall* call) {
  int64_t numel = weight.numel();
  if (numel == 0) return;
  if (numel == call->shape.batch && !(numel == o.numel() && weight.dim() == o.dim())) {
    call->sample_weight = dense_floats(weight, numel);
    call->sample_weight_dtype = dtype_of(weight);
  } else {
    dense_floats(weight, o.numel());
    call->weight = view_of(weight, o);
  }
}

// x_t tells what x0 was only where it was not rounded a second time: in the compute type. The choice must depend on the sample alone,
// so that a batch gives the same bits in one piece and in several.
void set_point(const std::optional<Tensor>& x_t, const Tensor& o, LossCall* call) {
  if (!x_t || call->x0.data || dtype_of(*x_t) != (call->wide ? Dtype::float64 : Dtype::float32)) return;
  if (call->shape.channels * call->shape.positions >= kWorthRecovering) call->x_t = float_view(*x_t, o);
}

LossCall loss_call(const LossInputs& in, int reduction, const DataTransform& transform) {
  LossCall call = {};
  call.transform = transform;
  call.shape = shape_of(in.o);
  call.o = float_view(in.o, in.o);
  call.x1 = data_view(in.x1, in.o);
  call.x0 = float_view_or_absent(in.x0, in.o);
  call.key_words = key_words(in.key, call.shape.batch);
  call.coefficients = dense_floats(in.coef, kColumns * call.shape.batch);
  call.coefficient_dtype = dtype_of(in.coef);
  set_weight(in.weight, in.o, &call);
  call.wide = is_wide(in.coef) || is_wide(in.o) || is_wide(in.x1) || (call.x0.data && is_wide(in.x0));
  call.reduction = reduction;
  call.divisor = reduction_divisor(reduction, call.shape.batch, call.shape.channels * call.shape.positions);
  call.grad_factor = 2.0 / call.divisor;
  return call;
}

View read_grad_output(const Tensor& grad_output, int reduction, int64_t batch) {
  bool per_sample = reduction == kNone;
  Dtype dtype = dtype_of(grad_output);
  check_device(grad_output);
  if (dtype != Dtype::float32 && dtype != Dtype::float64) grad_output.fail("expected float32 or float64");
  if (grad_output.numel() != (per_sample ? batch : 1) || grad_output.dim() > 1 || (per_sample && grad_output.dim() != 1))
    grad_output.fail(per_sample ? "expected one number a sample" : "expected one number");
  return View{grad_output.data(), dtype, per_sample ? grad_output.strides()[0] : 0, 0, 0};
}

}  // namespace

LossCall read_path_loss(Arguments* in) {
  Tensor loss = in->tensor("loss"), grad = in->tensor("grad");
  LossInputs inputs = read_inputs(in);
  int reduction = code(in->integer(), kMean, kNone, "reduction");
  refuse_grad({&inputs.o, &inputs.x1, &inputs.x0, &inputs.coef, &inputs.weight});
  LossCall call = loss_call(inputs, reduction, read_transform(in));
  set_point(in->optional_tensor("x_t"), inputs.o, &call);
  call.grad = float_view_or_absent(grad, inputs.o);
  call.loss = dense_floats(loss, reduction == kNone ? call.shape.batch : 1);
  call.loss_dtype = dtype_of(loss);
  return call;
}

LossCall read_path_loss_backward(Arguments* in) {
  Tensor grad = in->tensor("grad");
  LossInputs inputs = read_inputs(in);
  Tensor grad_output = in->tensor("grad_output");
  int reduction = code(in->integer(), kMean, kNone, "reduction");
  refuse_grad({&inputs.o, &inputs.x1, &inputs.x0, &inputs.coef, &inputs.weight, &grad_output});
  LossCall call = loss_call(inputs, reduction, read_transform(in));
  call.grad = float_view(grad, inputs.o);
  call.grad_output = read_grad_output(grad_output, reduction, call.shape.batch);
  call.finished = in->flag() && reduction != kNone;
  return call;
}

}  // namespace fm
