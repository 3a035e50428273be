// The arguments of noise.
#include "calls.h"
#include "unbox.h"

namespace fm {

using abi::Arguments;
using abi::Tensor;

NoiseCall read_noise(Arguments* in) {
  Tensor out = in->tensor("out"), key = in->tensor("key");
  NoiseCall call = {};
  call.kind = static_cast<DrawKind>(code(in->integer(), 0, 3, "kind"));
  int64_t stream = whole(in->integer(), 0, kStreamLimit - 1, "stream"), index = whole(in->integer(), 0, kIndexLimit - 1, "index");
  call.purpose = purpose_of(static_cast<uint32_t>(stream), static_cast<uint32_t>(index));
  call.shape = shape_of(out);
  call.out = call.kind == DrawKind::word ? view_of(out, out) : float_view(out, out);
  if (call.kind == DrawKind::word && call.out.dtype != Dtype::int64) out.fail("words are int64");
  call.key_words = key_words(key, call.shape.batch);
  return call;
}

}  // namespace fm
