// The kernels of the optimiser under every instruction set of this CPU, against plain loops on memory of exactly the elements they own.
#include "harness.h"

namespace test {
namespace {

constexpr double kClip = 0.5, kRate = 0.25;

// Parameters differ in how often they were updated, which the corrections of the bias show.
fm::AdamwNumbers numbers_of(size_t parameter) {
  double early = static_cast<double>(parameter % 3);
  return fm::AdamwNumbers{kClip, 0.99, 0.1, 0.98, 0.02, 5.0 - early, 1e-8, 1e-3 * (1.0 + early)};
}

uint16_t bfloat16_of(double x) {
  float value = static_cast<float>(x);
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

template <class T>
std::vector<T> numbers(int64_t count, double scale, double shift) {
  std::vector<T> found(static_cast<size_t>(count));
  for (size_t i = 0; i < found.size(); ++i) found[i] = static_cast<T>(shift + scale * std::sin(1.7 * static_cast<double>(i) + 0.3));
  return found;
}

template <class T>
struct Problem {
  static constexpr Dtype kDtype = sizeof(T) == 8 ? Dtype::float64 : Dtype::float32;
  std::vector<std::vector<T>> p, g;
  std::vector<std::vector<uint16_t>> copies;
  std::vector<fm::Parameter> parameters;
  std::vector<fm::AdamwNumbers> rows;
  std::vector<T> m, v, averages;
  int64_t length = 0;

  explicit Problem(const std::vector<int64_t>& counts) {
    for (int64_t count : counts) {
      p.push_back(numbers<T>(count, 1.0, 0.0));
      g.push_back(numbers<T>(count, 2.0, 0.5));
      copies.emplace_back(static_cast<size_t>(count));
    }
    for (size_t i = 0; i < counts.size(); ++i) {
      bool half = i % 2 == 1, moves = i % 5 != 4;
      parameters.push_back(fm::Parameter{length, counts[i], 0, p[i].data(), moves ? g[i].data() : nullptr, kDtype,
                                         half ? copies[i].data() : nullptr, Dtype::bfloat16});
      rows.push_back(numbers_of(i));
      length += counts[i] + static_cast<int64_t>(i % 3);
    }
    m = numbers<T>(length, 0.1, 0.0);
    v = numbers<T>(length, 0.1, 0.2);
    averages = numbers<T>(2 * length, 1.0, 0.0);
  }

  fm::ParameterRange range() { return fm::ParameterRange{parameters.data(), static_cast<int64_t>(parameters.size()), length}; }
  int64_t units() const { return fm::divide_up(length, fm::kTileElements); }
};

template <class T>
void check_update(const Isa& isa, const std::vector<int64_t>& counts, int64_t parts) {
  Problem<T> before(counts), after(counts);
  const double rates[2] = {kRate, 1.0};
  fm::AdamwArgs args = {after.range(), after.rows.data(), after.m.data(), after.v.data(), after.averages.data(), 2, rates, sizeof(T) == 8};
  for (int64_t i = 0; i < parts; ++i) isa.adamw(args, after.units() * i / parts, after.units() * (i + 1) / parts);
  const double tolerance = sizeof(T) == 8 ? 1e-14 : 2e-6;
  std::vector<bool> owned(static_cast<size_t>(before.length));
  for (size_t i = 0; i < counts.size(); ++i) {
    const fm::Parameter& parameter = before.parameters[i];
    for (size_t j = 0; j < static_cast<size_t>(counts[i]); ++j) {
      size_t at = static_cast<size_t>(parameter.offset) + j;
      double g = kClip * before.g[i][j], m = before.m[at], v = before.v[at], p = before.p[i][j];
      owned[at] = true;
      if (parameter.gradient) {
        m += 0.1 * (g - m);
        v = 0.98 * v + 0.02 * g * g;
        p = 0.99 * p - before.rows[i].step_size * m / (before.rows[i].root_scale * std::sqrt(v) + 1e-8);
      }
      double first = before.averages[at];
      bool same = close(after.m[at], m, tolerance) && close(after.v[at], v, tolerance) && close(after.p[i][j], p, tolerance) &&
                  close(after.averages[at], first + kRate * (p - first), tolerance) &&
                  close(after.averages[at + static_cast<size_t>(before.length)], p, tolerance);
      bool rounded = !parameter.copy || after.copies[i][j] == bfloat16_of(after.p[i][j]);
      expect(same && rounded, std::string(isa.name) + " update of parameter " + std::to_string(i));
    }
  }
  for (size_t at = 0; at < owned.size(); ++at)
    expect(owned[at] || (after.m[at] == before.m[at] && after.averages[at] == before.averages[at]), "memory between the parameters");
}

template <class T>
void check_norm(const Isa& isa, const std::vector<int64_t>& counts) {
  Problem<T> problem(counts);
  double expected = 0, found = 0;
  for (size_t i = 0; i < counts.size(); ++i) {
    problem.parameters[i].gradient = problem.g[i].data();
    for (T x : problem.g[i]) expected += static_cast<double>(x) * static_cast<double>(x);
  }
  std::vector<double> partial(static_cast<size_t>(problem.units()));
  isa.norm(fm::GradientNormArgs{problem.range(), partial.data()}, 0, problem.units());
  for (double sum : partial) found += sum;
  expect(close(found, expected, 1e-13), std::string(isa.name) + " norm");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  const std::vector<std::vector<int64_t>> cases = {{},     {0},    {1},         {0, 5, 0, 17, 31},
                                                   {1024}, {1025}, {1000, 100}, {3, 5000, 0, 7, 1, 2047, 64, 1, 1, 1}};
  for (const Isa& isa : instruction_sets()) {
    for (const std::vector<int64_t>& counts : cases) {
      for (int64_t parts : {1, 2, 3}) {
        check_update<float>(isa, counts, parts);
        check_update<double>(isa, counts, parts);
      }
      check_norm<float>(isa, counts);
      check_norm<double>(isa, counts);
    }
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
