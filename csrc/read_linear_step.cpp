// The arguments of linear_step.
#include "read_linear_step.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

namespace {

// One row of the table: the coefficient of x, then one for each k.
const double* read_coefficients(const Tensor& table, int64_t row, int64_t terms) {
  if (table.dim() != 2 || table.sizes()[1] != 1 + terms) table.fail("expected [rows, 1 + len(k)]");
  int64_t rows = table.sizes()[0];
  const double* data = dense_doubles(table, rows * (1 + terms));
  return data + whole(row, 0, rows - 1, "row") * (1 + terms);
}

}  // namespace

StepReader::StepReader(Arguments* in) : out_(in->tensor("out")), copy_(in->tensor("copy")), x_(in->tensor("x")), k_(in->tensors("k")) {
  Tensor table = in->tensor("table");
  refuse_grad({&x_});
  refuse_grad(k_);
  call_.shape = shape_of(x_);
  call_.count = k_.size();
  if (call_.count < 1) throw std::runtime_error("fm_fast: argument k: expected at least one tensor");
  call_.coefficients = read_coefficients(table, in->integer(), call_.count);
  call_.guidance = in->number();
  kept_ = in->optional_tensor("kept");
  call_.out = float_view(out_, x_);
  call_.x = float_view(x_, x_);
  if (kept_) call_.kept = float_view(*kept_, x_);
  call_.copy = copy_.numel() ? halved_view(copy_, x_) : HalvedView{};
  if (kept_) float_view(k_[call_.count - 1], x_);  // a doubled k is not one that can be kept
  call_.wide = call_.x.dtype == Dtype::float64 || call_.out.dtype == Dtype::float64;
}

}  // namespace fm
