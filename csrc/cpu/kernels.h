// The torch-free layer of the CPU: what its kernels read and write, and how work is cut into units.
// Plain data only: this header is compiled under several instruction sets.
#pragma once

#include "../calls.h"

namespace fm {

// A unit is the smallest piece of work given to a thread: some whole samples, or one tile of one sample.
// The cut depends on shapes and layouts only, never on the number of threads, and so do all sums.
struct Tiling {
  int64_t tile_channels, tile_positions, channel_tiles, position_tiles, samples_per_unit, units;
  int64_t noise_rows;  // channels merged into one row although gaps lie between their numbers as drawn, else 1
};

struct NoiseArgs : NoiseCall {
  Tiling tiling;
  Key key;
};

// Units are samples.
struct ScheduleArgs : ScheduleCall {
  Key key;
};

struct SampleArgs : SampleCall {
  Tiling tiling;
  Key key;
};

struct LossArgs : LossCall {
  Tiling tiling;
  Key key;
  double* partial;  // [B, channel_tiles * position_tiles] sums of the loss, or nullptr
};

struct StepArgs : StepCall {
  Tiling tiling;
  const StepTerm* terms;
  double coefficient;  // of x
};

struct ErrorArgs {
  StepArgs error;  // without `out` and `copy`
  View y, end;
  double rtol, atol;
  double* partial;  // [B, tiles of a sample] sums of squares
};

// Bit p % 128 of block c * ceil(P / 128) + p / 128 of a probe: the parity of codes[c * P + p] & its row.
struct ParityArgs {
  const int64_t *codes, *rows;
  int64_t channels, positions;
  uint32_t* parities;  // four words a block
};

// Units count those of all probes, `tiling` cuts one.
struct ProbeArgs : ProbeCall {
  Tiling tiling;
  Key key;
  const uint32_t* parities;  // or nullptr
};

struct DivergenceArgs {
  ProbeArgs probes;
  bool normals;
  double* partial;  // [probes, B, tiles of a sample]
};

// A parameter of the network, as a run in the order of its memory; its moments and averages begin at `offset` of their flat tensors.
struct Parameter {
  int64_t offset, count;
  int group;             // row of the settings
  void* value;           // float or double
  const void* gradient;  // nullptr: none, the weights stay
  Dtype gradient_dtype;
  void* copy;  // or nullptr
  Dtype copy_dtype;
};

// Parameters in the order of their offsets, which divide `length` positions among them.
struct ParameterRange {
  const Parameter* parameters;
  int64_t count, length;
};

// The numbers of one parameter and one step: everything an element needs beyond its own memory.
struct AdamwNumbers {
  double clip;         // factor of the gradient
  double keep;         // 1 - learning rate times weight decay
  double mean_rate;    // 1 - beta1
  double square_keep;  // beta2
  double square_rate;  // 1 - beta2
  double root_scale;   // 1 / sqrt(1 - beta2^n)
  double epsilon;
  double step_size;  // learning rate / (1 - beta1^n)
};

struct GradientNormArgs {
  ParameterRange range;
  double* partial;  // one sum of squares a unit
};

struct AdamwArgs {
  ParameterRange range;
  const AdamwNumbers* numbers;  // one row a parameter
  void *mean, *square;          // [length]
  void* averages;               // [average_count, length]
  int64_t average_count;
  const double* average_rates;  // 1 - decay of each average
  bool wide;
};

// y = mask silu(GroupNorm([x, second] + embedding) (1 + scale) + shift). A unit is some whole groups of one sample.
struct NormArgs {
  Shape shape;             // of both inputs together
  View x, second, y;       // second may be absent; y is not used by the backward pass
  int64_t first_channels;  // of x
  int64_t groups, unit_groups;
  View weight, bias;             // [C]: batch stride 0
  View embedding, scale, shift;  // [B, C], may be absent
  void *mean, *rstd;             // [B, groups] in the compute type
  Key key;
  double eps, dropout;  // dropout 0: no mask
  uint32_t purpose;
  bool activation;
};

struct NormGradArgs {
  NormArgs norm;
  View grad_y, grad_x, grad_second;
  double* sums;  // [B, 3, C]: sums over the positions of dz, dz xhat and dx
};

// A convolution of size 1 or 3 that keeps height and width; x [B, H, W, C], grad_y [B, H, W, O], O a multiple of kConvOutputs. All tensors
// are of `dtype`: float32, or of size 3 also bfloat16 or float16.
struct ConvArgs {
  Dtype dtype;
  const void *x, *grad_y;
  int64_t batch, height, width, inputs, outputs, size;
  int64_t row;        // from one position of grad_y to the next: of all outputs, where these are some of them
  void* grad_weight;  // [O, C, size, size], by strides
  int64_t output_stride, input_stride, tap_stride[2];
  void* grad_bias;  // [O], or nullptr
  int64_t bias_stride;
  float* partial;  // of `parts` parts of the batch: [products, C, O], then the bias [O]
  int64_t parts, samples_per_part;
  int64_t unit_inputs, unit_outputs;
  int64_t unit_tiles;  // of size 3, at a time
};

constexpr int64_t kConvOutputs = 16;       // of a block
constexpr int64_t kGradientChannels = 16;  // input channels of a unit of conv_weight_grad_sums

// Of Winograd's algorithm (winograd.h): a tile is 4x4 results, whose 6x6 inputs are transformed into as many products.
constexpr int kTileSide = 4;
constexpr int64_t kTileProducts = 36;

// Sums of an input and an output channel: of size 3 those of Winograd's algorithm.
static inline int64_t conv_products(const ConvArgs& args) { return args.size == 1 ? 1 : kTileProducts; }

// Of the inputs at least one, which the bias is summed with.
static inline int64_t conv_input_ranges(const ConvArgs& args) { return args.inputs > 0 ? (args.inputs - 1) / args.unit_inputs + 1 : 1; }

// Pairs of input and output channels, each of which is a unit of every part.
static inline int64_t conv_ranges(const ConvArgs& args) {
  return conv_input_ranges(args) * ((args.outputs + args.unit_outputs - 1) / args.unit_outputs);
}

static inline int64_t conv_sums(const ConvArgs& args) { return (conv_products(args) * args.inputs + 1) * args.outputs; }

// A convolution of size 3 that keeps height and width: x [B, H, W, C] to y [B, H, W, O], C and O multiples of kConvOutputs. x, y, weight
// and bias are of `dtype`: float32, bfloat16 or float16.
struct Conv3x3Args {
  Dtype dtype;
  const void *x, *weight,
      *bias;  // weight [O, C, 3, 3] by strides, which are negative where the taps are turned round; bias may be nullptr
  void* y;
  int64_t batch, height, width, inputs, outputs;
  int64_t output_stride, input_stride, tap_stride[2], bias_stride;
  int64_t row;         // from one position of y to the next: of all outputs, where these are some of them
  float* transformed;  // weights: kTileProducts times C O numbers
  int64_t unit_tiles;
};

constexpr int64_t kAttentionQueries = 192;  // a unit of attention's forward pass

// Self-attention of N pixels: joint [B, N, 3, H, D] holds queries, keys and values, out [B, N, H, D]; D is a multiple of 16.
struct AttentionArgs {
  const void* joint;
  Dtype dtype;
  int64_t batch, pixels, heads, features;
  void* out;        // read by the backward pass
  float* log_sums;  // [B, H, N]: log sum exp of the scores of each query
  const void* grad_out;
  void* grad_joint;
};

constexpr int64_t kControlSamples = 16;  // a unit of step_control

// A different column for each row, such that the sum of the costs is the least.
struct AssignmentArgs {
  const void* costs;  // [n, n], float32 or float64, finite
  bool wide;
  int64_t n;
  const double* guess;  // of the columns' prices up to a factor
  int64_t* columns;     // of each row: the result
  // Working memory, n numbers each:
  double *prices, *shifted, *distances, *settled_distances;
  int64_t *rows, *parents, *settled, *waiting, *free_columns;
};

// Run units begin <= i < end.
using NoiseKernel = void (*)(const NoiseArgs&, int64_t begin, int64_t end);
using ScheduleKernel = void (*)(const ScheduleArgs&, int64_t begin, int64_t end);
using SampleKernel = void (*)(const SampleArgs&, int64_t begin, int64_t end);
using LossKernel = void (*)(const LossArgs&, int64_t begin, int64_t end);
using StepKernel = void (*)(const StepArgs&, int64_t begin, int64_t end);
using ErrorKernel = void (*)(const ErrorArgs&, int64_t begin, int64_t end);
using ControlKernel = void (*)(const ControlCall&, int64_t begin, int64_t end);
using ParityKernel = void (*)(const ParityArgs&, int64_t begin, int64_t end);
using ProbeKernel = void (*)(const ProbeArgs&, int64_t begin, int64_t end);
using DivergenceKernel = void (*)(const DivergenceArgs&, int64_t begin, int64_t end);
using GradientNormKernel = void (*)(const GradientNormArgs&, int64_t begin, int64_t end);
using AdamwKernel = void (*)(const AdamwArgs&, int64_t begin, int64_t end);
using NormKernel = void (*)(const NormArgs&, int64_t begin, int64_t end);
using NormGradKernel = void (*)(const NormGradArgs&, int64_t begin, int64_t end);
using ConvKernel = void (*)(const ConvArgs&, int64_t begin, int64_t end);
using AssignmentKernel = void (*)(const AssignmentArgs&);
using AttentionKernel = void (*)(const AttentionArgs&, int64_t begin, int64_t end);
using Conv3x3Kernel = void (*)(const Conv3x3Args&, int64_t begin, int64_t end);

#define FM_DECLARE_KERNELS(isa)                                                              \
  namespace isa {                                                                            \
  void noise_units(const NoiseArgs& args, int64_t begin, int64_t end);                       \
  void schedule_units(const ScheduleArgs& args, int64_t begin, int64_t end);                 \
  void path_sample_units(const SampleArgs& args, int64_t begin, int64_t end);                \
  void path_loss_units(const LossArgs& args, int64_t begin, int64_t end);                    \
  void linear_step_units(const StepArgs& args, int64_t begin, int64_t end);                  \
  void step_error_units(const ErrorArgs& args, int64_t begin, int64_t end);                  \
  void step_control_units(const ControlCall& args, int64_t begin, int64_t end);              \
  void parity_units(const ParityArgs& args, int64_t begin, int64_t end);                     \
  void probe_units(const ProbeArgs& args, int64_t begin, int64_t end);                       \
  void divergence_step_units(const DivergenceArgs& args, int64_t begin, int64_t end);        \
  void adamw_ema_norm_units(const GradientNormArgs& args, int64_t begin, int64_t end);       \
  void adamw_ema_units(const AdamwArgs& args, int64_t begin, int64_t end);                   \
  void group_norm_silu_units(const NormArgs& args, int64_t begin, int64_t end);              \
  void group_norm_silu_backward_units(const NormGradArgs& args, int64_t begin, int64_t end); \
  void conv_weight_grad_units(const ConvArgs& args, int64_t begin, int64_t end);             \
  void conv_weight_grad_sums(const ConvArgs& args, int64_t begin, int64_t end);              \
  void conv3x3_weights(const Conv3x3Args& args, int64_t begin, int64_t end);                 \
  void conv3x3_units(const Conv3x3Args& args, int64_t begin, int64_t end);                   \
  void attention_units(const AttentionArgs& args, int64_t begin, int64_t end);               \
  void attention_backward_units(const AttentionArgs& args, int64_t begin, int64_t end);      \
  void assignment(const AssignmentArgs& args);                                               \
  }
FM_DECLARE_KERNELS(portable)
#if defined(__x86_64__)
FM_DECLARE_KERNELS(avx2)
FM_DECLARE_KERNELS(avx512)
FM_DECLARE_KERNELS(avx512_bf16)  // of which the library has attention alone
#endif
#undef FM_DECLARE_KERNELS

}  // namespace fm
