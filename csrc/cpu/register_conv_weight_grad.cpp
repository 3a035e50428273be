// conv_weight_grad, from torch's arguments to its kernels.
#include "register_conv.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr int64_t kUnitInputs = 128;    // of a unit, for which the gradients are transformed anew
constexpr int64_t kUnitOutputs = 64;    // of a unit, for which the inputs are transformed anew
constexpr int64_t kMostParts = 8;       // of a batch
constexpr int64_t kUnits = 16;          // in all, about: work for that many threads, and few partial sums of many outputs
constexpr int64_t kLeastTiles = 128;    // of a part, or its sums would cost more than what is summed
constexpr int64_t kInlinePartial = 16;  // the partial sums lie on the heap

void read_weight(const Tensor& weight, const Tensor& bias, ConvArgs* args) {
  check_device(weight);
  if (weight.dim() != 4 || dtype_of(weight) != args->dtype) weight.fail("expected [O, C, size, size] of the dtype of x");
  const int64_t *n = weight.sizes(), *stride = weight.strides();
  if (n[0] != args->outputs || n[1] != args->inputs) weight.fail("expected the channels of grad_y and x");
  if (n[2] != n[3] || (n[2] != 1 && n[2] != 3)) weight.fail("expected a size of 1 or 3");
  if (n[2] == 3 && n[1] % kConvOutputs) weight.fail("expected a multiple of 16 input channels for size 3");
  if (n[2] == 1 && args->dtype != Dtype::float32) weight.fail("expected float32 for size 1");
  args->size = n[2];
  args->grad_weight = weight.data();
  args->output_stride = stride[0];
  args->input_stride = stride[1];
  args->tap_stride[0] = stride[2];
  args->tap_stride[1] = stride[3];
  args->grad_bias = bias_of(bias, args->outputs, args->dtype);
  args->bias_stride = args->grad_bias ? bias.strides()[0] : 0;
}

// Into parts of the batch and units. The cut depends on the shapes alone, and so do all sums.
void cut(ConvArgs* args) {
  args->unit_inputs = kUnitInputs;
  args->unit_outputs = kUnitOutputs;
  int64_t units = greater(conv_ranges(*args), 1);
  int64_t parts = lesser(greater(kUnits / units, 1), kMostParts);
  int64_t tiles = greater(tiles_of(1, args->height, args->width), 1);
  args->samples_per_part = greater(divide_up(args->batch, parts), divide_up(kLeastTiles, tiles));
  args->parts = divide_up(args->batch, args->samples_per_part);
  args->unit_tiles = tiles_at_a_time(lesser(args->inputs, kUnitInputs) + lesser(args->outputs, kUnitOutputs));
}

ConvArgs conv_args(const Tensor& grad_weight, const Tensor& grad_bias, const Tensor& grad_y, const Tensor& x) {
  ConvArgs args = {};
  args.dtype = convolved_dtype(x);
  args.x = channels_last(x, args.dtype);
  args.grad_y = channels_last(grad_y, args.dtype);
  const int64_t *n = x.sizes(), *outputs = grad_y.sizes();
  if (outputs[0] != n[0] || outputs[2] != n[2] || outputs[3] != n[3]) grad_y.fail("expected batch, height and width of x");
  if (outputs[1] % kConvOutputs) grad_y.fail("expected a multiple of 16 channels");
  args.batch = n[0];
  args.inputs = n[1];
  args.height = n[2];
  args.width = n[3];
  args.outputs = args.row = outputs[1];
  read_weight(grad_weight, grad_bias, &args);
  cut(&args);
  return args;
}

// The gradients of `count` outputs from `first`.
ConvArgs some_outputs(ConvArgs args, int64_t first, int64_t count) {
  int64_t bytes = element_size(args.dtype);
  args.grad_y = static_cast<const char*>(args.grad_y) + first * bytes;
  args.grad_weight = static_cast<char*>(args.grad_weight) + first * args.output_stride * bytes;
  if (args.grad_bias) args.grad_bias = static_cast<char*>(args.grad_bias) + first * args.bias_stride * bytes;
  args.outputs = count;
  return args;
}

void sum_gradients(const ConvArgs& args) {
  run_units(kernels().conv_weight_grad, args, args.parts * conv_ranges(args), 1);
  run_units(kernels().conv_weight_grad_sums, args, greater(divide_up(args.inputs, kGradientChannels), 1), 2);
}

}  // namespace

void conv_weight_grad(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTT");
  Tensor grad_weight = in.tensor("grad_weight"), grad_bias = in.tensor("grad_bias"), grad_y = in.tensor("grad_y"), x = in.tensor("x");
  refuse_grad({&grad_y, &x});
  ConvArgs args = conv_args(grad_weight, grad_bias, grad_y, x);
  int64_t most = lesser(outputs_at_a_time(args.outputs, args.parts * conv_products(args) * args.inputs), args.outputs);
  Scratch<float, kInlinePartial> partial(args.parts * conv_sums(some_outputs(args, 0, most)));
  args.partial = partial.data();
  for (int64_t first = 0; first < args.outputs; first += most) sum_gradients(some_outputs(args, first, lesser(most, args.outputs - first)));
}

}  // namespace fm
