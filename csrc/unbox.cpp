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

// The sizes of `like` from dimension `first` on.
bool same_sizes(const abi::Tensor& tensor, const abi::Tensor& like, int64_t first) {
  bool same = tensor.dim() == like.dim();
  for (int64_t i = first; same && i < like.dim(); ++i) same = tensor.sizes()[i] == like.sizes()[i];
  return same;
}

// The sizes of `like`, but for the batch.
void check_sizes(const abi::Tensor& tensor, const abi::Tensor& like, int64_t batch) {
  bool same = same_sizes(tensor, like, 1) && (like.dim() == 0 || tensor.sizes()[0] == batch);
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
    if (strides[i] != expected) tensor.fail("strides do not collapse to (batch, channel, position): make it contiguous");
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

int code(int64_t value, int64_t least, int64_t most, const char* name) {
  if (value < least || value > most)
    throw std::runtime_error(std::string("fm_fast: argument ") + name + ": unknown code " + std::to_string(value));
  return static_cast<int>(value);
}

int64_t whole(int64_t value, int64_t least, int64_t most, const char* name) {
  if (value < least || value > most)
    throw std::runtime_error(std::string("fm_fast: argument ") + name + ": expected " + std::to_string(least) + " to " +
                             std::to_string(most) + ", got " + std::to_string(value));
  return value;
}

Dtype dtype_of(const abi::Tensor& tensor) {
  int32_t code = tensor.dtype();
  const DtypeCode* codes = dtype_codes();
  for (int i = 0; i < 6; ++i)
    if (codes[i].code == code) return codes[i].dtype;
  tensor.fail("dtype not supported");
}

bool is_wide(const abi::Tensor& tensor) { return dtype_of(tensor) == Dtype::float64; }

Shape shape_of(const abi::Tensor& tensor) {
  int64_t dim = tensor.dim(), positions = 1;
  const int64_t* sizes = tensor.sizes();
  if (dim < 1) tensor.fail("expected at least one dimension");
  for (int64_t i = dim > 2 ? 2 : 1; i < dim; ++i) positions *= sizes[i];
  return Shape{sizes[0], dim > 2 ? sizes[1] : 1, positions, dim > 1 ? sizes[dim - 1] : 1};
}

namespace {

View view_of_batch(const abi::Tensor& tensor, const abi::Tensor& like, int64_t batch) {
  check_device(tensor);
  check_sizes(tensor, like, batch);
  int64_t dim = tensor.dim();
  const int64_t* strides = tensor.strides();
  return View{tensor.data(), dtype_of(tensor), strides[0], dim > 2 ? strides[1] : 0, collapsed_stride(tensor, dim > 2 ? 2 : 1)};
}

void check_float(const abi::Tensor& tensor, const View& view) {
  if (view.dtype == Dtype::uint8 || view.dtype == Dtype::int64) tensor.fail("expected a floating-point tensor");
}

}  // namespace

View view_of(const abi::Tensor& tensor, const abi::Tensor& like) { return view_of_batch(tensor, like, like.sizes()[0]); }

View float_view(const abi::Tensor& tensor, const abi::Tensor& like) {
  View view = view_of(tensor, like);
  check_float(tensor, view);
  return view;
}

View data_view(const abi::Tensor& tensor, const abi::Tensor& like) {
  View view = view_of(tensor, like);
  if (view.dtype == Dtype::int64) tensor.fail("expected a floating-point or uint8 tensor");
  return view;
}

View channels_view(const abi::Tensor& tensor, const abi::Tensor& like, int64_t channels) {
  check_device(tensor);
  const int64_t* sizes = tensor.sizes();
  if (!same_sizes(tensor, like, 2) || sizes[0] != like.sizes()[0] || sizes[1] != channels)
    tensor.fail(std::string("expected the shape of ") + like.name() + " with " + std::to_string(channels) + " channels");
  if (dtype_of(tensor) != dtype_of(like)) tensor.fail(std::string("expected the dtype of ") + like.name());
  View view = {tensor.data(), dtype_of(tensor), tensor.strides()[0], tensor.strides()[1], collapsed_stride(tensor, 2)};
  check_float(tensor, view);
  return view;
}

View table_view(const abi::Tensor& tensor, int64_t batch, int64_t channels) {
  if (tensor.numel() == 0) return View{nullptr, Dtype::float32, 0, 0, 0};
  check_device(tensor);
  const int64_t *sizes = tensor.sizes(), *strides = tensor.strides();
  bool rows = tensor.dim() == 2 && sizes[0] == batch && sizes[1] == channels;
  if (!rows && !(tensor.dim() == 1 && batch == 1 && sizes[0] == channels))
    tensor.fail("expected " + std::to_string(channels) + " numbers" +
                (batch == 1 ? "" : " for each of " + std::to_string(batch) + " samples"));
  View view = {tensor.data(), dtype_of(tensor), rows ? strides[0] : 0, strides[rows ? 1 : 0], 0};
  check_float(tensor, view);
  return view;
}

HalvedView halved_view(const abi::Tensor& tensor, const abi::Tensor& like) {
  int64_t batch = like.sizes()[0];
  bool halves = batch > 0 && tensor.dim() > 0 && tensor.sizes()[0] == 2 * batch;
  View view = view_of_batch(tensor, like, halves ? 2 * batch : batch);
  check_float(tensor, view);
  int64_t offset = batch * view.batch_stride * element_size(view.dtype);
  return HalvedView{view, halves ? static_cast<char*>(view.data) + offset : nullptr};
}

View float_view_or_absent(const abi::Tensor& tensor, const abi::Tensor& like) {
  if (tensor.numel() == 0) return View{nullptr, Dtype::float32, 0, 0, 0};
  return float_view(tensor, like);
}

namespace {

void* dense_data(const abi::Tensor& tensor, int64_t numel) {
  check_device(tensor);
  if (tensor.numel() != numel || !is_dense(tensor)) tensor.fail("expected a contiguous tensor of " + std::to_string(numel) + " elements");
  return tensor.data();
}

}  // namespace

void* dense_floats(const abi::Tensor& tensor, int64_t numel) {
  Dtype dtype = dtype_of(tensor);
  if (dtype != Dtype::float32 && dtype != Dtype::float64) tensor.fail("expected float32 or float64");
  return dense_data(tensor, numel);
}

double* dense_doubles(const abi::Tensor& tensor, int64_t numel) {
  if (dtype_of(tensor) != Dtype::float64) tensor.fail("expected float64");
  return static_cast<double*>(dense_floats(tensor, numel));
}

int64_t* dense_integers(const abi::Tensor& tensor) {
  if (dtype_of(tensor) != Dtype::int64 || !is_dense(tensor)) tensor.fail("expected a contiguous int64 tensor");
  return static_cast<int64_t*>(dense_data(tensor, tensor.numel()));
}

uint8_t* dense_bytes(const abi::Tensor& tensor, int64_t numel) {
  if (dtype_of(tensor) != Dtype::uint8) tensor.fail("expected uint8");
  return static_cast<uint8_t*>(dense_data(tensor, numel));
}

KeyWords key_words(const abi::Tensor& key, int64_t batch) {
  check_device(key);
  int64_t numel = key.numel();
  if (dtype_of(key) != Dtype::int64 || !is_dense(key) || (numel != 3 && numel != 2 + batch))
    key.fail("expected a contiguous int64 tensor (seed, step, first id) or (seed, step, one id a sample)");
  return KeyWords{static_cast<const int64_t*>(key.data()), numel == 2 + batch};
}

DataTransform read_transform(abi::Arguments* in) { return DataTransform{in->number(), in->number(), in->flag()}; }

namespace {

void refuse_grad(const abi::Tensor& input) {
  if (input.numel() > 0 && input.requires_grad())
    input.fail("requires grad, but the raw op has no derivative: call the public function, or use no_grad");
}

}  // namespace

void refuse_grad(std::initializer_list<const abi::Tensor*> inputs) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (const abi::Tensor* input : inputs) refuse_grad(*input);
}

void refuse_grad(const abi::TensorList& inputs) {
  if (!aoti_torch_grad_mode_is_enabled()) return;
  for (int64_t i = 0; i < inputs.size(); ++i) refuse_grad(inputs[i]);
}

}  // namespace fm
