// The kernel of the convolution's parameters under every instruction set of this CPU, against plain loops, on memory of exactly the
// elements that it may touch.
#include "harness.h"

namespace test {
namespace {

struct Case {
  int64_t batch, height, width, inputs, outputs, size, parts, unit_inputs, unit_outputs;
};

// Of one weight, or where `input` is negative of one bias.
template <class S>
double plain(const Case& c, const std::vector<S>& x, const std::vector<S>& dy, int64_t output, int64_t input, int64_t i, int64_t j) {
  double sum = 0;
  int64_t half = c.size / 2;
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.height; ++h)
      for (int64_t w = 0; w < c.width; ++w) {
        int64_t row = h + i - half, column = w + j - half;
        double gradient = at(dy, ((b * c.height + h) * c.width + w) * c.outputs + output);
        if (input < 0) {
          sum += gradient;
        } else if (row >= 0 && row < c.height && column >= 0 && column < c.width) {
          sum += gradient * at(x, ((b * c.height + row) * c.width + column) * c.inputs + input);
        }
      }
  return sum;
}

// last: half a unit in the last place of the results, of which they are rounded once.
template <class S>
void check(const Isa& isa, const Case& c, fm::Dtype dtype, double last) {
  std::vector<S> x = numbers<S>(c.batch * c.height * c.width * c.inputs, 0.3);
  std::vector<S> dy = numbers<S>(c.batch * c.height * c.width * c.outputs, 0.8);
  int64_t taps = c.size * c.size;
  std::vector<S> weight = unset<S>(c.outputs * c.inputs * taps), bias = unset<S>(c.outputs);
  fm::ConvArgs args = {};
  args.dtype = dtype;
  args.x = x.data();
  args.grad_y = dy.data();
  args.batch = c.batch, args.height = c.height, args.width = c.width, args.inputs = c.inputs, args.outputs = args.row = c.outputs,
  args.size = c.size;
  args.grad_weight = weight.data();
  args.output_stride = c.inputs * taps, args.input_stride = taps, args.tap_stride[0] = c.size, args.tap_stride[1] = 1;
  args.grad_bias = bias.data();
  args.bias_stride = 1;
  args.samples_per_part = fm::divide_up(c.batch, c.parts);
  args.parts = c.batch ? fm::divide_up(c.batch, args.samples_per_part) : 0;
  args.unit_inputs = c.unit_inputs, args.unit_outputs = c.unit_outputs;
  args.unit_tiles = 12;
  std::vector<float> partial = unset<float>(args.parts * fm::conv_sums(args));
  args.partial = partial.data();
  for (int64_t unit = 0; unit < args.parts * fm::conv_ranges(args); ++unit) isa.conv(args, unit, unit + 1);
  isa.conv_sums(args, 0, fm::divide_up(c.inputs, fm::kGradientChannels));
  double unit = 1e-6 * std::sqrt(static_cast<double>(c.batch * c.height * c.width)), plain_sum = 2.0,
         of_tiles = c.size == 3 ? 5.0 : plain_sum;
  auto is_close = [&](double found, double wanted, double units) {
    return std::fabs(found - wanted) <= units * unit + last * std::fabs(wanted);
  };
  std::string name =
      std::string(isa.name) + " convolution of " + std::to_string(c.inputs) + " to " + std::to_string(c.outputs) + " channels";
  for (int64_t output = 0; output < c.outputs; ++output) {
    expect(is_close(at(bias, output), plain(c, x, dy, output, -1, 0, 0), plain_sum), name + ", bias");
    for (int64_t input = 0; input < c.inputs; ++input)
      for (int64_t tap = 0; tap < taps; ++tap) {
        double found = at(weight, (output * c.inputs + input) * taps + tap);
        expect(is_close(found, plain(c, x, dy, output, input, tap / c.size, tap % c.size), of_tiles), name + ", weight");
      }
  }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  const std::vector<Case> cases = {{0, 3, 3, 16, 16, 3, 2, 16, 16},   {1, 1, 1, 1, 16, 1, 1, 16, 16},   {1, 1, 1, 16, 16, 3, 1, 32, 32},
                                   {3, 5, 7, 32, 32, 3, 2, 16, 16},   {2, 70, 2, 16, 16, 3, 8, 32, 32}, {2, 3, 130, 16, 48, 3, 1, 32, 32},
                                   {5, 4, 4, 40, 16, 1, 3, 16, 16},   {2, 9, 8, 48, 48, 3, 2, 32, 192}, {4, 8, 8, 16, 32, 3, 4, 32, 32},
                                   {3, 5, 7, 17, 48, 1, 2, 128, 192}, {2, 5, 3, 80, 96, 3, 1, 32, 64}};
  for (const Isa& isa : instruction_sets()) {
    for (const Case& c : cases) {
      check<float>(isa, c, fm::Dtype::float32, 0.0);
      if (c.size == 1) continue;
      check<fm::Bfloat16>(isa, c, fm::Dtype::bfloat16, 0x1p-8);
      check<fm::Float16>(isa, c, fm::Dtype::float16, 0x1p-11);
    }
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
