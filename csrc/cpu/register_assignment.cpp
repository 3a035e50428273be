// assignment, from torch's arguments to its kernel.
#include <math.h>

#include "../unbox.h"
#include "dispatch.h"
#include "ops.h"
#include "scratch.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr double kLargest = 1e300;  // sums of a few of them are finite
constexpr int64_t kInlineNumbers = 1024;

template <class T>
bool are_finite(const void* data, int64_t count) {
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) finite &= fabs(static_cast<double>(static_cast<const T*>(data)[i])) < kLargest;
  return finite;
}

void check_finite(const Tensor& tensor, const void* data, int64_t count) {
  if (!(is_wide(tensor) ? are_finite<double>(data, count) : are_finite<float>(data, count)))
    tensor.fail("expected finite numbers below 1e300");
}

}  // namespace

void assignment(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTT");
  Tensor columns = in.tensor("columns"), costs = in.tensor("costs"), guess = in.tensor("guess");
  int64_t n = columns.dim() == 1 ? columns.sizes()[0] : 0;
  if (costs.dim() != 2 || costs.sizes()[0] != n || costs.sizes()[1] != n) costs.fail("expected a row and a column for each of columns");
  AssignmentArgs args = {};
  args.costs = dense_floats(costs, n * n);
  args.wide = is_wide(costs);
  args.n = n;
  args.guess = dense_doubles(guess, n);
  args.columns = dense_integers(columns);
  check_finite(costs, args.costs, n * n);
  check_finite(guess, args.guess, n);
  Scratch<double, kInlineNumbers> numbers(4 * n);
  Scratch<int64_t, kInlineNumbers> places(5 * n);
  double** doubles[] = {&args.prices, &args.shifted, &args.distances, &args.settled_distances};
  int64_t** integers[] = {&args.rows, &args.parents, &args.settled, &args.waiting, &args.free_columns};
  for (int64_t i = 0; i < 4; ++i) *doubles[i] = numbers.data() + i * n;
  for (int64_t i = 0; i < 5; ++i) *integers[i] = places.data() + i * n;
  kernels().assignment(args);
}

}  // namespace fm
