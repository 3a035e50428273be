// conv3x3, from torch's arguments to its kernels.
#include "register_conv.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr int64_t kInlineTransformed = 16;  // the transformed weights lie on the heap
constexpr int64_t kUnitMultiple = 4;

// `transposed`: y is of the channels that the weight calls its inputs, and the taps are turned round, as in the gradient of x.
void read_weight(const Tensor& weight, bool transposed, Conv3x3Args* args) {
  check_device(weight);
  if (weight.dim() != 4 || dtype_of(weight) != args->dtype) weight.fail("expected [O, C, 3, 3] of the dtype of x");
  const int64_t *n = weight.sizes(), *stride = weight.strides();
  if (n[transposed] != args->outputs || n[!transposed] != args->inputs) weight.fail("expected the channels of y and x");
  if (n[2] != 3 || n[3] != 3) weight.fail("expected a size of 3");
  int64_t first = transposed ? 2 * (stride[2] + stride[3]) : 0;
  args->weight = static_cast<const char*>(weight.data()) + first * element_size(args->dtype);
  args->output_stride = stride[transposed];
  args->input_stride = stride[!transposed];
  for (int i = 0; i < 2; ++i) args->tap_stride[i] = transposed ? -stride[2 + i] : stride[2 + i];
}

// At most so many tiles a unit, and as many in each, of a number of units that two or four threads can share.
int64_t share_of(int64_t tiles, int64_t most) {
  int64_t units = divide_up(divide_up(tiles, most), kUnitMultiple) * kUnitMultiple;
  return greater(divide_up(tiles, greater(units, 1)), 1);
}

Conv3x3Args conv3x3_args(const Tensor& y, const Tensor& x, const Tensor& weight, const Tensor& bias, bool transposed) {
  Conv3x3Args args = {};
  args.dtype = convolved_dtype(x);
  args.x = channels_last(x, args.dtype);
  args.y = channels_last(y, args.dtype);
  const int64_t *n = x.sizes(), *outputs = y.sizes();
  if (outputs[0] != n[0] || outputs[2] != n[2] || outputs[3] != n[3]) y.fail("expected batch, height and width of x");
  if (n[1] % kConvOutputs) x.fail("expected a multiple of 16 channels");
  if (outputs[1] % kConvOutputs) y.fail("expected a multiple of 16 channels");
  args.batch = n[0];
  args.inputs = n[1];
  args.height = n[2];
  args.width = n[3];
  args.outputs = args.row = outputs[1];
  read_weight(weight, transposed, &args);
  args.bias = bias_of(bias, args.outputs, args.dtype);
  args.bias_stride = args.bias ? bias.strides()[0] : 0;
  return args;
}

// The convolution to `count` outputs from `first`.
Conv3x3Args some_outputs(Conv3x3Args args, int64_t first, int64_t count) {
  int64_t bytes = element_size(args.dtype);
  args.weight = static_cast<const char*>(args.weight) + first * args.output_stride * bytes;
  args.y = static_cast<char*>(args.y) + first * bytes;
  if (args.bias) args.bias = static_cast<const char*>(args.bias) + first * args.bias_stride * bytes;
  args.outputs = count;
  args.unit_tiles = share_of(tiles_of(args.batch, args.height, args.width), tiles_at_a_time(args.inputs + count));
  return args;
}

void convolve(const Conv3x3Args& args) {
  run_units(kernels().conv3x3_weights, args, args.outputs / kConvOutputs * (args.inputs / kConvOutputs), 4);
  run_units(kernels().conv3x3, args, divide_up(tiles_of(args.batch, args.height, args.width), args.unit_tiles), 1);
}

}  // namespace

void conv3x3(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTb");
  Tensor y = in.tensor("y"), x = in.tensor("x"), weight = in.tensor("weight"), bias = in.tensor("bias");
  refuse_grad({&x, &weight, &bias});
  Conv3x3Args args = conv3x3_args(y, x, weight, bias, in.flag());
  if (y.numel() == 0) return;
  int64_t most = lesser(outputs_at_a_time(args.outputs, kTileProducts * args.inputs), args.outputs);
  Scratch<float, kInlineTransformed> transformed(kTileProducts * args.inputs * most + 16);
  args.transformed = on_a_line(transformed.data());
  for (int64_t first = 0; first < args.outputs; first += most) convolve(some_outputs(args, first, lesser(most, args.outputs - first)));
}

}  // namespace fm
