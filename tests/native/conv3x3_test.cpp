// The 3x3 convolution under every instruction set of this CPU, against plain loops, on memory of exactly the elements that it may touch.
#include "harness.h"

namespace test {
namespace {

struct Case {
  int64_t batch, height, width, inputs, outputs, unit_tiles;
  bool transposed;
};

template <class S>
double plain(const Case& c, const std::vector<S>& x, const std::vector<S>& weight, int64_t b, int64_t h, int64_t w, int64_t output) {
  double sum = 0;
  for (int64_t i = 0; i < 3; ++i)
    for (int64_t j = 0; j < 3; ++j) {
      int64_t row = h + i - 1, column = w + j - 1;
      if (row < 0 || row >= c.height || column < 0 || column >= c.width) continue;
      for (int64_t k = 0; k < c.inputs; ++k) {
        int64_t tap = c.transposed ? (2 - i) * 3 + 2 - j : i * 3 + j, pair = c.transposed ? k * c.outputs + output : output * c.inputs + k;
        sum += at(x, ((b * c.height + row) * c.width + column) * c.inputs + k) * at(weight, pair * 9 + tap);
      }
    }
  return sum;
}

// last: half a unit in the last place of the results, of which they are rounded once.
template <class S>
void check(const Isa& isa, const Case& c, fm::Dtype dtype, double last) {
  std::vector<S> x = numbers<S>(c.batch * c.height * c.width * c.inputs, 0.3), weight = numbers<S>(c.outputs * c.inputs * 9, 0.8);
  std::vector<S> bias = numbers<S>(c.outputs, 0.1), y = unset<S>(c.batch * c.height * c.width * c.outputs);
  std::vector<float> transformed = unset<float>(fm::kTileProducts * c.inputs * c.outputs);
  fm::Conv3x3Args args = {};
  args.dtype = dtype;
  args.x = x.data();
  args.weight = weight.data() + (c.transposed ? 8 : 0);
  args.bias = bias.data();
  args.bias_stride = 1;
  args.y = y.data();
  args.batch = c.batch, args.height = c.height, args.width = c.width, args.inputs = c.inputs, args.outputs = args.row = c.outputs;
  args.output_stride = c.transposed ? 9 : 9 * c.inputs, args.input_stride = c.transposed ? 9 * c.outputs : 9;
  args.tap_stride[0] = c.transposed ? -3 : 3, args.tap_stride[1] = c.transposed ? -1 : 1;
  args.transformed = transformed.data();
  args.unit_tiles = c.unit_tiles;
  int64_t tiles = fm::tiles_of(c.batch, c.height, c.width);
  isa.conv3x3_weights(args, 0, c.outputs / fm::kConvOutputs * (c.inputs / fm::kConvOutputs));
  for (int64_t unit = 0; unit < fm::divide_up(tiles, c.unit_tiles); ++unit) isa.conv3x3(args, unit, unit + 1);
  std::string name = std::string(isa.name) + " 3x3 convolution of " + std::to_string(c.inputs) + " to " + std::to_string(c.outputs);
  double tolerance = 4e-7 * static_cast<double>(9 * c.inputs);
  for (int64_t b = 0; b < c.batch; ++b)
    for (int64_t h = 0; h < c.height; ++h)
      for (int64_t w = 0; w < c.width; ++w)
        for (int64_t o = 0; o < c.outputs; ++o) {
          double found = at(y, ((b * c.height + h) * c.width + w) * c.outputs + o);
          double wanted = at(bias, o) + plain(c, x, weight, b, h, w, o);
          expect(std::fabs(found - wanted) <= tolerance + last * std::fabs(wanted), name);
        }
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  const std::vector<Case> cases = {{0, 3, 3, 16, 16, 12, false}, {1, 1, 1, 16, 16, 12, false},  {1, 1, 1, 16, 32, 12, true},
                                   {3, 5, 7, 48, 32, 12, false}, {3, 5, 7, 32, 48, 12, true},   {2, 1, 60, 16, 16, 12, false},
                                   {2, 60, 2, 16, 16, 24, true}, {5, 4, 4, 32, 160, 12, false}, {4, 8, 8, 16, 32, 60, false}};
  for (const Isa& isa : instruction_sets()) {
    for (const Case& c : cases) {
      check<float>(isa, c, fm::Dtype::float32, 0.0);
      check<fm::Bfloat16>(isa, c, fm::Dtype::bfloat16, 0x1p-8);
      check<fm::Float16>(isa, c, fm::Dtype::float16, 0x1p-11);
    }
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
