// The arguments of divergence_step.
#include "read_probe.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

namespace {

enum ProbeKind : int { kSigns = 0, kNormals = 1 };

Evaluation read_evaluation(const Tensor& sums, const Tensor& dots, int64_t batch, int64_t groups) {
  if (dots.dim() != 2 || dots.sizes()[1] != batch) dots.fail("expected [probes, B]");
  int64_t probes = dots.sizes()[0];
  if (groups < 1 || probes % groups) throw std::runtime_error("fm_fast: argument groups: expected a divisor of the number of probes");
  return Evaluation{dense_doubles(dots, probes * batch), dense_doubles(sums, 2 * batch), batch, probes, groups, 0, 0};
}

}  // namespace

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
