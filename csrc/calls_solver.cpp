// Readers of calls.h for the ops of solvers: linear_step, probe and divergence_step.
#include "calls.h"
#include "step_reader.h"
#include "unbox.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

namespace {

enum ProbeKind : int { kSigns = 0, kNormals = 1 };

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
  call_.out = float_view(out_, x_);
  call_.x = float_view(x_, x_);
  call_.copy = copy_.numel() ? halved_view(copy_, x_) : HalvedView{};
  call_.wide = call_.x.dtype == Dtype::float64 || call_.out.dtype == Dtype::float64;
}

namespace {

// Which probes: the arguments that both ops share.
struct ProbeInputs {
  Tensor key, codes, rows;
  int64_t index, first, share;
};

void set_structure(const ProbeInputs& in, int64_t sample_elements, ProbeCall* call) {
  if (in.codes.numel() == 0) return;
  const int64_t *codes = dense_integers(in.codes), *rows = dense_integers(in.rows);
  if (in.codes.numel() != sample_elements) in.codes.fail("expected one code an element of a sample");
  if (in.rows.numel() < in.first + call->probes) in.rows.fail("expected one row a probe");
  call->codes = codes;
  call->rows = rows + in.first;
}

// `probes` is [K, B, ...]: probes first, first + 1, ...
ProbeCall probe_call(const Tensor& probes, const ProbeInputs& in) {
  Tensor entry = probes.entry();
  ProbeCall call = {};
  call.shape = shape_of(entry);
  call.view = float_view(entry, entry);
  call.probe_stride = probes.strides()[0];
  call.probes = probes.sizes()[0];
  call.key_words = key_words(in.key, call.shape.batch);
  call.share = whole(in.share, 1, INT64_MAX, "share");
  call.first = whole(in.first, 0, INT64_MAX - call.probes, "first");
  call.index = whole(in.index, 0, kIndexLimit - 1, "index");
  whole(call.index + (call.first + call.probes - 1) / call.share, 0, kIndexLimit - 1, "index + probes / share");
  set_structure(in, call.shape.channels * call.shape.points, &call);
  return call;
}

Evaluation read_evaluation(const Tensor& sums, const Tensor& dots, int64_t batch, int64_t groups) {
  if (dots.dim() != 2 || dots.sizes()[1] != batch) dots.fail("expected [probes, B]");
  int64_t probes = dots.sizes()[0];
  if (groups < 1 || probes % groups) throw std::runtime_error("fm_fast: argument groups: expected a divisor of the number of probes");
  return Evaluation{dense_doubles(dots, probes * batch), dense_doubles(sums, 2 * batch), batch, probes, groups, 0, 0};
}

}  // namespace

ProbeCall read_probe(Arguments* in) {
  Tensor out = in->tensor("out");
  ProbeInputs inputs = {in->tensor("key"), in->tensor("codes"), in->tensor("rows"), in->integer(), in->integer(), in->integer()};
  return probe_call(out, inputs);
}

DivergenceCall read_divergence_step(Arguments* in) {
  Tensor sums = in->tensor("sums"), dots = in->tensor("dots"), g = in->tensor("g");
  Tensor key = in->tensor("key"), codes = in->tensor("codes"), rows = in->tensor("rows");
  refuse_grad({&sums, &g});
  DivergenceCall call = {};
  call.normals = code(in->integer(), kSigns, kNormals, "kind") == kNormals;
  if (call.normals && codes.numel()) codes.fail("expected none for normal probes");
  call.probes = probe_call(g, ProbeInputs{key, codes, rows, in->integer(), in->integer(), in->integer()});
  call.evaluation = read_evaluation(sums, dots, call.probes.shape.batch, in->integer());
  call.evaluation.bias = in->number();
  call.evaluation.factor = in->number();
  int64_t last = call.probes.first + call.probes.probes;
  if (last > call.evaluation.probes) dots.fail("expected a row for each probe");
  call.last = last == call.evaluation.probes;
  call.dots = call.evaluation.dots + call.probes.first * call.evaluation.batch;
  return call;
}

}  // namespace fm
