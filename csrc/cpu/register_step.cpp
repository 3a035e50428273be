// linear_step, from torch's arguments to its kernel.
#include "dispatch.h"
#include "elementwise.h"
#include "ops.h"
#include "scratch.h"
#include "unbox.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;
using abi::TensorList;

constexpr int64_t kInlineTerms = 8;

using Terms = Scratch<StepTerm, kInlineTerms>;

// One row of the table: the coefficient of x, then one for each k.
const double* read_coefficients(const Tensor& table, int64_t row, int64_t terms) {
  if (table.dim() != 2 || table.sizes()[1] != 1 + terms) table.fail("expected [rows, 1 + len(k)]");
  int64_t rows = table.sizes()[0];
  const double* data = dense_doubles(table, rows * (1 + terms));
  return data + whole(row, 0, rows - 1, "row") * (1 + terms);
}

void read_terms(const TensorList& k, const Tensor& x, const double* coefficients, Terms* terms) {
  for (int64_t i = 0; i < k.size(); ++i) (*terms)[i] = StepTerm{halved_view(k[i], x), coefficients[1 + i]};
}

Tiling plan_step(StepArgs* args, Terms* terms) {
  Scratch<View*, 3 + kInlineTerms> views(3 + args->count);
  int64_t count = 0;
  views[count++] = &args->out;
  views[count++] = &args->x;
  if (args->copy.first.data) views[count++] = &args->copy.first;
  for (int64_t i = 0; i < args->count; ++i) views[count++] = &(*terms)[i].k.first;
  return plan_elementwise(&args->shape, Views{views.data(), count});
}

}  // namespace

void linear_step(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTLTif");
  Tensor out = in.tensor("out"), copy = in.tensor("copy"), x = in.tensor("x");
  TensorList k = in.tensors("k");
  Tensor table = in.tensor("table");
  refuse_grad({&x});
  refuse_grad(k);
  StepArgs args;
  args.shape = shape_of(x);
  args.count = k.size();
  if (args.count < 1) throw std::runtime_error("fm_fast: argument k: expected at least one tensor");
  const double* coefficients = read_coefficients(table, in.integer(), args.count);
  args.coefficient = coefficients[0];
  args.guidance = in.number();
  args.out = float_view(out, x);
  args.x = float_view(x, x);
  args.copy = copy.numel() ? halved_view(copy, x) : HalvedView{};
  args.wide = args.x.dtype == Dtype::float64 || args.out.dtype == Dtype::float64;
  Terms terms(args.count);
  args.terms = terms.data();
  read_terms(k, x, coefficients, &terms);
  if (x.numel() == 0) return;
  args.tiling = plan_step(&args, &terms);
  run_units(kernels().linear_step, args, args.tiling.units, kGrain);
}

}  // namespace fm
