// The ops of training, from torch's arguments to kernels: noise, path_sample, path_loss and its backward.
#include "../loss.h"
#include "dispatch.h"
#include "ops.h"
#include "scratch.h"
#include "unbox.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr int64_t kScheduleGrain = 2048;  // samples of a thread
constexpr int64_t kWorthRecovering = 64;  // elements of a sample, below which drawing x0 again is faster

}  // namespace

// --- noise ---------------------------------------------------------------------------------------------------------------------------

void noise(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTiii");
  Tensor out = in.tensor("out"), key = in.tensor("key");
  NoiseArgs args = {};
  args.kind = static_cast<DrawKind>(code(in.integer(), 0, 3, "kind"));
  uint32_t stream = static_cast<uint32_t>(in.integer()), index = static_cast<uint32_t>(in.integer());
  args.tag = stream | index << 8;
  args.shape = shape_of(out);
  args.out = args.kind == DrawKind::word ? view_of(out, out) : float_view(out, out);
  if (args.kind == DrawKind::word && args.out.dtype != Dtype::int64) out.fail("words are int64");
  args.key = key_of(key, args.shape.batch);
  args.tiling = plan(&args.shape, {&args.out}, args.kind == DrawKind::sign ? 128 : 4);
  run_units(kernels().noise, args, args.tiling.units, kGrain);
}

// --- path_sample ---------------------------------------------------------------------------------------------------------------------

namespace {

DataTransform read_transform(Arguments* in) { return DataTransform{in->number(), in->number(), in->flag()}; }

struct SampleInputs {
  Tensor x_t, t, coef, x1, x0, key;
};

SampleArgs sample_args(const SampleInputs& in, const DataTransform& transform) {
  SampleArgs args = {};
  args.shape = shape_of(in.x1);
  args.x_t = float_view(in.x_t, in.x1);
  args.x1 = view_of(in.x1, in.x1);
  args.x0 = float_view_or_absent(in.x0, in.x1);
  args.key = key_of(in.key, args.shape.batch);
  args.transform = transform;
  args.coefficients = dense_floats(in.coef, 6 * args.shape.batch);
  args.coefficient_dtype = dtype_of(in.coef);
  args.wide = is_wide(in.coef) || is_wide(in.x_t) || is_wide(in.x1) || (args.x0.data && is_wide(in.x0));
  args.tiling = plan(&args.shape, {&args.x_t, &args.x1, &args.x0}, 4);
  return args;
}

}  // namespace

void path_sample(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTTTiffiifffffffb");
  SampleInputs inputs = {in.tensor("x_t"), in.tensor("t"), in.tensor("coef"), in.tensor("x1"), in.tensor("x0"), in.tensor("key")};
  refuse_grad({&inputs.t, &inputs.coef, &inputs.x1, &inputs.x0});
  Path path = {static_cast<int>(in.integer()), in.number(), in.number()};
  int objective = code(in.integer(), kVelocity, kData, "objective");
  TimeLaw law = {static_cast<int>(in.integer()), in.number(), in.number(), in.number(), in.number()};
  SampleArgs args = sample_args(inputs, read_transform(&in));
  int64_t batch = args.shape.batch;
  if (path.kind != kPathGiven) {
    void *t = dense_floats(inputs.t, batch), *coefficients = dense_floats(inputs.coef, 6 * batch);
    if (is_wide(inputs.t) != is_wide(inputs.coef)) inputs.t.fail("expected the dtype of coef");
    ScheduleArgs schedule = {t, coefficients, is_wide(inputs.coef), args.key, path, objective, law};
    run_units(kernels().schedule, schedule, batch, kScheduleGrain);
  }
  run_units(kernels().path_sample, args, args.tiling.units, kGrain);
}

// --- path_loss -----------------------------------------------------------------------------------------------------------------------

namespace {

struct LossInputs {
  Tensor o, x1, x0, key, coef, weight;
};

LossInputs read_inputs(Arguments* in) {
  return LossInputs{in->tensor("o"), in->tensor("x1"), in->tensor("x0"), in->tensor("key"), in->tensor("coef"), in->tensor("weight")};
}

void set_weight(const Tensor& weight, const Tensor& o, LossArgs* args) {
  int64_t numel = weight.numel();
  if (numel == 0) return;
  if (numel == args->shape.batch && !(numel == o.numel() && weight.dim() == o.dim())) {
    args->sample_weight = dense_floats(weight, numel);
    args->sample_weight_dtype = dtype_of(weight);
  } else {
    dense_floats(weight, o.numel());
    args->weight = view_of(weight, o);
  }
}

// x_t tells what x0 was only where it was not rounded a second time: in the compute type. The choice must depend on the sample alone,
// so that a batch gives the same bits in one piece and in several.
void set_point(const std::optional<Tensor>& x_t, const Tensor& o, LossArgs* args) {
  if (!x_t || args->x0.data || dtype_of(*x_t) != (args->wide ? Dtype::float64 : Dtype::float32)) return;
  if (args->shape.channels * args->shape.points >= kWorthRecovering) args->x_t = float_view(*x_t, o);
}

LossArgs loss_args(const LossInputs& in, int reduction, const DataTransform& transform) {
  LossArgs args = {};
  args.transform = transform;
  args.shape = shape_of(in.o);
  args.o = float_view(in.o, in.o);
  args.x1 = view_of(in.x1, in.o);
  args.x0 = float_view_or_absent(in.x0, in.o);
  args.key = key_of(in.key, args.shape.batch);
  args.coefficients = dense_floats(in.coef, 6 * args.shape.batch);
  args.coefficient_dtype = dtype_of(in.coef);
  set_weight(in.weight, in.o, &args);
  args.wide = is_wide(in.coef) || is_wide(in.o) || is_wide(in.x1) || (args.x0.data && is_wide(in.x0));
  args.grad_factor = 2.0 / reduction_divisor(reduction, args.shape.batch, args.shape.channels * args.shape.points);
  return args;
}

Tiling plan_loss(LossArgs* args) { return plan(&args->shape, {&args->o, &args->x1, &args->x0, &args->x_t, &args->grad, &args->weight}, 4); }

void put_number(const Tensor& tensor, int64_t index, double value) {
  if (is_wide(tensor))
    static_cast<double*>(tensor.data())[index] = value;
  else
    static_cast<float*>(tensor.data())[index] = static_cast<float>(value);
}

// Sums of chunks to the loss: [B] means, or one number.
void reduce(const LossArgs& args, double divisor, int reduction, const Tensor& loss) {
  int64_t batch = args.shape.batch, tiles = tiles_per_sample(args.tiling);
  if (reduction != kNone) return put_number(loss, 0, sum_in_order(args.partial, batch * tiles) / divisor);
  for (int64_t b = 0; b < batch; ++b) put_number(loss, b, sum_in_order(args.partial + b * tiles, tiles) / divisor);
}

}  // namespace

void path_loss(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTTTTTiffbO");
  Tensor loss = in.tensor("loss"), grad = in.tensor("grad");
  LossInputs inputs = read_inputs(&in);
  int reduction = code(in.integer(), kMean, kNone, "reduction");
  refuse_grad({&inputs.o, &inputs.x1, &inputs.x0, &inputs.coef, &inputs.weight});
  LossArgs args = loss_args(inputs, reduction, read_transform(&in));
  set_point(in.optional_tensor("x_t"), inputs.o, &args);
  args.grad = float_view_or_absent(grad, inputs.o);
  dense_floats(loss, reduction == kNone ? args.shape.batch : 1);
  args.tiling = plan_loss(&args);
  Scratch<double, kInlineSums> partials(args.shape.batch * tiles_per_sample(args.tiling));
  args.partial = partials.data();
  run_units(kernels().path_loss, args, args.tiling.units, kGrain);
  reduce(args, reduction_divisor(reduction, args.shape.batch, args.shape.channels * args.shape.points), reduction, loss);
}

void path_loss_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTTTTTiffb");
  Tensor grad = in.tensor("grad");
  LossInputs inputs = read_inputs(&in);
  Tensor grad_output = in.tensor("grad_output");
  int reduction = code(in.integer(), kMean, kNone, "reduction");
  refuse_grad({&inputs.o, &inputs.x1, &inputs.x0, &inputs.coef, &inputs.weight, &grad_output});
  LossArgs args = loss_args(inputs, reduction, read_transform(&in));
  args.grad = float_view(grad, inputs.o);
  bool per_sample = reduction == kNone;
  Dtype dtype = dtype_of(grad_output);
  if (dtype != Dtype::float32 && dtype != Dtype::float64) grad_output.fail("expected float32 or float64");
  if (grad_output.numel() != (per_sample ? args.shape.batch : 1) || grad_output.dim() > 1)
    grad_output.fail(per_sample ? "expected one number a sample" : "expected one number");
  args.grad_output = View{grad_output.data(), dtype, per_sample ? grad_output.strides()[0] : 0, 0, 0};
  args.tiling = plan_loss(&args);
  run_units(kernels().path_loss, args, args.tiling.units, kGrain);
}

}  // namespace fm
