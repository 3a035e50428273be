// attention and its backward, from torch's arguments to their kernels.
#include "dispatch.h"
#include "ops.h"
#include "run.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;

constexpr int64_t kFeatureMultiple = 16;  // whole vectors of every instruction set

// The memory of [sizes...] without gaps.
void* dense(const Tensor& tensor, std::initializer_list<int64_t> sizes, Dtype dtype) {
  check_device(tensor);
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) tensor.fail("expected another number of dimensions");
  if (dtype_of(tensor) != dtype) tensor.fail("expected another dtype");
  int64_t stride = 1, i = tensor.dim();
  while (i-- > 0) {
    int64_t size = sizes.begin()[i];
    if (tensor.sizes()[i] != size) tensor.fail("expected another shape");
    if (size > 1 && tensor.strides()[i] != stride) tensor.fail("expected memory without gaps");
    stride *= size;
  }
  return tensor.data();
}

AttentionArgs attention_args(const Tensor& joint, const Tensor& out, const Tensor& log_sums) {
  AttentionArgs args = {};
  if (joint.dim() != 5 || joint.sizes()[2] != 3) joint.fail("expected [B, N, 3, H, D]");
  const int64_t* n = joint.sizes();
  args.dtype = dtype_of(joint);
  if (args.dtype != Dtype::float32 && args.dtype != Dtype::bfloat16 && args.dtype != Dtype::float16)
    joint.fail("expected float32, bfloat16 or float16");
  if (n[4] % kFeatureMultiple) joint.fail("expected a multiple of 16 features");
  args.batch = n[0], args.pixels = n[1], args.heads = n[3], args.features = n[4];
  args.joint = dense(joint, {n[0], n[1], 3, n[3], n[4]}, args.dtype);
  args.out = dense(out, {n[0], n[1], n[3], n[4]}, args.dtype);
  args.log_sums = static_cast<float*>(dense(log_sums, {n[0], n[3], n[1]}, Dtype::float32));
  return args;
}

}  // namespace

void attention(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTT");
  Tensor out = in.tensor("out"), log_sums = in.tensor("log_sums"), joint = in.tensor("joint");
  refuse_grad({&joint});
  AttentionArgs args = attention_args(joint, out, log_sums);
  if (joint.numel() == 0) return;
  run_units(kernels().attention, args, args.batch * args.heads * divide_up(args.pixels, kAttentionQueries), 1);
}

void attention_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TTTTT");
  Tensor grad_joint = in.tensor("grad_joint"), grad_out = in.tensor("grad_out"), joint = in.tensor("joint");
  Tensor out = in.tensor("out"), log_sums = in.tensor("log_sums");
  refuse_grad({&grad_out, &joint, &out});
  AttentionArgs args = attention_args(joint, out, log_sums);
  const int64_t* n = joint.sizes();
  args.grad_out = dense(grad_out, {n[0], n[1], n[3], n[4]}, args.dtype);
  args.grad_joint = dense(grad_joint, {n[0], n[1], 3, n[3], n[4]}, args.dtype);
  if (joint.numel() == 0) return;
  run_units(kernels().attention_backward, args, args.batch * args.heads, 1);
}

}  // namespace fm
