// adamw_ema_norm and adamw_ema, from torch's arguments to their kernels.
#include <math.h>

#include "dispatch.h"
#include "ops.h"
#include "run.h"
#include "scratch.h"

namespace fm {
namespace {

using abi::Arguments;
using abi::Tensor;
using abi::TensorList;

constexpr int64_t kInlineParameters = 64;
constexpr int64_t kInlineAverages = 8;
constexpr int64_t kLayoutColumns = 2;   // offset, group
constexpr int64_t kSettingColumns = 6;  // learning rate, beta1, beta2, epsilon, weight decay, largest norm
constexpr int64_t kDecayColumns = 4;    // limit, a, b, exponent
constexpr int64_t kOwnCounts = 2;       // where the parameters' own counts begin, behind updates and skipped steps
constexpr double kNormEpsilon = 1e-6;   // as in torch.nn.utils.clip_grad_norm_

using Parameters = Scratch<Parameter, kInlineParameters>;

void expect_sizes(const Tensor& tensor, int64_t rows, int64_t columns) {
  if (tensor.dim() != 2 || (rows >= 0 && tensor.sizes()[0] != rows) || tensor.sizes()[1] != columns)
    tensor.fail("expected [" + (rows < 0 ? "rows" : std::to_string(rows)) + ", " + std::to_string(columns) + "]");
}

// A tensor without gaps, whatever the order of its dimensions: its memory is one run.
const Tensor& gapless(const Tensor& tensor) {
  int64_t span = 1, numel = tensor.numel();
  for (int64_t i = 0; i < tensor.dim(); ++i) span += (tensor.sizes()[i] - 1) * tensor.strides()[i];
  if (numel > 0 && span != numel) tensor.fail("expected memory without gaps");
  return tensor;
}

// Memory of the same order.
const Tensor& alike(const Tensor& tensor, const Tensor& like) {
  bool same = tensor.dim() == like.dim();
  for (int64_t i = 0; same && i < like.dim(); ++i)
    same = tensor.sizes()[i] == like.sizes()[i] && (like.sizes()[i] == 1 || tensor.strides()[i] == like.strides()[i]);
  if (!same) tensor.fail(std::string("expected the shape and strides of ") + like.name());
  return tensor;
}

Dtype float_dtype(const Tensor& tensor) {
  Dtype dtype = dtype_of(tensor);
  if (dtype == Dtype::uint8 || dtype == Dtype::int64) tensor.fail("expected a floating-point tensor");
  return dtype;
}

// The pieces of work that the positions are cut into.
int64_t units_of(const ParameterRange& range) { return divide_up(range.length, kTileElements); }

// --- norm ----------------------------------------------------------------------------------------------------------------------------

ParameterRange read_gradients(const TensorList& g, Parameters* parameters) {
  int64_t length = 0;
  for (int64_t i = 0; i < g.size(); ++i) {
    Tensor gradient = g[i];
    check_device(gradient);
    Parameter& parameter = (*parameters)[i] = {};
    parameter.offset = length;
    parameter.count = gapless(gradient).numel();
    parameter.gradient = gradient.data();
    parameter.gradient_dtype = float_dtype(gradient);
    length += parameter.count;
  }
  return ParameterRange{parameters->data(), g.size(), length};
}

// --- update --------------------------------------------------------------------------------------------------------------------------

struct State {
  Tensor mean, square, averages, layout;
  int64_t groups;
};

void read_copy(const Tensor& copy, const Tensor& p, Parameter* parameter) {
  if (copy.numel() == 0) return;
  check_device(copy);
  parameter->copy = alike(copy, p).data();
  parameter->copy_dtype = dtype_of(copy);
  if (parameter->copy_dtype != Dtype::bfloat16 && parameter->copy_dtype != Dtype::float16) copy.fail("expected bfloat16 or float16");
}

void read_gradient(const Tensor& g, const Tensor& p, Parameter* parameter) {
  if (g.numel() == 0) return;
  check_device(g);
  parameter->gradient = alike(g, p).data();
  parameter->gradient_dtype = float_dtype(g);
}

// Offsets rise, and the positions of a parameter end where those of the next may begin.
void read_place(const State& state, const int64_t* row, int64_t begin, Parameter* parameter) {
  int64_t length = state.mean.numel();
  if (row[0] < begin || parameter->count > length - row[0]) state.layout.fail("expected rising offsets of parameters that fit into m");
  parameter->offset = row[0];
  parameter->group = static_cast<int>(whole(row[1], 0, state.groups - 1, "layout"));
}

ParameterRange read_parameters(const TensorList& p, const TensorList& copies, const TensorList& g, const State& state,
                               Parameters* parameters) {
  if (g.size() != p.size()) throw std::runtime_error("fm_fast: argument g: expected one tensor a parameter");
  if (copies.size() != 0 && copies.size() != p.size())
    throw std::runtime_error("fm_fast: argument copies: expected one tensor a parameter");
  expect_sizes(state.layout, p.size(), kLayoutColumns);
  const int64_t* rows = dense_integers(state.layout);
  int64_t begin = 0;
  for (int64_t i = 0; i < p.size(); ++i) {
    Tensor weights = p[i];
    check_device(weights);
    if (dtype_of(weights) != dtype_of(state.mean)) weights.fail("expected the dtype of m");
    Parameter& parameter = (*parameters)[i] = {};
    parameter.count = gapless(weights).numel();
    parameter.value = weights.data();
    read_place(state, rows + i * kLayoutColumns, begin, &parameter);
    read_gradient(g[i], weights, &parameter);
    if (copies.size()) read_copy(copies[i], weights, &parameter);
    begin = parameter.offset + parameter.count;
  }
  return ParameterRange{parameters->data(), p.size(), state.mean.numel()};
}

void check_state(const State& state) {
  Dtype dtype = dtype_of(state.mean);
  int64_t length = state.mean.numel();
  dense_floats(state.mean, length);
  dense_floats(state.square, length);
  if (state.averages.dim() != 2 || state.averages.sizes()[1] != length)
    state.averages.fail("expected [averages, " + std::to_string(length) + "]");
  dense_floats(state.averages, state.averages.numel());
  if (dtype_of(state.square) != dtype) state.square.fail("expected the dtype of m");
  if (dtype_of(state.averages) != dtype) state.averages.fail("expected the dtype of m");
}

// What update number n (from 1) does with a parameter of a group whose settings are a row of the table; `square_sum` is that of all
// gradients.
AdamwNumbers numbers_of_step(const double* row, double square_sum, double n) {
  double rate = row[0], beta1 = row[1], beta2 = row[2];
  double factor = row[5] / (sqrt(square_sum) + kNormEpsilon);
  AdamwNumbers numbers;
  numbers.clip = factor < 1 ? factor : 1;
  numbers.keep = 1 - rate * row[4];
  numbers.mean_rate = 1 - beta1;
  numbers.square_keep = beta2;
  numbers.square_rate = 1 - beta2;
  numbers.root_scale = 1 / sqrt(1 - pow(beta2, n));
  numbers.epsilon = row[3];
  numbers.step_size = rate / (1 - pow(beta1, n));
  return numbers;
}

// 1 - min(limit, ((a + n) / (b + n))^exponent) after n updates.
double average_rate(const double* row, double n) {
  double decay = pow((row[1] + n) / (row[2] + n), row[3]);
  return 1 - (decay < row[0] ? decay : row[0]);
}

// The numbers of each parameter, most of which are those of its neighbour. done: the updates that each has had.
void fill_numbers(const ParameterRange& range, const double* settings, double square_sum, const int64_t* done, AdamwNumbers* numbers) {
  for (int64_t i = 0; i < range.count; ++i) {
    int group = range.parameters[i].group;
    if (i > 0 && group == range.parameters[i - 1].group && done[i] == done[i - 1])
      numbers[i] = numbers[i - 1];
    else
      numbers[i] = numbers_of_step(settings + group * kSettingColumns, square_sum, static_cast<double>(done[i]) + 1);
  }
}

// counts: the updates of all parameters together, then, behind kOwnCounts, those of each.
void update(const State& state, const ParameterRange& range, const double* settings, const double* decays, double square_sum,
            const int64_t* counts) {
  Scratch<AdamwNumbers, kInlineParameters> numbers(range.count);
  fill_numbers(range, settings, square_sum, counts + kOwnCounts, numbers.data());
  AdamwArgs args = {};
  args.range = range;
  args.numbers = numbers.data();
  args.mean = state.mean.data();
  args.square = state.square.data();
  args.averages = state.averages.data();
  args.average_count = state.averages.sizes()[0];
  args.wide = is_wide(state.mean);
  Scratch<double, kInlineAverages> rates(args.average_count);
  for (int64_t i = 0; i < args.average_count; ++i) rates[i] = average_rate(decays + i * kDecayColumns, static_cast<double>(counts[0]));
  args.average_rates = rates.data();
  run_units(kernels().adamw_ema, args, units_of(range), kGrain);
}

}  // namespace

void adamw_ema_norm(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "TL");
  Tensor total = in.tensor("total");
  TensorList g = in.tensors("g");
  refuse_grad(g);
  double* sum = dense_doubles(total, 1);
  Parameters parameters(g.size());
  ParameterRange range = read_gradients(g, &parameters);
  int64_t units = units_of(range);
  Scratch<double, kInlineSums> partial(units);
  run_units(kernels().adamw_ema_norm, GradientNormArgs{range, partial.data()}, units, kGrain);
  *sum = sum_in_order(partial.data(), units);
}

void adamw_ema(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack, "LLTTTTLTTTT");
  TensorList p = in.tensors("p"), copies = in.tensors("copies");
  Tensor mean = in.tensor("m"), square = in.tensor("v"), averages = in.tensor("averages"), counts = in.tensor("counts");
  TensorList g = in.tensors("g");
  Tensor layout = in.tensor("layout"), total = in.tensor("total"), settings = in.tensor("settings"), decays = in.tensor("decays");
  refuse_grad(p);
  refuse_grad(g);
  expect_sizes(settings, -1, kSettingColumns);
  State state{mean, square, averages, layout, settings.sizes()[0]};
  check_state(state);
  expect_sizes(decays, averages.sizes()[0], kDecayColumns);
  const double *setting_rows = dense_doubles(settings, settings.numel()), *decay_rows = dense_doubles(decays, decays.numel());
  double square_sum = *dense_doubles(total, 1);
  int64_t* counted = dense_integers(counts);
  if (counts.numel() != kOwnCounts + p.size()) counts.fail("expected two numbers and one a parameter");
  Parameters parameters(p.size());
  ParameterRange range = read_parameters(p, copies, g, state, &parameters);
  bool finite = isfinite(square_sum);
  if (finite) {
    update(state, range, setting_rows, decay_rows, square_sum, counted);
    for (int64_t i = 0; i < range.count; ++i) counted[kOwnCounts + i] += range.parameters[i].gradient ? 1 : 0;
  }
  ++counted[finite ? 0 : 1];
}

}  // namespace fm
