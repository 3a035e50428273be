// The arguments of probe.
#include "read_probe.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

namespace {

void set_structure(const ProbeInputs& in, int64_t sample_elements, ProbeCall* call) {
  if (in.codes.numel() == 0) return;
  const int64_t *codes = dense_integers(in.codes), *rows = dense_integers(in.rows);
  if (in.codes.numel() != sample_elements) in.codes.fail("expected one code an element of a sample");
  if (in.rows.numel() < in.first + call->probes) in.rows.fail("expected one row a probe");
  call->codes = codes;
  call->rows = rows + in.first;
}

}  // namespace

ProbeCall probe_call(const Tensor& probes, const ProbeInputs& in) {
  Tensor entry = probes.entry();
  ProbeCall call = {};
  call.shape = shape_of(entry);
  call.view = float_view(entry, entry);
  call.probe_stride = probes.strides()[0];
  call.probes = whole(probes.sizes()[0], 1, INT64_MAX, "probes");
  call.key_words = key_words(in.key, call.shape.batch);
  call.share = whole(in.share, 1, INT64_MAX, "share");
  call.first = whole(in.first, 0, INT64_MAX - call.probes, "first");
  call.index = whole(in.index, 0, kIndexLimit - 1, "index");
  whole((call.first + call.probes - 1) / call.share, 0, kIndexLimit - 1 - call.index, "index + probes / share");
  set_structure(in, call.shape.channels * call.shape.positions, &call);
  return call;
}

ProbeCall read_probe(Arguments* in) {
  Tensor out = in->tensor("out");
  ProbeInputs inputs = {in->tensor("key"), in->tensor("codes"), in->tensor("rows"), in->integer(), in->integer(), in->integer()};
  return probe_call(out, inputs);
}

}  // namespace fm
