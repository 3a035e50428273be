// group_norm_silu and its backward, from torch's arguments to their kernels.
#include "dispatch.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

#define FM_ISA plain  // the parameters' gradients are too small for vectors
#include "norm_parameters.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr int64_t kUnitElements = 8192;  // of a unit, at least, where channels are runs of positions
constexpr int64_t kUnitChannels = 64;    // of a unit, at least, where positions are runs of channels
constexpr int64_t kThreadElements = 16384;
constexpr int64_t kGradientGrain = 16;  // channels of a thread

struct NormInputs {
  Tensor x, second, embedding, weight, bias, scale, shift;
};

NormInputs read_inputs(Arguments* in) {
  return NormInputs{in->tensor("x"),    in->tensor("second"), in->tensor("embedding"), in->tensor("weight"),
                    in->tensor("bias"), in->tensor("scale"),  in->tensor("shift")};
}

struct NormSettings {
  int64_t groups;
  double eps;
  bool activation;
  double dropout;
  int64_t index;
};

bool is_channels_last(const View& view, int64_t positions) { return positions == 1 || view.channel_stride < view.position_stride; }

// Whole groups that are worth a unit of their own, in channels_last as many as fill vectors. The cut depends on the shape and the layout
// alone.
int64_t groups_of_unit(const NormArgs& args) {
  int64_t positions = greater(args.shape.positions, 1), width = greater(args.shape.channels / args.groups, 1);
  bool channels_last = is_channels_last(args.x, positions);
  int64_t groups = divide_up(channels_last ? kUnitChannels : divide_up(kUnitElements, positions), width);
  if (channels_last)
    while (groups * width % kLineElements) ++groups;
  return lesser(groups, args.groups);
}

// What is absent has no elements and one dimension; the inputs of an empty batch have no elements either.
bool has_second(const NormInputs& in) { return in.second.dim() > 1; }

Shape joined_shape(const NormInputs& in) {
  if (in.x.dim() < 3) in.x.fail("expected [B, C, ...] with at least three dimensions");
  Shape shape = shape_of(in.x);
  if (has_second(in)) shape.channels += in.second.sizes()[1];
  return shape;
}

void set_dropout(const NormSettings& settings, const Tensor& key, NormArgs* args) {
  if (!(settings.dropout >= 0.0 && settings.dropout < 1.0)) throw std::runtime_error("fm_fast: argument dropout: expected [0, 1)");
  args->dropout = settings.dropout;
  args->purpose = purpose_of(kStreamDropout, static_cast<uint32_t>(whole(settings.index, 0, kIndexLimit - 1, "index")));
  if (settings.dropout > 0) args->key = key_of(key, args->shape.batch);
}

NormArgs norm_args(const NormInputs& in, const Tensor& mean, const Tensor& rstd, const Tensor& key, const NormSettings& settings) {
  NormArgs args = {};
  args.shape = joined_shape(in);
  int64_t batch = args.shape.batch, channels = args.shape.channels;
  args.first_channels = in.x.sizes()[1];
  args.x = channels_view(in.x, in.x, args.first_channels);
  if (has_second(in)) args.second = channels_view(in.second, in.x, channels - args.first_channels);
  args.groups = whole(settings.groups, 1, greater(channels, 1), "groups");
  if (channels % args.groups) in.x.fail("expected a number of channels that groups divides");
  args.embedding = table_view(in.embedding, batch, channels);
  args.weight = table_view(in.weight, 1, channels);
  args.bias = table_view(in.bias, 1, channels);
  args.scale = table_view(in.scale, batch, channels);
  args.shift = table_view(in.shift, batch, channels);
  args.mean = dense_floats(mean, batch * args.groups);
  args.rstd = dense_floats(rstd, batch * args.groups);
  if (is_wide(mean) != is_wide(in.x)) mean.fail("expected float32, or float64 for float64 x");
  if (is_wide(rstd) != is_wide(in.x)) rstd.fail("expected float32, or float64 for float64 x");
  args.eps = settings.eps;
  args.activation = settings.activation;
  args.unit_groups = groups_of_unit(args);
  set_dropout(settings, key, &args);
  return args;
}

int64_t units_of(const NormArgs& args) {
  return args.shape.channels * args.shape.positions == 0 ? 0 : args.shape.batch * divide_up(args.groups, args.unit_groups);
}

int64_t grain_of(const NormArgs& args) {
  int64_t elements = args.shape.channels / args.groups * args.unit_groups * args.shape.positions;
  return greater(kThreadElements / greater(elements, 1), 1);
}

// --- the parameters' gradients -------------------------------------------------------------------------------------------------------

struct ParameterGradients {
  const NormArgs& norm;
  const double* sums;  // [B, 3, C]
  View embedding, weight, bias, scale, shift;
};

// Of channels begin..end, over the samples in order. z = (xhat weight + bias) (1 + scale) + shift.
void parameter_gradients(const ParameterGradients& out, int64_t begin, int64_t end) {
  int64_t channels = out.norm.shape.channels;
  for (int64_t c = begin; c < end; ++c) {
    double weight = plain::parameter(out.norm.weight, 0, c, 1.0), bias = plain::parameter(out.norm.bias, 0, c, 0.0);
    double weight_sum = 0, bias_sum = 0;
    for (int64_t b = 0; b < out.norm.shape.batch; ++b) {
      const double* sums = out.sums + 3 * b * channels + c;
      double dz = sums[0], product = sums[channels], dx = sums[2 * channels];
      double factor = 1.0 + plain::parameter(out.norm.scale, b, c, 0.0);
      weight_sum += factor * product;
      bias_sum += factor * dz;
      plain::put_parameter(out.scale, b, c, weight * product + bias * dz);
      plain::put_parameter(out.shift, b, c, dz);
      plain::put_parameter(out.embedding, b, c, dx);
    }
    plain::put_parameter(out.weight, 0, c, weight_sum);
    plain::put_parameter(out.bias, 0, c, bias_sum);
  }
}

}  // namespace

void group_norm_silu(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTTTTTTTTifbfi");
  Tensor y = in.tensor("y"), mean = in.tensor("mean"), rstd = in.tensor("rstd");
  NormInputs inputs = read_inputs(&in);
  Tensor key = in.tensor("key");
  NormSettings settings = {in.integer(), in.number(), in.flag(), in.number(), in.integer()};
  refuse_grad({&inputs.x, &inputs.second, &inputs.embedding, &inputs.weight, &inputs.bias, &inputs.scale, &inputs.shift});
  NormArgs args = norm_args(inputs, mean, rstd, key, settings);
  args.y = channels_view(y, inputs.x, args.shape.channels);
  run_units(kernels().group_norm_silu, args, units_of(args), grain_of(args));
}

void group_norm_silu_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTTTTTTTTTTTTTTTibfi");
  Tensor grad_x = in.tensor("grad_x"), grad_second = in.tensor("grad_second"), grad_embedding = in.tensor("grad_embedding");
  Tensor grad_weight = in.tensor("grad_weight"), grad_bias = in.tensor("grad_bias");
  Tensor grad_scale = in.tensor("grad_scale"), grad_shift = in.tensor("grad_shift"), grad_y = in.tensor("grad_y");
  NormInputs inputs = read_inputs(&in);
  Tensor mean = in.tensor("mean"), rstd = in.tensor("rstd"), key = in.tensor("key");
  NormSettings settings = {in.integer(), 1.0, in.flag(), in.number(), in.integer()};
  refuse_grad({&grad_y, &inputs.x, &inputs.second, &inputs.embedding, &inputs.weight, &inputs.bias, &inputs.scale, &inputs.shift});
  NormGradArgs args = {};
  args.norm = norm_args(inputs, mean, rstd, key, settings);
  int64_t batch = args.norm.shape.batch, channels = args.norm.shape.channels;
  args.grad_y = channels_view(grad_y, inputs.x, channels);
  args.grad_x = channels_view(grad_x, inputs.x, args.norm.first_channels);
  if (has_second(inputs)) args.grad_second = channels_view(grad_second, inputs.x, channels - args.norm.first_channels);
  Scratch<double, kInlineSums> sums(3 * batch * channels);
  args.sums = sums.data();
  ParameterGradients out = {args.norm,
                            args.sums,
                            table_view(grad_embedding, batch, channels),
                            table_view(grad_weight, 1, channels),
                            table_view(grad_bias, 1, channels),
                            table_view(grad_scale, batch, channels),
                            table_view(grad_shift, batch, channels)};
  if (args.norm.shape.positions == 0)
    for (int64_t i = 0; i < 3 * batch * channels; ++i) sums[i] = 0;
  run_units(kernels().group_norm_silu_backward, args, units_of(args.norm), grain_of(args.norm));
  run_units(parameter_gradients, out, channels, kGradientGrain);
}

}  // namespace fm
