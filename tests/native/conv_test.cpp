// The kernel of the convolution's parameters under every instruction set of this CPU, against plain loops, on memory of exactly the
// elements that it may touch.
#include "harness.h"

namespace test {
namespace {

struct Case {
  int64_t batch, height, width, inputs, outputs, size, parts, unit_blocks;
};

std::vector<float> numbers(int64_t count, double phase) {
  std::vector<float> found(static_cast<size_t>(count));
  for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<float>(std::sin(1.7 * static_cast<double>(i) + phase));
  return found;
}

// Of one weight, or where `input` is negative of one bias.
double plain(const Case& c, const std::vector<float>& x, const std::vector<float>& dy, int64_t output, int64_t input, int64_t i,
             int64_t j) {
  double sum = 0;
  int64_t half = c.size / 2;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.height; ++h)
      for (int64_t w = 0; w < c.width; ++w) {
        int64_t row = h + i - half, column = w + j - half;
        double gradient = static_cast<double>(dy[static_cast<size_t>(((b * c.height + h) * c.width + w) * c.outputs + output)]);
        if (input < 0) {
          sum += gradient;
        } else if (row >= 0 && row < c.height && column >= 0 && column < c.width) {
          sum += gradient * static_cast<double>(x[static_cast<size_t>(((b * c.height + row) * c.width + column) * c.inputs + input)]);
        }
      }
  return sum;
}

void check(const Isa& isa, const Case& c) {
  std::vector<float> x = numbers(c.batch * c.height * c.width * c.inputs, 0.3), dy = numbers(c.batch * c.height * c.width * c.outputs, 0.8);
  int64_t taps = c.size * c.size, blocks = c.outputs / fm::kConvOutputs;
  std::vector<float> weight(static_cast<size_t>(c.outputs * c.inputs * taps), NAN), bias(static_cast<size_t>(c.outputs), NAN);
  fm::ConvArgs args = {};
  args.x = x.data();
  args.grad_y = dy.data();
  args.batch = c.batch, args.height = c.height, args.width = c.width, args.inputs = c.inputs, args.outputs = c.outputs, args.size = c.size;
  args.grad_weight = weight.data();
  args.output_stride = c.inputs * taps, args.input_stride = taps, args.tap_stride[0] = c.size, args.tap_stride[1] = 1;
  args.grad_bias = bias.data();
  args.bias_stride = 1;
  args.samples_per_part = fm::divide_up(c.batch, c.parts);
  args.parts = c.batch ? fm::divide_up(c.batch, args.samples_per_part) : 0;
  args.unit_blocks = c.unit_blocks;
  args.unit_tiles = 12;
  std::vector<float> partial(static_cast<size_t>(args.parts * blocks * fm::conv_block_sums(args)), NAN);
  args.partial = partial.data();
  int64_t units = args.parts * fm::divide_up(blocks, c.unit_blocks);
  for (int64_t unit = 0; unit < units; ++unit) isa.conv(args, unit, unit + 1);
  isa.conv_sums(args, 0, blocks * (c.inputs + 1));
  double tolerance = 2e-6 * std::sqrt(static_cast<double>(c.batch * c.height * c.width));
  std::string name =
      std::string(isa.name) + " convolution of " + std::to_string(c.inputs) + " to " + std::to_string(c.outputs) + " channels";
  for (int64_t output = 0; output < c.outputs; ++output) {
    expect(std::fabs(static_cast<double>(bias[static_cast<size_t>(output)]) - plain(c, x, dy, output, -1, 0, 0)) <= tolerance,
           name + ", bias");
    for (int64_t input = 0; input < c.inputs; ++input)
      for (int64_t tap = 0; tap < taps; ++tap) {
        double found = static_cast<double>(weight[static_cast<size_t>((output * c.inputs + input) * taps + tap)]);
        expect(std::fabs(found - plain(c, x, dy, output, input, tap / c.size, tap % c.size)) <= tolerance, name + ", weight");
      }
  }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  const std::vector<Case> cases = {{0, 3, 3, 16, 16, 3, 2, 1}, {1, 1, 1, 1, 16, 1, 1, 1},   {1, 1, 1, 16, 16, 3, 1, 2},
                                   {3, 5, 7, 32, 32, 3, 2, 1}, {2, 70, 2, 16, 16, 3, 8, 2}, {2, 3, 130, 16, 48, 3, 1, 2},
                                   {5, 4, 4, 40, 16, 1, 3, 1}, {2, 9, 8, 48, 48, 3, 2, 12}, {4, 8, 8, 16, 32, 3, 4, 2},
                                   {3, 5, 7, 17, 48, 1, 2, 12}};
  for (const Isa& isa : instruction_sets()) {
    for (const Case& c : cases) check(isa, c);
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
