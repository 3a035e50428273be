// From torch tensors to the views of tensors.h, with every check that memory safety needs.
// (Friendly errors are Python's work: these are the last line of defence of a raw op call.)
#pragma once

#include <initializer_list>

#include "tensors.h"
#include "torch_abi.h"

namespace fm {

// Fails unless the tensor is on the device that this library's kernels run on. Each library has its own.
void check_device(const abi::Tensor& tensor);

// An enumerated argument: values that no kernel knows must not run as something else.
int code(int64_t value, int64_t least, int64_t most, const char* name);
// A whole number in a range.
int64_t whole(int64_t value, int64_t least, int64_t most, const char* name);

// Dtype of a tensor; fails for those we do not know.
Dtype dtype_of(const abi::Tensor& tensor);
bool is_wide(const abi::Tensor& tensor);

// [B, C, P] of a data tensor.
Shape shape_of(const abi::Tensor& tensor);

// View of a tensor with the sizes of `like`; an optional tensor without elements is absent.
View view_of(const abi::Tensor& tensor, const abi::Tensor& like);
View float_view(const abi::Tensor& tensor, const abi::Tensor& like);
// Data: floating-point, or uint8, which the data map makes numbers of.
View data_view(const abi::Tensor& tensor, const abi::Tensor& like);
View float_view_or_absent(const abi::Tensor& tensor, const abi::Tensor& like);

// A tensor [B, C, ...] of the dtype and sizes of `like`, but with `channels` channels.
View channels_view(const abi::Tensor& tensor, const abi::Tensor& like, int64_t channels);

// One number a channel, [C], or one a sample and channel, [B, C], of any floating dtype and strides; absent without elements.
View table_view(const abi::Tensor& tensor, int64_t batch, int64_t channels);

// A tensor of the sizes of `like`, or with twice its batch.
HalvedView halved_view(const abi::Tensor& tensor, const abi::Tensor& like);

// Dense float32 or float64 tensors of `numel` elements: t, coef, weights.
void* dense_floats(const abi::Tensor& tensor, int64_t numel);

double* dense_doubles(const abi::Tensor& tensor, int64_t numel);
int64_t* dense_integers(const abi::Tensor& tensor);
uint8_t* dense_bytes(const abi::Tensor& tensor, int64_t numel);

// (seed, step, first id) or (seed, step, one id a sample).
KeyWords key_words(const abi::Tensor& key, int64_t batch);

// (flip, levels, dequantise)
DataTransform read_transform(abi::Arguments* in);

// Fails if gradients are being recorded and one of the inputs wants its own: raw ops have no derivative.
void refuse_grad(std::initializer_list<const abi::Tensor*> inputs);

// The same for a list.
void refuse_grad(const abi::TensorList& inputs);

}  // namespace fm
