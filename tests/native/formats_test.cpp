// Dtypes, the data map, mirrored samples, and offsets beyond 2^31 elements.
#include <sys/mman.h>

#include "harness.h"

namespace test {
namespace {

// One row: x1 of one dtype through a = 1, s = 0 into x_t of another.
void convert(const Isa& isa, const void* from, Dtype from_dtype, void* to, Dtype to_dtype, int64_t count, bool wide) {
  fm::SampleArgs args = {};
  double coefficients[6] = {1, 0, 0, 0, 0, 0};
  std::vector<float> zeros(static_cast<size_t>(count));
  args.shape = Shape{1, 1, count, count};
  args.x1 = View{const_cast<void*>(from), from_dtype, count, 0, 1};
  args.x0 = View{zeros.data(), Dtype::float32, count, 0, 1};
  args.x_t = View{to, to_dtype, count, 0, 1};
  args.transform = {0.0, 256.0, false};
  args.coefficients = coefficients;
  args.coefficient_dtype = Dtype::float64;
  args.wide = wide;
  args.tiling = fm::plan(&args.shape, {&args.x_t, &args.x1, &args.x0}, fm::kDrawnNumbers);
  isa.sample(args, 0, args.tiling.units);
}

struct Format {
  Dtype dtype;
  int fraction_bits, smallest_exponent;  // of the last bit of subnormals
  uint16_t infinity;
  double largest;
};

const Format kFormats[] = {{Dtype::float16, 10, -24, 0x7c00, 65504.0}, {Dtype::bfloat16, 7, -133, 0x7f80, 3.3895313892515355e38}};

double value_of(const Format& format, uint16_t bits) {
  int fraction = bits & ((1 << format.fraction_bits) - 1), exponent = (bits & 0x7fff) >> format.fraction_bits;
  int top = format.infinity >> format.fraction_bits;
  double sign = bits & 0x8000 ? -1.0 : 1.0;
  if (exponent == top) return fraction ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(fraction, format.smallest_exponent);
  return sign * std::ldexp(fraction + (1 << format.fraction_bits), exponent - 1 + format.smallest_exponent);
}

// Round to nearest even by the C library: in units of the last place.
double rounded(const Format& format, double x) {
  if (std::isnan(x) || std::isinf(x)) return x;
  int exponent = std::ilogb(x) - format.fraction_bits;
  int last = x == 0 || exponent < format.smallest_exponent ? format.smallest_exponent : exponent;
  double result = std::ldexp(std::nearbyint(std::ldexp(x, -last)), last);
  return std::fabs(result) > format.largest ? std::copysign(INFINITY, x) : result;
}

bool same(double a, double b) { return (std::isnan(a) && std::isnan(b)) || a == b; }

void all_sixteen_bit_values(const Isa& isa, const Format& format) {
  std::vector<uint16_t> bits(65536), back(65536);
  std::vector<double> values(65536);
  for (size_t i = 0; i < 65536; ++i) bits[i] = static_cast<uint16_t>(i);
  convert(isa, bits.data(), format.dtype, values.data(), Dtype::float64, 65536, true);
  convert(isa, bits.data(), format.dtype, back.data(), format.dtype, 65536, false);
  for (size_t i = 0; i < 65536; ++i) {
    double expected = value_of(format, bits[i]);
    expect(same(values[i], expected), "widening a 16-bit value");
    expect(same(value_of(format, back[i]), expected), "a 16-bit value and back");
  }
}

void rounding(const Isa& isa, const Format& format) {
  std::vector<float> values;
  uint32_t weyl = 1;
  for (int i = 0; i < 200000; ++i) values.push_back(fm::bit_cast<float>(weyl += 0x9E3779B9u));
  for (int i = 0; i < 65536; ++i) {  // halfway cases and their neighbours
    double x = value_of(format, static_cast<uint16_t>(i)), next = value_of(format, static_cast<uint16_t>(i + 1));
    float half = static_cast<float>(0.5 * (x + next));
    for (float y : {half, std::nextafterf(half, 0.0f), std::nextafterf(half, INFINITY)}) values.push_back(y);
  }
  std::vector<uint16_t> result(values.size());
  convert(isa, values.data(), Dtype::float32, result.data(), format.dtype, static_cast<int64_t>(values.size()), false);
  for (size_t i = 0; i < values.size(); ++i)
    expect(same(value_of(format, result[i]), rounded(format, static_cast<double>(values[i]))),
           std::string(isa.name) + " rounding " + std::to_string(values[i]));
}

// uint8 data, mirrored and dequantised, in both layouts: a = 1, s = 0.
void data_map(const Isa& isa, bool channels_last) {
  constexpr int64_t B = 16, C = 3, H = 37, W = 29, P = H * W;
  std::vector<uint8_t> x1(B * C * P);
  std::vector<float> zeros(B * C * P), x_t(B * C * P), coefficients;
  for (size_t i = 0; i < x1.size(); ++i) x1[i] = static_cast<uint8_t>(i * 37 % 17);
  for (int64_t i = 0; i < B * 6; ++i) coefficients.push_back(i % 6 == 0 ? 1.0f : 0.0f);
  int64_t channel = channels_last ? 1 : P, point = channels_last ? C : 1;
  fm::SampleArgs args = {};
  args.shape = Shape{B, C, P, W};
  args.x1 = View{x1.data(), Dtype::uint8, C * P, channel, point};
  args.x0 = View{zeros.data(), Dtype::float32, C * P, P, 1};
  args.x_t = View{x_t.data(), Dtype::float32, C * P, P, 1};
  args.key = Key{11, 12, 13, 0, nullptr};
  args.transform = {0.5, 17.0, true};
  args.coefficients = coefficients.data();
  args.tiling = fm::plan(&args.shape, {&args.x_t, &args.x1, &args.x0}, fm::kDrawnNumbers);
  isa.sample(args, 0, args.tiling.units);
  int mirrored = 0;
  for (int64_t b = 0; b < B; ++b) {
    bool flip = fm::flips(fm::Stream{11, 12, 13, fm::kStreamFlip}, static_cast<uint32_t>(b), 0.5);
    mirrored += flip;
    for (int64_t c = 0; c < C; ++c)
      for (int64_t p = 0; p < P; ++p) {
        int64_t source = flip ? p / W * W + (W - 1 - p % W) : p, block = c * ((P + 3) / 4) + p / 4;
        fm::Words w =
            fm::stream_words(fm::Stream{11, 12, 13, fm::kStreamDequantise}, static_cast<uint32_t>(b), static_cast<uint32_t>(block));
        double u = fm::uniform_from_word(w.w[p % 4]), x = x1[static_cast<size_t>(b * C * P + c * channel + source * point)];
        expect(close(x_t[static_cast<size_t>((b * C + c) * P + p)], 2 * (x + u) / 17 - 1, 1e-6), std::string(isa.name) + " data map");
      }
  }
  expect(mirrored > 0 && mirrored < B, "some samples are mirrored");
}

// The last units of one very long row, and of samples very far apart: only the touched pages of the reserved memory exist.
void far_offsets(const Isa& isa) {
  constexpr int64_t kPositions = (1ll << 31) + 4096 + 5, kStride = kPositions + 3;
  size_t bytes = static_cast<size_t>(2 * kStride) * sizeof(float);
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) return expect(false, "reserving address space");
  fm::NoiseArgs args = {};
  args.shape = Shape{2, 1, kPositions, kPositions};
  args.out = View{memory, Dtype::float32, kStride, 0, 1};
  args.key = Key{1, 2, 3, 4, nullptr};
  args.tiling = fm::plan(&args.shape, {&args.out}, fm::kDrawnNumbers);
  isa.noise(args, args.tiling.units - 2, args.tiling.units);
  const float* sample = static_cast<const float*>(memory) + kStride;
  for (int64_t p = kPositions - 1029; p < kPositions; ++p)
    expect(close(sample[p], scalar_normal(args.shape, args.key, 0, 1, 0, p), 2e-6), "offset beyond 2^31 elements");
  expect(sample[kPositions] == 0.0f, "nothing behind the end");
  munmap(memory, bytes);
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  for (const Isa& isa : instruction_sets()) {
    for (const Format& format : kFormats) {
      all_sixteen_bit_values(isa, format);
      rounding(isa, format);
    }
    data_map(isa, false);
    data_map(isa, true);
    far_offsets(isa);
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
