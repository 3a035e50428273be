// Checks and conversions of unbox.h.
#include "unbox.h"

namespace fm {
namespace {

struct DtypeCode {
  int32_t code;
  Dtype dtype;
};

const DtypeCode* dtype_codes() {
  static const DtypeCode codes[6] = {{aoti_torch_dtype_float32(), Dtype::float32},   {aoti_torch_dtype_float64(), Dtype::float64},
                                     {aoti_torch_dtype_bfloat16(), Dtype::bfloat16}, {aoti_torch_dtype_float16(), Dtype::float16},
                                     {aoti_torch_dtype_uint8(), Dtype::uint8},       {aoti_torch_dtype_int64(), Dtype::int64}};
  return codes;
}

void check_device(const abi::Tensor& tensor) {
  static const int32_t cpu = aoti_torch_device_type_cpu();
  if (tensor.device_type() != cpu) tensor.fail("expected a CPU tensor");
}

void check_same_sizes(const abi::Tensor& tensor, const abi::Tensor& like) {
  int64_t dim = like.dim();
  bool same = tensor.dim() == dim;
  const int64_t *a = tensor.sizes(), *b = like.sizes();
  for (int64_t i = 0; same && i < dim; ++i) same = a[i] == b[i];
  if (!same) tensor.fail(std::string("expected the shape of ") + like.name());
}

// One stride for dimensions first..dim-1, if they collapse. Dimensions of size 1 have no say.
int64_t collapsed_stride(const abi::Tensor& tensor, int64_t first) {
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  int64_t stride = 1, expected = -1;
  if (tensor.numel() == 0) return stride;  // strides of no elements mean nothing
  for (int64_t i = tensor.dim() - 1; i >= first; --i) {
    if (sizes[i] == 1) continue;
    if (expected < 0) stride = expected = strides[i];
    if (strides[i] != expected) tensor.fail("strides do not collapse to (batch, channel, point): make it contiguous");
    expected *= sizes[i];
  }
  return stride;
}

bool is_dense(const abi::Tensor& tensor) {
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  int64_t expected = 1;
  if (tensor.numel() == 0) return true;
  for (int64_t i = tensor.dim() - 1; i >= 0; --i) {
    if (sizes[i] != 1 && strides[i] != expected) return false;
    expected *= sizes[i];
  }
  return true;
}

}  // namespace

Dtype dtype_of(const abi::Tensor& tensor) {
  int32_t code = tensor.dtype();
  const DtypeCode* codes = dtype_codes();
  for (int i = 0; i < 6; ++i)
    if (codes[i].code == code) return codes[i].dtype;
  tensor.fail("dtype not supported");
}

bool is_wide(const abi::Tensor& tensor) { return dtype_of(tensor) == Dtype::float64; }

Shape shape_of(const abi::Tensor& tensor) {
  int64_t dim = tensor.dim(), points = 1;
  const int64_t* sizes = tensor.sizes();
  if (dim < 1) tensor.fail("expected at least one dimension");
  for (int64_t i = dim > 2 ? 2 : 1; i < dim; ++i) points *= sizes[i];
  return Shape{sizes[0], dim > 2 ? sizes[1] : 1, points, dim > 1 ? sizes[dim - 1] : 1};
}

View view_of(const abi::Tensor& tensor, const abi::Tensor& like) {
  check_device(tensor);
  check_same_sizes(tensor, like);
  int64_t dim = tensor.dim();
  const int64_t* strides = tensor.strides();
  return View{tensor.data(), dtype_of(tensor), strides[0], dim > 2 ? strides[1] : 0, collapsed_stride(tensor, dim > 2 ? 2 : 1)};
}

View float_view(const abi::Tensor& tensor, const abi::Tensor& like) {
  View view = view_of(tensor, like);
  if (view.dtype == Dtype::uint8 || view.dtype == Dtype::int64) tensor.fail("expected a floating-point tensor");
  return view;
}

View float_view_or_absent(const abi::Tensor& tensor, const abi::Tensor& like) {
  if (tensor.numel() == 0) return View{nullptr, Dtype::float32, 0, 0, 0};
  return float_view(tensor, like);
}

void* dense_floats(const abi::Tensor& tensor, int64_t numel) {
  check_device(tensor);
  Dtype dtype = dtype_of(tensor);
  if (dtype != Dtype::float32 && dtype != Dtype::float64) tensor.fail("expected float32 or float64");
  if (tensor.numel() != numel || !is_dense(tensor)) tensor.fail("expected a contiguous tensor of " + std::to_string(numel) + " elements");
  return tensor.data();
}

Key key_of(const abi::Tensor& key, int64_t batch) {
  check_device(key);
  int64_t numel = key.numel();
  if (dtype_of(key) != Dtype::int64 || !is_dense(key) || (numel != 3 && numel != 2 + batch))
    key.fail("expected a contiguous int64 tensor (seed, step, first id) or (seed, step, one id a sample)");
  const int64_t* words = static_cast<const int64_t*>(key.data());
  uint64_t seed = static_cast<uint64_t>(words[0]);
  bool listed = numel == 2 + batch;
  return Key{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(words[1]), listed ? 0 : words[2],
             listed ? words + 2 : nullptr};
}

void refuse_grad(std::initializer_list<const abi::Tensor*> inputs) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (const abi::Tensor* input : inputs)
    if (input->numel() > 0 && input->requires_grad())
      input->fail("requires grad, but the raw op has no derivative: call the public function, or use no_grad");
}

}  // namespace fm
