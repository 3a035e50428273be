// The arguments of step_control.
#include "calls.h"
#include "unbox.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

int64_t rows_of(const Tensor& tensor, int64_t batch) {
  if (tensor.dim() != 2 || tensor.sizes()[1] != batch) tensor.fail("expected rows of " + std::to_string(batch) + " numbers");
  return tensor.sizes()[0];
}

int64_t* integers(const Tensor& tensor, int64_t numel) {
  if (tensor.numel() != numel) tensor.fail("expected " + std::to_string(numel) + " numbers");
  return dense_integers(tensor);
}

int64_t length_of(const Tensor& tensor, int64_t least) {
  if (tensor.dim() != 1 || tensor.sizes()[0] < least) tensor.fail("expected at least " + std::to_string(least) + " numbers");
  return tensor.sizes()[0];
}

}  // namespace

ControlCall read_step_control(Arguments* in) {
  Tensor numbers = in->tensor("numbers"), counts = in->tensor("counts"), totals = in->tensor("totals"), accepted = in->tensor("accepted");
  Tensor times = in->tensor("times"), factors = in->tensor("factors");
  Tensor means = in->tensor("means"), stops = in->tensor("stops"), nodes = in->tensor("nodes");
  ControlCall call = {};
  call.batch = accepted.dim() == 1 ? accepted.sizes()[0] : 0;
  call.parts = rows_of(means, call.batch);
  call.stop_count = length_of(stops, 2);
  call.stages = length_of(nodes, 1);
  call.numbers = dense_doubles(numbers, 3 * call.batch);
  call.counts = integers(counts, 3 * call.batch);
  call.totals = integers(totals, 3);
  call.accepted = dense_bytes(accepted, call.batch);
  call.times = dense_doubles(times, call.stages * call.batch);
  call.factors = dense_floats(factors, 2 * call.batch);
  call.wide = is_wide(factors);
  call.means = dense_doubles(means, call.parts * call.batch);
  call.stops = dense_doubles(stops, call.stop_count);
  call.nodes = dense_doubles(nodes, call.stages);
  call.order = static_cast<double>(whole(in->integer(), 1, 64, "order"));
  call.evaluations = in->integer();
  return call;
}

}  // namespace fm
