// The torch-free kernels under every instruction set of this CPU, against plain loops: sizes, layouts, skewed memory, NaN, ranges of units.
#include "harness.h"

namespace test {
namespace {

std::vector<int64_t> listed_ids() {
  std::vector<int64_t> ids = {5, 1ll << 40, -1, 77, 123456789012345, 0};
  for (int64_t id = 8; ids.size() < 130; ++id) ids.push_back(id);  // as many as the largest batch
  return ids;
}

Key listed_key() {
  static const std::vector<int64_t> ids = listed_ids();
  return Key{1u, 0x80000002u, 3u, 0, ids.data()};
}

Key running_key() {
  return Key{7u, 9u, 0xffffffffu, 4294967290ll, nullptr};  // ids wrap at 2^32
}

std::vector<Shape> shapes() {
  return {{5, 1, 1, 1},   {20, 1, 2, 2},    {20, 1, 70, 70}, {7, 1, 37, 37},   {3, 3, 64, 8},    {2, 5, 63, 9},  {2, 3, 1024, 32},
          {2, 70, 16, 4}, {1, 2, 1640, 41}, {2, 130, 9, 3},  {2, 1, 1100, 11}, {1, 17, 2052, 2}, {13, 16, 7, 7}, {3, 40, 15, 5},
          {130, 1, 3, 3}, {70, 1, 4, 4},    {0, 3, 16, 4},   {4, 1, 0, 0},     {4, 0, 16, 4}};
}

const Layout kLayouts[] = {Layout::contiguous, Layout::channels_last, Layout::sliced, Layout::transposed_batch};

std::string describe(const Isa& isa, const Shape& s, int layout) {
  return std::string(isa.name) + " [" + std::to_string(s.batch) + ", " + std::to_string(s.channels) + ", " + std::to_string(s.positions) +
         "] layout " + std::to_string(layout);
}

void known_answers() {
  const struct {
    fm::Words counter;
    uint32_t key0, key1;
    fm::Words expected;
  } cases[] = {
      {{{0, 0, 0, 0}}, 0, 0, {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}},
      {{{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u, {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}},
      {{{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822, 0x299f31d0, {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}},
  };
  for (const auto& c : cases) {
    fm::Words words = fm::philox(c.counter, c.key0, c.key1);
    expect(memcmp(&words, &c.expected, sizeof words) == 0, "Random123 known answer");
  }
}

// noise: every kind of float output.
void check_noise(const Isa& isa, const Shape& shape, int layout, const Key& key) {
  Tensor<float> out(shape, kLayouts[layout], 1);
  fm::NoiseArgs args = {};
  args.shape = shape;
  args.out = out.view();
  args.key = key;
  args.purpose = 0u | 9u << 8;
  args.tiling = fm::plan(&args.shape, {&args.out}, fm::kDrawnNumbers);
  isa.noise(args, 0, args.tiling.units);
  out.for_each([&](int64_t b, int64_t c, int64_t p, float& x) {
    expect(close(x, scalar_normal(shape, key, args.purpose, b, c, p), 2e-6), "normal " + describe(isa, shape, layout));
  });
}

// Times and coefficients of a batch that vectors do not divide, against the scalar law of each sample.
void check_schedule(const Isa& isa, const Key& key, int64_t batch, int sampler) {
  std::vector<float> t(static_cast<size_t>(batch) + 1, 0.25f), rows(6 * static_cast<size_t>(batch) + 1, -1.0f);
  fm::ScheduleCall call = {t.data(), rows.data(), false, {fm::kPathOT, 0.125, 0.0}, fm::kVelocity, {sampler, 0.5, 1.5, 0.0, 0.75}};
  fm::ScheduleArgs args = {call, key};
  isa.schedule(args, 0, batch);
  fm::Stream stream = {key.seed_low, key.seed_high, key.step, fm::kStreamTime};
  for (int64_t b = 0; b < batch; ++b) {
    double time = sampler == fm::kTimeGiven ? 0.25 : fm::draw_time(args.law, stream, id_of(key, b));
    std::string what = "time " + std::to_string(b) + " of law " + std::to_string(sampler) + " " + isa.name;
    expect(close(t[b], static_cast<float>(time), sampler == fm::kTimeLogitNormal ? 1e-6 : 0.0), what);
    expect(rows[6 * b] == t[b] && close(rows[6 * b + 1], 1.0 - 0.875 * t[b], 1e-7) && rows[6 * b + 3] == -0.875f, "row of " + what);
  }
  expect(t.back() == 0.25f && rows.back() == -1.0f, "nothing behind the batch is written");
}

struct Problem {
  Shape shape;
  Tensor<float> x1, x0, o, x_t, grad, weight;
  std::vector<float> coefficients;

  Problem(const Shape& s, int layout)
      : shape(s),
        x1(s, kLayouts[layout], 1),
        x0(s, kLayouts[(layout + 1) % 4], 2),
        o(s, kLayouts[(layout + 2) % 4], 3),
        x_t(s, kLayouts[(layout / 2) % 4], 1),
        grad(s, kLayouts[(layout + 3) % 4]),
        weight(s, Layout::contiguous) {
    x1.fill(1);
    x0.fill(2);
    o.fill(3);
    weight.fill(4);
    for (int64_t b = 0; b < s.batch; ++b) {
      for (float c : {0.3f, 0.7f, 1.25f, -0.5f, 0.75f, 2.0f}) coefficients.push_back(c + static_cast<float>(b) / 8);
      if (b % 3 == 1) coefficients[static_cast<size_t>(6 * b + 2)] = 0;  // c1: the noise of such a sample is not recovered
    }
  }

  fm::SampleArgs sample_args(const Key& key, bool given) const {
    fm::SampleArgs args = {};
    args.shape = shape;
    args.x_t = x_t.view();
    args.x1 = x1.view();
    if (given) args.x0 = x0.view();
    args.key = key;
    args.transform = {0.0, 256.0, false};
    args.coefficients = coefficients.data();
    args.tiling = fm::plan(&args.shape, {&args.x_t, &args.x1, &args.x0}, fm::kDrawnNumbers);
    return args;
  }

  fm::LossArgs loss_args(const Key& key, bool given, bool weighted) const {
    fm::LossArgs args = {};
    args.shape = shape;
    args.o = o.view();
    args.x1 = x1.view();
    args.grad = grad.view();
    if (given) args.x0 = x0.view();
    if (weighted) args.weight = weight.view();
    args.key = key;
    args.transform = {0.0, 256.0, false};
    args.coefficients = coefficients.data();
    args.grad_factor = 2.0 / 3.0;
    args.tiling = fm::plan(&args.shape, {&args.o, &args.x1, &args.x0, &args.grad, &args.weight}, fm::kDrawnNumbers);
    return args;
  }
};

void check_sample(const Isa& isa, Problem& problem, int layout, const Key& key, bool given) {
  fm::SampleArgs args = problem.sample_args(key, given);
  isa.sample(args, 0, args.tiling.units);
  problem.x_t.for_each([&](int64_t b, int64_t c, int64_t p, float& x) {
    const float* k = problem.coefficients.data() + 6 * b;
    double x0 = given ? problem.x0.at(b, c, p) : scalar_normal(problem.shape, key, 0, b, c, p);
    expect(close(x, k[0] * problem.x1.at(b, c, p) + k[1] * x0, 3e-6), "x_t " + describe(isa, problem.shape, layout));
  });
}

void check_loss(const Isa& isa, Problem& problem, int layout, const Key& key, bool given, bool weighted, bool with_x_t = false) {
  fm::LossArgs args = problem.loss_args(key, given, weighted);
  if (with_x_t) {
    args.x_t = problem.x_t.view();
    args.shape = problem.shape;  // planning edits it
    args.tiling = fm::plan(&args.shape, {&args.o, &args.x1, &args.x_t, &args.grad, &args.weight}, fm::kDrawnNumbers);
  }
  std::vector<double> partial(static_cast<size_t>(problem.shape.batch * fm::tiles_per_sample(args.tiling)), -1.0);
  args.partial = partial.data();
  isa.loss(args, 0, args.tiling.units);
  double expected = 0, total = 0;
  for (double sum : partial) total += sum;
  problem.grad.for_each([&](int64_t b, int64_t c, int64_t p, float& g) {
    const float* k = problem.coefficients.data() + 6 * b;
    double x0 = given ? problem.x0.at(b, c, p) : scalar_normal(problem.shape, key, 0, b, c, p);
    double difference = k[4] * problem.o.at(b, c, p) - (k[2] * problem.x1.at(b, c, p) + k[3] * x0);
    double weight = k[5] * (weighted ? problem.weight.at(b, c, p) : 1.0);
    expected += weight * difference * difference;
    expect(close(g, 2.0 * weight * k[4] * difference / 3.0, 1e-5), "grad " + describe(isa, problem.shape, layout));
  });
  if (problem.shape.channels * problem.shape.positions > 0)
    expect(close(total, expected, 1e-5), "loss " + describe(isa, problem.shape, layout));
}

// Units may run in any order and grouping: the results are the same bits.
void check_ranges(const Isa& isa, const Shape& shape) {
  Problem whole(shape, 0), pieces(shape, 0);
  fm::LossArgs a = whole.loss_args(running_key(), false, false), b = pieces.loss_args(running_key(), false, false);
  size_t count = static_cast<size_t>(shape.batch * fm::tiles_per_sample(a.tiling));
  std::vector<double> sums_a(count), sums_b(count);
  a.partial = sums_a.data();
  b.partial = sums_b.data();
  isa.loss(a, 0, a.tiling.units);
  for (int64_t unit = b.tiling.units; unit-- > 0;) isa.loss(b, unit, unit + 1);
  expect(sums_a == sums_b, "sums of single units " + describe(isa, shape, 0));
  whole.grad.for_each([&](int64_t i, int64_t c, int64_t p, float& g) { expect(g == pieces.grad.at(i, c, p), "gradient of single units"); });
}

void check_nan(const Isa& isa) {
  Shape shape = {2, 1, 40, 40};
  Problem problem(shape, 0);
  problem.o.at(1, 0, 7) = NAN;
  problem.x1.at(0, 0, 3) = NAN;
  fm::LossArgs args = problem.loss_args(running_key(), true, false);
  std::vector<double> partial(2);
  args.partial = partial.data();
  isa.loss(args, 0, args.tiling.units);
  expect(std::isnan(partial[0]) && std::isnan(partial[1]), "NaN reaches the loss");
  expect(std::isnan(problem.grad.at(1, 0, 7)) && !std::isnan(problem.grad.at(1, 0, 8)), "NaN stays in its element");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  known_answers();
  for (const Isa& isa : instruction_sets()) {
    for (const Shape& shape : shapes())
      for (int layout = 0; layout < 4; ++layout) {
        const Key keys[] = {listed_key(), running_key()};
        Problem problem(shape, layout);
        for (const Key& key : keys) check_noise(isa, shape, layout, key);
        check_sample(isa, problem, layout, keys[0], false);
        check_loss(isa, problem, layout, keys[0], false, layout % 2 == 1, true);
        check_sample(isa, problem, layout, keys[1], true);
        check_loss(isa, problem, layout, keys[1], false, layout % 2 == 1);
        check_loss(isa, problem, layout, keys[0], true, layout % 2 == 0);
      }
    for (int sampler : {fm::kTimeGiven, fm::kTimeUniform, fm::kTimeStratified, fm::kTimeLogitNormal}) {
      check_schedule(isa, listed_key(), 20, sampler);
      check_schedule(isa, running_key(), 133, sampler);
    }
    for (const Shape& shape : shapes()) check_ranges(isa, shape);
    check_nan(isa);
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
