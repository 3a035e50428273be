// The assignment under every instruction set of this CPU: the prices that it ends with prove that its sum is the least (linear programming
// duality: no assignment costs less than sum_j v_j + sum_i min_j (cost_ij - v_j)), and every instruction set finds the same columns.
#include "harness.h"

namespace test {
namespace {

// One number of a Weyl sequence in [-1, 1).
double weyl(uint32_t* state) { return static_cast<double>(*state += 0x9E3779B9u) / 2147483648.0 - 1.0; }

// Products of points of a few dimensions, or (0) whole numbers with many ties.
template <class T>
std::vector<T> costs_of(int64_t n, int dimensions) {
  uint32_t state = static_cast<uint32_t>(n);
  std::vector<double> points(static_cast<size_t>(2 * n * dimensions));
  for (double& x : points) x = weyl(&state);
  std::vector<T> costs(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double cost = dimensions ? 0 : std::floor(3 * weyl(&state));
      for (int64_t k = 0; k < dimensions; ++k)
        cost -= points[static_cast<size_t>(i * dimensions + k)] * points[static_cast<size_t>((n + j) * dimensions + k)];
      costs[static_cast<size_t>(i * n + j)] = static_cast<T>(cost);
    }
  return costs;
}

template <class T>
struct Problem {
  int64_t n;
  std::vector<T> costs;
  std::vector<double> guess, numbers;
  std::vector<int64_t> columns, places;

  Problem(int64_t size, int dimensions)
      : n(size), costs(costs_of<T>(size, dimensions)), guess(at(size)), numbers(at(4 * size)), columns(at(size)), places(at(5 * size)) {
    uint32_t state = 7;
    for (double& price : guess) price = weyl(&state);
  }

  static size_t at(int64_t count) { return static_cast<size_t>(count); }

  void solve(const Isa& isa) {
    double* d = numbers.data();
    int64_t* p = places.data();
    isa.assignment(fm::AssignmentArgs{costs.data(), sizeof(T) == 8, n, guess.data(), columns.data(), d, d + n, d + 2 * n, d + 3 * n, p,
                                      p + n, p + 2 * n, p + 3 * n, p + 4 * n});
  }

  double cost(int64_t i, int64_t j) const { return static_cast<double>(costs[at(i * n + j)]); }

  double sum() const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += cost(i, columns[at(i)]);
    return sum;
  }

  double lower_bound() const {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) {
      double least = cost(i, 0) - numbers[0];
      for (int64_t j = 1; j < n; ++j) least = std::fmin(least, cost(i, j) - numbers[at(j)]);
      sum += numbers[at(i)] + least;
    }
    return sum;
  }
};

template <class T>
void check(const Isa& isa, int64_t n, int dimensions) {
  Problem<T> problem(n, dimensions), portable(n, dimensions);
  problem.solve(isa);
  portable.solve(instruction_sets()[0]);
  std::string name = std::string(isa.name) + " assignment of " + std::to_string(n) + " in " + std::to_string(dimensions);
  std::vector<bool> taken(problem.at(n));
  for (int64_t column : problem.columns) {
    expect(column >= 0 && column < n && !taken[problem.at(column)], name + ": each column once");
    taken[problem.at(column)] = true;
  }
  if (n > 1) expect(close(problem.sum(), problem.lower_bound(), 1e-12 * static_cast<double>(n)), name + ": optimal");
  expect(problem.columns == portable.columns, name + ": the same everywhere");
}

}  // namespace
}  // namespace test

int main() {
  using namespace test;
  for (const Isa& isa : instruction_sets()) {
    for (int64_t n : {0, 1, 2, 3, 7, 8, 9, 16, 33, 100, 257})
      for (int dimensions : {0, 1, 2, 20}) {
        check<float>(isa, n, dimensions);
        check<double>(isa, n, dimensions);
      }
    printf("%s\n", isa.name);
  }
  return failures ? 1 : 0;
}
